"""The budget of `--batch-tokens auto`: a few batches of the run's own rows, scored as the run will, and thrown away.

A larger budget pays until the device is busy, and as long as memory lasts. So it is doubled while that makes scoring
faster and what its largest batch needs is there. What is tried decides the plan of a run and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.parameters import rest_zeros
from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.models.devices import devices_of, free_memory, kind_of
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import artifacts
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.scoring.budget import LEAST, out_of_memory
from alphatoken_curate.scoring.meter import Meter
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.tokens.dealt import columns_in, pick_in, tokens_in
from alphatoken_curate.tokens.plan import collate, plan_batches
from alphatoken_curate.tokens.tokenise import AnyRow, branches

Shards = Sequence[Sequence[AnyRow]]
"""The rows to score, shard by shard."""

_SMALLEST = {"cpu": 512, "cuda": 2048}
_USUAL = {"cpu": 2048, "cuda": 16384}
"""By type of device: the first budget that is tried, and the one to take where a trial does not pay."""

GAIN = 1.05
"""A budget of twice the size must be this much faster."""

SHARE = 16
"""A trial runs at most one token for each so many of the run."""

SECONDS = 10.0
"""A trial does not go on when its next step would take it beyond this."""

ROOM = 0.9
"""Share of the free memory that a batch may need."""

_SAMPLED_SHARDS = 4

_REHEARSAL = {"cpu": 1024, "cuda": 4096}
"""The budget of a rehearsal, which tries none: a step takes as many batches as it needs, and sums them in order.

On a CPU a small one: where memory runs out there the system ends the process, which gets no chance to halve it.
"""


def usual_budget(shards: Shards, device_type: str) -> int:
    """The budget without a trial, a power of two: the usual one, or less where that holds all rows of a shard."""
    usual, smallest = (sizes.get(device_type, sizes["cpu"]) for sizes in (_USUAL, _SMALLEST))
    return min(usual, max(smallest, _power(_largest_batch(shards))))


def rehearsal_budget(device_type: str) -> int:
    """The budget of a rehearsal."""
    return _REHEARSAL.get(device_type, _REHEARSAL["cpu"])


def pays(shards: Shards, device_type: str) -> bool:
    """Whether the run is long enough for a trial that gets as far as the usual budget."""
    usual = _USUAL.get(device_type, _USUAL["cpu"])
    return _largest_batch(shards) > usual and tokens_in(shards) >= SHARE * 2 * usual


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """The rows that a trial runs on, of all to score; picklable, and as large whatever there are."""

    shards: list[list[AnyRow]]
    """Some whole ones, for what padding costs."""
    middling: list[AnyRow]
    """By width: as many as a batch may hold round the row in the `middle` of all tokens."""
    middle: int
    longest: list[AnyRow]
    """The widest, as many as a batch may hold."""
    tokens: int
    """Of all rows."""
    most: int
    """The largest budget that makes a difference."""


def sample_of(shards: Shards) -> Sample:
    """What a trial of these rows runs on."""
    columns = list(columns_in(shards))
    widths, tokens = (np.concatenate([one[name] for one in columns]) for name in ("width", "tokens"))
    order, most = np.argsort(widths, kind="stable"), _power(_largest_batch(shards))
    seen = np.cumsum(tokens[order], dtype=np.int64)
    middle = int(np.searchsorted(seen, seen[-1] / 2))
    count = max(1, most // int(widths[order[middle]]))
    first = max(0, min(middle - count // 2, len(order) - count))
    step = max(1, len(shards) // _SAMPLED_SHARDS)
    return Sample(
        shards=[list(shard) for shard in shards[::step][:_SAMPLED_SHARDS]],
        middling=pick_in(shards, order[first : first + count].tolist()),
        middle=middle - first,
        longest=pick_in(shards, order[-max(1, most // int(widths[order[-1]])) :].tolist()),
        tokens=int(seen[-1]),
        most=most,
    )


def untried(spec: ScorerSpec, shards: Shards) -> int | None:
    """The budget of these rows without a trial; None where one pays."""
    kind = kind_of(spec.device)
    if spec.config.rehearses:
        return rehearsal_budget(kind)
    return None if pays(shards, kind) else usual_budget(shards, kind)


def tokens_of(shards: Shards) -> int:
    """Most tokens that a trial goes through."""
    return tokens_in(shards) // SHARE


def tried(of: ReferencePass | ShardScorer, sample: Sample, progress: Progress, _: int = 0) -> int:
    """The largest budget that pays for these rows, on a model of the shapes of the one that will score them."""
    spec, kind = of.spec, kind_of(of.spec.device)
    meter = Meter(*devices_of(spec.device))
    trial = Trial(of.scoring, spec.config, spec.directions, sample, meter, progress)
    first = min(max(_SMALLEST.get(kind, _SMALLEST["cpu"]), _power(trial.width)), sample.most)
    found = grow(trial.speed, first, sample.most, trial.affords)
    del trial
    free_memory()
    progress.note(f"--batch-tokens auto: {found}")
    return found


def grow(speed: Callable[[int], float], first: int, most: int, affords: Callable[[int], bool]) -> int:
    """Double a budget while that makes scoring faster; halve the first one until it runs.

    `speed` gives tokens per second at a budget, 0 where memory does not last; `affords` whether to try one at all.
    """
    budget = first
    while not (best := speed(budget)) and budget // 2 >= LEAST:
        budget //= 2
    while 2 * budget <= most and budget >= first and affords(2 * budget):
        faster = speed(2 * budget)
        if not faster or faster < GAIN * best:
            break
        budget, best = 2 * budget, faster
    return budget


class Trial:
    """Batches of the run's own rows, along directions of zeros, with what they take in seconds and bytes.

    Speed is that of rows of middling length, since most tokens lie in such; memory is what the longest rows need.
    """

    def __init__(
        self,
        scoring: ScoringModel,
        config: ScoreConfig,
        directions: int,
        sample: Sample,
        meter: Meter,
        progress: Progress,
    ) -> None:
        self.scoring, self.meter, self.progress, self.sample = scoring, meter, progress, sample
        self.width = _width(sample.middling[sample.middle])
        along = blank(scoring, directions)
        self._scorer = make_scorer(scoring, along, config.estimator, config.window, settle=False)
        self._spent, self._last, self._began = 0, 0.0, meter.now()
        self._rate: float | None = None
        """Bytes that a padded token needs: an upper bound, from a small batch."""

    def affords(self, budget: int) -> bool:
        """Whether a step with that budget is worth its tokens and seconds."""
        seconds = self.meter.now() - self._began
        return self._spent + budget <= self.sample.tokens // SHARE and seconds + 2 * self._last <= SECONDS

    def speed(self, budget: int) -> float:
        """Tokens per second that a run with this budget would score; 0 where memory does not last for it."""
        rows = self._typical(budget)
        try:
            if not self._fits(rows, budget):
                return 0.0
            began = self.meter.now()
            padded = self._score(rows)
            self._last = self.meter.now() - began
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        else:
            return padded / self._last / self._padding(budget)
        free_memory()
        return 0.0

    def _padding(self, budget: int) -> float:
        """Padded tokens for each token that counts."""
        shards = self.sample.shards
        return sum(planned(shard, budget)[1] for shard in shards) / sum(map(count_tokens, shards))

    def _typical(self, budget: int) -> list[AnyRow]:
        """Rows of middling length that fill a batch."""
        count, middling = max(1, budget // self.width), self.sample.middling
        first = max(0, min(self.sample.middle - count // 2, len(middling) - count))
        rows = middling[first : first + count]
        return [rows[i] for i in plan_batches(rows, budget)[0]]

    def _longest(self, budget: int) -> list[AnyRow]:
        """The rows of a run's largest batch."""
        rows = self.sample.longest
        return [rows[i] for i in plan_batches(rows, budget)[0]]

    def _fits(self, rows: list[AnyRow], budget: int) -> bool:
        """Whether memory lasts for the largest batch. Where that is not plain from a small one, it is run."""
        if self._rate is None:
            self._rate = self._need(rows) / _padded(rows)  # warms up, too
        longest = self._longest(budget)
        # What attention needs grows with the length of rows besides.
        stretch = _width(longest[0]) / min(self.width, _width(longest[0]))
        room = ROOM * self.meter.room()
        return self._rate * _padded(longest) * stretch <= room or self._need(longest) <= room

    def _need(self, rows: list[AnyRow]) -> int:
        """Bytes that a batch takes at most: scored, or one of those a direction is made from."""
        before = self.meter.used()
        self.meter.begin()
        self._score(rows)
        target_gradient(self.scoring, [collate(rows, range(len(rows)))], all_positions=True)
        return self.meter.peak() - before

    def _score(self, rows: list[AnyRow]) -> int:
        """Score one batch; returns its padded tokens."""
        self._scorer.score(collate(rows, range(len(rows))))
        padded = _padded(rows)
        self._spent += padded
        self.progress.advance(count_tokens(rows))
        return padded


