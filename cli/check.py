"""alphatoken-curate check: are these rows fit to score, what would scoring make of them, and what would it take?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.errors import InputError
from alphatoken_curate.rows.files import legible
from alphatoken_curate.wording import count, in_sequences

from .grouped import Grouped
from .options import config_options, read_config

if TYPE_CHECKING:
    from alphatoken_curate.scoring.estimate import Estimate


@click.command(cls=Grouped)
@click.argument("data", nargs=-1)
@click.option(
    "--estimate",
    "estimated",
    is_flag=True,
    help="Load the models, try each stage on a few batches, and predict seconds and peak memory of the whole scoring.",
)
@click.option("--workers", type=click.IntRange(1, 4096), metavar="N", help="Estimate seconds by so many, too.")
@config_options(ScoreConfig)
@click.pass_context
def command(ctx: click.Context, /, data: tuple[str, ...], estimated: bool, workers: int | None, **_: Any) -> None:
    """Read and tokenise DATA as `score` would, and say what is in it. Writes nothing, and takes the flags of `score`.

    Loads no model but with --estimate or --workers. Exit 3 where a row is bad, with every bad row's file, line and
    reason; with --bad-rows quarantine they are counted.
    """
    config = read_config(ctx, ScoreConfig, data)

    from alphatoken_curate.rows.read import grouped
    from alphatoken_curate.scoring.check import check

    from .terminal import listener as listening

    with listening() as listener:
        found = check(config, estimated=estimated or workers is not None, progress=listener)
    pairs = "; preference pairs" if found.kind == "preference" else ""
    bad = f", {len(found.bad):,} bad" if found.bad else ""
    told = in_sequences(config.turns == "each" and found.sequences)
    parts = f"{found.rows:,} to score{told}, {found.target_rows:,} target{bad}{pairs}"
    click.echo(f"rows             {found.rows_read:>12,}   {parts}")
    if found.held_out:
        click.echo(f"{'':30}   (the target rows are held out of DATA; see --target)")
    click.echo(f"tokens           {found.tokens:>12,}   longest row {found.longest:,}")
    click.echo(f"response tokens  {found.response_tokens:>12,}   {found.response_tokens / found.tokens:.1%} of all")
    if found.truncated_rows:
        cut = count(found.truncated_rows, "row")
        click.echo(f"cut off          {found.truncated_tokens:>12,}   in {cut}, by --max-length")
    for what, rows in found.read_as.items():
        click.echo(f"read so          {rows:>12,}   rows: {legible(what)}")
    if found.template_date is not None:
        click.echo(f"template's date  {found.template_date:>12}   --template-date sets another")
    for what, rows in found.told.items():
        click.echo(f"not as given     {rows:>12,}   rows: {what}")
    batches = f"{count(found.batches, 'batch', 'batches')} of {found.batch_tokens:,} tokens"
    click.echo(f"padding          {found.padding:>12.1%}   in {batches}")
    stored = f"about {_size(found.value_bytes)} of values, {_size(found.train_bytes)} of train"
    click.echo(f"shards           {found.shards:>12,}   {stored}")
    if found.bad:
        click.echo(f"bad rows         {len(found.bad):>12,}   set aside with --bad-rows quarantine")
        for line in grouped(found.bad):
            click.echo(legible(line))
    if found.estimate is not None:
        _tell(found.estimate, workers)
    if not found.rows:
        raise InputError("No row is left to score.")


def _tell(found: Estimate, workers: int | None) -> None:
    """What lies where, a line for each stage, the total, and what several workers make of it."""
    click.echo(f"{'placement':<32}" + f"\n{'':32}".join(found.placement))
    click.echo(f"{'estimate':<26}{'seconds':>9}")
    for stage in found.stages:
        click.echo(f"  {stage.name:<24}{stage.seconds:>9,.1f}")
    peak = f"peak memory {found.peak_bytes / 2**20:,.0f} MiB, {found.batch_tokens:,} tokens a batch"
    click.echo(f"  {'total':<24}{found.seconds:>9,.1f}   {peak}")
    if workers is not None:
        seconds, share = found.by(workers)
        who = f"by {workers} workers"
        work = f"each like one alone; {share:.0%} of that at work{found.kept_by(workers)}"
        click.echo(f"  {who:<24}{seconds:>9,.1f}   {work}")


def _size(count: int) -> str:
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
