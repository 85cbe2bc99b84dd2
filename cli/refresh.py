"""alphatoken-curate refresh: the rows of a run scored again at checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alphatoken_curate.rows.files import legible
from alphatoken_curate.runs.folder import check_is_run

from .generations import lines_of
from .paths import READ, RUN
from .workers import engine_of, engine_options

if TYPE_CHECKING:
    from alphatoken_curate import RefreshSummary

    from .lines import Lines


@click.command(name="refresh")
@click.argument("run", type=RUN)
@click.option(
    "--checkpoint",
    type=READ,
    metavar="C",
    help="A model folder, a PEFT adapter folder (LoRA, DoRA), or a folder of `checkpoint-*` folders, in step order.",
)
@click.option(
    "--watch",
    type=READ,
    metavar="DIR",
    help="Instead: score each new `checkpoint-*` of a training run's output once it is complete, until stopped.",
)
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=30.0, show_default=True, help="Seconds between looks."
)
@click.option(
    "--base", metavar="NAME", help="Where the model that adapters belong to lies now. Default: the run's model."
)
@click.option("--reference", metavar="NAME", help="Where the run's reference lies now. Default: where it lay.")
@click.option("--device", metavar="NAME", help="Default: as the run was told.")
@click.option(
    "--trunk-device", type=click.Choice(["cpu", "disk", "none"]), help="As `score` has it, or none. Default: likewise."
)
@engine_options
def command(
    run: Path,
    checkpoint: Path | None,
    watch: Path | None,
    interval: float,
    base: str | None,
    reference: str | None,
    device: str | None,
    trunk_device: str | None,
    **settings: Any,
) -> None:
    """Score the rows of RUN again at a checkpoint, as a new generation, then make the mask anew.

    Rows, target, shards and settings are those of RUN, and the mask's those of its newest mask, which takes the new
    generation unless it was made from all. Generations are never rewritten. The same command goes on where
    it was interrupted, and leaves alone what is there.
    """
    if (checkpoint is None) == (watch is None):
        raise click.UsageError("Give either --checkpoint C or --watch DIR.")
    check_is_run(run)  # before torch is imported

    from alphatoken_curate.scoring.refresh import refresh
    from alphatoken_curate.scoring.watch import watch as each_new

    from .terminal import listener as listening

    with listening() as listener:
        places = {"base": base, "reference": reference, "device": device, "trunk_device": trunk_device}
        places |= {"progress": listener}  # type: ignore[dict-item]
        engine = engine_of(settings, device or "auto")
        if checkpoint is not None:
            refresh(run, checkpoint, told=partial(_tell, listener), engine=engine, **places)  # type: ignore[arg-type]
            return
        for done in each_new(run, watch, interval=interval, engine=engine, **places):  # type: ignore[arg-type]
            _tell(listener, done)


def _tell(listener: Lines, done: RefreshSummary) -> None:
    listener.finish()
    for line in lines_of(done):
        click.echo(legible(line))
