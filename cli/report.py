"""`alphatoken-curate report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from .lines import tell_version
from .paths import OUT, RUN


@click.command(name="report")
@click.argument("run", type=RUN)
@click.option("-o", "--output", type=OUT, metavar="FILE", help="Default: report.html in RUN.")
def command(run: Path, output: Path | None) -> None:
    """Write the run folder RUN as one HTML page: charts, and rows coloured by value. It opens without a network."""
    from alphatoken_curate.page.report import report

    tell_version(run)
    path = report(run, output)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser.")
