"""Linear maps, attention and token losses whose gradient is differentiated once more, with no more than that takes.

With z = W x, error dz = dL / dz and a the direction of W, the derivative of <a, dL / dW> takes no dL / dW: of nine
products of matrices eight are left, and W's own part is added where it is wanted, not handed through the graph.
Attention keeps no probabilities: the second derivative makes them again, in blocks of queries, from

    P = softmax(S), S = scaling Q K^T, dP = dO V^T, dS = P * (dP - sum(P * dP)),  and what moves, marked by ', along
    (Q', K', V'): P' = P * (S' - sum(P * S')),  dS' = P' * (dP - sum(P * dP)) + P * (dP' - sum(P * dP)')

since mixed derivatives are equal: that of <Q', dQ> + <K', dK> + <V', dV> by Q is (dQ)', and by dO is O'.
Of the losses of N tokens over V logits, logits alone are kept; softmax is made again.
Shapes are those of `probabilities`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from alphatoken_curate.engine.probabilities import fold, in_block, plain_rule, put, walk
from alphatoken_curate.engine.tangent_attention import operands


class Twice(TorchFunctionMode):
    """Inside this block linear maps of some weights, and torch's own attention, are those of this module.

    The derivative by such a weight, the second of a graph or the first of none, is added to `into`, and torch is told
    of none. Of all else, and where a weight is met in another function too, it is torch's. With `dtype` these maps
    multiply numbers rounded to it, as a training by autocast does; all else, and every sum, is as wide as it was.
    """

    def __init__(self, weights: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weights, self.dtype = set(weights), dtype
        self.into: dict[Tensor, Tensor] = {}
        """Where to add it, for each weight; to be set before it is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and len(args) > 1 and args[1] in self.weights:
            return self._linear(*args, **kwargs)
        if func is torch.addmm and not kwargs and args[2] in self.weights:  # the maps of GPT-2, (d_in, d_out)
            return _Linear.apply(args[1], args[2], True, self) + args[0]  # type: ignore[no-untyped-call]
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value, mask, dropout, causal, scale, _ = operands(*args, **kwargs)
            if not dropout and not (mask is not None and mask.requires_grad):
                return _Attention.apply(query, key, value, mask, causal, scale)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = _Linear.apply(x, weight, False, self)  # type: ignore[no-untyped-call]
        return out if bias is None else out + bias

    def product(self, one: Tensor, other: Tensor) -> Tensor:
        """Of matrices, or of many and one."""
        if self.dtype is None:
            return one @ other
        return (one.to(self.dtype) @ other.to(self.dtype)).to(one.dtype)

    def add_to(self, weight: Tensor, turned: bool, error: Tensor, x: Tensor) -> None:
        """Add what a map's weight gets of its outputs' cotangents and its inputs."""
        self.add_product(_laid(self.into[weight], turned), _flat(error).T, _flat(x))

    def add_product(self, into: Tensor, one: Tensor, other: Tensor) -> None:
        """Add the product of two matrices to a third."""
        if self.dtype is None:
            into.addmm_(one, other)
        else:
            into.add_(self.product(one, other))


def _laid(matrix: Tensor, turned: bool) -> Tensor:
    """(d_out, d_in)."""
    return matrix.T if turned else matrix


