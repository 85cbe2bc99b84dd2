"""Token losses and their gradient in the last hidden state, in chunks of positions: no T x V tensor exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.tokens.draws import inverse_transform
from alphatoken_curate.tokens.plan import Batch

Head = Callable[[Tensor], Tensor]
"""Last hidden states (n, D) -> logits (n, V), with the model's own scaling and soft caps."""

Weigh = Callable[[Batch, Tensor], Tensor]
"""A batch and the nll (N,) of its response tokens -> the weight (N,) of each in a loss, held constant."""

OnError = Callable[[slice, Tensor], None]
"""Called with a chunk of the N tokens and d nll / d logits there, (n, V), which is overwritten by the next chunk's."""

_BYTES_PER_CHUNK = {"cpu": 24 << 20, "cuda": 1 << 30}
"""Bytes of the logits held at a time, and of their gradient. On a CPU, past 32 MiB, malloc maps new pages each time."""

_LOGITS_PER_SLICE = {"cpu": 1 << 17, "cuda": 1 << 28}
"""Logits whose softmax each thread takes at a time: what stays in the cache of a core, or everything on a card."""


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
    logits_dtype: torch.dtype = torch.float32,
) -> Losses:
    """Losses of `targets` (N,) int64 predicted from `hidden` (N, D).

    With `uniforms` (N,) float64 in [0, 1) the targets are replaced by draws from the model's own prediction.
    `logits_dtype`: what the head returns, by which chunks are sized where `on_error` needs no wider error.
    """
    kind = torch.promote_types(hidden.dtype, torch.float32)
    nll, entropy = hidden.new_empty(len(targets), dtype=kind), hidden.new_empty(len(targets), dtype=kind)
    grad = torch.empty_like(hidden) if gradient else None
    buffer: Tensor | None = None
    rows = chunk_rows(hidden.device, vocabulary, kind if on_error is not None else logits_dtype)
    for first in range(0, len(targets), rows):
        part = slice(first, min(first + rows, len(targets)))
        x = hidden[part].detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = head(x)
        if buffer is None:
            needed = len(x) if gradient or on_error is not None else 0
            buffer = logits.new_empty(needed, vocabulary, dtype=logits.dtype if on_error is None else kind)
        error = buffer[: len(x)]
        drawn = None if uniforms is None else uniforms[part]
        _softmax_slices(logits.detach(), targets[part], drawn, error, nll[part], entropy[part])
        if grad is not None:
            grad[part] = torch.autograd.grad(logits, x, error.to(logits.dtype))[0]
        if on_error is not None:
            on_error(part, error)
        del logits  # before the next are made
    return Losses(nll, entropy, grad)


def chunk_rows(device: torch.device, vocabulary: int, kind: torch.dtype) -> int:
    """Positions whose logits are held at a time."""
    return max(1, _BYTES_PER_CHUNK.get(device.type, _BYTES_PER_CHUNK["cpu"]) // (vocabulary * kind.itemsize))


def _softmax_slices(
    logits: Tensor, targets: Tensor, uniforms: Tensor | None, error: Tensor, nll: Tensor, entropy: Tensor
) -> None:
    """Fill nll and entropy (n,), and error (n, V) with softmax - one-hot unless it is empty, some rows at a time.

    All is computed in the dtype of nll: in `error` itself, or in a piece of scratch where that is narrower or empty.
    """
    device, vocabulary = logits.device.type, logits.shape[1]
    threads = torch.get_num_threads() if device == "cpu" else 1
    step = max(1, threads * _LOGITS_PER_SLICE.get(device, _LOGITS_PER_SLICE["cpu"]) // vocabulary)
    scratch = None if error.dtype == nll.dtype and len(error) else nll.new_empty(min(step, len(logits)), vocabulary)
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        raw = logits[part].to(nll.dtype)
        probabilities = error[part] if scratch is None else scratch[: len(raw)]
        torch.softmax(raw, dim=-1, out=probabilities)
        # log-sum-exp from the largest probability: cheap, and never the log of a small number.
        log_sum = raw.amax(dim=-1) - probabilities.amax(dim=-1).log()
        entropy[part] = log_sum - torch.linalg.vecdot(probabilities, raw)
        chosen = (targets[part] if uniforms is None else inverse_transform(probabilities, uniforms[part]))[:, None]
        nll[part] = log_sum - raw.gather(1, chosen).squeeze(1)
        if len(error):
            probabilities.scatter_add_(1, chosen, probabilities.new_full(chosen.shape, -1.0))
            # Where they are the same memory there is nothing to copy.
            if scratch is not None:
                error[part] = probabilities


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
        logits_dtype=scoring.logits_dtype,
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
