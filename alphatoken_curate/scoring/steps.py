"""What a rehearsal would take, by two of its steps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alphatoken_curate.directions.rehearsal import Course, mean_loss
from alphatoken_curate.directions.trainee import Trainee, Weights
from alphatoken_curate.directions.windows import borders_of
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.scoring.courses import first_steps, kept_bytes, kept_room, pair_loss
from alphatoken_curate.scoring.meter import Meter
from alphatoken_curate.scoring.rehearse import at_once, rehearsal_in
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens
from alphatoken_curate.tokens.plan import plan_batches
from alphatoken_curate.tokens.tokenise import PairRow, TokenRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """Of all orders `seconds`; `kept_bytes` are the most that lies on disk at a time."""

    seconds: float
    kept_bytes: int


def tried_steps(
    course: Course, trainee: Trainee, beside: Sequence[TokenRow], spec: ScorerSpec, meter: Meter, progress: Progress
) -> Tried:
    """Two steps there and back, states on disk and all; the others by their tokens, and once more as replayed.

    `beside`: the rows of all outcomes, target rows first, whose gradient comes once a window.
    """
    config, two = spec.config, first_steps(course, 2)
    if isinstance(two.rows[0], PairRow):
        # The model itself will do for the reference.
        two = replace(two, loss=pair_loss(config, two.rows, trainee.nll_of(two.rows, two.batch_tokens)))
    together = at_once(trainee, spec.outcomes, config)
    few, asked = [beside[i] for i in plan_batches(beside, course.batch_tokens)[0]], list[float]()

    def outcome(trainee: Trainee) -> Weights:
        began = meter.now()
        found = mean_loss(few, course.batch_tokens)(trainee)
        asked.append(meter.now() - began)
        return found

    padded = [sum(count_tokens([one.rows[i] for i in step]) for step in one.steps) for one in (course, two)]
    progress.stage("estimate: rehearsal", 2 * padded[1])
    with tempfile.TemporaryDirectory() as kept:
        rehearsal = rehearsal_in(Store(folder=Path(kept), fields={}), "0", trainee, two, config)
        done = [meter.now()]
        rehearsal.run([outcome] * together, lambda _: done.append(meter.now()))
        tried = meter.now() - done[0] - sum(asked)
    progress.advance(2 * padded[1])
    # Two steps are one segment, which nothing is replayed of.
    every = borders_of(len(course.steps), course.window)
    keeps_all = course.keeps_all(rehearsal.state, kept_room(config))
    replayed = 0 if keeps_all else sum(borders[-2] - borders[0] for borders in every)
    replay = (done[len(two.steps)] - done[0]) * replayed / len(course.steps)
    parts, tokens = -(-spec.outcomes // together), count_tokens(beside)
    ends = len(every) * sum(asked) / together * tokens / count_tokens(few)
    return Tried(
        seconds=((tried * parts + replay) * padded[0] / padded[1] + ends) * config.rehearse_seeds,
        kept_bytes=kept_bytes(
            rehearsal.state, course, together, spec.outcomes, config, below=(trainee.below_bytes, tokens)
        ),
    )
