"""What a rehearsal would take, by two of its steps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alphatoken_curate.directions.rehearsal import Course, mean_loss
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.scoring.meter import Meter
from alphatoken_curate.scoring.rehearse import at_once, rehearsal_in
from alphatoken_curate.scoring.spec import ScorerSpec
from alphatoken_curate.tokens.tokenise import TokenRow


def seconds_of(
    course: Course, trainee: Trainee, target: Sequence[TokenRow], spec: ScorerSpec, meter: Meter, progress: Progress
) -> float:
    """Seconds of all orders: two steps there and back, states on disk and all, the others by their tokens.

    And once more as they are replayed, but where every state is kept. `target`: any rows, for the outcomes.
    """
    rows, config = course.rows, spec.config
    two = replace(course, steps=course.steps[:2])
    together = at_once(trainee, spec.outcomes, config)
    padded = [sum(len(rows[i].input_ids) for step in one.steps for i in step) for one in (course, two)]
    progress.stage("estimate: rehearsal", 2 * padded[1])
    with tempfile.TemporaryDirectory() as kept:
        store = Store(folder=Path(kept), fields={})
        rehearsal, done = rehearsal_in(store, "0", trainee, two, config), [meter.now()]
        outcomes = [mean_loss(target, course.batch_tokens)] * together
        rehearsal.run(outcomes, lambda _: done.append(meter.now()))
        tried = meter.now() - done[0]
        replayed = 0 if rehearsal_in(store, "0", trainee, course, config).keeps_all else course.borders[-2]
    progress.advance(2 * padded[1])
    # Two steps are one segment, which nothing is replayed of.
    replay = (done[len(two.steps)] - done[0]) * replayed / len(course.steps)
    parts = -(-spec.outcomes // together)
    return (tried * parts + replay) * config.rehearse_seeds * padded[0] / padded[1]
