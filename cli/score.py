"""alphatoken-curate score: values, a mask and loss weights from rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.rows.files import legible
from alphatoken_curate.wording import pasted

from .grouped import Grouped
from .options import config_options, read_config
from .paths import OUT
from .told import first_row, nothing_but, older, rows, summary
from .workers import engine_of, engine_options, part_option, told_of_part

if TYPE_CHECKING:
    from alphatoken_curate import ScoreSummary


@click.command(cls=Grouped)
@click.argument("data", nargs=-1)
@click.option("-o", "--output", "--out", type=OUT, help="Run folder. Default: DATA's stem + .alphatoken.")
@engine_options
@part_option
@config_options(ScoreConfig)
@click.pass_context
def command(ctx: click.Context, /, data: tuple[str, ...], output: Path | None, part: str | None, **_: Any) -> None:
    """Value every response token of DATA; write values, a mask and loss weights.

    DATA: JSONL (.gz, .zst), JSON arrays, Parquet, folders, globs, s3://, gs:// or hf:// URLs of these, or a Hugging
    Face dataset name. The same command goes on where it was interrupted, and leaves a finished run alone.
    """
    config = read_config(ctx, ScoreConfig, data)

    from alphatoken_curate.scoring.score import score, score_part

    from .terminal import listener as listening

    engine = engine_of(ctx.params, config.device)
    with listening() as listener:
        if part is None:
            lines = _told(score(config, output, listener, engine), config)
        else:
            lines = told_of_part(score_part(config, part, output, listener, engine))
    for line in lines:
        click.echo(legible(line))


def _told(done: ScoreSummary, config: ScoreConfig) -> Iterator[str]:
    run, mask = pasted(done.run), done.mask
    if not done.shards_scored and not mask.created:
        there = f"{done.run} is finished: the values and mask {mask.mask} are there already."
        yield f"{there} {nothing_but(done.beside)}"
    elif not done.shards_scored and mask.mask:
        taken = ", which readers take from now on" if mask.newest else ""
        yield f"{done.run} was scored before; wrote mask {mask.mask}{taken}."
    else:
        yield f"Wrote {done.run}"
    yield rows(done)
    yield from summary(mask)
    yield f"  values  {done.run}/values/generation=0/   mask {mask.mask}: {mask.path}/"
    yield from _errors(done.run)
    if not done.has_stability:
        yield "  stability is 0, as model and reference are the same; --reference or --retention change that"
    yield f"Next: alphatoken-curate stats {run}   or   alphatoken-curate show {run} --row {first_row(done.run)}"
    if not mask.newest:
        yield from older(done.run, mask.mask)
    elif mask.kept_tokens == mask.response_tokens and not mask.branches:
        yield from _suggested(run, config)


def _suggested(run: str, config: ScoreConfig) -> Iterator[str]:
    """When another mask may pay, and which."""
    why = "Only where tokens may be wrong, and you have looked at what goes"
    how = "--by '7 - surprise' --keep positive"
    # Of paths alone the effect of a token's own loss, which a weight changes, is not known.
    if config.rehearses and (by := _OF_OWN_LOSS.get(config.estimator)):
        why, how = "A mild use, for the training that was rehearsed", f"--by {by} --weights tilt:0.25"
    yield f"Every token trains until you make another mask. {why}, for example:"
    yield f"  alphatoken-curate mask {run} {how}"


_OF_OWN_LOSS = {"influence": "adapt_influence", "exact+influence": "'adapt_direct + adapt_upstream'"}
"""By the estimator: what adaptation loses without a token's own loss."""


def _errors(run: Path) -> Iterator[str]:
    """What values are below 0 beyond their error, where they have one."""
    from alphatoken_curate.reading.errors import beyond

    for n, line in enumerate(found.lines() if (found := beyond(run)) else ()):
        yield f"  {'' if n else 'errors':<8}{line}"
