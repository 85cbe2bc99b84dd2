"""`alphatoken-curate publish`: a finished run to a bucket."""

from __future__ import annotations

from pathlib import Path

import click

from alphatoken_curate.rows.files import legible
from alphatoken_curate.wording import count

from .lines import tell_version
from .paths import RUN


@click.command(name="publish")
@click.argument("run", type=RUN)
@click.argument("url")
def command(run: Path, url: str) -> None:
    """Put the run folder RUN under URL, s3://bucket/prefix, its manifest last; scan(URL) reads it there.

    RUN is verified first. The same command goes on after one that was stopped, and adds the generations and masks that
    RUN has got since. Nothing that is there is overwritten but the manifest, the card and what else changes under its
    name, and these only where nobody else has changed them. Credentials come from the environment; needs the extra
    [s3].
    """
    from alphatoken_curate.reading.publish import publish

    tell_version(run)
    done = publish(run, url, told=lambda name: click.echo(legible(f"put {name}"), err=True))
    there = f", {count(done.kept, 'object')} there already" if done.kept else ""
    if not done.put:
        click.echo(legible(f"{done.url} is published already: {count(done.kept, 'object')}. Nothing was written."))
        return
    click.echo(legible(f"Published {run} to {done.url}: {count(done.put, 'object')} put, {done.bytes:,} bytes{there}"))
    click.echo(legible(f"Next, in Python: alphatoken_curate.scan({done.url!r})"))
