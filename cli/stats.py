"""`alphatoken-curate stats`: a run in numbers, in the terminal, as JSON or as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .lines import tell_json, tell_version
from .paths import OUT, RUN

if TYPE_CHECKING:
    from alphatoken_curate.reading.stats import Stats


@click.command(name="stats")
@click.argument("run", type=RUN)
@click.option("--generation", type=int, metavar="G", help="The scoring to show. Default: the newest.")
@click.option("--json", "as_json", is_flag=True, help="Print all numbers as one JSON object with sorted keys.")
@click.option("--svg", type=OUT, metavar="FILE", help="Draw all histograms into FILE instead.")
@click.option("--png", type=OUT, metavar="FILE", help="The same as pixels; needs the extra [png].")
def command(run: Path, generation: int | None, as_json: bool, svg: Path | None, png: Path | None) -> None:
    """Show the run folder RUN in numbers: counts, histograms, component spreads, generations and masks.

    Histograms are of the value and of each of its components, and of the value by branch, source and generation.
    """
    from alphatoken_curate.reading.stats import stats

    tell_version(run)
    found = stats(run, generation=generation)
    _draw(found, run, svg, png)
    if as_json:
        tell_json(found)
    elif svg is None and png is None:
        from rich.console import Console

        from alphatoken_curate.views import stats_text

        console = Console(markup=False, highlight=False, emoji=False)
        for part in stats_text.stats_lines(found, console.width):
            console.print(part)


def _draw(found: Stats, run: Path, svg: Path | None, png: Path | None) -> None:
    from alphatoken_curate.runs.atomic import atomic_file, check_replaces
    from alphatoken_curate.views import stats_picture

    for path, ending in ((svg, ".svg"), (png, ".png")):
        if path is not None:
            check_replaces(path, ending)
    name = run.resolve().name
    # Drawn before anything is written: matplotlib may be missing.
    made = [(path, draw(found, name)) for path, draw in ((svg, stats_picture.svg), (png, stats_picture.png)) if path]
    for path, content in made:
        with atomic_file(path) as sink:
            sink.write(content)
        click.echo(f"Wrote {path}", err=True)
