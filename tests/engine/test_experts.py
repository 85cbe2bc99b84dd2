from __future__ import annotations

import copy
from typing import Any

import oracles
import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from alphatoken_curate.engine import experts
from alphatoken_curate.engine.capture import ScoringModel

FAMILIES = ["mixtral", "gpt_oss", "granitemoe", "phimoe"]
"""Matrices both ways round, biases, gates side by side and interleaved."""


def experts_of(family: str) -> Any:
    """The experts of a tiny model's last block, in float64, computed the plain way."""
    model = tiny_model(family).requires_grad_(True)
    return next(m for m in reversed(list(model.modules())) if oracles.is_experts(m))


def routed(count: int, of: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """For each of 9 positions `count` different experts out of `of`, and their shares."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(of, generator=generator)[:count] for _ in range(9)])
    return chosen, torch.rand(9, count, generator=generator, dtype=torch.float64)


def states() -> Tensor:
    return torch.randn(9, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_every_gradient_are_those_of_the_models_own_forward(family: str) -> None:
    module = experts_of(family)
    (chosen, shares), x = routed(2, 4), states()  # the fifth expert is never chosen
    shares.requires_grad_(True)
    inputs = [x, shares, *module.parameters()]
    found, wanted = experts.experts_forward(module, x, chosen, shares), module(x, chosen, shares)
    assert torch.allclose(found, wanted, atol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(6), dtype=found.dtype)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(wanted, inputs, weights), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_experts_without_a_gate() -> None:
    config = NemotronHConfig(hidden_size=16, n_routed_experts=4, moe_intermediate_size=8, moe_latent_size=None)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = NemotronHExperts(config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    assert experts.expert_matrices(module) == {"up_proj": False, "down_proj": False}
    chosen, shares = routed(2, 4)
    assert torch.allclose(
        experts.experts_forward(module, states(), chosen, shares), module(states(), chosen, shares), atol=1e-12
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_watch_is_told_what_each_expert_that_was_hit_multiplies(family: str) -> None:
    module = experts_of(family)
    (chosen, shares), x = routed(2, 4), states()
    told: dict[tuple[str, int | None], tuple[Tensor, Tensor, Tensor | None]] = {}

    def note(slot: str, expert: int | None, h: Tensor, z: Tensor, where: Tensor | None) -> Tensor:
        told[slot, expert] = h, z, where
        return z

    undo = experts.watch(module, note)
    experts.experts_forward(module, x, chosen, shares)
    assert told.keys() == {(slot, e) for slot in ("gate_up_proj", "down_proj") for e in chosen.unique().tolist()}
    for (slot, expert), (h, z, where) in told.items():
        assert where is not None
        assert where.tolist() == [i for i, row in enumerate(chosen.tolist()) if expert in row]
        matrix = getattr(module, slot)[expert]
        plain = h @ (matrix if module.is_transposed else matrix.t())
        bias = getattr(module, f"{slot}_bias")[expert] if module.has_bias else 0
        assert torch.allclose(z, plain + bias, atol=1e-12)
        if slot == "gate_up_proj":
            assert torch.equal(h, x[where])
    undo()
    told.clear()
    experts.experts_forward(module, x, chosen, shares)
    assert not told


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "ernie4_5_moe", "phimoe"])
def test_a_watched_router_tells_its_product_and_runs_as_before(family: str) -> None:
    model = tiny_model(family)
    router = next(m for n, m in oracles.routers(model, 1).items())
    told: list[tuple[Any, ...]] = []
    undo = experts.watch(router, lambda *all_of_it: told.append(all_of_it) or all_of_it[3])
    before = model.model(input_ids=torch.arange(3, 10)[None]).last_hidden_state
    (slot, expert, h, z, where), *others = told
    assert (slot, expert, where, others) == ("weight", None, None, [])
    bias = getattr(router, "bias", None)
    plain = h.double() @ router.weight.t() + (0 if bias is None else bias)
    assert torch.allclose(z.double(), plain, atol=1e-12 if z.dtype is torch.float64 else 1e-5)  # Ernie casts its weight
    undo()
    assert torch.equal(model.model(input_ids=torch.arange(3, 10)[None]).last_hidden_state, before)
    assert len(told) == 1


def test_only_the_scoring_blocks_get_our_function_and_give_it_back() -> None:
    model = tiny_model("mixtral")
    configs = [m.config for m in model.modules() if oracles.is_experts(m)]
    scoring = ScoringModel(model, 1)
    named = [m.config._experts_implementation for m in model.modules() if oracles.is_experts(m)]
    assert named == ["eager"] * 3 + [experts.NAME]
    scoring.release_model()
    assert [m.config for m in model.modules() if oracles.is_experts(m)] == configs
    assert not experts._watches


def test_a_module_that_is_no_mixture_has_no_experts() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    assert not any(experts.expert_matrices(m) for m in model.modules())
