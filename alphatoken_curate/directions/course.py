"""The steps of a training that is rehearsed: which rows each takes, and what is made of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alphatoken_curate.directions.optimisers import Optimiser, State
from alphatoken_curate.directions.step_losses import TOKENS, StepLoss
from alphatoken_curate.tokens.draws import keyed_uniform, of_turn
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches, token_places, token_starts
from alphatoken_curate.tokens.tokenise import AnyRow, branches

REHEARSAL_DRAW = -5
"""Less the epoch, the position under which a row's place in it is drawn; no token has a negative one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The steps of a training: which rows each takes, and how it moves."""

    rows: Sequence[AnyRow]
    steps: Sequence[Sequence[int]]
    """Indices of the rows of each step."""
    optimiser: Optimiser
    denominator: Literal["count", "sum"] = "count"
    batch_tokens: int = 4096
    """Padded tokens that run together; a step takes as many batches as it needs, which hold pairs whole."""
    loss: StepLoss = TOKENS
    """What is made of the losses of a step's tokens."""
    window: int | None = None
    """Steps after which the way back begins anew; None is all of them."""
    begins: NDArray[np.floating] | None = None
    """(N,) nll of all response tokens where it begins, by which a loss is too large; None where that is not known."""

    def batches(self, k: int, *, twice: bool = False) -> list[Batch]:
        """The batches of step k; their `rows` are indices among all sequences.

        `twice`: of half the tokens, since a graph of second derivatives holds more than twice as much.
        """
        chosen = [self.rows[i] for i in self.steps[k]]
        planned = plan_batches(chosen, self.batch_tokens // 2 if twice else self.batch_tokens)
        return [collate(self.rows, [self.steps[k][i] for i in indices]) for indices in planned]

    def loss_before(self, k: int) -> float:
        """The loss of the rows of step k where the training begins; 0 where that is not known."""
        if self.begins is None:
            return 0.0
        batches, starts = self.batches(k), token_starts(self.rows)
        losses = [self.loss.total(one, torch.from_numpy(self.begins[token_places(one, starts)])) for one in batches]
        return float(sum(losses)) / sum(map(self.loss.units, batches))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Response tokens of each sequence."""
        return np.diff(token_starts(self.rows))

    def keeps_all(self, state: State, room: int) -> bool:
        """Whether all steps of a window, each a state like this one and a gradient, take no more than `room` bytes."""
        each = sum(x.nbytes for x in (*state.tensors, *state.weights))
        return each * min(len(self.steps), self.window or len(self.steps)) <= room

    @property
    def taken(self) -> list[list[int]]:
        """Indices of the sequences of each step: of a pair both branches."""
        each = len(branches(self.rows[0]))
        return [[each * i + branch for i in step for branch in range(each)] for step in self.steps]


def plan_steps(rows: Sequence[AnyRow], *, epochs: int, rows_per_step: int, seed: int) -> list[tuple[int, ...]]:
    """Indices of the rows of each step: every epoch takes all rows once, in an order drawn by (seed, row, epoch).

    The last step of an epoch takes what is left.
    """
    found = []
    for epoch in range(epochs):
        turns = [-row.turn for row in rows]  # downwards, as the positions of these draws go
        draws = keyed_uniform(seed, [row.row_id for row in rows], of_turn(REHEARSAL_DRAW - epoch, turns))
        order = np.argsort(draws, kind="stable").tolist()
        found += [tuple(order[first : first + rows_per_step]) for first in range(0, len(order), rows_per_step)]
    return found
