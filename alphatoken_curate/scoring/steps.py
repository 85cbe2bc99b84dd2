"""What a rehearsal would take, of one process or of several workers, by two of its steps."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.rehearsal import mean_loss
from alphatoken_curate.directions.trainee import Trainee, Weights
from alphatoken_curate.directions.windows import borders_of
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.scoring.courses import first_steps, kept_bytes, kept_room, pair_loss
from alphatoken_curate.scoring.meter import Meter
from alphatoken_curate.scoring.portions import deal
from alphatoken_curate.scoring.rehearse import fitting, rehearsal_in, together
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens
from alphatoken_curate.tokens.plan import plan_batches
from alphatoken_curate.tokens.tokenise import PairRow, TokenRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What portions of it take, of so many `orders` and `outcomes`."""

    orders: int
    outcomes: int
    there: float
    """Seconds of a training and what is replayed of it; `again` for each further part of the outcomes."""
    again: float
    back: float
    """Seconds of an outcome, there and back."""
    fits: float
    """Outcomes that free memory has room for."""
    sharing: bool
    """Whether workers have one memory together."""
    states: Callable[[int], int]
    """Bytes on disk while so many outcomes go back together, but for what came of any."""
    values: int
    """Bytes on disk of what comes of an outcome."""

    def seconds(self, workers: int = 1) -> float:
        """Of so many workers, each as fast as one alone: until the last of them is done."""
        busy = [0.0] * workers
        for outcomes, at_once in self._dealt(workers):
            parts = math.ceil(outcomes / at_once)
            busy[busy.index(min(busy))] += self.there + (parts - 1) * self.again + outcomes * self.back
        return max(busy)

    def kept_bytes(self, workers: int = 1) -> int:
        """Most that lies on disk at a time, of all workers."""
        states = sum(self.states(at_once) for _, at_once in self._dealt(workers)[:workers])
        return states + self.orders * self.outcomes * self.values

    def _dealt(self, workers: int) -> list[tuple[int, int]]:
        """Of each portion its outcomes, and how many go back together."""
        every = [*itertools.product(range(self.orders), range(self.outcomes))]
        found = [len(portion) for portion in deal(every, self.outcomes, self.orders, workers)]
        fits = self.fits / (min(workers, len(found)) if self.sharing else 1)
        return [(outcomes, together(outcomes, int(fits))) for outcomes in found]


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
    fits = fitting(trainee, config)
    tried_at_once = together(spec.outcomes, int(fits))
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
        rehearsal.run([outcome] * tried_at_once, lambda _: done.append(meter.now()))
        tried = meter.now() - done[0] - sum(asked)
    progress.advance(2 * padded[1])
    # Two steps are one segment, which nothing is replayed of.
    every = borders_of(len(course.steps), course.window)
    keeps_all = course.keeps_all(rehearsal.state, kept_room(config))
    replayed = 0 if keeps_all else sum(borders[-2] - borders[0] for borders in every)
    first = done[len(two.steps)] - done[0]
    replay, scale = first * replayed / len(course.steps), padded[0] / padded[1]
    tokens = count_tokens(beside)
    ends = len(every) * sum(asked) / tried_at_once * tokens / count_tokens(few)  # of all outcomes
    of_all = partial(kept_bytes, rehearsal.state, course, config=config, below=(trainee.below_bytes, tokens))
    each = of_all(1, 1) - of_all(1, 0)
    return Tried(
        orders=config.rehearse_seeds,
        outcomes=spec.outcomes,
        there=(first + replay) * scale,
        again=first * scale,
        back=(tried - first) / tried_at_once * scale + ends / spec.outcomes,
        fits=fits,
        sharing=trainee.device.type != "cuda",
        states=lambda at_once: of_all(at_once, 0),
        values=each // config.rehearse_seeds,
    )
