"""The training to come, rehearsed, and what its outcome owes to the loss weight of every token.

theta_k = step(theta_{k-1}, g_k), g_k the gradient of sum_t w_t l_t / D over the rows of step k, D the number of their
response tokens (`count`) or the sum of their weights (`sum`); or of the loss of its pairs (`step_losses`). For an
outcome J of theta_N, value_t = -dJ / dw_t at w = 1, summed over the visits of t (metagradient, arXiv 2503.13751; MAGIC,
arXiv 2504.16430).

Forward: steps are taken, and the state at the start of each segment of about sqrt(N) steps is kept, of the last segment
every step. Backward, segment by segment from the last: the steps of the others are taken again, which must end in the
same bits, and all are gone back through one by one.
With a_k the cotangent of g_k, token t has -<a_k, gradient of l_t> / D of step k and, with `sum`, <a_k, g_k> / D, the
same for all of its tokens; of pairs what w_t does to omega; and lambda, the cotangent of the weights, gets H_k a_k.
Several outcomes go back together.
In windows (`directions.windows`) each is gone back through before the next is trained: lambda begins anew at its end,
from J of the weights there, and the optimiser's cotangents from 0. So what is kept, but for values, is of one window.
Shapes: n outcomes, N response tokens of all rows, row by row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.optimisers import State, decays
from alphatoken_curate.directions.shelves import InMemory, Shelf
from alphatoken_curate.directions.step_losses import TOKENS, StepLoss
from alphatoken_curate.directions.trainee import Trainee, Weights
from alphatoken_curate.directions.waypoints import Waypoints
from alphatoken_curate.directions.windows import Window, windows
from alphatoken_curate.errors import CurateError, InputError
from alphatoken_curate.tokens.plan import Batch, batches_of, token_starts
from alphatoken_curate.tokens.tokenise import AnyRow

Outcome = Callable[[Trainee], Weights]
"""Gives the gradient of J in the weights, at those the rehearsal ended with."""

Paths = Callable[[Sequence[Batch], Sequence[Weights]], Sequence[Tensor]]
"""Given the batches of a step and a direction of the weights for each outcome: direct and causal of the response tokens
of each batch, (2, n, N of the batch), at the weights as they are."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Values:
    """-dJ / dw of every token, for each outcome, in parts: each (n, N) float64 in nats, summed over visits."""

    own: NDArray[np.float64]
    """Through the token's own loss: what `influence` is along -a_k / D."""
    denominator: NDArray[np.float64]
    """Through the sum of weights it is divided by: the same for all tokens of a step; 0 with `count`, and of pairs."""
    direct: NDArray[np.float64] | None = None
    """The paths of `own` and beside it, along the same directions, where they were asked for."""
    causal: NDArray[np.float64] | None = None
    omega: NDArray[np.float64] | None = None
    """Of pairs: through omega, which weighs all tokens of a pair, and what divides a branch; `own` holds both."""

    root_share: float = 0.0
    """By what share of their length the root term changes the steps of the training: little, or it is another one."""

    @property
    def value(self) -> NDArray[np.float64]:
        """Through all of these, (n, N)."""
        return self.own + self.denominator + (0.0 if self.omega is None else self.omega)


def mean_loss(rows: Sequence[AnyRow], batch_tokens: int, loss: StepLoss = TOKENS) -> Outcome:
    """J: the mean loss over all response tokens of some rows, or of what else the loss is a mean over."""

    def gradient(trainee: Trainee) -> Weights:
        return trainee.gradient(batches_of(rows, batch_tokens), whole=True, loss=loss)[0]

    return gradient


def drift_loss(fisher: Weights, reference: Weights) -> Outcome:
    """J = 1/2 (theta - reference)^T F (theta - reference), F a diagonal: the retention loss around the reference."""

    def gradient(trainee: Trainee) -> Weights:
        each = zip(fisher, trainee.weights, reference, strict=True)
        return [f.to(w.dtype) * (w.detach() - r.to(w)) for f, w, r in each]

    return gradient


