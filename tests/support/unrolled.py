"""A training as one formula that autograd goes through, weights of tokens and all; and the same really run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
import torch
from torch import Tensor

from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.tokens.tokenise import TokenRow

J = Callable[[Any, dict[str, Tensor]], Tensor]
"""An outcome of a model and its trained weights, by name."""

State = tuple[dict[str, Tensor], list[list[Tensor]]]
"""Weights by name, and the optimiser's slots."""


def plain_step(
    o: Optimiser, weights: list[Tensor], slots: list[list[Tensor]], grads: list[Tensor], k: int
) -> list[Tensor]:
    """The same step as a formula that autograd goes through: weights, then slots."""
    if o.clip is not None:
        norm = torch.cat([g.flatten() for g in grads]).norm()
        grads = [g * (o.clip / (norm + 1e-6)).clamp(max=1) for g in grads]
    decays = [o.weight_decay * (w.ndim > 1) for w in weights]
    lr = o.rate(k)
    if o.kind == "sgd":
        moved = [g + d * w for g, d, w in zip(grads, decays, weights, strict=True)]
        if slots:
            moved = [o.momentum * b + g for b, g in zip(slots[0], moved, strict=True)]
        return [*(w - lr * g for w, g in zip(weights, moved, strict=True)), *(moved if slots else [])]
    b1, b2 = o.betas
    ms = [b1 * m + (1 - b1) * g for m, g in zip(slots[0], grads, strict=True)]
    vs = [b2 * v + (1 - b2) * g**2 for v, g in zip(slots[1], grads, strict=True)]
    c1, c2 = 1 - b1 ** (k + 1), 1 - b2 ** (k + 1)
    updates = [(m / c1) / ((v / c2 + o.root).sqrt() + o.eps) for m, v in zip(ms, vs, strict=True)]
    return [*(w * (1 - lr * d) - lr * u for w, d, u in zip(weights, decays, updates, strict=True)), *ms, *vs]


def token_losses(model: Any, held: dict[str, Tensor], row: TokenRow) -> Tensor:
    """-log p of a row's response tokens under these weights."""
    ids = torch.from_numpy(row.input_ids.astype(np.int64))
    logits = torch.func.functional_call(model, held, (), {"input_ids": ids[None], "use_cache": False}).logits[0]
    places = np.flatnonzero(row.response)
    return -torch.log_softmax(logits[places - 1], dim=-1).gather(1, ids[places][:, None])[:, 0]


def mean_over(rows: Sequence[TokenRow]) -> J:
    """The mean loss over all response tokens of some rows."""
    return lambda model, held: torch.cat([token_losses(model, held, row) for row in rows]).mean()


def trained(
    model: Any,
    names: Sequence[str],
    rows: Sequence[TokenRow],
    steps: Sequence[Sequence[int]],
    optimiser: Optimiser,
    weights: Tensor,
    **how: Any,
) -> dict[str, Tensor]:
    """The named weights after a training in which tokens weigh `weights` (N,), row by row; else as `trained_on`."""
    held, slots = begun(model, names, optimiser)
    return trained_on(model, held, slots, rows, list(enumerate(steps)), optimiser, weights, **how)[0]


def begun(model: Any, names: Sequence[str], optimiser: Optimiser) -> State:
    """The named weights as they are, and slots of zeros."""
    held = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if name in set(names)}
    return held, [[torch.zeros_like(w) for w in held.values()] for _ in range(_slots(optimiser))]


def trained_on(
    model: Any,
    held: dict[str, Tensor],
    slots: list[list[Tensor]],
    rows: Sequence[TokenRow],
    steps: Sequence[tuple[int, Sequence[int]]],
    optimiser: Optimiser,
    weights: Tensor,
    *,
    summed: bool,
    graph: bool,
    seen: Callable[[dict[str, Tensor], list[Tensor]], list[Tensor]] = lambda _, grads: grads,
    loss_of: Callable[[dict[str, Tensor], Sequence[int]], Tensor] | None = None,
) -> State:
    """The same from a state on, by numbered steps; with the slots.

    `loss_of`: gives the loss of a step in place of theirs. `seen` is told the weights and gradients of each step, and
    gives the gradients to go on with.
    """
    each = weights.split([int(row.response.sum()) for row in rows])
    for k, step in steps:
        if loss_of is None:
            losses = torch.cat([each[i] * token_losses(model, held, rows[i]) for i in step])
            loss = losses.sum() / (torch.cat([each[i] for i in step]).sum() if summed else len(losses))
        else:
            loss = loss_of(held, step)
        grads = list(torch.autograd.grad(loss, list(held.values()), create_graph=graph, materialize_grads=True))
        grads = seen(held, grads)
        after = plain_step(optimiser, list(held.values()), slots, grads, k)
        if not graph:
            after = [x.detach().requires_grad_() for x in after]
        held = dict(zip(held, after[: len(held)], strict=True))
        slots = [after[i : i + len(held)] for i in range(len(held), len(after), len(held))]
    return held, slots


