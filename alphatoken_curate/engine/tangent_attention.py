"""Scaled dot-product attention in forward mode: its output and, for each direction, the tangent of its output.

With probabilities P, scores S = scaling Q K^T, output O = P V and a direction's tangents marked by ',
S' = scaling (Q' K^T + Q K'^T) and O' = (P * S') V + P V' - (P * S' summed over keys) O, where a sink counts as a key
whose value is zero. Probabilities are walked in
blocks of queries: nothing of size Q x T outlives a block. Shapes are those of `probabilities`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from alphatoken_curate.engine.precision import wide
from alphatoken_curate.engine.probabilities import Rule, fold, in_block, plain_rule, put, walk
from alphatoken_curate.engine.tangents import Dual, NoTangentError, dual, parts, rule


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, how: Rule) -> Dual:
    """Query (B, H, Q, D), key and value (B, K, T, D), sinks (H,), any of them `Dual` -> (B, Q, H, D)."""
    if isinstance(mask, Dual):
        raise NoTangentError("attention whose mask moves")
    (query, queries), (key, keys), (value, values) = (parts(x) for x in (query, key, value))
    sinks, sinking = (None, ()) if sinks is None else parts(sinks)
    rows, heads, length, _ = query.shape
    groups = key.shape[1]
    out = value.new_empty(rows, length, heads, value.shape[-1])
    found = [torch.empty_like(out) for _ in queries or keys or values or sinking]
    for (first, last), seen in walk(query, key, mask):
        part, near = query[:, :, first:last], (key[:, :, :seen], value[:, :, :seen])
        weights, slope = in_block(query, key, mask, sinks, how, (first, last), seen)
        scale = weights * how.scaling if slope is None else weights * slope * how.scaling
        folded = weights.flatten(2, 3).to(value.dtype)
        mixed = folded @ near[1]
        put(out.transpose(1, 2), first, last, mixed)
        for n, moved in enumerate(found):
            terms = [fold(queries[n][:, :, first:last], groups) @ near[0].transpose(-1, -2)] if queries else []
            if keys:
                terms.append(fold(part, groups) @ keys[n][:, :, :seen].transpose(-1, -2))
            tangent = _through_scores(terms, scale.flatten(2, 3), near[1], mixed)
            if values:
                tangent.add_(folded @ values[n][:, :, :seen])
            if sinking:
                tangent.sub_(_sunk(weights, sinking[n]) * mixed)
            put(moved.transpose(1, 2), first, last, tangent)
    return dual(out, found)


def _sunk(weights: Tensor, sinking: Tensor) -> Tensor:
    """What a moving sink takes from the keys' probabilities (B, K, G, n, t), in all: (B, K, G n, 1)."""
    taken = 1 - weights.sum(-1, keepdim=True)
    return (taken * sinking.to(taken.dtype).view(1, *weights.shape[1:3], 1, 1)).flatten(2, 3)


def _through_scores(terms: list[Tensor], scale: Tensor, value: Tensor, mixed: Tensor) -> Tensor:
    """(P * S') V - (P * S' summed over keys) O of a block; `terms` add up to S' / scaling, and `scale` is P scaling."""
    if not terms:
        return torch.zeros_like(mixed)
    score = wide(terms[0])
    for term in terms[1:]:
        score.add_(term)
    score.mul_(scale)
    return (score.to(value.dtype) @ value).sub_(score.sum(-1, keepdim=True) * mixed)


@rule("moving_attention")
def _scoring_attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What blocks of S call by way of `attention.attention_forward`."""
    return attend(*args)


@rule("scaled_dot_product_attention")
def _plain_attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Attention of torch itself, which blocks outside S call; on a CPU it has no forward-mode formula of its own."""
    query, key, value, mask, dropout, causal, scale, _ = operands(*args, **kwargs)
    if dropout:
        raise NoTangentError("scaled_dot_product_attention with dropout")
    mask, how = plain_rule(query, key, mask, causal, scale)
    out, tangents = parts(attend(query, key, value, mask, None, how))
    return dual(out.transpose(1, 2), (t.transpose(1, 2) for t in tangents))


def operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Iterable[Any]:
    """Arguments by the names torch gives them."""
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
