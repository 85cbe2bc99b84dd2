"""The Gauss-Newton matrix of training as an explicit one of autograd, label by label, and rows for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import oracles
import torch
from tiny import VOCABULARY, make_row, tiny_rows
from torch import Tensor, nn

from alphatoken_curate.tokens.plan import Batch, collate, plan_batches
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow


def rows_of(pairs: bool) -> list[AnyRow]:
    """The usual rows; or pairs: long and short shared prompts, branches that differ in length, no shared prompt."""
    if not pairs:
        return list(tiny_rows())
    draw = np.random.default_rng(5)
    found: list[AnyRow] = []
    for i, (prompt, chosen, rejected) in enumerate([(11, 5, 3), (1, 1, 6), (4, 7, 2)]):
        shared = draw.integers(3, VOCABULARY, prompt).tolist()
        one, other = (
            make_row(i, shared + draw.integers(3, VOCABULARY, n).tolist(), [(prompt, prompt + n)])
            for n in (chosen, rejected)
        )
        found.append(PairRow(chosen=one, rejected=other))
    return [*found, PairRow(chosen=tiny_rows()[3], rejected=tiny_rows()[1])]


def batches(rows: list[AnyRow], budget: int) -> list[Batch]:
    return [collate(rows, indices) for indices in plan_batches(rows, budget)]


def root_of(
    model: Any,
    layers: int,
    rows: Sequence[AnyRow],
    names: Sequence[str],
    beta: float = 0.1,
    reference: Sequence[float] | None = None,
) -> Tensor:
    """R (n, P) with R^T R the Gauss-Newton matrix of the mean over rows, or pairs, of their loss.

    `names` of maps in the order of the vector. `reference`: its nll of each sequence, None for that of the model.
    """
    plain, found = oracles.eager(model).requires_grad_(True), []
    for i, row in enumerate(rows):
        if isinstance(row, PairRow):
            anchors = None if reference is None else reference[2 * i : 2 * i + 2]
            found += _of_pair(plain, layers, row, beta, anchors)
        else:
            found += _of_row(plain, layers, row)
    return torch.stack([torch.cat([one[name].reshape(-1) for name in names]) for one in found]) / len(rows) ** 0.5


def _of_row(model: nn.Module, layers: int, row: TokenRow) -> list[dict[str, Tensor]]:
    """Of each label of each response token: root(p / tokens) times the gradient of log p."""
    ids, places = _where(row)
    logits = model(input_ids=ids[None], use_cache=False).logits[0][[t - 1 for t in places]]
    logs = torch.log_softmax(logits, dim=-1).flatten()
    each = zip(logs, logs.detach().exp().div(len(places)).sqrt(), strict=True)
    return [_times(oracles.weight_gradients(model, layers, log), root) for log, root in each]


def _of_pair(
    model: nn.Module, layers: int, pair: PairRow, beta: float, reference: Sequence[float] | None
) -> list[dict[str, Tensor]]:
    """The gradient of the margin times the root of the second derivative of -log sigmoid(margin)."""
    sums = [oracles.losses(model, *_where(row)).sum() for row in (pair.chosen, pair.rejected)]
    anchors = [float(s.detach()) for s in sums] if reference is None else reference
    margin = beta * ((anchors[0] - sums[0]) - (anchors[1] - sums[1]))
    m = margin.detach().requires_grad_()
    (slope,) = torch.autograd.grad(-nn.functional.logsigmoid(m), m, create_graph=True)
    (bend,) = torch.autograd.grad(slope, m)
    return [_times(oracles.weight_gradients(model, layers, margin), bend.sqrt())]


def _times(gradients: dict[str, Tensor], by: Tensor) -> dict[str, Tensor]:
    return {name: gradient * by for name, gradient in gradients.items()}


def _where(row: TokenRow) -> tuple[Tensor, list[int]]:
    return torch.from_numpy(row.input_ids.astype(np.int64)), np.flatnonzero(row.response).tolist()
