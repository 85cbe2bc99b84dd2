"""What S computes in, in a model of bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.engine import attention, probabilities
from alphatoken_curate.engine.capture import ScoringModel, probe_ids, probe_logits
from alphatoken_curate.errors import ModelError
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.tokens.plan import collate

FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma2", "mixtral"]


def model_of(family: str) -> Any:
    """Random weights that bfloat16 holds exactly, small enough that its rounding is."""
    return tiny_model(family, dtype=torch.float64, initializer_range=0.15).to(torch.bfloat16)


def random_direction(scoring: ScoringModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(m.weight.shape, generator=generator).to(m.weight.dtype) for m in scoring.maps]


def scored(model: Any, layers: Any, estimator: str, *, settle: bool) -> Tensor:
    scoring, rows = ScoringModel(model, layers), tiny_rows()
    direction = random_direction(scoring)
    scorer = make_scorer(scoring, [direction], estimator, 4, settle=settle)
    signals = scorer.score(collate(rows, range(len(rows))))
    found = [x for x in (signals.direct, signals.causal, signals.influence) if x is not None]
    assert all(x.dtype == torch.promote_types(direction[0].dtype, torch.float32) for x in found)
    return torch.cat(found).double()


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest error of some signals, each in parts of its root mean square."""
    return float(((found - wanted).square().mean(1).sqrt() / wanted.square().mean(1).sqrt()).max())


def by_backwards(model: Any) -> Tensor:
    """Direct, causal and influence by one backward per token through the model as it is, along the same direction."""
    scoring = ScoringModel(copy.deepcopy(model), "all")
    direction = {m.name: d.to(model.dtype) for m, d in zip(scoring.maps, random_direction(scoring), strict=True)}
    parts = []
    for row in tiny_rows():
        places = np.flatnonzero(row.response).tolist()
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        c = oracles.contraction_by_backwards(model, scoring.layers, direction, ids, places).double()
        parts.append(torch.stack([*oracles.along_paths(c, places), c.sum(0)]))
    return torch.cat(parts, dim=1)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("estimator", ["published", "exact", "influence", "exact+influence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_they_settle_signals_are_those_of_float64(family: str, estimator: str) -> None:
    model = model_of(family)
    exact = copy.deepcopy(model).double()
    assert error(*(scored(one, "all", estimator, settle=False) for one in (model, exact))) < 0.05


@pytest.mark.one_in(7)
@pytest.mark.parametrize("family", FAMILIES)
def test_settled_they_err_as_the_model_s_own_backward_does(family: str) -> None:
    model = model_of(family)
    exact = copy.deepcopy(model).double()
    own = error(by_backwards(model), by_backwards(exact))
    assert 0.005 < own < 0.15
    for estimator in ("published", "exact", "influence", "exact+influence"):
        ours = error(*(scored(one, "all", estimator, settle=True) for one in (copy.deepcopy(model), exact)))
        assert ours < 2.5 * own


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
    scoring.settle()
    assert {name: p.dtype for name, p in model.named_parameters()} == kinds
    assert scoring.hidden(torch.tensor([[3, 4, 5]])).dtype == torch.bfloat16
    scoring.release_model()
    assert {name: p.dtype for name, p in model.named_parameters()} == kinds
    assert model(torch.tensor([[3, 4, 5]])).logits.dtype == torch.bfloat16


def test_what_was_float32_in_a_narrow_block_stays_so() -> None:
    model = model_of("mixtral")
    norm = model.model.layers[-1].input_layernorm
    norm.float()
    norm.register_buffer("share", torch.tensor([1 / 3]))
    forward = norm.forward
    norm.forward = lambda x: forward(x).to(x.dtype)
    scoring = ScoringModel(model, 1)
    scoring.settle()
    assert {t.dtype for t in (norm.weight, norm.share)} == {torch.float32}
    assert float(norm.share) == float(torch.tensor(1 / 3))
    assert model.model.layers[-1].post_attention_layernorm.weight.dtype == torch.bfloat16


def test_in_float16_error_signals_would_vanish_so_the_scoring_blocks_stay_wide() -> None:
    scoring = ScoringModel(tiny_model("llama", dtype=torch.float32).to(torch.float16), 2)
    scoring.settle()
    assert {p.dtype for block in scoring.blocks for p in block.parameters()} == {torch.float32}


def test_what_keys_get_from_many_blocks_of_queries_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a sum stands still once a block's part is less than half a unit in its last place."""
    generator, module = torch.Generator().manual_seed(0), torch.nn.Module()
    given = [torch.randn(1, 2, 2048, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    attention.listen(module, attention.Tape())

    def grads(size: int, kind: torch.dtype) -> list[Tensor]:
        monkeypatch.setitem(probabilities.SCORES_PER_BLOCK, "cpu", size)
        own = [x.detach().to(kind).requires_grad_() for x in given]
        out, _ = attention.attention_forward(module, *own, None)
        return [g.double() for g in torch.autograd.grad(out.double().abs().sum(), own)]

    exact, whole, parted = grads(1 << 30, torch.float64), grads(1 << 30, torch.bfloat16), grads(1, torch.bfloat16)
    for wanted, one, other in zip(exact, whole, parted, strict=True):
        assert (other - wanted).norm() < 1.2 * (one - wanted).norm()


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
