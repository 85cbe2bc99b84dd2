"""`alphatoken-curate compare`: two runs, or two generations of one, side by side."""

from __future__ import annotations

from pathlib import Path

import click

from .lines import tell_json, tell_version
from .paths import RUN


@click.command(name="compare")
@click.argument("run", type=RUN)
@click.argument("other", required=False, type=RUN)
@click.option(
    "--generations",
    metavar="G,H",
    help="Of RUN and of OTHER, or both of RUN. Default: the newest of each; of RUN alone its first and newest.",
)
@click.option("--changed", type=click.IntRange(min=0), default=10, show_default=True, help="Tokens to tell of.")
@click.option("--json", "as_json", is_flag=True, help="Print all numbers as one JSON object with sorted keys.")
def command(run: Path, other: Path | None, generations: str | None, changed: int, as_json: bool) -> None:
    """Show how alike two scorings of the same rows are: RUN and OTHER, or two generations of RUN.

    Rank correlations of values and components, the overlap of what masks keep, and the tokens that changed most.
    """
    from alphatoken_curate.reading.compare import compare

    for one in (run, other):
        if one is not None:
            tell_version(one)
    found = compare(run, other, generations=_numbers(generations), changed=changed)
    if as_json:
        tell_json(found)
        return
    from rich.console import Console

    from alphatoken_curate.views.compare_text import compare_lines

    console = Console(markup=False, highlight=False, emoji=False)
    for part in compare_lines(found, console.width):
        console.print(part)


def _numbers(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    first, _, second = text.partition(",")
    if not (first.isdecimal() and second.isdecimal()):
        raise click.UsageError(f"--generations: found {text!r}; give two numbers, such as 0,2.")
    return int(first), int(second)