def blank(scoring: ScoringModel, count: int) -> list[Direction]:
    """Directions of zeros, in memory that is really taken."""
    return [[t.fill_(0.0) for t in (*scoring.zeros(), *rest_zeros(scoring))] for _ in range(count)]


def planned(rows: Sequence[AnyRow], budget: int) -> tuple[int, int]:
    """Batches of a shard, and the padded tokens in them."""
    batches = plan_batches(rows, budget)
    return len(batches), sum(_padded([rows[i] for i in batch]) for batch in batches)


def needed_first(spec: ScorerSpec, shards: Sequence[int]) -> Literal["reference", "model"]:
    """Which model the run needs first: a trial takes that, as both have the same shapes."""
    wanted = [partial(_lacks, spec.store, artifacts.REFERENCE_NLL, shard) for shard in shards if spec.has_reference]
    if spec.has_drift and spec.estimates_fisher:
        wanted.append(partial(_lacks, spec.store, artifacts.FISHER))
    return "reference" if any(lacks() for lacks in wanted) else "model"


def _lacks(store: Store, kind: str, part: int | None = None) -> bool:
    """Whether an artefact has no file; where that is of something else, a model is loaded too early, and no more."""
    name = store.path(kind, part).name
    return not any((folder / name).is_file() for folder in (store.folder, store.reuse) if folder is not None)


def _width(row: AnyRow) -> int:
    return max(len(sequence.input_ids) for sequence in branches(row)) * len(branches(row))


def _padded(rows: Sequence[AnyRow]) -> int:
    return len(rows) * max(map(_width, rows), default=0)


def _largest_batch(shards: Shards) -> int:
    """Padded tokens of a shard in one batch, where that is the largest."""
    return max((len(one) * int(one["width"].max(initial=0)) for one in columns_in(shards)), default=0)


def _power(count: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(0, count - 1).bit_length()
