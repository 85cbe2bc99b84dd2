"""alphatoken-curate verify: is a run whole and right?"""

from __future__ import annotations

from pathlib import Path

import click

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.rows.files import legible

from .options import tell_version


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def command(run: Path) -> None:
    """Check every file of RUN: digests, page checksums, schemas, counts and alignment. Exit 4 where one is wrong."""
    from alphatoken_curate.reading.verify import verify

    tell_version(run)
    problems = verify(run)
    for problem in problems:
        click.echo(legible(f"{problem.file}: {problem.found}. {problem.do}"), err=True)
    if problems:
        raise StoredDataError(f"{run}: {len(problems)} problems found.")
    click.echo(f"{run}: every file is as it was written, and every row is accounted for.")
