"""Attention probabilities, block by block of queries: what attention is made of, forward and backward.

Shapes: B rows, H query heads, K key/value heads, G = H / K, Q queries, T keys (T - Q of them a constant prefix),
D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alphatoken_curate.engine.precision import wide

SCORES_PER_BLOCK = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Attention scores held at a time: what fits the cache of a CPU core, or fills a card."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores are made: their scaling, soft cap, and the window where no mask says it."""

    scaling: float
    softcap: float | None
    sliding_window: int | None


def _query_blocks(query: Tensor, keys: int) -> list[tuple[int, int]]:
    rows, heads, queries, _ = query.shape
    most = SCORES_PER_BLOCK.get(query.device.type, SCORES_PER_BLOCK["cpu"])
    size = max(16, most // (rows * heads * keys))
    return [(first, min(first + size, queries)) for first in range(0, queries, size)]


def _visible(mask: Tensor | None, rule: Rule, span: tuple[int, int], keys: int, prefix: int) -> Tensor:
    """What queries span[0]..span[1] may see of the first `keys` keys, bool or float; broadcasts to (B, H, n, keys)."""
    if mask is not None:
        return mask[..., span[0] : span[1], :keys]
    rows = torch.arange(span[0] + prefix, span[1] + prefix)[:, None]
    columns = torch.arange(keys)[None, :]
    seen = columns <= rows
    if rule.sliding_window is not None:
        seen &= columns > rows - rule.sliding_window
    return seen[None, None]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B or 1, H or 1, n, T) -> (B or 1, K or 1, G or 1, n, T)."""
    rows, heads, queries, keys = x.shape
    return x.reshape(rows, 1, 1, queries, keys) if heads == 1 else x.reshape(rows, -1, groups, queries, keys)


def _probabilities(
    query: Tensor, key: Tensor, visible: Tensor, sinks: Tensor | None, rule: Rule, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Query (B, K, G n, D), key (B, K, t, D) -> probabilities (B, K, G, n, t) and, where capped, d capped / d raw.

    Both are float32 at least.
    """
    scores = wide((query * rule.scaling) @ key.transpose(-1, -2)).unflatten(2, (groups, -1))
    slope = None
    if rule.softcap is not None:
        capped = torch.tanh(scores.div_(rule.softcap))
        slope = 1 - capped * capped
        scores = capped.mul_(rule.softcap)
    seen = _by_group(visible.to(scores.device), groups)
    if seen.dtype == torch.bool:
        # Any score plus the least number is the least number; filling through a mask that broadcasts is slow.
        seen = torch.zeros_like(seen, dtype=scores.dtype).masked_fill_(~seen, torch.finfo(scores.dtype).min)
    scores.add_(seen)
    if sinks is None:
        return torch.softmax(scores, dim=-1), slope
    column = sinks.to(scores.dtype).reshape(1, -1, groups, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1], slope


def walk(query: Tensor, key: Tensor, mask: Tensor | None) -> list[tuple[tuple[int, int], int]]:
    """Blocks of queries, and how many leading keys each may see: to its last query's own, unless a mask says more."""
    keys = key.shape[2]
    prefix = keys - query.shape[2]
    return [
        (
            span,
            keys
            if mask is not None and _any_seen(mask[..., span[0] : span[1], prefix + span[1] :])
            else prefix + span[1],
        )
        for span in _query_blocks(query, keys)
    ]


def _any_seen(mask: Tensor) -> bool:
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(seen.any())


def fold(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, n, D) -> (B, K, G n, D): the query heads of a key head side by side."""
    rows, heads, queries, size = x.shape
    return x.reshape(rows, kv_heads, heads // kv_heads * queries, size)


def put(into: Tensor, first: int, last: int, folded: Tensor) -> None:
    """Write (B, K, G n, D) of queries first..last-1 into (B, H, Q, D): `fold` undone."""
    into[:, :, first:last] = folded.reshape(into.shape[0], into.shape[1], last - first, into.shape[3])


def plain_rule(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor | None, Rule]:
    """Mask and rule of torch's own attention: without a mask every key is seen, unless it is causal."""
    if mask is None and not causal:
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    return mask, Rule(scaling=scaling, softcap=None, sliding_window=None)


def in_block(
    query: Tensor, key: Tensor, mask: Tensor | None, sinks: Tensor | None, rule: Rule, span: tuple[int, int], keys: int
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, K, G, n, keys) of queries span[0]..span[1], and d capped / d raw where scores are capped."""
    groups = query.shape[1] // key.shape[1]
    visible = _visible(mask, rule, span, keys, key.shape[2] - query.shape[2])
    folded = fold(query[:, :, span[0] : span[1]], key.shape[1])
    return _probabilities(folded, key[:, :, :keys], visible, sinks, rule, groups)