def token_nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log p of targets (N,) int64 by logits (N, V): (N,) in nats, to be differentiated twice."""
    nll: Tensor = _Nll.apply(logits, target)  # type: ignore[no-untyped-call]
    return nll


class _Nll(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        return nn.functional.cross_entropy(logits, target, reduction="none")

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        return _NllBack.apply(weight, *ctx.saved_tensors), None  # type: ignore[no-untyped-call]


class _NllBack(Function):
    """The gradient by the logits, w (p - onehot)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(weight, logits, target)
        error = torch.softmax(logits, dim=-1)
        error[torch.arange(len(target), device=target.device), target] -= 1
        return error.mul_(weight[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, logits, target = ctx.saved_tensors
        p = torch.softmax(logits, dim=-1)
        mean = torch.linalg.vecdot(p, along)
        to_weight = mean - along.gather(1, target[:, None]).squeeze(1)
        return to_weight, p.mul_(along - mean[:, None]).mul_(weight[:, None]), None


class _Linear(Function):
    """`turned`: the weight is (d_in, d_out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turned: bool, mode: Twice) -> Tensor:
        ctx.how = turned, mode
        ctx.save_for_backward(x, weight)
        return mode.product(x, _laid(weight, turned).T)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x, weight), (turned, mode) = ctx.saved_tensors, ctx.how
        if torch.is_grad_enabled():
            return *_LinearBack.apply(error, x, weight, turned, mode), None, None  # type: ignore[no-untyped-call]
        mode.add_to(weight, turned, error, x)
        return mode.product(error, _laid(weight, turned)) if ctx.needs_input_grad[0] else None, None, None, None


class _LinearBack(Function):
    """The gradient by the input, and a placeholder of that by the weight, which is only ever differentiated."""

    @staticmethod
    def forward(
        ctx: Any, error: Tensor, x: Tensor, weight: Tensor, turned: bool, mode: Twice
    ) -> tuple[Tensor | None, Tensor]:
        ctx.how = turned, mode
        ctx.save_for_backward(error, x, weight)
        ctx.set_materialize_grads(False)
        to_x = mode.product(error, _laid(weight, turned)) if x.requires_grad else None
        return to_x, weight.new_zeros(()).expand_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_x: Tensor | None, along: Tensor | None) -> tuple[Tensor | None, ...]:
        (error, x, weight), (turned, mode) = ctx.saved_tensors, ctx.how
        of_x = None
        if to_x is None:
            to_error = error.new_zeros(error.shape)
        else:
            to_error = mode.product(to_x, _laid(weight, turned).T)
            mode.add_to(weight, turned, error, to_x)
        if along is not None:
            along = _laid(along, turned)
            mode.add_product(_flat(to_error), _flat(x), along.T)
            of_x = mode.product(error, along) if ctx.needs_input_grad[1] else None
        return to_error, of_x, None, None, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        ctx.how = mask, causal, scale
        ctx.save_for_backward(query, key, value)
        return _attend(query, key, value, *ctx.how)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Any:
        return *_AttentionBack.apply(error, *ctx.saved_tensors, *ctx.how), None, None, None  # type: ignore[no-untyped-call]


class _AttentionBack(Function):
    @staticmethod
    def forward(
        ctx: Any, error: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *how: Any
    ) -> tuple[Tensor, ...]:
        ctx.how = mask, *how
        ctx.save_for_backward(error, query, key, value)
        with torch.enable_grad():
            query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
            return torch.autograd.grad(_attend(query, key, value, mask, *how), (query, key, value), error)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *along: Tensor) -> Any:
        error, query, key, value = ctx.saved_tensors
        return *_second(error, query, key, value, along, *ctx.how), None, None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    with torch._C.DisableTorchFunction():  # a backward may run inside the mode, which would send it here again
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
        )


def _second(
    error: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    along: tuple[Tensor, ...],
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """How output and gradients move along (Q', K', V'): (O', (dQ)', (dK)', (dV)')."""
    mask, rule = plain_rule(query, key, mask, causal, scale)
    heads, scaling = key.shape[1], rule.scaling
    out, to_query = torch.empty_like(error), torch.empty_like(query)
    to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
    for (first, last), seen in walk(query, key, mask):
        p = in_block(query, key, mask, None, rule, (first, last), seen)[0].flatten(2, 3)
        q, d_o, q_moves = (fold(x[:, :, first:last], heads) for x in (query, error, along[0]))
        k, v, k_moves, v_moves = (x[:, :, :seen] for x in (key, value, *along[1:]))
        s_moves = (q_moves @ k.mT).add_(q @ k_moves.mT).mul_(scaling)
        p_moves = s_moves.sub_(_rowwise(p, s_moves)).mul_(p)
        off = d_o @ v.mT
        share = _rowwise(p, off)
        off_moves = d_o @ v_moves.mT
        ds_moves = off_moves.sub_(_rowwise(p_moves, off) + _rowwise(p, off_moves)).mul_(p)
        ds_moves.addcmul_(p_moves, off.sub_(share))
        ds = off.mul_(p)
        put(out, first, last, (p_moves @ v).add_(p @ v_moves))
        put(to_query, first, last, (ds_moves @ k).add_(ds @ k_moves).mul_(scaling))
        to_key[:, :, :seen].add_((ds_moves.mT @ q).add_(ds.mT @ q_moves), alpha=scaling)
        to_value[:, :, :seen].add_(p_moves.mT @ d_o)
    return out, to_query, to_key, to_value


def _rowwise(one: Tensor, other: Tensor) -> Tensor:
    """Sum over keys of the product, (B, K, G n, 1)."""
    found: Tensor = torch.linalg.vecdot(one, other)
    return found.unsqueeze(-1)
