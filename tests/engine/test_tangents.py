"""Every rule against torch.func.jvp, which shares no code with it, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alphatoken_curate.engine import tangent_rules
from alphatoken_curate.engine.tangents import Dual, NoTangentError, dual, parts

X, Y, W = (2, 3, 5), (2, 3, 5), (4, 5)
MASK = torch.tensor([[True, False, True, True, False]])
INDEX = torch.tensor([[0, 2, 1], [1, 1, 0]])

ONE: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(6, 5),
    "transpose and product": lambda x: x.transpose(0, 1).contiguous() * 3.0,
    "T of a matrix": lambda x: x[0].T @ x[1],
    "chunks": lambda x: torch.cat([b.exp() * a for a, b in [x.chunk(2, dim=-1)[:1] * 2]], dim=-1),
    "split": lambda x: x.split([2, 3], dim=-1)[1],
    "unbind": lambda x: torch.stack(x.unbind(1)[::-1]),
    "slices": lambda x: torch.cat((-x[..., 2:], x[..., :2]), dim=-1),
    "mean of squares": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    "x ** 3": lambda x: x**3,
    "2 ** x": lambda x: 2.0**x,
    "1 - x": lambda x: 1 - x,
    "x - 1": lambda x: x - torch.ones(5),
    "1 / x": lambda x: 1.0 / (x + 9),
    "x / 3": lambda x: x / torch.full((5,), 3.0),
    "-x": lambda x: -x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: F.relu(x).square(),
    "sigmoid": lambda x: torch.sigmoid(x) * torch.tanh(x),
    "clamp": lambda x: x.clamp(min=-0.5, max=0.5),
    "softplus": F.softplus,
    "softmax": lambda x: F.softmax(x, dim=-1),
    "softmax in wider type": lambda x: torch.softmax(x, -1, dtype=torch.float64),
    "log softmax": lambda x: F.log_softmax(x, dim=-1),
    "layer norm": lambda x: F.layer_norm(x, (5,)),
    "group of heads": lambda x: x[:, :, None, :].expand(2, 3, 4, 5).reshape(2, 12, 5),
    "masked fill": lambda x: x.masked_fill(MASK, -3.0),
    "where": lambda x: torch.where(MASK, x, 2 * x.exp()),
    "where else a number": lambda x: torch.where(MASK, 0.0, x),
    "gather": lambda x: x.gather(1, INDEX[:, :, None].expand(2, 3, 5)),
    "rows chosen": lambda x: x.reshape(6, 5)[torch.tensor([4, 0, 4])],
    "topk": lambda x: torch.topk(x, 2, dim=-1).values * torch.topk(x, 2, dim=-1)[0],
    "max": lambda x: x.max(dim=-1).values,
    "einsum": lambda x: torch.einsum("btd,bsd->bts", x, x),
    "norm": lambda x: F.normalize(x, dim=-1),
    "cumsum": lambda x: x.cumsum(1),
    "pad": lambda x: F.pad(x, (1, 0), value=7.0),
    "in another dtype": lambda x: (x.to(torch.float32) * 2).type_as(x),
    "turned as complex numbers": lambda x: torch.view_as_real(
        torch.view_as_complex(x[..., :4].reshape(2, 3, 2, 2).contiguous())
        * torch.polar(torch.ones(2), torch.arange(2.0))
    ).flatten(2),
    "sums": lambda x: x.sum(dim=(0, 1)) + x.sum(),
    "dropout at rest": lambda x: F.dropout(x, 0.5, training=False),
    "detached": lambda x: x.detach() * x,
    "of no value": lambda x: torch.zeros_like(x) + x,
}

TWO: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda x, y: x + y,
    "sum over rows": lambda x, y: x + y[:1, :1],
    "difference": lambda x, y: x[0, 0] - y,
    "product": lambda x, y: x * y,
    "product over rows": lambda x, y: x[..., :1] * y,
    "quotient": lambda x, y: x / (y + 9),
    "matmul": lambda x, y: x @ y.transpose(1, 2),
    "bmm": lambda x, y: torch.bmm(x, y.mT),
    "stacked": lambda x, y: torch.stack([x, y, torch.ones_like(x)], dim=1),
    "added in wider type": lambda x, y: x.float() + y,
    "baddbmm": lambda x, y: torch.baddbmm(torch.zeros(2, 3, 3), x, y.mT, beta=1.0, alpha=0.5),
    "power": lambda x, y: (x.abs() + 1) ** y,
}


def move(shape: tuple[int, ...], seed: int) -> tuple[Tensor, list[Tensor]]:
    """A random tensor and two tangents of it."""
    generator = torch.Generator().manual_seed(seed)
    x, *tangents = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return x, tangents


def agrees(f: Callable[..., Any], *inputs: tuple[Tensor, list[Tensor]], moving: tuple[bool, ...]) -> None:
    """Primal and tangents of f are torch's, where those of the inputs marked as moving are given."""
    given = [dual(x, tangents) if on else x for (x, tangents), on in zip(inputs, moving, strict=True)]
    primal, found = parts(f(*given))
    assert len(found) == 2 and not isinstance(primal, Dual)
    for n in range(2):
        tangents = tuple(t[n] if on else torch.zeros_like(x) for (x, t), on in zip(inputs, moving, strict=True))
        wanted, slope = torch.func.jvp(f, tuple(x for x, _ in inputs), tangents)
        assert found[n].shape == wanted.shape and found[n].dtype == wanted.dtype
        torch.testing.assert_close(primal, wanted, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found[n], slope, rtol=1e-6 if slope.dtype == torch.float32 else 1e-11, atol=1e-11)


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_moving_tensor(name: str) -> None:
    agrees(ONE[name], move(X, 1), moving=(True,))


