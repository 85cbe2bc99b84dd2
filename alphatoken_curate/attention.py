"""Scaled dot-product attention of the scoring blocks, with a backward that can tell own from other positions.

Shapes: B rows, H query heads, K key/value heads, G = H / K, Q queries, T keys (T - Q of them a constant prefix),
D head size. A `Tape` says what a backward does and keeps what it found:

* `total`  every gradient; keeps the part of dK and dV that came from *other* positions (`exact`) or the
  head-averaged attention in a band (`published`, Eq. 9), whichever was asked for;
* `own`    a query sends gradient only into the key and value of its own position.

Forward values are the same in both. The function is registered with transformers' AttentionInterface, and the
scoring blocks alone are given a config that names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

NAME = "alphatoken_curate"

_SCORES_PER_BLOCK = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Attention scores held at a time: what fits the cache of a CPU core, or fills a card."""

_tapes: WeakKeyDictionary[nn.Module, Tape] = WeakKeyDictionary()


@dataclass(slots=True)
class Call:
    """What one scoring block's attention saw and what its backward left behind."""

    module: nn.Module
    key: Tensor
    value: Tensor
    cross_key: Tensor | None = None
    cross_value: Tensor | None = None
    band: list[tuple[int, int, int, Tensor]] = field(default_factory=list)
    """(first query, last query, first key column, attention (B, queries, columns)), in segment coordinates."""


@dataclass(slots=True)
class Tape:
    """Orders to, and records of, the attention calls of the scoring blocks in one forward and its backwards."""

    mode: Literal["total", "own"] = "total"
    keep_cross: bool = False
    window: int = 0
    calls: list[Call] = field(default_factory=list)

    def clear(self) -> None:
        """Forget a batch."""
        self.calls.clear()
        self.mode = "total"


def install(blocks: list[nn.Module], tape: Tape) -> Callable[[], None]:
    """Give every attention in `blocks` a copied config that names our function, and the tape it writes to.

    Returns what undoes it.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    replaced: list[tuple[Any, Any]] = []
    for block in blocks:
        for module in block.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_attn_implementation"):
                renamed = copy.copy(config)
                renamed._attn_implementation_internal = NAME
                module.config = renamed
                _tapes[module] = tape
                replaced.append((module, config))

    def undo() -> None:
        for module, config in replaced:
            module.config = config

    return undo


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Query (B, H, Q, D), key and value (B, K, T, D), mask None, bool or float (B or 1, 1 or H, Q, T).

    Returns (B, Q, H, D), as transformers' attention functions do. Mask None means causal, aligned at the last key.
    """
    tape = _tapes[module]
    rule = _Rule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sliding_window=sliding_window if attention_mask is None else None,
    )
    call = Call(module=module, key=key, value=value)
    tape.calls.append(call)
    attend: Callable[..., Tensor] = _Attention.apply
    out = attend(query, key, value, attention_mask, s_aux, rule, tape, call)
    return out, None


@dataclass(frozen=True, slots=True)
class _Rule:
    scaling: float
    softcap: float | None
    sliding_window: int | None


def _query_blocks(query: Tensor, keys: int) -> list[tuple[int, int]]:
    rows, heads, queries, _ = query.shape
    most = _SCORES_PER_BLOCK.get(query.device.type, _SCORES_PER_BLOCK["cpu"])
    size = max(16, most // (rows * heads * keys))
    return [(first, min(first + size, queries)) for first in range(0, queries, size)]


def _visible(mask: Tensor | None, rule: _Rule, span: tuple[int, int], keys: int, prefix: int) -> Tensor:
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
    query: Tensor, key: Tensor, visible: Tensor, sinks: Tensor | None, rule: _Rule, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Query (B, K, G n, D), key (B, K, t, D) -> probabilities (B, K, G, n, t) and, where capped, d capped / d raw."""
    scores = ((query * rule.scaling) @ key.transpose(-1, -2)).unflatten(2, (groups, -1))
    slope = None
    if rule.softcap is not None:
        capped = torch.tanh(scores.div_(rule.softcap))
        slope = 1 - capped * capped
        scores = capped.mul_(rule.softcap)
    seen = _by_group(visible.to(scores.device), groups)
    if seen.dtype == torch.bool:
        scores.masked_fill_(~seen, torch.finfo(scores.dtype).min)
    else:
        scores.add_(seen)
    if sinks is None:
        return torch.softmax(scores, dim=-1), slope
    column = sinks.to(scores.dtype).reshape(1, -1, groups, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1], slope


class _Attention(torch.autograd.Function):
    """Attention with recomputed probabilities: nothing of size Q x T outlives a block of queries."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        rule: _Rule,
        tape: Tape,
        call: Call,
    ) -> Tensor:
        ctx.mask, ctx.sinks, ctx.rule, ctx.tape, ctx.call = mask, sinks, rule, tape, call
        rows, heads, queries, _ = query.shape
        out = value.new_empty(rows, queries, heads, value.shape[-1])
        for span, keys in _walk(query, key, mask):
            probabilities, _ = _block(ctx, query, key, span, keys)
            mixed = probabilities.flatten(2, 3) @ value[:, :, :keys]
            out[:, span[0] : span[1]] = mixed.reshape(rows, heads, span[1] - span[0], -1).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        # (B, Q, H) -> (B, K, G, Q, 1): what each probability row's gradient sums to.
        shares = (grad_out * out).sum(-1).transpose(1, 2).unflatten(1, (key.shape[1], -1)).unsqueeze(-1)
        tape: Tape = ctx.tape
        grads = _Grads(query, key, value, tape)
        for span, keys in _walk(query, key, ctx.mask):
            probabilities, slope = _block(ctx, query, key, span, keys)
            upstream = _fold(grad_out[:, span[0] : span[1]].transpose(1, 2), key.shape[1])
            scores = (upstream @ value[:, :, :keys].transpose(-1, -2)).view_as(probabilities)
            scores.sub_(shares[:, :, :, span[0] : span[1]]).mul_(probabilities)
            if slope is not None:
                scores.mul_(slope)
            folded = _fold(query[:, :, span[0] : span[1]], key.shape[1]) * ctx.rule.scaling
            grads.query[:, :, span[0] : span[1]] = (
                (scores.flatten(2, 3) @ key[:, :, :keys])
                .mul_(ctx.rule.scaling)
                .view(query.shape[0], query.shape[1], span[1] - span[0], -1)
            )
            if tape.window and tape.mode == "total":
                ctx.call.band.append(_band(probabilities, span, grads.prefix, tape.window))
            grads.add(span, keys, scores, probabilities, folded, upstream)
        if tape.mode == "own":
            return grads.query, grads.own_key, grads.own_value, None, None, None, None, None
        if tape.keep_cross:
            ctx.call.cross_key, ctx.call.cross_value = grads.key, grads.value
            return grads.query, grads.key + grads.own_key, grads.value + grads.own_value, None, None, None, None, None
        return grads.query, grads.key, grads.value, None, None, None, None, None


