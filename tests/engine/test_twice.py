"""Beside torch's own second derivative of the same functions, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from alphatoken_curate.engine import probabilities
from alphatoken_curate.engine.twice import Twice, token_nll

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _seed() -> None:
    GENERATOR.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def leaf(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def second(loss: Tensor, inputs: list[Tensor], along: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient, and the derivative of its product with a direction."""
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    return [g.detach() for g in grads], list(torch.autograd.grad(grads, inputs, along, allow_unused=True))


def check(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """The same gradient and second derivative inside the mode as outside."""
    along = [normal(*x.shape) for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = second((function(*inputs) ** 3).sum(), inputs, along)
    with Twice([]):
        found = second((function(*inputs) ** 3).sum(), inputs, along)
    for own, theirs in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


def attend(**how: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, **how)


@pytest.mark.parametrize("block", [1, 1 << 21], ids=["in blocks", "at once"])
@pytest.mark.parametrize(
    "how",
    [
        {"is_causal": True},
        {},
        {"is_causal": True, "scale": 0.3},
        {"attn_mask": torch.ones(37, 37).tril().bool()[None, None]},
        {"attn_mask": torch.where(torch.ones(37, 37).tril().bool(), 0.25, -torch.inf).double()[None, None]},
        {"attn_mask": torch.ones(2, 4, 37, 37).tril().bool()},
    ],
    ids=["causal", "all seen", "scaled", "mask", "added mask", "mask of each head"],
)
def test_attention(how: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probabilities.SCORES_PER_BLOCK, "cpu", block)
    check(attend(**how), [leaf(2, 4, 37, 8), leaf(2, 4, 37, 8), leaf(2, 4, 37, 6)])


def test_attention_whose_heads_share_keys() -> None:
    check(attend(is_causal=True, enable_gqa=True), [leaf(2, 6, 21, 8), leaf(2, 2, 21, 8), leaf(2, 2, 21, 8)])


def test_attention_of_which_not_all_is_differentiated() -> None:
    keys = normal(1, 2, 9, 4)
    check(lambda q, v: attend(is_causal=True)(q, keys, v), [leaf(1, 2, 9, 4), leaf(1, 2, 9, 4)])


def test_token_losses() -> None:
    target = torch.tensor([0, 6, 3])

    def loss(nll: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda logits, weights: nll(logits * 2) * weights

    inputs = [leaf(3, 7), leaf(3)]
    along = [normal(3, 7), normal(3)]
    theirs = loss(lambda x: nn.functional.cross_entropy(x, target, reduction="none"))
    wanted = second((theirs(*inputs) ** 2).sum(), inputs, along)
    found = second((loss(lambda x: token_nll(x, target))(*inputs) ** 2).sum(), inputs, along)
    for own, other in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("start", ["hidden states", "data"])
def test_what_a_linear_map_owes_is_added_where_it_is_wanted(start: str) -> None:
    """Two maps, the first used twice; two directions over one graph."""
    first, bias, last = leaf(5, 4), leaf(5), leaf(3, 5)
    x = leaf(2, 6, 4) if start == "hidden states" else normal(2, 6, 4)
    inputs = [bias, x] if start == "hidden states" else [bias]

    def loss() -> Tensor:
        linear = nn.functional.linear
        hidden = torch.tanh(linear(x, first, bias)) + 0.5 * linear(x, first)
        return (linear(hidden, last) ** 3).sum()

    every = [first, last, *inputs]
    directions = [[normal(*t.shape) for t in every] for _ in range(2)]
    wanted = [second(loss(), every, along)[1] for along in directions]
    with Twice([first, last]) as twice:
        grads = torch.autograd.grad(loss(), every, create_graph=True)
        for along, theirs in zip(directions, wanted, strict=True):
            twice.into = {w: torch.full_like(w, 2.0, requires_grad=False) for w in (first, last)}
            told = torch.autograd.grad(grads, every, along, retain_graph=True, allow_unused=True)
            assert told[0] is None and told[1] is None
            into = [w - 2.0 for w in twice.into.values()]
            for own, other in zip((*into, *told[2:]), theirs, strict=True):
                torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_maps_that_are_laid_the_other_way() -> None:
    """GPT-2's, by `torch.addmm`."""
    weight, bias, x = leaf(4, 5), leaf(5), leaf(7, 4)
    along = [normal(*t.shape) for t in (weight, bias, x)]

    def loss() -> Tensor:
        return (torch.addmm(bias, x, weight) ** 3).sum()

    wanted = second(loss(), [weight, bias, x], along)[1]
    with Twice([weight]) as twice:
        twice.into = {weight: torch.zeros_like(weight, requires_grad=False)}
        found = second(loss(), [weight, bias, x], along)[1]
    assert found[0] is None
    for own, theirs in zip((twice.into[weight], *found[1:]), wanted, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("laid", ["out, in", "in, out"])
def test_products_of_rounded_numbers(laid: str) -> None:
    """Each of the eight products is that of numbers rounded to bfloat16, and what is around them is not rounded."""
    weight, x = leaf(6, 6), leaf(9, 6)
    turned = laid == "in, out"
    error, to_x, along = normal(9, 6), normal(9, 6), normal(6, 6)

    def product(one: Tensor, other: Tensor) -> Tensor:
        return (one.to(torch.bfloat16) @ other.to(torch.bfloat16)).double()

    with Twice([weight], torch.bfloat16) as twice:
        zero = torch.zeros(6, dtype=torch.float64)
        out = torch.addmm(zero, x, weight) if turned else nn.functional.linear(x, weight)
        grads = torch.autograd.grad(out, [x, weight], error, create_graph=True)
        twice.into = {weight: torch.zeros_like(weight, requires_grad=False)}
        (of_x,) = torch.autograd.grad(grads, [x], [to_x, along])
    w, a = (weight.T, along.T) if turned else (weight, along)
    torch.testing.assert_close(out, product(x, w.T), rtol=0, atol=0)
    torch.testing.assert_close(grads[0], product(error, w), rtol=0, atol=0)
    torch.testing.assert_close(of_x, product(error, a), rtol=0, atol=0)
    into = twice.into[weight].T if turned else twice.into[weight]
    torch.testing.assert_close(into, product(error.T, to_x), rtol=0, atol=0)


def test_a_graph_keeps_no_probabilities() -> None:
    """What is saved between the passes grows with queries plus keys, not with their product."""
    saved: list[int] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    length = 300
    inputs = [leaf(1, 2, length, 4) for _ in range(3)]
    with Twice([]), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = attend(is_causal=True)(*inputs).sum()
        torch.autograd.grad(loss, inputs, create_graph=True)
    assert saved and max(saved) <= 2 * length * 4
