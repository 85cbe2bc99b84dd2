"""The loss of weighted tokens, and what it is divided by.

Over the trainable tokens t (those with a label) of a step, with nll_t = -log p(token t | what precedes it) and weight
w_t: loss = sum_t w_t nll_t / D, where D is one of

    count   the number of trainable tokens, as transformers and TRL divide. Weights have mean 1 over the whole mask, so
            the learning rate keeps its meaning, and a batch of light tokens makes a small step.
    sum     the sum of their weights: the weighted mean of the batch, whatever the scale of its weights.

For binary masks both are the same. Where nothing trains the loss is 0.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from alphatoken_curate.errors import UsageError
from alphatoken_curate.runs.schema import IGNORE_INDEX

Denominator: TypeAlias = Literal["count", "sum"]

_CHUNK = 1 << 24
"""Logits that are in float32 at one time: 64 MiB."""


def weighted_loss(
    logits: Tensor,
    labels: Tensor,
    loss_weight: Tensor,
    *,
    denominator: Denominator = "count",
    num_items: Tensor | float | None = None,
) -> Tensor:
    """The weighted loss of a batch, a scalar in nats; in float32, or in the dtype of `logits` where that is wider.

    `logits` (B, T, V) as a causal language model gives them, not shifted; `labels` (B, T) integer, -100 where nothing
    trains; `loss_weight` (B, T) floating: token-aligned, as in train/. The sum is divided by `num_items` where it is
    given, which a step over several batches needs (`count_items` of each, added up); else by `denominator` of this
    batch. Logits are read in chunks of positions: no copy of them all in float32 stands. Raises `UsageError` for shapes
    that do not fit.
    """
    if logits.shape[:-1] != labels.shape or labels.shape != loss_weight.shape:
        raise UsageError(
            f"weighted_loss: logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and loss_weight"
            f" {tuple(loss_weight.shape)}; give (B, T, V), (B, T) and (B, T)"
        )
    items = count_items(labels, loss_weight, denominator) if num_items is None else num_items
    # Labels are shifted, not logits: those would be copied.
    target = pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX).flatten().to(logits.device)
    weight = pad(loss_weight[..., 1:], (0, 1)).flatten().to(logits.device)
    size = max(1, _CHUNK // logits.shape[-1])
    parts = zip(logits.flatten(0, -2).split(size), target.split(size), weight.split(size), strict=True)
    sums = [
        checkpoint(_weighted_sum, *part, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else _weighted_sum(*part)
        for part in parts
    ]
    return divided(torch.stack(sums).sum(), items)


def count_items(labels: Tensor, loss_weight: Tensor, denominator: Denominator) -> Tensor:
    """What the loss of these tokens is divided by, a scalar: see the top of this module. Index 0 does not count.

    `labels`, `loss_weight` (..., T). Raises `UsageError` for another denominator.
    """
    trains = labels[..., 1:] != IGNORE_INDEX
    if denominator == "count":
        return trains.sum()
    if denominator == "sum":
        return loss_weight[..., 1:].float().masked_fill(~trains, 0.0).sum()
    raise UsageError(f"denominator: found {denominator!r}; give `count` or `sum`")


def divided(total: Tensor, items: Tensor | float) -> Tensor:
    """`total` / `items`, and `total`, which is then 0, where there is no item: never 0 / 0."""
    count = torch.as_tensor(items, device=total.device)
    return total / torch.where(count > 0, count, torch.ones_like(count)).to(total.dtype)


def _weighted_sum(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Of one chunk, (N, V), (N,) and (N,)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    nll = cross_entropy(logits.to(wide), target, ignore_index=IGNORE_INDEX, reduction="none")
    return (nll * weight.to(wide)).sum()
