"""The Fisher diagonal of the reference over the scoring set (paper Eq. 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from alphatoken_curate.capture import Direction, ScoringModel
from alphatoken_curate.draws import keyed_uniform
from alphatoken_curate.losses import loss_gradient
from alphatoken_curate.plan import Batch
from alphatoken_curate.tokens import TokenRow


def fisher_diagonal(
    scoring: ScoringModel, rows: Sequence[TokenRow], batches: Iterable[Batch], *, sampled: bool, seed: int
) -> Direction:
    """F_m = E[(delta^2)^T (h^2)], (d_out, d_in): summed over the positions of a sequence, mean over sequences.

    The loss of a sequence is the sum of -log p over its response tokens: the data's own (`empirical`), or, `sampled`,
    tokens drawn at the same positions from the model's prediction, keyed by (seed, row, position).
    """
    sums, sequences = scoring.zeros(), 0

    def accumulate(index: int, h: Tensor, delta: Tensor) -> None:
        sums[index].addmm_(delta.flatten(0, 1).square().t(), h.flatten(0, 1).square())
        scoring.release(index)

    for planned in batches:
        batch = replace(planned, start=0)
        ids = torch.from_numpy(batch.input_ids).to(scoring.device)
        uniforms = _uniforms(rows, batch, seed) if sampled else None
        with scoring.graph(ids) as hidden:
            _, grad = loss_gradient(scoring, hidden, batch, uniforms)
            scoring.backward([hidden], [grad], accumulate)
        sequences += len(batch.rows)
    return [s.div_(sequences) for s in sums]


def _uniforms(rows: Sequence[TokenRow], batch: Batch, seed: int) -> Tensor:
    row_ids = np.array([rows[i].row_id for i in batch.rows])
    return torch.from_numpy(keyed_uniform(seed, row_ids[batch.row], batch.position + 1))
