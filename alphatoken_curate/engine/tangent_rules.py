"""How the functions that models are made of are differentiated: linear, bilinear and elementwise ones (`tangents`).

Importing this module registers them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor

from alphatoken_curate.engine.tangents import (
    Dual,
    NoTangentError,
    by_torch,
    call,
    count_directions,
    dual,
    each_leaf,
    floats,
    leaves,
    rule,
    tangents_of,
    torchs_own,
    with_tangents,
)

# ----------------------------------------------------------------------------------------------------- rules: linear


@rule("__get__")
def _attribute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    turns = func.__self__.__name__ in ("T", "mT", "H", "mH")  # type: ignore[attr-defined]
    return _linear_in_first(func, args, kwargs) if turns else func(*args, **kwargs)


@rule(
    *(
        "view",
        "reshape",
        "view_as",
        "reshape_as",
        "transpose",
        "permute",
        "contiguous",
        "unsqueeze",
        "squeeze",
        "flatten",
    ),
    *(
        "unflatten",
        "expand",
        "expand_as",
        "__getitem__",
        "index_select",
        "select",
        "narrow",
        "chunk",
        "split",
        "unbind",
    ),
    *("tensor_split", "movedim", "swapaxes", "t", "repeat", "repeat_interleave", "flip", "roll", "gather", "clone"),
    *("to", "float", "double", "half", "bfloat16", "type_as", "neg", "__neg__", "mean", "sum", "cumsum", "dropout"),
    *("tril", "triu", "broadcast_to", "split_with_sizes", "unfold", "diagonal", "take_along_dim"),
)
def _linear_in_first(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Functions that are linear in their first argument, and take no other that carries tangents."""
    if not isinstance(args[0], Dual) or _carries((args[1:], tuple(kwargs.values()))):
        return by_torch(func, args, kwargs)
    primal = func(*args, **kwargs)
    if not any(floats(x) for x in leaves(primal)):
        return primal
    return each_leaf(_dual_of, primal, *(func(t, *args[1:], **kwargs) for t in args[0].tangents))


def _dual_of(primal: Tensor, *tangents: Tensor) -> Dual:
    """`dual` of tangents given one by one."""
    return dual(primal, tangents)