def _slots(optimiser: Optimiser) -> int:
    return 2 if optimiser.kind == "adamw" else int(optimiser.momentum != 0)


def values_by_autograd(
    model: Any,
    names: Sequence[str],
    rows: Sequence[TokenRow],
    steps: Sequence[Sequence[int]],
    optimiser: Optimiser,
    outcomes: Sequence[J],
    *,
    summed: bool,
) -> Tensor:
    """-dJ / dw at w = 1 through the whole unrolled training, (n, N)."""
    model = oracles.eager(model).requires_grad_(False)
    count = sum(int(row.response.sum()) for row in rows)
    weights = torch.ones(count, dtype=torch.float64, requires_grad=True)
    held = trained(model, names, rows, steps, optimiser, weights, summed=summed, graph=True)
    return torch.stack([-torch.autograd.grad(J(model, held), weights, retain_graph=True)[0] for J in outcomes])


def values_by_windows(
    model: Any,
    names: Sequence[str],
    rows: Sequence[TokenRow],
    steps: Sequence[Sequence[int]],
    optimiser: Optimiser,
    outcomes: Sequence[J],
    ends: Sequence[int],
    *,
    summed: bool,
) -> Tensor:
    """The same through the steps of each window alone, from the state that it starts at, by J where it ends: sums.

    `ends`: of each window, the steps that are done then.
    """
    model = oracles.eager(model).requires_grad_(False)
    (held, slots), found = begun(model, names, optimiser), []
    for first, end in zip([0, *ends], ends, strict=False):
        weights = torch.ones(sum(int(row.response.sum()) for row in rows), dtype=torch.float64, requires_grad=True)
        mine = list(enumerate(steps))[first:end]
        held, slots = trained_on(model, held, slots, rows, mine, optimiser, weights, summed=summed, graph=True)
        grads = (torch.autograd.grad(J(model, held), weights, retain_graph=True) for J in outcomes)
        found.append(torch.stack([-grad for (grad,) in grads]))
        held = {name: w.detach().requires_grad_() for name, w in held.items()}
        slots = [[s.detach() for s in slot] for slot in slots]
    return torch.stack(found).sum(dim=0)


@dataclass
class Step:
    """The weights before a step, by name, and the cotangents of its gradient."""

    held: dict[str, Tensor]
    cotangents: dict[str, Tensor]


def cotangents_by_autograd(
    model: Any,
    names: Sequence[str],
    rows: Sequence[TokenRow],
    steps: Sequence[Sequence[int]],
    optimiser: Optimiser,
    outcome: J,
) -> list[Step]:
    """a_k of each step of the unrolled training: the derivative by something added to g_k."""
    model = oracles.eager(model).requires_grad_(False)
    weights = torch.ones(sum(int(row.response.sum()) for row in rows), dtype=torch.float64)

    def train(seen: Any) -> dict[str, Tensor]:
        return trained(model, names, rows, steps, optimiser, weights, summed=False, graph=True, seen=seen)

    return cotangents_of(train, lambda held: outcome(model, held))


def cotangents_of(
    train: Callable[[Any], dict[str, Tensor]], outcome: Callable[[dict[str, Tensor]], Tensor]
) -> list[Step]:
    """The same of a training that is told what to do with the gradients of each step."""
    found: list[tuple[dict[str, Tensor], list[Tensor]]] = []

    def nudged(held: dict[str, Tensor], grads: list[Tensor]) -> list[Tensor]:
        nudges = [torch.zeros_like(g, requires_grad=True) for g in grads]
        found.append(({name: w.detach() for name, w in held.items()}, nudges))
        return [g + x for g, x in zip(grads, nudges, strict=True)]

    held = train(nudged)
    grads = torch.autograd.grad(outcome(held), [x for _, nudges in found for x in nudges])
    each = [grads[i : i + len(held)] for i in range(0, len(grads), len(held))]
    return [Step(before, dict(zip(before, a, strict=True))) for (before, _), a in zip(found, each, strict=True)]


def values_by_retraining(
    model: Any,
    names: Sequence[str],
    rows: Sequence[TokenRow],
    steps: Sequence[Sequence[int]],
    optimiser: Optimiser,
    outcome: J,
    tokens: Sequence[int],
    *,
    summed: bool,
    by: float,
) -> Tensor:
    """The same of some tokens, from trainings with the token's weight moved: central differences, Richardson's."""
    model = oracles.eager(model).requires_grad_(False)
    count = sum(int(row.response.sum()) for row in rows)

    def after(token: int, moved: float) -> float:
        weights = torch.ones(count, dtype=torch.float64)
        weights[token] += moved
        held = trained(model, names, rows, steps, optimiser, weights, summed=summed, graph=False)
        return float(outcome(model, held).detach())

    def slope(token: int, moved: float) -> float:
        return (after(token, moved) - after(token, -moved)) / (2 * moved)

    return -torch.tensor([(4 * slope(t, by / 2) - slope(t, by)) / 3 for t in tokens], dtype=torch.float64)
