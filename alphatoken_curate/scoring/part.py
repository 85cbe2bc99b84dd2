"""A scoring in jobs of their own: one that prepares, then any number side by side, each with its share of the shards.

What `score` does last, the manifest and the mask, a plain `score` of the same settings does when all shards are there;
it scores those that are not. A share is the shards whose number is I modulo N: a function of the data alone.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import artifacts, manifest, shards
from alphatoken_curate.scoring.budget import NAME as BUDGET
from alphatoken_curate.scoring.budget import Budget
from alphatoken_curate.scoring.changes import told_of_data
from alphatoken_curate.scoring.engines import Engine
from alphatoken_curate.scoring.job import job_of
from alphatoken_curate.scoring.loop import directed, kept_in, missing_shards, read_all, score_shards, settle, tell
from alphatoken_curate.scoring.rehearsing import COLUMNS
from alphatoken_curate.scoring.stages import Stages

PREPARE = "prepare"

_SHARE = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSummary:
    """What a part did: shards `scored` by it, and how many of all `shards` of the run are `missing` then.

    `finished`: whether the run has a manifest and a mask, too.
    """

    run: Path
    part: str
    scored: int
    missing: int
    shards: int
    finished: bool


def share_of(part: str) -> tuple[int, int] | None:
    """(I, N) of `I/N`, 0 <= I < N; None of `prepare`. Raises UsageError for anything else."""
    if part == PREPARE:
        return None
    found = _SHARE.fullmatch(part)
    if not found or not int(found[1]) < int(found[2]):
        raise UsageError(f"--part {part}: it takes prepare, or I/N with I from 0 to N - 1, such as 0/4.")
    return int(found[1]), int(found[2])


def part_of_rows(config: ScoreConfig, part: str, folder: Path, listener: Progress, engine: Engine) -> PartSummary:
    """Do a part of what `loop.score_rows` does. Raises as `score_part`."""
    share = share_of(part)
    if share is not None and not (folder / "artifacts" / BUDGET).is_file():
        raise _not_prepared(part, folder)  # before a lock makes the folder
    with ExitStack() as held:
        place = kept_in(folder, held, listener, shared=share is not None)
        prepared, spec = read_all(config, folder, engine, listener, place)
        job = job_of(prepared, spec)
        mine = range(0) if share is None else range(share[0], len(job.shards), share[1])
        place.hold()
        held.enter_context(told_of_data(folder, prepared))
        budget = Budget(
            folder,
            spec.store.fields,
            config.batch_tokens,
            listener,
            threads=config.threads,
            versions=job.facts.versions,
            writes=share is None,
        )
        stages = Stages(job=job, spec=spec, engine=engine, budget=budget, progress=listener)
        missing = missing_shards(folder, job, spec, budget)
        scored = [index for index in missing if index in mine]
        if share is None:
            tell(prepared, spec, listener, config)
            if missing:
                settle(stages, missing)
                stages.reference(())
                with directed(stages):
                    pass
        elif scored:
            _check_prepared(stages, part)
            settle(stages, scored)
            stages.reference_losses(scored)
            with directed(stages, made=True) as ready:
                score_shards(folder, ready, scored)
        spec.store.check_sources(whole=True)
    there = len(shards.listed(shards.values_folder(folder, 0)))
    return PartSummary(
        run=folder,
        part=part,
        scored=len(scored),
        missing=len(job.shards) - there,
        shards=len(job.shards),
        finished=(folder / manifest.NAME).is_file() and bool(manifest.read(folder).masks),
    )


def _check_prepared(stages: Stages, part: str) -> None:
    """Raise UsageError where something that shards are scored by is not there: only `prepare` may write it."""
    store, kinds = stages.spec.store, sorted(stages.needed())
    lacks = [kind for kind in kinds if not store.is_made(kind, COLUMNS if kind == artifacts.REHEARSAL else None)]
    if lacks or not stages.budget.is_settled:
        what = f" ({', '.join(lacks)} of these settings and inputs is not there)" if lacks else ""
        raise _not_prepared(part, store.folder.parent, what)


def _not_prepared(part: str, run: Path, what: str = "") -> UsageError:
    return UsageError(
        f"--part {part}: {run} is not prepared{what}. Run the same command with --part prepare first, and wait for its"
        " end."
    )