@pytest.mark.parametrize("moving", [(True, True), (True, False), (False, True)], ids=["both", "first", "second"])
@pytest.mark.parametrize("name", TWO)
def test_functions_of_two_tensors(name: str, moving: tuple[bool, bool]) -> None:
    agrees(TWO[name], move(X, 1), move(Y, 2), moving=moving)


@pytest.mark.parametrize("moving", [(a, b, c) for a in (1, 0) for b in (1, 0) for c in (1, 0) if a or b or c])
def test_linear_maps(moving: tuple[bool, bool, bool]) -> None:
    agrees(F.linear, move(X, 1), move(W, 2), move((4,), 3), moving=moving)
    agrees(lambda x, w, b: F.linear(x[0, 0], weight=w, bias=b), move(X, 1), move(W, 2), move((4,), 3), moving=moving)
    agrees(lambda x, w, b: torch.addmm(b, x[0], w.t()), move(X, 1), move(W, 2), move((4,), 3), moving=moving)


def test_norms_with_moving_weights() -> None:
    agrees(lambda x, w, b: F.layer_norm(x, (5,), w, b), move(X, 1), move((5,), 2), move((5,), 3), moving=(True,) * 3)
    agrees(lambda x, w: F.rms_norm(x, (5,), w, 1e-3), move(X, 1), move((5,), 2), moving=(True, True))


def test_embeddings_but_for_the_padding_row() -> None:
    ids = torch.tensor([[3, 0, 2], [0, 1, 3]])
    table = move((4, 5), 1)
    agrees(lambda w: F.embedding(ids, w), table, moving=(True,))
    leaf = table[0].clone().requires_grad_()
    _, found = parts(F.embedding(ids, dual(*table), padding_idx=0))
    weights = torch.randn(2, 3, 5)
    (grad,) = torch.autograd.grad((F.embedding(ids, leaf, padding_idx=0) * weights).sum(), leaf)
    for tangent, moved in zip(found, table[1], strict=True):
        torch.testing.assert_close((tangent * weights).sum(), (grad * moved).sum())


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_": lambda x, y: (x * 1).add_(y),
    "+=": lambda x, y: _changed(x, lambda z: z.__iadd__(y)),
    "mul_": lambda x, y: (x * 1).mul_(y),
    "div_": lambda x, y: (x * 1).div_(3.0),
    "clamp_": lambda x, y: (x * y).clamp_(max=0.3),
    "into zeros": lambda x, y: torch.zeros(7, 5).index_add_(0, torch.tensor([6, 0, 6]), x[0] * y[0]),
    "into a slice": lambda x, y: _changed(x, lambda z: z.__setitem__((slice(None), 1), y[:, 0])),
    "a number into a slice": lambda x, y: _changed(x, lambda z: z.__setitem__((slice(None), 1), 0.0)),
    "copy_": lambda x, y: torch.empty(2, 3, 5).copy_(y[:1]),
    "through a view": lambda x, y: _changed(x, lambda z: z[:, :2].mul_(y[:, :2])),
    "through views of a new one": lambda x, y: _changed(
        x.new_zeros(2, 3, 5), lambda z: (z[:, :2].copy_(y[:, :2]), z[:, 2:].copy_(x[:, 2:]))
    ),
    "masked_fill_": lambda x, y: (x * y).masked_fill_(MASK, 0.5),
}


def _changed(x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    z = x * 1
    change(z)
    return z


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place(name: str) -> None:
    agrees(CHANGES[name], move(X, 1), move(Y, 2), moving=(True, True))


class _Own(torch.autograd.Function):
    """A function with a backward of its own, whose forward is elementwise, in place and by torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _own(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise AssertionError("no tangent goes this way")


def _own(x: Tensor) -> Tensor:
    return (x * torch.tanh(0.8 * x * x)).mul_(3.0) + F.layer_norm(x, (5,))


@pytest.mark.parametrize("graph", [True, False])
def test_a_function_with_a_backward_of_its_own_is_differentiated_by_its_forward(graph: bool) -> None:
    x, tangents = move(X, 1)
    with torch.set_grad_enabled(graph):
        primal, found = parts(_Own.apply(dual(x, tangents)))
    wanted, _ = torch.func.jvp(_own, (x,), (x,))
    torch.testing.assert_close(primal, wanted, rtol=1e-13, atol=1e-13)
    assert len(found) == 2
    for tangent, given in zip(found, tangents, strict=True):
        torch.testing.assert_close(tangent, torch.func.jvp(_own, (x,), (given,))[1], rtol=1e-11, atol=1e-11)


def test_results_without_a_derivative_stay_plain() -> None:
    x = dual(*move(X, 1))
    for found in (x.argmax(-1), x > 0, x.shape, x.dtype, x.dim(), x.sum().item(), x.to(torch.int64), x.detach()):
        assert not isinstance(found, Dual)


def test_a_function_without_a_formula_is_named() -> None:
    x = dual(*move((4, 4), 1))
    with pytest.raises(NoTangentError, match=r"cdist: .*forward AD"):
        torch.cdist(x, x)
    with pytest.raises(NoTangentError, match="normal_ changes a tensor in place"):
        x.normal_()


def test_one_slope_serves_all_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    whole = tangent_rules.call
    monkeypatch.setattr(tangent_rules, "call", lambda f, *rest: calls.append(f.__name__) or whole(f, *rest))
    F.silu(dual(*move(X, 1)))
    assert calls == ["silu"]
