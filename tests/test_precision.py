"""What S computes in, in a model of bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate import attention
from alphatoken_curate.capture import ScoringModel, probe_ids, probe_logits
from alphatoken_curate.errors import ModelError
from alphatoken_curate.paths import PathScorer
from alphatoken_curate.plan import collate
from alphatoken_curate.precision import plain_products, rounded_products

FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma2", "mixtral"]
SETTINGS: list[Any] = [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]


def model_of(family: str) -> Any:
    """Random weights that bfloat16 holds exactly, small enough that its rounding is."""
    return tiny_model(family, dtype=torch.float64, initializer_range=0.15).to(torch.bfloat16)


def scored(model: Any, layers: Any, estimator: Any) -> Tensor:
    scoring, rows = ScoringModel(model, layers), tiny_rows()
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(m.weight.shape, generator=generator).to(m.weight.dtype) for m in scoring.maps]
    signals = PathScorer(scoring, [direction], estimator, 4).score(collate(rows, range(len(rows))))
    assert signals.direct is not None and signals.causal is not None
    return torch.cat([signals.direct, signals.causal]).double()


@pytest.mark.parametrize("estimator", ["published", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_signals_are_those_of_float64_up_to_the_rounding_of_bfloat16(family: str, estimator: str) -> None:
    model = model_of(family)
    exact = copy.deepcopy(model).double()
    found, wanted = (scored(one, "all", estimator) for one in (model, exact))
    error = (found - wanted).square().mean(1).sqrt() / wanted.square().mean(1).sqrt()
    assert float(error.max()) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_below_stay_narrow_and_everything_is_put_back(family: str) -> None:
    model = model_of(family)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    scoring = ScoringModel(model, 1)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide and all(p.dtype == torch.float32 for p in scoring.blocks[0].parameters())
    inside = {name for name in wide if any(part.isdigit() for part in name.split("."))}
    assert all(".3." in name for name in inside) and not any("embed" in name for name in wide)
    assert scoring.hidden(torch.tensor([[3, 4, 5]])).dtype == torch.float32
    scoring.release_model()
    assert {name: p.dtype for name, p in model.named_parameters()} == kinds
    assert model(torch.tensor([[3, 4, 5]])).logits.dtype == torch.bfloat16


def test_products_round_inside_the_block_alone() -> None:
    before = [place.fp32_precision for place in SETTINGS]
    with pytest.raises(ZeroDivisionError), rounded_products():
        assert [place.fp32_precision for place in SETTINGS] == ["bf16", "tf32"]
        with plain_products():
            assert [place.fp32_precision for place in SETTINGS] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in SETTINGS] == ["bf16", "tf32"]
        raise ZeroDivisionError
    assert [place.fp32_precision for place in SETTINGS] == before


def test_a_wide_model_is_not_rounded() -> None:
    scoring = ScoringModel(tiny_model("llama", dtype=torch.float32), 2)
    seen: list[str] = []
    scoring.maps[0].module.register_forward_hook(lambda *_: seen.append(SETTINGS[0].fp32_precision))
    with scoring.products():
        scoring.hidden(torch.tensor([[3, 4, 5]]))
    narrow = ScoringModel(model_of("llama"), 2)
    narrow.maps[0].module.register_forward_hook(lambda *_: seen.append(SETTINGS[0].fp32_precision))
    narrow.hidden(torch.tensor([[3, 4, 5]]))
    with narrow.products():
        narrow.hidden(torch.tensor([[3, 4, 5]]))
    assert seen[0] != "bf16" and seen[-2] != "bf16" and seen[-1] == "bf16"


def sharp_model() -> Any:
    """Its attention picks single keys, so that rounding decides which, and its logits change by a tenth and more."""
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
    return model.to(torch.bfloat16)


def test_a_model_whose_own_rounding_is_large_is_captured() -> None:
    model = sharp_model()
    before = probe_logits(model)
    scoring = ScoringModel(model, "all")
    after = scoring._logits(scoring.hidden(probe_ids(model)))
    change = (after - before).float().abs().max() / before.float().abs().max()
    assert change > 5e-2
    scoring.release_model()


def test_a_narrow_model_whose_attention_is_another_under_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention.in_block

    def wrong(*given: Any) -> Any:
        probabilities, slope = true(*given)
        return 1.05 * probabilities, slope

    monkeypatch.setattr(attention, "in_block", wrong)
    with pytest.raises(ModelError, match="logits change by"):
        ScoringModel(tiny_model("llama", dtype=torch.float32).to(torch.bfloat16), "all")
