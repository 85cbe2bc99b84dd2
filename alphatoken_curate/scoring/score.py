"""`score`: rows in, run folder out. What is wrong or finished already is told before torch is imported."""

from __future__ import annotations

from pathlib import Path

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.runs.folder import destination
from alphatoken_curate.scoring.finished import finished
from alphatoken_curate.scoring.folder import ScoreSummary, check_ours, default_run
from alphatoken_curate.scoring.named import check_named


def score(config: ScoreConfig, run: Path | str | None = None, progress: Progress | None = None) -> ScoreSummary:
    """Score every row, write values/, then a mask and train/.

    The same call resumes an unfinished run and leaves a finished one alone. Raises UsageError, InputError (bad rows),
    ModelError, FingerprintError (the folder was made with other settings), StoredDataError (damage).
    """
    listener = progress or Silent()
    folder = destination(Path(run) if run is not None else default_run(config))
    check_named(config)
    check_ours(folder)
    listener.stage("starting", 0)
    if (done := finished(config, folder, listener)) is not None:
        return done

    from alphatoken_curate.scoring.loop import score_rows

    return score_rows(config, folder, listener)
