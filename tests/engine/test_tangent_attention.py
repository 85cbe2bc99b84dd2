"""Tangents of attention against torch.func.jvp of attention as a textbook has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alphatoken_curate.engine import probabilities
from alphatoken_curate.engine.probabilities import Rule
from alphatoken_curate.engine.tangent_attention import attend
from alphatoken_curate.engine.tangents import NoTangentError, dual, parts

ROWS, HEADS, GROUPS, LENGTH, SIZE = 2, 4, 2, 7, 3


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[1, 1 << 20], ids=["many blocks", "one block"], autouse=True)
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probabilities.SCORES_PER_BLOCK, "cpu", request.param)


def textbook(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *, seen: Tensor, softcap: Any, sunk: bool
) -> Any:
    """(B, Q, H, D) by whole matrices of scores."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = query @ key.mT * 0.6
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -1e300)
    if sunk:
        scores = torch.cat([scores, sinks.view(1, HEADS, 1, 1).expand(ROWS, HEADS, LENGTH, 1)], -1)
    return (torch.softmax(scores, -1)[..., : key.shape[2]] @ value).transpose(1, 2)


def inputs(length: int = LENGTH) -> list[tuple[Tensor, list[Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((HEADS, LENGTH), (GROUPS, length), (GROUPS, length))
    made = [torch.randn(3, ROWS, *shape, SIZE, generator=generator) for shape in shapes]
    return [(x, list(t)) for x, *t in made]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("moving", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 0)])
@pytest.mark.parametrize("kind", ["causal", "window", "bool", "float"])
@pytest.mark.parametrize(("softcap", "sunk"), [(None, False), (2.0, False), (None, True)])
def test_tangents_are_those_of_the_textbook(moving: tuple[int, ...], kind: str, softcap: Any, sunk: bool) -> None:
    """Whichever of query, key, value and sinks move."""
    if not sunk and moving[3]:
        moving = (0, 1, 1, 0)
    place = torch.arange(LENGTH)
    seen = place[None] <= place[:, None]
    mask: Tensor | None = None
    if kind == "window":
        seen &= place[None] > place[:, None] - 3
    if kind in ("bool", "float"):
        seen = seen[None, None] & (place >= torch.tensor([[0], [2]]))[:, None, None]
        seen |= torch.eye(LENGTH, dtype=torch.bool)
        mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float64).min)
    how = Rule(scaling=0.6, softcap=softcap, sliding_window=3 if kind == "window" else None)
    given = [*inputs(), (torch.linspace(-1, 1, HEADS), [torch.linspace(2, -1, HEADS), torch.ones(HEADS)])]
    *qkv, sinks = (dual(x, t) if on else x for (x, t), on in zip(given, moving, strict=True))
    out, found = parts(attend(*qkv, mask, sinks if sunk else None, how))  # type: ignore[call-arg]
    for n in range(2):
        wanted, slope = torch.func.jvp(
            lambda *all_four: textbook(*all_four, seen=seen, softcap=softcap, sunk=sunk),
            tuple(x for x, _ in given),
            tuple(t[n] if on else torch.zeros_like(x) for (x, t), on in zip(given, moving, strict=True)),
        )
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[n], slope, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [LENGTH, LENGTH + 2])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_torch_itself(causal: bool, length: int) -> None:
    """What blocks outside S call; grouped heads, keys before the first query, a mask or none."""
    if causal and length > LENGTH:
        pytest.skip("torch aligns a causal mask at the first key there")
    given = inputs(length)
    query, key, value = (dual(x, t) for x, t in given)
    found, tangents = parts(F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for n, tangent in enumerate(tangents):
            wanted, slope = torch.func.jvp(
                lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=causal, enable_gqa=True),
                tuple(x for x, _ in given),
                tuple(t[n] for _, t in given),
            )
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(tangent, slope)


def test_what_has_no_formula_is_refused() -> None:
    (query, _), (key, _), (value, _) = inputs()
    moving = dual(query, [query])
    with pytest.raises(NoTangentError, match="dropout"):
        F.scaled_dot_product_attention(moving, key, value, dropout_p=0.1, enable_gqa=True)
    with pytest.raises(NoTangentError, match="mask"):
        F.scaled_dot_product_attention(moving, key, value, dual(torch.zeros(7, 7), [torch.ones(7, 7)]), enable_gqa=True)
