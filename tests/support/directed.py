"""Random directions of a scoring set, influence along them by a backward pass per token, and how closely two agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import torch

# from directed import ids_of, places
from torch import Tensor

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.tokens.plan import collate, plan_batches
from alphatoken_curate.tokens.tokenise import TokenRow

EXACT = 1e-10
"""Of the largest value, in float64 throughout (`all_float64`)."""


def random_direction(scoring: ScoringModel, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m.weight.shape, generator=generator, dtype=m.weight.dtype) for m in scoring.maps]


def places(row: TokenRow) -> list[int]:
    return np.flatnonzero(row.response).tolist()


def ids_of(row: TokenRow) -> Tensor:
    return torch.from_numpy(row.input_ids.astype(np.int64))


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = EXACT) -> None:
    largest = wanted.abs().max().clamp_min(1e-30)
    assert torch.isfinite(found).all()
    assert ((found - wanted).abs().max() / largest).item() < tolerance


def directions(scoring: ScoringModel) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        [
            torch.randn(w.shape, generator=generator, dtype=torch.promote_types(w.dtype, torch.float32))
            for w in scoring.weights
        ]
        for _ in range(2)
    ]


def influence_of(scorer: Any, rows: list[TokenRow], budget: int) -> list[Tensor]:
    """(2, tokens) of each row, whatever the batches were."""
    found: dict[int, Tensor] = {}
    for indices in plan_batches(rows, budget):
        batch = collate(rows, indices)
        signals = scorer.score(batch)
        found |= {index: signals.influence[:, torch.from_numpy(batch.row == i)] for i, index in enumerate(batch.rows)}
    return [found[i] for i in range(len(rows))]


def by_name(scoring: ScoringModel, direction: list[Tensor]) -> dict[str, Tensor]:
    """Whole parameters by their names in the model, put together from the matrices of a direction."""
    whole: dict[str, Tensor] = {}
    for m, matrix in zip(scoring.maps, direction, strict=False):
        kept = matrix.t() if m.transposed else matrix
        name = f"{m.owner}.{m.slot}"
        if m.expert is None:
            whole[name] = kept
        else:
            whole.setdefault(name, torch.zeros(m.bare.shape, dtype=matrix.dtype))[m.expert] = kept
    return whole | dict(zip(scoring.rest, direction[len(scoring.maps) :], strict=True))


def by_gradients(model: Any, direction: dict[str, Tensor], row: TokenRow) -> Tensor:
    """<gradient of each token's loss, M>, by autograd on the parameters: one backward per token."""
    model = oracles.eager(model).requires_grad_(True)
    held = dict(model.named_parameters())
    found = []
    for loss in oracles.losses(model, ids_of(row), places(row)):
        grads = torch.autograd.grad(loss, [held[name] for name in direction], retain_graph=True, allow_unused=True)
        found.append(sum((g * m).sum() for g, m in zip(grads, direction.values(), strict=True) if g is not None))
    return torch.stack(found).detach()
