"""Token losses and their gradient in the last hidden state, in chunks of positions: no T x V tensor exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alphatoken_curate.capture import ScoringModel
from alphatoken_curate.draws import inverse_transform
from alphatoken_curate.plan import Batch

Head = Callable[[Tensor], Tensor]
"""Last hidden states (n, D) -> logits (n, V), with the model's own scaling and soft caps."""

Weigh = Callable[[Batch, Tensor], Tensor]
"""A batch and the nll (N,) of its response tokens -> the weight (N,) of each in a loss, held constant."""

OnError = Callable[[slice, Tensor], None]
"""Called with a chunk of the N tokens and d nll / d logits there, (n, V), which is overwritten by the next chunk's."""

_LOGITS_PER_CHUNK = {"cpu": 6 << 20, "cuda": 1 << 28}
"""Logits held at a time: 24 MiB of float32 on a CPU (past 32 MiB malloc maps new pages each time), 1 GiB on a card."""

_LOGITS_PER_SLICE = {"cpu": 1 << 18, "cuda": 1 << 28}
"""Logits whose softmax is taken at a time: what stays in the cache of a core, or everything on a card."""


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """For N predicted tokens: nll and entropy (N,) in nats, d sum(nll) / d hidden (N, D) where it was asked for."""

    nll: Tensor
    entropy: Tensor
    grad: Tensor | None


def token_losses(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    gradient: bool,
    uniforms: Tensor | None = None,
    on_error: OnError | None = None,
) -> Losses:
    """Losses of `targets` (N,) int64 predicted from `hidden` (N, D).

    With `uniforms` (N,) float64 in [0, 1) the targets are replaced by draws from the model's own prediction.
    """
    device = hidden.device.type
    kind = torch.promote_types(hidden.dtype, torch.float32)
    rows = max(1, _LOGITS_PER_CHUNK.get(device, _LOGITS_PER_CHUNK["cpu"]) // vocabulary)
    step = max(1, _LOGITS_PER_SLICE.get(device, _LOGITS_PER_SLICE["cpu"]) // vocabulary)
    nll, entropy = hidden.new_empty(len(targets), dtype=kind), hidden.new_empty(len(targets), dtype=kind)
    grad = torch.empty_like(hidden) if gradient else None
    buffer = hidden.new_empty(min(rows, len(targets)), vocabulary, dtype=kind)
    for first in range(0, len(targets), rows):
        part = slice(first, min(first + rows, len(targets)))
        x = hidden[part].detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = head(x)
        error = buffer[: len(x)]
        drawn = None if uniforms is None else uniforms[part]
        _softmax_slices(logits.detach(), targets[part], drawn, step, error, nll[part], entropy[part])
        if grad is not None:
            grad[part] = torch.autograd.grad(logits, x, error.to(logits.dtype))[0]
        if on_error is not None:
            on_error(part, error)
    return Losses(nll, entropy, grad)


def _softmax_slices(
    logits: Tensor, targets: Tensor, uniforms: Tensor | None, step: int, error: Tensor, nll: Tensor, entropy: Tensor
) -> None:
    """Fill error (n, V) with softmax - one-hot, nll and entropy (n,), `step` rows at a time."""
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        raw, probabilities = logits[part].to(error.dtype), error[part]
        torch.softmax(raw, dim=-1, out=probabilities)
        # log-sum-exp from the largest probability: cheap, and never the log of a small number.
        log_sum = raw.amax(dim=-1) - probabilities.amax(dim=-1).log()
        entropy[part] = log_sum - torch.linalg.vecdot(probabilities, raw)
        chosen = (targets[part] if uniforms is None else inverse_transform(probabilities, uniforms[part]))[:, None]
        nll[part] = log_sum - raw.gather(1, chosen).squeeze(1)
        probabilities.scatter_add_(1, chosen, probabilities.new_full(chosen.shape, -1.0))


def loss_gradient(
    scoring: ScoringModel, hidden: Tensor, batch: Batch, uniforms: Tensor | None = None, weigh: Weigh | None = None
) -> tuple[Losses, Tensor]:
    """Losses of a batch's response tokens and d sum(weight * nll) / d hidden, (B, T - start, D).

    The weights are those of `weigh`, held constant, or all 1. The losses themselves are never weighted.
    """
    row = torch.from_numpy(batch.row).to(hidden.device)
    column = torch.from_numpy(batch.position - batch.start).to(hidden.device)
    target = torch.from_numpy(batch.target).to(hidden.device)
    losses = token_losses(
        scoring.head,
        hidden.detach()[row, column],
        target,
        vocabulary=scoring.vocabulary,
        gradient=True,
        uniforms=uniforms,
    )
    assert losses.grad is not None
    grad, each = torch.zeros_like(hidden), losses.grad
    if weigh is not None:
        each = (each * weigh(batch, losses.nll)[:, None]).to(each.dtype)
    grad[row, column] = each
    return losses, grad


def row_means(batch: Batch, nll: Tensor) -> Tensor:
    """A `Weigh`: 1 / (number of response tokens of the token's sequence), so that each counts by its mean loss."""
    return torch.from_numpy(1 / batch.counts[batch.row]).to(nll)


def positions(batch: Batch, device: torch.device) -> Tensor:
    """(N,) flat index of each predicting position in (B, T - start)."""
    flat = batch.row * (batch.input_ids.shape[1] - batch.start) + batch.position - batch.start
    return torch.from_numpy(flat).to(device)


def at(x: Tensor, where: Tensor) -> Tensor:
    """(B, T, d) at N flat positions -> (N, d)."""
    flat = x.flatten(0, 1)
    return flat if len(where) == len(flat) else flat.index_select(0, where)
