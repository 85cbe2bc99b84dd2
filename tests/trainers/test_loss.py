"""The loss of weighted tokens, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alphatoken_curate.errors import UsageError
from alphatoken_curate.trainers import loss as module
from alphatoken_curate.trainers import weighted_loss

SHAPE = (3, 7, 11)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and weights; some tokens are masked, and index 0 has a label that must not count."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, SHAPE[2], SHAPE[:2], generator=generator)
    weight = torch.rand(SHAPE[:2], generator=generator) + 0.1
    masked = torch.rand(SHAPE[:2], generator=generator) < 0.4
    return logits, labels.masked_fill(masked, -100), weight.masked_fill(masked, 0.0)


def by_hand(logits: Tensor, labels: Tensor, weight: Tensor, denominator: str) -> Tensor:
    total, items = torch.zeros((), dtype=torch.float64), 0.0
    for b in range(SHAPE[0]):
        for t in range(1, SHAPE[1]):
            if labels[b, t] != -100:
                odds = logits[b, t - 1].double()
                total = total + weight[b, t].double() * (odds.logsumexp(0) - odds[labels[b, t]])
                items += 1.0 if denominator == "count" else float(weight[b, t])
    return total / items


@pytest.mark.parametrize("chunk", [SHAPE[2], 5 * SHAPE[2], 1 << 24])
@pytest.mark.parametrize("denominator", ["count", "sum"])
def test_loss_and_gradient_are_those_by_hand(denominator: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    logits, labels, weight = batch()
    found = weighted_loss(logits, labels, weight, denominator=denominator)
    wanted = by_hand(logits, labels, weight, denominator)
    assert found.dtype == torch.float64 and abs(found - wanted) < 1e-7  # the sum of weights is in float32
    (gradient,), (expected,) = torch.autograd.grad(found, logits), torch.autograd.grad(wanted, logits)
    assert torch.allclose(gradient, expected, atol=1e-8)
    with torch.no_grad():
        assert weighted_loss(logits, labels, weight, denominator=denominator) == found


def test_low_precision_is_widened() -> None:
    logits, labels, weight = batch(torch.bfloat16)
    found = weighted_loss(logits, labels, weight)
    assert found.dtype == torch.float32 and abs(found - by_hand(logits, labels, weight, "count")) < 1e-6
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.dtype == torch.bfloat16


def test_a_step_of_several_batches_is_divided_once() -> None:
    logits, labels, weight = batch()
    items = sum(module.count_items(labels[i : i + 1], weight[i : i + 1], "sum") for i in range(SHAPE[0]))
    parts = [
        weighted_loss(logits[i : i + 1], labels[i : i + 1], weight[i : i + 1], num_items=items) for i in range(SHAPE[0])
    ]
    assert abs(sum(parts) - by_hand(logits, labels, weight, "sum")) < 1e-7


def test_masked_tokens_are_exactly_absent() -> None:
    logits, labels, weight = batch()
    (before,) = torch.autograd.grad(weighted_loss(logits, labels, weight), logits)
    shifted = torch.nn.functional.pad(labels[:, 1:] == -100, (0, 1), value=True)
    assert shifted.any() and not before[shifted].any() and before[~shifted].any(-1).all()
    # Even where the model is broken, and whatever the label at index 0.
    with torch.no_grad():
        logits[shifted] = 1e30
        labels[:, 0] = 3
    (after,) = torch.autograd.grad(weighted_loss(logits, labels, weight), logits)
    assert torch.equal(before, after)


def test_nothing_to_train_gives_zero() -> None:
    logits, labels, weight = batch()
    for denominator in ("count", "sum"):
        found = weighted_loss(logits, torch.full_like(labels, -100), torch.zeros_like(weight), denominator=denominator)
        assert found == 0 and not torch.autograd.grad(found, logits)[0].any()


def test_no_copy_of_all_logits_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever autograd keeps for the backward is a view of the logits, or as small as a chunk."""
    chunk = 2 * SHAPE[2]
    monkeypatch.setattr(module, "_CHUNK", chunk)
    logits, labels, weight = batch(torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        weighted_loss(logits, labels, weight)
    own = logits.untyped_storage().data_ptr()
    copies = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != own]
    assert sum(tensor.numel() for tensor in copies if tensor.is_floating_point()) < chunk + 2 * labels.numel()


def test_what_cannot_be_is_refused() -> None:
    logits, labels, weight = batch()
    with pytest.raises(UsageError, match=r"logits \(3, 6, 11\), labels \(3, 7\)"):
        weighted_loss(logits[:, 1:], labels, weight)
    with pytest.raises(UsageError, match="'mean'; give `count` or `sum`"):
        weighted_loss(logits, labels, weight, denominator="mean")  # type: ignore[arg-type]
