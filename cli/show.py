"""`alphatoken-curate show`: a row's tokens coloured by their values, in the row_text."""

from __future__ import annotations

from pathlib import Path

import click

_EPILOG = """\b
Columns: value, nll, entropy, reference_nll, adapt_direct, adapt_causal,
stab_direct, stab_causal, loss_weight.

Colours need a terminal of 256 colours or more; elsewhere, and where NO_COLOR is set, values are written beside the
tokens. To page with colours: FORCE_COLOR=1 alphatoken-curate show RUN --row 0 | less -R
"""


@click.command(name="show", epilog=_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--row", type=int, metavar="N", help="Number of the row among all rows read, from 0.")
@click.option("--id", "own_id", metavar="ID", help="The row's own id, in place of --row.")
@click.option("--column", default="value", show_default=True, help="What to colour by; the columns are named below.")
@click.option("--tokens", is_flag=True, help="A table in place of the text: one line a response token, every signal.")
def command(run: Path, row: int | None, own_id: str | None, column: str, tokens: bool) -> None:
    """Show row N of the run folder RUN: its tokens coloured by value, and which of them the newest mask keeps."""
    from rich.console import Console

    from alphatoken_curate import row_text
    from alphatoken_curate.row_view import read_row

    view = read_row(run, row=row, id=own_id)
    console = Console(markup=False, highlight=False, emoji=False)
    palette = row_text.has_palette(console)
    console.print(row_text.row_title(view))
    if view.status != "scored":
        console.print(row_text.without_values(view, console.width))
    elif tokens:
        # What reads a pipe is not bound to the width of a terminal.
        wide = console if console.is_terminal else Console(width=10_000, markup=False, highlight=False, emoji=False)
        table, note = row_text.token_table(view, column, palette=palette, width=wide.width)
        wide.print("", table, "")
        console.print(note)
    else:
        draw = row_text.coloured_row if palette else row_text.plain_row
        console.print(draw(view, column, console.width))