def _walk(query: Tensor, key: Tensor, mask: Tensor | None) -> list[tuple[tuple[int, int], int]]:
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


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, n, D) -> (B, K, G n, D): the query heads of a key head side by side."""
    rows, heads, queries, size = x.shape
    return x.reshape(rows, kv_heads, heads // kv_heads * queries, size)


def _block(ctx: Any, query: Tensor, key: Tensor, span: tuple[int, int], keys: int) -> tuple[Tensor, Tensor | None]:
    groups = query.shape[1] // key.shape[1]
    visible = _visible(ctx.mask, ctx.rule, span, keys, key.shape[2] - query.shape[2])
    folded = _fold(query[:, :, span[0] : span[1]], key.shape[1])
    return _probabilities(folded, key[:, :, :keys], visible, ctx.sinks, ctx.rule, groups)


class _Grads:
    """Gradients of query, key and value; the constant prefix of keys keeps a gradient of zero.

    Where own positions are told apart, `key` and `value` hold what came from the others, and nothing is subtracted.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, tape: Tape) -> None:
        self.prefix = key.shape[2] - query.shape[2]
        self.groups = query.shape[1] // key.shape[1]
        self.query = torch.empty_like(query)
        self.all, self.apart = tape.mode == "total", tape.mode == "own" or tape.keep_cross
        self.key, self.value = (torch.zeros_like(x) if self.all else x for x in (key, value))
        self.own_key, self.own_value = (torch.zeros_like(x) if self.apart else x for x in (key, value))

    def add(
        self, span: tuple[int, int], keys: int, scores: Tensor, probabilities: Tensor, query: Tensor, out: Tensor
    ) -> None:
        """Add a block: scores and probabilities (B, K, G, n, keys), query (B, K, G n, D), out the output's gradient."""
        if self.apart:
            first, last = self.prefix + span[0], self.prefix + span[1]
            for full, own, x in ((scores, self.own_key, query), (probabilities, self.own_value, out)):
                square = full[..., first:last]
                own[:, :, first:last] = self._own(square, x)
                square.diagonal(dim1=-2, dim2=-1).zero_()
        if self.all:
            live = slice(self.prefix, keys)
            self.key[:, :, live] += scores[..., live].flatten(2, 3).transpose(-1, -2) @ query
            self.value[:, :, live] += probabilities[..., live].flatten(2, 3).transpose(-1, -2) @ out

    def _own(self, square: Tensor, x: Tensor) -> Tensor:
        diagonal = square.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        summed: Tensor = (diagonal * x.unflatten(2, (self.groups, -1))).sum(2)
        return summed


def _band(probabilities: Tensor, span: tuple[int, int], prefix: int, window: int) -> tuple[int, int, int, Tensor]:
    """Attention averaged over query heads where 0 < query - key <= window and the key is not of the prefix (Eq. 9)."""
    first, last = span
    start = max(0, first - window)
    mean = probabilities[..., prefix + start : prefix + last].mean(dim=(1, 2))
    distance = torch.arange(first, last)[:, None] - torch.arange(start, last)[None, :]
    inside = ((distance > 0) & (distance <= window)).to(mean.device)
    return first, last, start, mean * inside
