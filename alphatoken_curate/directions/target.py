"""The gradient of a mean response loss: adaptation over target rows, retention and lookahead over others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from alphatoken_curate.directions.losses import Weigh, loss_gradient, positions
from alphatoken_curate.directions.selection import Selection
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.tokens.plan import Batch


def target_gradient(
    scoring: ScoringModel, batches: Iterable[Batch], *, all_positions: bool, weigh: Weigh | None = None
) -> Direction:
    """G_m (d_out, d_in) in nats per unit of weight: the mean over all response tokens of the batches.

    With `weigh` each token's gradient is multiplied by its weight first; the sum is still divided by their number.
    With `all_positions` it is the true gradient (`exact`, retention and lookahead); without, delta^T h is summed over
    the response positions alone (`published`).
    """
    sums, tokens = target_sums(scoring, batches, all_positions=all_positions, weigh=weigh)
    return [s.div_(tokens) for s in sums]


def target_sums(
    scoring: ScoringModel, batches: Iterable[Batch], *, all_positions: bool, weigh: Weigh | None = None
) -> tuple[Direction, int]:
    """The same, summed over response tokens in place of their mean, and how many they are."""
    sums, tokens = scoring.zeros(), 0
    for planned in batches:
        batch = replace(planned, start=0) if all_positions else planned
        ids = torch.from_numpy(batch.input_ids).to(scoring.device)
        total = ids.shape[0] * (ids.shape[1] - batch.start)
        chosen = None if all_positions else Selection(positions(batch, ids.device), total)

        def accumulate(
            index: int, h: Tensor, delta: Tensor, where: Tensor | None, chosen: Selection | None = chosen
        ) -> None:
            if chosen is not None:
                _, (h, delta) = chosen.rows(where, h, delta)
            sums[index].addmm_(delta.t(), h)
            scoring.release(index)

        with scoring.graph(ids, batch.start, pairs=batch.pairs) as hidden:
            _, grad = loss_gradient(scoring, hidden, batch, weigh=weigh)
            scoring.backward([hidden], [grad], accumulate)
        tokens += len(batch.target)
    return sums, tokens
