"""`score`: rows in, run folder out. What is wrong or finished already is told before torch is imported."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.runs.folder import destination
from alphatoken_curate.scoring.finished import finished
from alphatoken_curate.scoring.folder import ScoreSummary, check_ours, default_run, marks, written
from alphatoken_curate.scoring.named import check_named

if TYPE_CHECKING:
    from alphatoken_curate.scoring.engines import Engine
    from alphatoken_curate.scoring.part import PartSummary


def score(
    config: ScoreConfig, run: Path | str | None = None, progress: Progress | None = None, engine: Engine | None = None
) -> ScoreSummary:
    """Score every row, write values/, then a mask and train/.

    `engine`: who computes, such as `Local(8)`; by default this process. It changes no byte of what is written. The same
    call resumes an unfinished run and leaves a finished one alone. Raises UsageError, InputError (bad rows),
    ModelError, FingerprintError (the folder was made with other settings), StoredDataError (damage).
    """
    listener = progress or Silent()
    folder = destination(Path(run) if run is not None else default_run(config))
    check_named(config)
    check_ours(folder)
    before = marks(folder)
    listener.stage("starting", 0)
    if (done := finished(config, folder, listener)) is None:
        from alphatoken_curate.scoring.engines import Here
        from alphatoken_curate.scoring.loop import score_rows

        with closing(engine or Here()) as running:
            done = score_rows(config, folder, listener, running)
    return replace(done, beside=written(folder, before))


def score_part(
    config: ScoreConfig,
    part: str,
    run: Path | str | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> PartSummary:
    """`prepare`: compute all that shards are scored by, and no shard. `I/N`: score the shards with number I modulo N.

    Shares run at the same time, on machines that see the same run folder, models and data, once it is prepared; then
    `score` makes manifest and mask. The same call goes on where it was interrupted. Raises as `score`, and UsageError
    where a share is not prepared.
    """
    listener = progress or Silent()
    folder = destination(Path(run) if run is not None else default_run(config))
    check_named(config)
    check_ours(folder)
    listener.stage("starting", 0)

    from alphatoken_curate.scoring.engines import Here
    from alphatoken_curate.scoring.part import part_of_rows

    with closing(engine or Here()) as running:
        return part_of_rows(config, part, folder, listener, running)
