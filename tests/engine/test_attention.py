from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphatoken_curate.engine import attention, probabilities
from alphatoken_curate.engine.attention import Tape, attention_forward

B, H, K, Q, P, D = 2, 4, 2, 9, 5, 3
"""Rows, query heads, key heads, queries, prefix keys, head size."""


def plain(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, **rule: Any
) -> tuple[Tensor, Tensor]:
    """Attention as a textbook has it; returns (B, Q, H, D) and the probabilities (B, H, Q, T)."""
    key, value = (x.repeat_interleave(H // K, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if rule.get("softcap"):
        scores = rule["softcap"] * torch.tanh(scores / rule["softcap"])
    scores = scores.masked_fill(~seen, -torch.inf)
    if rule.get("s_aux") is not None:
        sink = rule["s_aux"].reshape(1, H, 1, 1).expand(*scores.shape[:3], 1)
        probabilities = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        probabilities = torch.softmax(scores, dim=-1)
    return (probabilities @ value).transpose(1, 2), probabilities


def causal(prefix: int, window: int | None = None) -> Tensor:
    rows, columns = torch.arange(Q)[:, None] + prefix, torch.arange(Q + prefix)[None]
    seen = columns <= rows
    return seen if window is None else seen & (columns > rows - window)


def tensors(prefix: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(B, H, Q, D), (B, K, Q + prefix, D), (B, K, Q + prefix, D)]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "softcap": {"softcap": 0.7},
    "window": {"sliding_window": 4},
    "sinks": {"s_aux": torch.linspace(-1, 2, H, dtype=torch.float64)},
}
MASKS = ("none", "bool", "float")


def run(case: str, mask: str, prefix: int, tape: Tape) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    rule = dict(CASES[case])
    seen = causal(prefix, rule.get("sliding_window"))
    inputs = tensors(prefix)
    given = None
    if mask == "bool":
        given = seen[None, None].expand(B, 1, -1, -1)
    if mask == "float":
        given = torch.zeros(1, 1, Q, Q + prefix, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    module = nn.Module()
    attention._tapes[module] = tape
    out, _ = attention_forward(module, *inputs, given, scaling=0.6, **rule)
    wanted, probabilities = plain(*inputs, seen, 0.6, **rule)
    return inputs, out, wanted, probabilities


@pytest.fixture(params=[1 << 21, 1], ids=["one block", "many blocks"])
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probabilities.SCORES_PER_BLOCK, "cpu", request.param)


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("prefix", [0, P])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_every_gradient_are_those_of_plain_attention(case: str, mask: str, prefix: int) -> None:
    inputs, out, wanted, _ = run(case, mask, prefix, Tape())
    assert torch.allclose(out, wanted, atol=1e-12)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    ours = torch.autograd.grad(out, inputs, weights)
    theirs = torch.autograd.grad(wanted, inputs, weights)
    assert torch.allclose(ours[0], theirs[0], atol=1e-12)
    for mine, yours in zip(ours[1:], theirs[1:], strict=True):
        assert torch.allclose(mine[:, :, prefix:], yours[:, :, prefix:], atol=1e-12)
        assert not mine[:, :, :prefix].any(), "the constant prefix gets no gradient"


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("prefix", [0, P])
@pytest.mark.parametrize("case", CASES)
def test_own_and_cross_positions_share_out_the_gradient(case: str, prefix: int) -> None:
    """`own` equals the gradient of an attention whose other keys and values are constants; the rest is `cross`."""
    tape = Tape(keep_cross=True)
    inputs, out, _, _ = run(case, "none", prefix, tape)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    total = torch.autograd.grad(out, inputs, weights, retain_graph=True)
    tape.mode = "own"
    own = torch.autograd.grad(out, inputs, weights)
    rule = CASES[case]
    for position in range(Q):
        query, key, value = tensors(prefix)
        here = torch.zeros(Q + prefix, 1, dtype=torch.float64)
        here[position + prefix] = 1
        keys = key * here + key.detach() * (1 - here)
        values = value * here + value.detach() * (1 - here)
        alone, _ = plain(query, keys, values, causal(prefix, rule.get("sliding_window")), 0.6, **rule)
        grads = torch.autograd.grad(alone[:, position], [query, key, value], weights[:, position])
        assert torch.allclose(own[0][:, :, position], grads[0][:, :, position], atol=1e-12)
        assert torch.allclose(own[1][:, :, position + prefix], grads[1][:, :, position + prefix], atol=1e-12)
        assert torch.allclose(own[2][:, :, position + prefix], grads[2][:, :, position + prefix], atol=1e-12)
    call = tape.calls[0]
    assert call.cross_key is not None and call.cross_value is not None
    assert torch.allclose(call.cross_key + own[1], total[1], atol=1e-12)
    assert torch.allclose(call.cross_value + own[2], total[2], atol=1e-12)


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("prefix", [0, P])
def test_the_band_is_the_head_averaged_attention_within_the_window(prefix: int) -> None:
    tape = Tape(window=3)
    inputs, out, _, probabilities = run("causal", "none", prefix, tape)
    torch.autograd.grad(out.sum(), inputs)
    found = torch.zeros(B, Q, Q, dtype=torch.float64)
    for first, last, start, band in tape.calls[0].band:
        found[:, first:last, start:last] += band
    mean = probabilities.detach().mean(1)[:, :, prefix:]
    distance = torch.arange(Q)[:, None] - torch.arange(Q)[None]
    assert torch.allclose(found, mean * ((distance > 0) & (distance <= 3)), atol=1e-12)


def test_a_query_that_sees_nothing_harms_no_other() -> None:
    """Left padding leaves queries without a key: what they get is finite, and nobody uses it."""
    inputs = tensors(0)
    seen = causal(0)[None, None].repeat(B, 1, 1, 1)
    seen[0, :, :3] = False
    seen[0, :, :, :3] = False
    module = nn.Module()
    attention._tapes[module] = Tape()
    out, _ = attention_forward(module, *inputs, seen, scaling=0.6)
    wanted, _ = plain(*inputs, seen, 0.6)
    assert torch.isfinite(out).all()
    assert torch.allclose(out[:, 3:], wanted[:, 3:], atol=1e-12)
    weights = torch.ones_like(out)
    weights[0, :3] = 0
    for grad in torch.autograd.grad(out, inputs, weights):
        assert torch.isfinite(grad).all()
