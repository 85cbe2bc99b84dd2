from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.directions import losses
from alphatoken_curate.directions.losses import loss_gradient, row_means, token_losses
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.tokens.plan import Batch, collate

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
    monkeypatch.setitem(losses._BYTES_PER_CHUNK, "cpu", 8 * chunk)
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


@pytest.mark.parametrize("chunk", [1 << 20, 2 * 5 * V])
def test_of_narrow_logits_only_the_error_is_rounded(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses._BYTES_PER_CHUNK, "cpu", chunk)
    monkeypatch.setitem(losses._LOGITS_PER_SLICE, "cpu", 2 * V)
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in inputs())
    errors = torch.empty(N, V)

    def head(x: Tensor) -> Tensor:
        return (x @ weight.t()).bfloat16()

    def keep(part: slice, error: Tensor) -> None:
        errors[part] = error

    found = token_losses(head, hidden, targets, vocabulary=V, gradient=True, logits_dtype=torch.bfloat16)
    for gradient in (True, False):
        given = token_losses(head, hidden, targets, vocabulary=V, gradient=gradient, on_error=keep)
        bare = token_losses(head, hidden, targets, vocabulary=V, gradient=False)
        assert torch.equal(found.nll, given.nll) and torch.equal(found.nll, bare.nll)
        assert torch.equal(found.entropy, given.entropy) and torch.equal(found.entropy, bare.entropy)
    raw = head(hidden).double()
    logs = torch.log_softmax(raw, dim=-1)
    exact = logs.exp() - torch.nn.functional.one_hot(targets, V)
    assert found.nll.dtype == torch.float32
    assert torch.allclose(found.nll.double(), -logs.gather(1, targets[:, None]).squeeze(1), atol=1e-6)
    assert torch.allclose(found.entropy.double(), -(logs.exp() * logs).sum(-1), atol=1e-6)
    assert torch.allclose(errors.double(), exact, atol=1e-6)
    assert found.grad is not None
    assert torch.allclose(found.grad, errors.bfloat16().float() @ weight, atol=1e-6)


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


def heavier_where_unlikely(batch: Batch, nll: Tensor) -> Tensor:
    return torch.from_numpy(batch.row - 2.0) * nll


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("weigh", [None, row_means, heavier_where_unlikely])
def test_the_gradient_is_that_of_the_weighted_losses_with_weights_held_constant(weigh: losses.Weigh | None) -> None:
    scoring, batch = ScoringModel(tiny_model("gemma2"), 1), collate(tiny_rows(), range(6))
    hidden = scoring.hidden(torch.from_numpy(batch.input_ids))
    found, gradient = loss_gradient(scoring, hidden, batch, weigh=weigh)
    x = hidden.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i, (row, position, target) in enumerate(zip(batch.row, batch.position, batch.target, strict=True)):
        nll = -torch.log_softmax(scoring.head(x[row, position][None])[0], dim=-1)[target]
        assert torch.allclose(found.nll[i], nll)
        alone = {None: 1.0, row_means: 1 / (batch.row == row).sum()}.get(weigh, (row - 2) * nll.detach())
        total = total + alone * nll
    wanted = torch.autograd.grad(total, x)[0]
    assert (gradient - wanted).abs().max() < 1e-10 * wanted.abs().max()


def test_row_means_make_every_sequence_count_the_same() -> None:
    batch = collate(tiny_rows(), range(6))
    weight = row_means(batch, torch.zeros(len(batch.row)))
    assert weight.dtype is torch.float32
    assert torch.equal(weight[:6], torch.full((6,), 1 / 6))
    assert torch.allclose(torch.bincount(torch.from_numpy(batch.row), weight), torch.ones(6))
