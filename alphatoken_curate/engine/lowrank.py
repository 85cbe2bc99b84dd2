"""Linear maps with two small matrices beside a weight that stays: y = W x + s B (A x).

W takes no part in any derivative and may be kept narrower than what it multiplies: no product with it holds a copy in
another dtype. Shapes: A (R, d_in), B (d_out, R), W (d_out, d_in), or (d_in, d_out) where a map is `turned`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Adapter:
    """What stands beside one linear map."""

    a: Tensor
    b: Tensor
    scale: float

    def product(self) -> Tensor:
        """The product s B A, (d_out, d_in)."""
        return torch.mm(self.b, self.a).mul_(self.scale)

    def induced(self, to_a: Tensor, to_b: Tensor) -> Tensor:
        """How s B A moves where A and B do, (d_out, d_in)."""
        return torch.mm(self.b, to_a).addmm_(to_b, self.a).mul_(self.scale)

    def pulled(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of A and B, of that of s B A, (d_out, d_in)."""
        return torch.mm(self.b.T, gradient).mul_(self.scale), torch.mm(gradient, self.a.T).mul_(self.scale)


class LowRank(TorchFunctionMode):
    """Inside this block linear maps of some weights have an adapter beside them, and those of narrow weights run.

    `dtype`: what narrow weights multiply in; by default that of what they multiply, to which they are taken piece by
    piece. What comes out of a map is as wide as what goes in.
    """

    def __init__(self, adapters: Mapping[Tensor, Adapter], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.adapters, self.dtype = adapters, dtype
        self.met = set[Tensor]()
        """Weights that have multiplied something, of those with an adapter."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and len(args) > 1 and self._is_ours(args[0], args[1]):
            return self._map(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"), turned=False)
        if func is torch.addmm and not kwargs and self._is_ours(args[1], args[2]):  # the maps of GPT-2, (d_in, d_out)
            return self._map(args[1], args[2], args[0], turned=True)
        return func(*args, **kwargs)

    def _is_ours(self, x: Tensor, weight: Tensor) -> bool:
        return weight in self.adapters or weight.dtype != x.dtype

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, turned: bool) -> Tensor:
        out: Tensor = _Fixed.apply(x, weight, turned, self.dtype)  # type: ignore[no-untyped-call]
        if bias is not None:
            out = out + bias
        if (beside := self.adapters.get(weight)) is None:
            return out
        self.met.add(weight)
        linear = nn.functional.linear
        return out + linear(linear(x, beside.a), beside.b) * beside.scale


class _Fixed(Function):
    """x W^T, linear in x alone: its derivative is the same of W^T, as often as it is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turned: bool, dtype: torch.dtype | None) -> Tensor:
        ctx.how = weight, turned, dtype
        kind = dtype if dtype is not None and weight.dtype != x.dtype else x.dtype
        matrix = weight if turned else weight.T
        return (x.to(kind) @ matrix.to(kind)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None, None, None]:
        weight, turned, dtype = ctx.how
        return _Fixed.apply(error, weight, not turned, dtype), None, None, None  # type: ignore[no-untyped-call]
