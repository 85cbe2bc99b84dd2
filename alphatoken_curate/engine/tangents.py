"""Forward-mode differentiation of a model's own forward, along several directions at once, over shared primal values.

A `Dual` is a tensor that carries one tangent for each direction. Whatever torch function meets one goes through
`Dual.__torch_function__`, which computes the primal once and each tangent beside it. No graph is kept: a tangent lives
as long as the value it belongs to. A linear map takes two products for each direction, z' = W h' + M h.

Three kinds of functions have rules of their own, because they are most of a model: linear ones (reshaping, moving,
summing), bilinear ones (matrix and elementwise products) and elementwise ones, whose slope is computed once for all
directions. Everything else is differentiated by torch's own forward mode, function by function, once for each
direction; where torch has no formula either, `NoTangentError` names the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor

Rule = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Called with a torch function and its arguments, some of them `Dual`; inside, a `Dual` acts as its primal."""


class NoTangentError(RuntimeError):
    """A function has no forward-mode formula, neither here nor in torch."""


class Dual(Tensor):
    """A tensor and its tangents: `tangents[n]`, of its own shape and dtype, is its derivative along direction n."""

    tangents: tuple[Tensor, ...]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute the primal and, where it has any, the tangents of a torch function."""
        with torch._C.DisableTorchFunctionSubclass():
            return _rule_of(func)(func, args, kwargs or {})


def dual(primal: Tensor, tangents: Iterable[Tensor]) -> Dual:
    """A tensor with its tangents; it shares the primal's storage."""
    with torch._C.DisableTorchFunctionSubclass():
        made = primal.as_subclass(Dual)
    made.tangents = tuple(tangents)
    return made


def parts(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(primal, tangents) of a tensor; no tangents where it is not a `Dual`."""
    if not isinstance(x, Dual):
        return x, ()
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor), x.tangents


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how functions of these names are differentiated."""

    def register(made: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, made))
        return made

    return register


_RULES: dict[str, Rule] = {}


def _rule_of(func: Callable[..., Any]) -> Rule:
    name = getattr(func, "__name__", "")
    if name in _RULES:
        return _RULES[name]
    return _in_place if name.endswith("_") and not name.endswith("__") else by_torch


# ---------------------------------------------------------------------------------------------------- nests of tensors


def leaves(x: Any) -> Iterable[Any]:
    """What a nest of tuples and lists holds, in order."""
    if isinstance(x, tuple | list):
        for item in x:
            yield from leaves(item)
    else:
        yield x


def each_leaf(change: Callable[..., Any], x: Any, *others: Any) -> Any:
    """Apply `change` leaf by leaf to nests of tuples and lists that are alike; the result is a nest like the first."""
    if not isinstance(x, tuple | list):
        return change(x, *others)
    items = [each_leaf(change, *leaves) for leaves in zip(x, *others, strict=True)]
    # Of the two kinds of named tuples, Python's own takes its fields one by one, torch's a sequence.
    return x._make(items) if hasattr(x, "_make") else type(x)(items)


def floats(x: Any) -> bool:
    """Whether it is a tensor that can be differentiated."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def tangents_of(x: Any) -> tuple[Tensor, ...] | None:
    """The tangents of a `Dual`, None of anything else."""
    return x.tangents if isinstance(x, Dual) else None


def count_directions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many tangents the `Dual` among these arguments carries."""
    return next(len(x.tangents) for x in leaves((args, tuple(kwargs.values()))) if isinstance(x, Dual))


# --------------------------------------------------------------------------------------------- whatever has no rule


def by_torch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Any function: by torch's own forward mode, one direction after the other."""
    found = []
    for n in range(count_directions(args, kwargs)):
        with torchs_own():
            out = call(func, _lifted(args, n), {key: _lifted(value, n) for key, value in kwargs.items()})
            if not any(floats(x) for x in leaves(out)):
                return out
            found.append(each_leaf(lambda x: forward_mode.unpack_dual(x).tangent if floats(x) else None, out))
            primal = each_leaf(lambda x: forward_mode.unpack_dual(x).primal if floats(x) else x, out)
    return each_leaf(_joined, primal, *found)


@contextmanager
def torchs_own() -> Iterator[None]:
    """A level of torch's own forward mode, which the forward of a custom `autograd.Function` switches off.

    Such a forward is differentiated by what it computes. No tangent meets its `backward`; whether the two agree is for
    others to see.
    """
    with forward_mode._set_fwd_grad_enabled(True), forward_mode.dual_level():
        yield


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function on torch's dual numbers. Raises NoTangentError where torch has no formula for it."""
    try:
        return func(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError, for a formula that torch lacks, is one of these
        name = getattr(func, "__name__", repr(func))
        raise NoTangentError(f"{name}: {str(error).splitlines()[0]}") from error


def _lifted(x: Any, n: int) -> Any:
    """The same nest, each `Dual` in it replaced by torch's dual number for direction n."""

    def lift(leaf: Any) -> Any:
        if not isinstance(leaf, Dual):
            return leaf
        return forward_mode.make_dual(leaf.as_subclass(Tensor), leaf.tangents[n])

    return each_leaf(lift, x)


def _joined(primal: Any, *tangents: Tensor | None) -> Any:
    """A result and its tangents; one that no tangent reaches stays plain."""
    if all(t is None for t in tangents):
        return primal
    return dual(primal, (torch.zeros_like(primal) if t is None else t for t in tangents))


def _in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A function that changes its first argument: what the same function out of place gives, copied there."""
    name = func.__name__.strip("_").removeprefix("i") if func.__name__.startswith("__i") else func.__name__[:-1]
    plain = getattr(Tensor, name, None)
    if plain is None:
        raise NoTangentError(f"{func.__name__} changes a tensor in place and has no counterpart that does not")
    return _overwrite(args[0], _rule_of(plain)(plain, args, kwargs), count_directions(args, kwargs))


def _overwrite(x: Tensor, made: Any, count: int) -> Dual:
    """Copy a result and its tangents, zero where it has none, into a tensor."""
    held = with_tangents(x, count)
    primal, tangents = parts(made)
    held.as_subclass(Tensor).copy_(primal)
    for n, old in enumerate(held.tangents):
        old.copy_(tangents[n]) if tangents else old.zero_()
    return held


def with_tangents(x: Tensor, count: int) -> Dual:
    """The same object, which carries tangents from now on."""
    if not isinstance(x, Dual):
        zeros = tuple(torch.zeros_like(x) for _ in range(count))
        x.__class__ = Dual
        x.tangents = zeros  # type: ignore[attr-defined]
    return x  # type: ignore[return-value]
