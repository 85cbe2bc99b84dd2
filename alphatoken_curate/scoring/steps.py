"""What a rehearsal would take, by two of its steps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from alphatoken_curate.directions.rehearsal import Course, mean_loss
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.scoring.courses import first_steps, pair_loss
from alphatoken_curate.scoring.meter import Meter
from alphatoken_curate.scoring.rehearse import at_once, rehearsal_in
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens
from alphatoken_curate.tokens.plan import collate, plan_batches, token_places, token_starts
from alphatoken_curate.tokens.tokenise import PairRow, TokenRow


def seconds_of(
    course: Course, trainee: Trainee, target: Sequence[TokenRow], spec: ScorerSpec, meter: Meter, progress: Progress
) -> float:
    """Seconds of all orders: two steps there and back, states on disk and all, the others by their tokens.

    And once more as they are replayed, but where every state is kept. `target`: any rows, for the outcomes.
    """
    config, two = spec.config, first_steps(course, 2)
    if isinstance(two.rows[0], PairRow):
        two = replace(two, loss=pair_loss(config, two.rows, _own_losses(trainee, two)))
    together = at_once(trainee, spec.outcomes, config)
    padded = [sum(count_tokens([one.rows[i] for i in step]) for step in one.steps) for one in (course, two)]
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


def _own_losses(trainee: Trainee, course: Course) -> NDArray[np.float32]:
    """The nll of all response tokens, (N,): the model itself will do for the reference."""
    starts = token_starts(course.rows)
    found = np.empty(starts[-1], np.float32)
    with torch.no_grad():
        for indices in plan_batches(course.rows, course.batch_tokens):
            batch = collate(course.rows, indices)
            found[token_places(batch, starts)] = trainee.nll(batch).cpu().numpy()
    return found
