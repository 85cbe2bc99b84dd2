"""Scaled dot-product attention of the scoring blocks, with a backward that can tell own from other positions.

Shapes: B rows, H query heads, K key/value heads, G = H / K, Q queries, T keys (T - Q of them a constant prefix),
D head size. A `Tape` says what a backward does and keeps what it found:

* `total`  every gradient; keeps the part of dK and dV that came from *other* positions (`exact`) or the
  head-averaged attention in a band (`published`, Eq. 9), whichever was asked for;
* `own`    a query sends gradient only into the key and value of its own position.

Forward values are the same in both. In a narrow model products are narrow, and scores and probabilities float32, as in
the attention of torch. The function is registered with transformers' AttentionInterface, and the scoring blocks alone
are given a config that names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from alphatoken_curate.engine.precision import wide, wide_zeros
from alphatoken_curate.engine.probabilities import Rule, fold, in_block, walk

NAME = "alphatoken_curate"

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


def listen(module: nn.Module, tape: Tape) -> None:
    """Have the attention of a module that calls `attention_forward` written to a tape."""
    _tapes[module] = tape


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
    rule = Rule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sliding_window=sliding_window if attention_mask is None else None,
    )
    if has_torch_function((query, key, value)):
        return moving_attention(query, key, value, attention_mask, s_aux, rule), None
    tape = _tapes[module]
    call = Call(module=module, key=key, value=value)
    tape.calls.append(call)
    attend: Callable[..., Tensor] = _Attention.apply
    out = attend(query, key, value, attention_mask, s_aux, rule, tape, call)
    return out, None


def moving_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, rule: Rule
) -> Tensor:
    """Attention of tensors that carry tangents, which know how (`tangent_attention`)."""
    given = (query, key, value, mask, sinks, rule)
    out: Tensor = handle_torch_function(moving_attention, given[:3], *given)
    return out


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
        rule: Rule,
        tape: Tape,
        call: Call,
    ) -> Tensor:
        ctx.mask, ctx.sinks, ctx.rule, ctx.tape, ctx.call = mask, sinks, rule, tape, call
        rows, heads, queries, _ = query.shape
        out = value.new_empty(rows, queries, heads, value.shape[-1])
        for span, keys in walk(query, key, mask):
            probabilities, _ = in_block(query, key, ctx.mask, ctx.sinks, ctx.rule, span, keys)
            mixed = probabilities.flatten(2, 3).to(value.dtype) @ value[:, :, :keys]
            out[:, span[0] : span[1]] = mixed.reshape(rows, heads, span[1] - span[0], -1).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        # (B, Q, H) -> (B, K, G, Q, 1): what each probability row's gradient sums to.
        shares = wide(grad_out * out).sum(-1).transpose(1, 2).unflatten(1, (key.shape[1], -1)).unsqueeze(-1)
        tape: Tape = ctx.tape
        grads = _Grads(query, key, value, tape)
        sunk = torch.zeros_like(ctx.sinks) if ctx.needs_input_grad[4] else None
        for span, keys in walk(query, key, ctx.mask):
            probabilities, slope = in_block(query, key, ctx.mask, ctx.sinks, ctx.rule, span, keys)
            upstream = fold(grad_out[:, span[0] : span[1]].transpose(1, 2), key.shape[1])
            scores = wide(upstream @ value[:, :, :keys].transpose(-1, -2)).view_as(probabilities)
            share = shares[:, :, :, span[0] : span[1]]
            scores.sub_(share).mul_(probabilities)
            if sunk is not None:
                # A sink is a key whose value is zero: all it gets is its share.
                sunk.sub_(((1 - probabilities.sum(-1, keepdim=True)) * share).sum((0, 3, 4)).flatten())
            if slope is not None:
                scores.mul_(slope)
            scores, weights = scores.to(key.dtype), probabilities.to(value.dtype)
            folded = fold(query[:, :, span[0] : span[1]], key.shape[1]) * ctx.rule.scaling
            grads.query[:, :, span[0] : span[1]] = (
                (scores.flatten(2, 3) @ key[:, :, :keys])
                .mul_(ctx.rule.scaling)
                .view(query.shape[0], query.shape[1], span[1] - span[0], -1)
            )
            if tape.window and tape.mode == "total":
                ctx.call.band.append(_band(weights, span, grads.prefix, tape.window))
            grads.add(span, keys, scores, weights, folded, upstream)
        if tape.mode == "own":
            found = grads.own_key, grads.own_value
        elif tape.keep_cross:
            ctx.call.cross_key, ctx.call.cross_value = grads.key.to(key.dtype), grads.value.to(value.dtype)
            found = grads.key + grads.own_key, grads.value + grads.own_value
        else:
            found = grads.key, grads.value
        return grads.query, found[0].to(key.dtype), found[1].to(value.dtype), None, sunk, None, None, None


class _Grads:
    """Gradients of query, key and value; the constant prefix of keys keeps a gradient of zero.

    What key and value get from block after block is summed in float32 at least.
    Where own positions are told apart, `key` and `value` hold what came from the others, and nothing is subtracted.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, tape: Tape) -> None:
        self.prefix = key.shape[2] - query.shape[2]
        self.groups = query.shape[1] // key.shape[1]
        self.query = torch.empty_like(query)
        self.all, self.apart = tape.mode == "total", tape.mode == "own" or tape.keep_cross
        self.key, self.value = (wide_zeros(x) if self.all else x for x in (key, value))
        self.own_key, self.own_value = (wide_zeros(x) if self.apart else x for x in (key, value))

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
