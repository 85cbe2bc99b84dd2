"""The Fisher diagonal of the reference over the scoring set (paper Eq. 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from alphatoken_curate.directions.losses import loss_gradient
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.tokens.draws import keyed_uniform, of_turn
from alphatoken_curate.tokens.plan import Batch
from alphatoken_curate.tokens.tokenise import TokenRow


def fisher_diagonal(
    scoring: ScoringModel, rows: Sequence[TokenRow], batches: Iterable[Batch], *, sampled: bool, seed: int
) -> Direction:
    """F_m = E[(delta^2)^T (h^2)], (d_out, d_in): summed over the positions of a sequence, mean over sequences.

    The loss of a sequence is the sum of -log p over its response tokens. Eq. 5 takes them from the model itself:
    `generate` (the published way) is `rows` of `generate.sample_answers` and their own tokens, not `sampled`. With
    `sampled` tokens are drawn from the model's prediction at the response positions of the data, keyed by (seed, row,
    position): the expectation of Eq. 5 over tokens, but after the data's prefixes and not the model's own. The
    data's tokens themselves make the `empirical` Fisher, which is not that of Eq. 5.
    """
    sums, sequences = fisher_sums(scoring, rows, batches, sampled=sampled, seed=seed)
    return [s.div_(sequences) for s in sums]


def fisher_sums(
    scoring: ScoringModel, rows: Sequence[TokenRow], batches: Iterable[Batch], *, sampled: bool, seed: int
) -> tuple[Direction, int]:
    """F summed over sequences in place of their mean, and how many they are.

    Sums and counts of parts of the rows add up to those of all, up to the rounding of sums.
    """
    sums, sequences = scoring.zeros(), 0

    def accumulate(index: int, h: Tensor, delta: Tensor, _: Tensor | None) -> None:
        sums[index].addmm_(delta.square().t(), h.square())
        scoring.release(index)

    for planned in batches:
        batch = replace(planned, start=0)
        ids = torch.from_numpy(batch.input_ids).to(scoring.device)
        uniforms = drawn_uniforms(rows, batch, seed) if sampled else None
        with scoring.graph(ids) as hidden:
            _, grad = loss_gradient(scoring, hidden, batch, uniforms)
            scoring.backward([hidden], [grad], accumulate)
        sequences += len(batch.rows)
    return sums, sequences


def drawn_uniforms(rows: Sequence[TokenRow], batch: Batch, seed: int) -> Tensor:
    """(N,) float64 in [0, 1), one for each response token, keyed by (seed, row and turn, position)."""
    row_ids = np.array([rows[i].row_id for i in batch.rows])
    turns = np.array([rows[i].turn for i in batch.rows])
    return torch.from_numpy(keyed_uniform(seed, row_ids[batch.row], of_turn(batch.position + 1, turns[batch.row])))