def _carries(nest: Any) -> bool:
    return any(isinstance(x, Dual) for x in leaves(nest))


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _joining(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    given = args[0] if args else kwargs["tensors"]
    rest = {key: value for key, value in kwargs.items() if key != "tensors"}
    primal = func(given, *args[1:], **rest)
    each = zip(*(tangents_of(x) or [torch.zeros_like(x)] * count_directions(args, kwargs) for x in given), strict=True)
    return dual(primal, (func(list(one), *args[1:], **rest).to(primal.dtype) for one in each))


@rule("masked_fill", "where")
def _choosing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Where a mask says so, something else: its tangents, or none."""
    if kwargs or len(args) != 3:
        return by_torch(func, args, kwargs)
    primal, n = func(*args), count_directions(args, kwargs)
    each = zip(*(tangents_of(x) or [_nothing(x)] * n for x in args), strict=True)
    return dual(primal, (func(*given).to(primal.dtype) for given in each))


def _nothing(x: Any) -> Any:
    """What stands for an argument in the tangent: a mask as it is, zero for a value."""
    if isinstance(x, Tensor):
        return x if x.dtype == torch.bool else torch.zeros_like(x)
    return 0.0


@rule("detach")
def _detach(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


@rule("requires_grad_")
def _asked(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Hooks of a training ask embeddings for a gradient: of no concern to tangents, which need no graph."""
    return args[0]


@rule("zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "new_full")
def _constant(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A tensor that stands still so far; what is written into it later, through views too, may move."""
    primal = func(*args, **kwargs)
    if not floats(primal):
        return primal
    return dual(primal, [torch.zeros_like(primal) for _ in range(count_directions(args, kwargs))])


@rule("__setitem__")
def _assign(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    target, index, value = args
    held = with_tangents(target, count_directions(args, kwargs))
    func(held, index, value)
    for n, t in enumerate(held.tangents):
        t[index] = value.tangents[n] if isinstance(value, Dual) else 0.0


@rule("copy_")
def _copy(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Dual:
    source = tangents_of(args[1])
    held = with_tangents(args[0], count_directions(args, kwargs))
    func(held, *args[1:], **kwargs)
    for n, t in enumerate(held.tangents):
        t.copy_(source[n]) if source else t.zero_()
    return held


# --------------------------------------------------------------------------------------------------- rules: bilinear


@rule("add", "__add__", "__radd__", "sub", "subtract", "__sub__", "__rsub__", "rsub")
def _adding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return by_torch(func, args, kwargs)
    one, other = args
    primal = func(one, other)
    if not (isinstance(one, Dual) and isinstance(other, Dual)):
        sign = -1 if func.__name__ in _MINUS[0 if isinstance(other, Dual) else 1] else 1
        tangents = (one if isinstance(one, Dual) else other).tangents
        return dual(primal, ((t if sign == 1 else -t).expand(primal.shape).to(primal.dtype) for t in tangents))
    return dual(primal, (func(a, b) for a, b in zip(one.tangents, other.tangents, strict=True)))


_MINUS = (("sub", "subtract", "__sub__"), ("rsub", "__rsub__"))
"""Functions that take the second argument away, and those that take the first away."""


@rule("mul", "multiply", "__mul__", "__rmul__", "matmul", "__matmul__", "bmm", "mm")
def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """(a b)' = a' b + a b', for products of any kind; no operand is turned round."""
    if kwargs or len(args) != 2:
        return by_torch(func, args, kwargs)
    one, other = args
    primal = func(one, other)
    if not isinstance(other, Dual):
        return dual(primal, (func(t, other) for t in one.tangents))
    if not isinstance(one, Dual):
        return dual(primal, (func(one, t) for t in other.tangents))
    both = zip(one.tangents, other.tangents, strict=True)
    return dual(primal, (func(a, other).add_(func(one, b)) for a, b in both))


@rule("div", "true_divide", "__truediv__")
def _quotient(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if kwargs or len(args) != 2 or isinstance(args[1], Dual):
        return by_torch(func, args, kwargs)
    return dual(func(*args), (func(t, args[1]) for t in args[0].tangents))


@rule("linear")
def _linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """W h + b: its tangent W h' + M h + b', the products added up in place."""
    x, weight, bias = _linear_operands(*args, **kwargs)
    primal = func(x, weight, bias)
    flat = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    found = []
    for n in range(count_directions(args, kwargs)):
        tangent = func(x.tangents[n], weight) if isinstance(x, Dual) else None
        if isinstance(weight, Dual):
            moved = weight.tangents[n]
            if tangent is None:
                tangent = func(x, moved)
            else:
                tangent.view(len(flat), -1).addmm_(flat, moved.t())
        if isinstance(bias, Dual):
            moved = bias.tangents[n]
            tangent = moved.expand(primal.shape) if tangent is None else tangent.add_(moved)
        found.append(tangent)
    return dual(primal, found)  # type: ignore[arg-type]


def _linear_operands(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


@rule("embedding")
def _embedding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Dual:
    """Rows of a moving table. A table's padding row has no gradient in torch, and so it does not move here."""
    ids, weight, padding = _embedding_operands(*args, **kwargs)
    found = [func(ids, t) for t in weight.tangents]
    if padding is not None:
        still = (ids == padding % len(weight)).unsqueeze(-1)
        found = [t.masked_fill_(still, 0.0) for t in found]
    return dual(func(*args, **kwargs), found)


def _embedding_operands(input: Any, weight: Any, padding_idx: int | None = None, *_: Any, **__: Any) -> Any:
    return input, weight, padding_idx


# ----------------------------------------------------------------------------------------------- rules: elementwise


@rule(
    *(
        "silu",
        "gelu",
        "relu",
        "relu6",
        "sigmoid",
        "tanh",
        "exp",
        "log",
        "log1p",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "square",
    ),
    *("pow", "__pow__", "softplus", "logsigmoid", "leaky_relu", "elu", "mish", "erf", "sin", "cos", "abs", "clamp"),
    *("clamp_min", "clamp_max", "hardtanh", "hardswish", "hardsigmoid"),
)
def _elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """f(x)' = f'(x) x': the slope is torch's own tangent along ones, computed once for all directions."""
    x, rest = args[0], args[1:]
    if not isinstance(x, Dual) or any(isinstance(a, Tensor) for a in leaves((rest, tuple(kwargs.values())))):
        return by_torch(func, args, kwargs)
    if kwargs.get("inplace"):
        raise NoTangentError(f"{func.__name__} with inplace=True")
    with torchs_own():
        out = call(func, (forward_mode.make_dual(x.as_subclass(Tensor), torch.ones_like(x)), *rest), kwargs)
        primal, slope = forward_mode.unpack_dual(out)
    return dual(primal, (slope * t for t in x.tangents)) if slope is not None else primal


@rule("softmax")
def _softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    primal = func(*args, **kwargs)
    dim = kwargs["dim"] if "dim" in kwargs else args[1]
    moved = (primal * t for t in args[0].tangents)
    return dual(primal, (m - primal * m.sum(dim, keepdim=True) for m in moved))
