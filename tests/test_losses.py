from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alphatoken_curate import losses
from alphatoken_curate.losses import token_losses

N, D, V = 23, 7, 31


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(N, D, generator=generator, dtype=torch.float64),
        torch.randn(V, D, generator=generator, dtype=torch.float64),
        torch.randint(V, (N,), generator=generator),
    )


@pytest.mark.parametrize(("chunk", "piece"), [(1 << 20, 1 << 20), (4 * V, 2 * V), (1, 1), (10 * V, 3 * V)])
def test_losses_entropy_and_gradient_against_autograd(chunk: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses._LOGITS_PER_CHUNK, "cpu", chunk)
    monkeypatch.setitem(losses._LOGITS_PER_SLICE, "cpu", piece)
    hidden, weight, targets = inputs()
    found = token_losses(lambda x: 3 * torch.tanh(x @ weight.t() / 3), hidden, targets, vocabulary=V, gradient=True)
    x = hidden.clone().requires_grad_()
    logs = torch.log_softmax(3 * torch.tanh(x @ weight.t() / 3), dim=-1)
    nll = -logs.gather(1, targets[:, None]).squeeze(1)
    assert torch.allclose(found.nll, nll, atol=1e-12)
    assert torch.allclose(found.entropy, -(logs.exp() * logs).sum(-1), atol=1e-12)
    assert found.grad is not None
    assert torch.allclose(found.grad, torch.autograd.grad(nll.sum(), x)[0], atol=1e-12)


def test_without_a_gradient_none_is_made() -> None:
    hidden, weight, targets = inputs()
    assert token_losses(lambda x: x @ weight.t(), hidden, targets, vocabulary=V, gradient=False).grad is None


def test_drawn_targets_follow_the_prediction_and_their_loss_is_that_of_the_draw() -> None:
    hidden, weight, _ = inputs()
    one, count = hidden[:1], 40_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    many = one.expand(count, D).contiguous()
    ignored = torch.zeros(count, dtype=torch.int64)
    found = token_losses(lambda x: x @ weight.t(), many, ignored, vocabulary=V, gradient=False, uniforms=uniforms).nll
    prediction = torch.softmax(one @ weight.t(), dim=-1)[0]
    for token in range(V):
        share = (found + prediction[token].log()).abs().lt(1e-9).double().mean()
        spread = (prediction[token] * (1 - prediction[token]) / count).sqrt()
        assert (share - prediction[token]).abs() < 5 * spread + 1e-4


def test_a_draw_is_the_first_token_past_it() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    found = token_losses(
        lambda x: logits.expand(len(x), 3),
        torch.zeros(6, 1, dtype=torch.float64),
        torch.zeros(6, dtype=torch.int64),
        vocabulary=3,
        gradient=False,
        uniforms=uniforms,
    ).nll
    halves = torch.tensor([2.0, 2, 4, 4, 4, 4], dtype=torch.float64).log()
    assert torch.allclose(found, halves)
