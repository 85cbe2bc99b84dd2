"""Beside torch's own derivatives of the merged map, in float64, and what narrow weights give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphatoken_curate.engine.lowrank import Adapter, LowRank


def made(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def through(x: Tensor, weight: Tensor, bias: Tensor, turned: bool) -> Tensor:
    return torch.addmm(bias, x, weight) if turned else nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("turned", [False, True])
def test_a_map_and_both_of_its_derivatives_are_those_of_the_merged_weight(turned: bool) -> None:
    x, a, b, weight, bias = made(0, (5, 4), (2, 4), (3, 2), (4, 3) if turned else (3, 4), (3,))
    inputs = [y.requires_grad_() for y in (x, a, b)]
    beside, along = Adapter(a=a, b=b, scale=1.5), made(1, (5, 4), (2, 4), (3, 2))

    def second(out: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        return [out.detach(), *(g.detach() for g in grads), *torch.autograd.grad(grads, inputs, along)]

    with LowRank({weight: beside}) as mode:
        found = second(through(x, weight, bias, turned))
    assert mode.met == {weight}
    merged = 1.5 * b @ a
    wanted = second(through(x, weight + (merged.T if turned else merged), bias, turned))
    for own, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-14)


def test_directions_are_derivatives_of_the_product() -> None:
    a, b, to_a, to_b, gradient = made(2, (2, 4), (3, 2), (2, 4), (3, 2), (3, 4))
    beside = Adapter(a=a, b=b, scale=0.5)
    value, moved = torch.func.jvp(lambda a, b: 0.5 * b @ a, (a, b), (to_a, to_b))
    torch.testing.assert_close(beside.product(), value)
    torch.testing.assert_close(beside.induced(to_a, to_b), moved)
    _, back = torch.func.vjp(lambda a, b: 0.5 * b @ a, a, b)
    for own, wanted in zip(beside.pulled(gradient), back(gradient), strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_narrow_weight_multiplies_what_is_wide_and_no_wide_copy_is_held(turned: bool, dtype: Any) -> None:
    weight, (x, bias) = made(3, (4, 3) if turned else (3, 4))[0].bfloat16(), made(4, (5, 4), (3,), dtype=torch.float32)
    x.requires_grad_()
    held: list[Tensor] = []
    with (
        LowRank({}, dtype),
        torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
    ):
        out = through(x, weight, bias, turned)
    assert not [t for t in held if t.ndim == 2]
    (grad,) = torch.autograd.grad(out.sum(), x)
    if dtype is None:
        wanted = through(x, weight.float(), bias, turned)
        torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), x)[0])
    else:
        matrix = weight if turned else weight.T
        wanted = (x.bfloat16() @ matrix).float() + bias
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    assert out.dtype == grad.dtype == torch.float32


def test_other_maps_are_left_alone() -> None:
    x, weight, other, a, b = made(5, (5, 4), (3, 4), (3, 4), (2, 4), (3, 2))
    with LowRank({weight: Adapter(a=a, b=b, scale=1.0)}) as mode:
        torch.testing.assert_close(nn.functional.linear(x, other), x @ other.T)
    assert not mode.met
