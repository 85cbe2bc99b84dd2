"""`alphatoken-curate show`: a row's tokens coloured by their values, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from alphatoken_curate.row_view import BranchView, RowView

_EPILOG = """\b
Columns: value, loss_weight, nll, entropy, reference_nll, and what the run's
estimator gives of adapt_direct, adapt_causal, adapt_upstream, adapt_influence,
stab_direct, stab_causal, stab_upstream, stab_influence, drift_direct,
drift_causal, drift_influence.

Colours need a terminal of 256 colours or more; elsewhere, and where NO_COLOR is set, values are written beside the
tokens. To page with colours: FORCE_COLOR=1 alphatoken-curate show RUN --row 0 | less -R
"""


@click.command(name="show", epilog=_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--row", type=int, metavar="N", help="Number of the row among all rows read, from 0.")
@click.option("--id", "own_id", metavar="ID", help="The row's own id, in place of --row.")
@click.option("--branch", type=click.Choice(["chosen", "rejected"]), help="One branch of a pair. Default: both.")
@click.option("--generation", type=int, metavar="G", help="The scoring to show. Default: the newest.")
@click.option("--column", default="value", show_default=True, help="What to colour by; the columns are named below.")
@click.option("--tokens", is_flag=True, help="A table in place of the text: one line a response token, every signal.")
def command(
    run: Path,
    row: int | None,
    own_id: str | None,
    branch: str | None,
    generation: int | None,
    column: str,
    tokens: bool,
) -> None:
    """Show row N of the run folder RUN: its tokens coloured by value, and which of them the newest mask keeps."""
    from alphatoken_curate import row_text
    from alphatoken_curate.row_view import read_row

    view = read_row(run, row=row, id=own_id, generation=generation)
    branches = view.chosen_branches(branch)
    console = _console()
    console.print(row_text.row_title(view))
    if view.status != "scored":
        console.print(row_text.why_without_values(view, console.width))
    elif not tokens:
        console.print(row_text.legend(view, column, console.width, palette=row_text.has_palette(console)))
    left_out: list[str] = []
    for place, one in enumerate(branches):
        if one.name and len(one.texts):
            console.print(*[""] * (place > 0 or tokens), row_text.branch_title(view, one), sep="\n")
        left_out += _print_branch(console, view, one, column, tokens=tokens)
    if tokens and view.status == "scored":
        console.print("", row_text.table_note(view, left_out), sep="\n")


def _print_branch(console: Console, view: RowView, branch: BranchView, column: str, *, tokens: bool) -> tuple[str, ...]:
    """Print the branch; of a table, which columns were left out."""
    from alphatoken_curate import row_text

    palette = row_text.has_palette(console)
    if view.status != "scored":
        if len(branch.texts):
            console.print(row_text.without_values(branch, console.width))
    elif tokens:
        # What reads a pipe is not bound to the width of a terminal.
        wide = console if console.is_terminal else _console(10_000)
        table, left_out = row_text.token_table(view, branch, column, palette=palette, width=wide.width)
        wide.print("", table)
        return left_out
    else:
        draw = row_text.coloured_row if palette else row_text.plain_row
        console.print(draw(view, branch, column, console.width))
    return ()


def _console(width: int | None = None) -> Console:
    from rich.console import Console

    return Console(width=width, markup=False, highlight=False, emoji=False)