class Rehearsal:
    """A training that is gone through, and back. What both shelves hold is done already and is not done again.

    `states` keeps what segments start from, and how far the way back has come; `steps` the steps of one segment, or of
    all where they take no more than `room` bytes: then no step is taken twice.
    """

    def __init__(
        self,
        trainee: Trainee,
        course: Course,
        states: Shelf,
        *,
        steps: Shelf | None = None,
        paths: Paths | None = None,
        room: int = 0,
    ) -> None:
        self.trainee, self.course, self.paths = trainee, course, paths
        self.steps = InMemory() if steps is None else steps
        self.optimiser = replace(course.optimiser, decaying=decays(trainee.model, trainee.names))
        self.state = self.optimiser.start([w.detach() for w in trainee.weights])
        self.kept = Waypoints(states, trainee.names, len(self.state.slots))
        self._keeps_all = course.keeps_all(self.state, room)
        self._first_loss, self._shift = math.inf, (0.0, 0.0)
        self._part, self._states_stay, self._moved = "", False, False
        self._window: Window

    def run(
        self, outcomes: Sequence[Outcome], told: Callable[[int], None] = lambda _: None, *, at_once: int | None = None
    ) -> Values:
        """Train, and give what each outcome owes to each token. `told` is called after each step with its number.

        `at_once`: outcomes that go back together, by default all: each holds the optimiser's state and a gradient once
        more, and the training is replayed for every such part of them.
        The model's weights end where they began. Raises InputError where the training or its derivative is not finite,
        CurateError where it cannot be repeated bit by bit.
        """
        size = at_once or len(outcomes)
        parts = [outcomes[first : first + size] for first in range(0, len(outcomes), size)]
        for window in self._windows():
            self._window = window
            for n, part in enumerate(parts):
                self._run_part(n, part, told, last=n + 1 == len(parts))
            if self._moved:
                steps = range(window.borders[0], window.borders[-1])
                self.trainee.forget_below(batch for k in steps for batch in self.course.batches(k))
            for k in window.borders:  # by now, or before a kill that came between
                if k and (window.is_last or k < window.borders[-1]):
                    self.kept.drop_state(k, digest=True)
        if self._moved and self._window.borders[0]:
            self._load(0)
        self.kept.drop_state(0, digest=True)
        return self._values([len(part) for part in parts])

    def left(self, outcomes: int, *, at_once: int | None = None) -> Iterator[int]:
        """The steps that `run` of so many outcomes is going to tell of: there once, and back for each part of them."""
        for window in self._windows():
            first, last, there = window.borders[0], window.borders[-1], False
            for n in range(math.ceil(outcomes / (at_once or outcomes))):
                if self.kept.has_values(part := f"{n}{window.name}"):
                    continue
                reached = self._reached(part, window.borders)
                if reached is None and not there:
                    yield from range(max(first, self._border_kept(window.borders)), last)
                there = True
                yield from range(first, last if reached is None else reached)

    def _reached(self, part: str, borders: Sequence[int]) -> int | None:
        """How far back a part has come; None where it has not set out."""
        return next((k for k in borders if self.kept.has_adjoints(part, k)), None)

    def _border_kept(self, borders: Sequence[int]) -> int:
        """The last of them whose state was kept; 0 where none was."""
        return next((k for k in reversed(borders) if self.kept.has_state(k)), 0)

    def _windows(self) -> Iterator[Window]:
        return windows(self.course.taken, self.course.lengths, self.course.window)

    def _values(self, parts: Sequence[int]) -> Values:
        """What came of all parts, of so many outcomes each, and of all windows in their order."""
        starts = token_starts(self.course.rows)
        sums, share = np.zeros((2 if self.paths is None else 4, sum(parts), int(starts[-1]))), 0.0
        for window in self._windows():
            mine, ends = window.places_in_all(starts), itertools.accumulate(parts)
            for n, end in enumerate(ends):
                found, share = self.kept.values(f"{n}{window.name}")
                sums[:, end - parts[n] : end, mine] += found
        parted = dict(zip(_PARTS, sums, strict=False))
        if self.course.loss.ways > 1:
            parted |= {"omega": parted["denominator"], "denominator": np.zeros_like(parted["own"])}
        return Values(**parted, root_share=share)

    def _run_part(self, n: int, outcomes: Sequence[Outcome], told: Callable[[int], None], *, last: bool) -> None:
        """See that the values of some outcomes that go back together are there. Before the `last` part states stay."""
        self._part, self._states_stay = f"{n}{self._window.name}", not last
        borders = self._window.borders
        if not self.kept.has_values(self._part):
            if not self._moved and not self.kept.has_state(0):
                self._keep_state(0)
            self._moved = True
            reached = self._reached(self._part, borders)
            if reached is None:
                self._forward(borders, told, keep=borders[0] if self._keeps_all else borders[-2])
                self._begin_adjoints([outcome(self.trainee) for outcome in outcomes])
                reached = borders[-1]
            for k in borders:  # what a replay is held against
                if not self.kept.has_digest(k):
                    self._forward([border for border in borders if border <= k])
            for first, after in reversed(list(itertools.pairwise(borders))):
                if first < reached:
                    self._back(first, after, told)
            self._finish()
        for k in borders:
            self.kept.drop_adjoints(self._part, k, len(outcomes))

    def _forward(
        self, borders: Sequence[int], told: Callable[[int], None] = lambda _: None, *, keep: float = math.inf
    ) -> None:
        """Train from the last border that was kept. Steps from `keep` on can be gone back through at once."""
        self._load(start := self._border_kept(borders))
        for k in range(start, borders[-1]):
            self._step(k, keep=k >= keep)
            shift = self.optimiser.root_shift(self.state, k)
            self._shift = self._shift[0] + shift[0], self._shift[1] + shift[1]
            if k >= borders[0]:
                told(k)
            if k + 1 in borders:
                self._keep_state(k + 1)

    def _step(self, k: int, *, keep: bool) -> None:
        """Take step k; `keep` what the way back through it needs."""
        grads, loss, _ = self.trainee.gradient(self.course.batches(k), loss=self.course.loss)
        self._check_training(k, grads, loss)
        if keep:
            self.steps.put(str(k), self.kept.named(self.state))
            self.steps.put(f"{k} grads", dict(zip(self.trainee.names, grads, strict=True)))
        self.optimiser.step(self.state, grads, k)

    def _check_training(self, k: int, grads: Weights, loss: float) -> None:
        if k == 0:
            self._first_loss = loss
        worst = 2 * max(self._first_loss, math.log(self.trainee.vocabulary))
        # A loss of pairs has no scale of its own: beta, which it is by, and their margins are any.
        small = loss <= worst or loss <= 2 * self.course.loss_before(k)
        finite = all(bool(g.isfinite().all()) for g in grads)
        if not (small and finite):
            raise InputError(
                f"The rehearsal diverges: in step {k + 1} of {len(self.course.steps)} the mean loss is {loss:.4g} nats"
                f" and its gradient is {'finite' if finite else 'not finite'}. {_GENTLER}"
            )

    def _back(self, first: int, last: int, told: Callable[[int], None]) -> None:
        """Take the steps of a segment again, if they are not kept yet, and go back through them."""
        if not all(self.steps.has(f"{k} grads") for k in range(first, last)):
            self._load(first)
            for k in range(first, last):
                self._step(k, keep=True)
            self._check_replay(first, last)
        adjoints, sums = self.kept.adjoints(self._part, last)
        for k in reversed(range(first, last)):
            self._back_through(k, adjoints, sums)
            told(k)
        self.kept.keep_adjoints(self._part, first, adjoints, sums)
        self.kept.drop_adjoints(self._part, last, len(adjoints))
        # The next window starts where this one ends.
        if not self._states_stay and (self._window.is_last or last < self._window.borders[-1]):
            self.kept.drop_state(last)

    def _back_through(self, k: int, adjoints: list[State], sums: NDArray[np.float64]) -> None:
        """Take adjoints from after step k to before it, and add what its tokens get."""
        along = self._cotangents(k, adjoints)
        self._add_values(k, along, [adjoint.weights for adjoint in adjoints], sums)
        if not all(bool(t.isfinite().all()) for adjoint in adjoints for t in adjoint.tensors):
            raise InputError(
                f"The derivative through step {k + 1} of the rehearsal is not finite. Adam's step has none where a"
                " second moment is 0: give a larger --rehearse-root, and another folder with -o."
            )

    def _cotangents(self, k: int, adjoints: list[State]) -> list[Weights]:
        """Go to where step k was taken from, take adjoints there but for H a, and give a of each."""
        before, grads = self.steps.get(str(k)), self.steps.get(f"{k} grads")
        assert before is not None and grads is not None
        self.state.copy_(self.kept.of_named(before))
        self.steps.drop(str(k))
        self.steps.drop(f"{k} grads")
        along, each = self.optimiser.pull_back, [grads[name] for name in self.trainee.names]
        return [along(self.state, each, k, adjoint) for adjoint in adjoints]

    def _add_values(self, k: int, along: list[Weights], into: list[Weights], sums: NDArray[np.float64]) -> None:
        """Add what the tokens of step k get to `sums`, and H_k a_k to `into`."""
        batches, loss = self.course.batches(k, twice=True), self.course.loss
        units = sum(loss.units(batch) for batch in batches)
        places = [self._window.places(batch) for batch in batches]
        summed = np.zeros(len(along))
        with self.trainee.trained_in(self.course.batches(k)):
            for batch, mine in zip(batches, places, strict=True):
                parts = self.trainee.products(batch, along, into, 1 / units, loss).double().cpu().numpy()
                sums[: len(parts), :, mine] -= parts
                summed += parts[0].sum(axis=1)
        if self.course.denominator == "sum":
            sums[1][:, np.concatenate(places)] += summed[:, None] / units
        if self.paths is not None:
            for a in along:
                for tensor in a:
                    tensor.div_(-units)
            for found, mine in zip(self.paths(batches, along), places, strict=True):
                sums[2:, :, mine] += found.double().cpu().numpy()

    def _check_replay(self, first: int, last: int) -> None:
        if not self.kept.is_same(last, self.state):
            steps = f"Step {last}" if last == first + 1 else f"Steps {first + 1} to {last}"
            raise CurateError(
                f"{steps} of the rehearsal came out otherwise when taken again: this machine does not compute the same"
                " twice. Use --device cpu, and the same number of threads."
            )

    def _keep_state(self, k: int) -> None:
        self.kept.keep_state(k, self.state, [self._first_loss, *self._shift])

    def _load(self, k: int) -> None:
        """Go to the state at a border; where it was deleted, by training up to there from one before it."""
        if (found := self.kept.state(k)) is None:
            if k == 0:
                raise CurateError("What the rehearsal begins with is gone. Run the same command again.")
            self._forward([border for border in self._window.borders if border <= k])
            return
        state, (self._first_loss, *shift) = found
        self.state.copy_(state)
        self._shift = shift[0], shift[1]

    def _begin_adjoints(self, gradients: list[Weights]) -> None:
        if not all(bool(g.isfinite().all()) for gradient in gradients for g in gradient):
            where = (
                "where the rehearsal ends" if self._window.is_last else f"after step {self._window.borders[-1]} of it"
            )
            raise InputError(f"The loss of the target or retention rows has no finite gradient {where}. {_GENTLER}")
        slots = range(len(self.state.slots))
        adjoints = [State(g, tuple([torch.zeros_like(x) for x in g] for _ in slots)) for g in gradients]
        sums = np.zeros((2 if self.paths is None else 4, len(gradients), int(self._window.starts[-1])))
        self.kept.keep_adjoints(self._part, self._window.borders[-1], adjoints, sums)

    def _finish(self) -> None:
        """Keep the values of a part, and what the root term did to all steps so far."""
        _, taken, whole = self.kept.told(self._window.borders[-1])
        share = math.sqrt(taken / whole) if whole else 0.0
        self.kept.keep_values(self._part, self.kept.sums(self._part, self._window.borders[0]), share)


_GENTLER = "Give a smaller --rehearse-lr, more --rehearse-warmup, or --rehearse-clip 1, and another folder with -o."
_PARTS = ("own", "denominator", "direct", "causal")  # of pairs omega's in place of the denominator's
