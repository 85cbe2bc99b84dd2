"""`alphatoken-curate stats`: a run in numbers, in the terminal or as JSON."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="stats")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--generation", type=int, metavar="G", help="The scoring to show. Default: the newest.")
@click.option("--json", "as_json", is_flag=True, help="Print all numbers as one JSON object with sorted keys.")
def command(run: Path, generation: int | None, as_json: bool) -> None:
    """Show the run folder RUN in numbers: counts, a histogram of values, component spreads, generations and masks."""
    from alphatoken_curate.stats import stats

    found = stats(run, generation=generation)
    if as_json:
        from dataclasses import asdict

        import orjson

        # As a dict: keys of a dataclass are not sorted.
        click.echo(orjson.dumps(asdict(found), option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2).decode())
        return
    from rich.console import Console

    from alphatoken_curate import stats_text

    console = Console(markup=False, highlight=False, emoji=False)
    for part in stats_text.stats_lines(found, console.width):
        console.print(part)
