"""`alphatoken-curate show`: a row's tokens coloured by their values, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alphatoken_curate.wording import count

from .lines import tell_version
from .paths import RUN

if TYPE_CHECKING:
    from rich.console import Console

    from alphatoken_curate.reading.search import Hit

_EPILOG = """\b
--by, which may be given again: value (as stored), loss_weight, nll, entropy, reference_nll,
surprise, reference_ratio, SQL of single tokens, and what the run's estimator
gives of adapt_direct, adapt_causal, adapt_upstream, adapt_influence,
stab_direct, stab_causal, stab_upstream, stab_influence, drift_direct,
drift_causal, drift_influence; with groups of target rows adapt_error, stab_error,
value_error.

Colours need a terminal of 256 colours or more; elsewhere, and where NO_COLOR is set, values are written beside the
tokens. To page with colours: FORCE_COLOR=1 alphatoken-curate show RUN --row 0 | less -R
"""
_MOST_HITS = 20


@click.command(name="show", epilog=_EPILOG)
@click.argument("run", type=RUN)
@click.option("--row", type=int, metavar="N", help="Number of the row among all rows read, from 0.")
@click.option("--id", "own_id", metavar="ID", help="The row's own id, in place of --row.")
@click.option("--turn", type=int, metavar="T", help="Of a chat scored by --turns each; default: the first scored.")
@click.option("--search", metavar="TEXT", help="Rows whose prompt or response has TEXT; if only one has, show it.")
@click.option("--branch", type=click.Choice(["chosen", "rejected"]), help="One branch of a pair. Default: both.")
@click.option("--generation", type=int, metavar="G", help="The scoring to show. Default: the newest.")
@click.option("--by", "columns", multiple=True, help="As in mask: what to colour by; or columns of the table.")
@click.option("--tokens", is_flag=True, help="A table in place of the text: one line a response token, every signal.")
def command(
    run: Path,
    row: int | None,
    own_id: str | None,
    turn: int | None,
    search: str | None,
    branch: str | None,
    generation: int | None,
    columns: tuple[str, ...],
    tokens: bool,
) -> None:
    """Show row N of the run folder RUN: its tokens coloured by value, and which of them the newest mask keeps."""
    from alphatoken_curate.reading.row import read_row
    from alphatoken_curate.views import row_text

    tell_version(run)
    console = _console()
    if search is not None and row is None and own_id is None:
        hit = _searched(console, run, search, generation)
        if hit is None:
            return
        row, turn = hit.row_id, hit.turn if turn is None else turn
    elif search is not None:
        raise click.UsageError("Give one of --row N, --id ID and --search TEXT.")
    view = read_row(run, row=row, id=own_id, turn=turn, generation=generation)
    # What reads a pipe is not bound to the width of a terminal.
    wide = console if console.is_terminal else _console(10_000)
    widths, palette = (console.width, wide.width), row_text.has_palette(console)
    # All of it first: nothing is printed of what is refused.
    for part in list(row_text.row_parts(view, branch, columns, widths, palette=palette, tokens=tokens)):
        (wide if tokens else console).print(part)


def _searched(console: Console, run: Path, text: str, generation: int | None) -> Hit | None:
    """The row that has the text; where there are several they are listed."""
    from alphatoken_curate.errors import UsageError
    from alphatoken_curate.reading.search import search_rows
    from alphatoken_curate.rows.files import visible
    from alphatoken_curate.views.row_text import hit_text

    hits = list(search_rows(run, text, generation=generation))
    if len(hits) == 1:
        return hits[0]
    if not hits:
        raise UsageError(f"{run}: no row has the text {visible(text)!r}; upper and lower case are alike")
    console.print(f"{count(len(hits), 'row has', 'rows have')} it; show one with --row N", style="bold")
    for hit in hits[:_MOST_HITS]:
        console.print("", hit_text(hit, console.width), sep="\n")
    if len(hits) > _MOST_HITS:
        console.print(f"\nand {len(hits) - _MOST_HITS:,} more: search for a longer text", style="bold")
    return None


def _console(width: int | None = None) -> Console:
    from rich.console import Console

    return Console(width=width, markup=False, highlight=False, emoji=False)
