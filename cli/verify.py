"""alphatoken-curate verify: is a run, or an export, whole and right?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.rows.files import legible
from alphatoken_curate.runs.folder import export_in_words, is_export
from alphatoken_curate.wording import count

from .lines import tell_version
from .paths import RUN

if TYPE_CHECKING:
    from alphatoken_curate.reading.verify import Problem


@click.command()
@click.argument("run", type=RUN)
def command(run: Path) -> None:
    """Check every file of RUN: digests, page checksums, schemas, counts and alignment. Exit 4 where one is wrong.

    RUN may be the folder of an export too: its files are checked by the digests in its export.json.
    """
    if is_export(run):
        from alphatoken_curate.exports.verify import verify_export

        _tell(run, verify_export(run))
        click.echo(legible(f"{run}: {export_in_words(run)}: every file is as export.json says."))
        return
    from alphatoken_curate.reading.verify import verify

    tell_version(run)
    _tell(run, verify(run))
    click.echo(legible(f"{run}: every file is as it was written, and every row is accounted for."))


def _tell(run: Path, problems: list[Problem]) -> None:
    """Each problem on stderr; raises `StoredDataError` where there is one."""
    for problem in problems:
        click.echo(legible(f"{problem.file}: {problem.found}. {problem.do}"), err=True)
    if problems:
        raise StoredDataError(f"{run}: {count(len(problems), 'problem')} found.")
