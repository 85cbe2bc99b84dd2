from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from oracles import contraction_by_backwards, eager, linear_maps, losses
from tiny import FAMILIES, tiny_model, tiny_pairs
from tiny_files import perturbed
from torch import Tensor

from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.runs.schema import components
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.signals.preference import Pairs, reference_sums
from alphatoken_curate.signals.stored import RowResult, plain_losses, row_signals
from alphatoken_curate.tokens.plan import collate, plan_batches, sequences
from alphatoken_curate.tokens.tokenise import PairRow, TokenRow

BETA = 0.3


def models(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A tuned model and its reference."""
    return perturbed(tiny_model(family, dtype=dtype), scale=0.1), tiny_model(family, dtype=dtype)


def directions(scoring: ScoringModel, count: int = 2) -> list[Direction]:
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randn(m.weight.shape, generator=generator, dtype=torch.float64).to(m.weight.dtype) for m in scoring.maps]
        for _ in range(count)
    ]


def places(row: TokenRow) -> list[int]:
    return np.flatnonzero(row.response).tolist()


def scored(
    family: str, rows: list[PairRow], *, estimator: Any, batch_tokens: int, dtype: torch.dtype = torch.float64
) -> tuple[list[RowResult], list[Direction], ScoringModel]:
    model, reference = models(family, dtype)
    sums = reference_sums(
        plain_losses(ScoringModel(reference, 2), sequences(rows), [collate(rows, i) for i in plan_batches(rows, 64)])
    )
    scoring = ScoringModel(model, 2)
    chosen = directions(scoring)
    found = row_signals(
        PathScorer(scoring, chosen, estimator, 4),
        rows,
        [collate(rows, indices) for indices in plan_batches(rows, batch_tokens)],
        components=components(estimator),
        objectives=("adapt", "stab"),
        stability_weight=1.5,
        reference_nll=None,
        pairs=Pairs(beta=BETA, reference=sums),
    )
    assert all(found)
    return [one for one in found if one], chosen, scoring


def by_eps(model: Any, reference: Any, row: PairRow, direction: dict[str, Tensor]) -> tuple[list[Tensor], float, float]:
    """Derivative of the pair's loss -log sigmoid(margin) in eps[s], y = W h + eps[s] (M h), for either branch."""
    model, reference = eager(model).requires_grad_(False), eager(reference).requires_grad_(False)
    branches = (row.chosen, row.rejected)
    eps = [torch.zeros(len(one.input_ids), dtype=torch.float64, requires_grad=True) for one in branches]
    active: list[Tensor] = []
    for name, module in linear_maps(model, 2).items():
        module.register_forward_hook(
            lambda _, args, out, m=direction[name]: out + active[0][None, :, None] * (args[0] @ m.t())
        )
    gains = []
    for one, moved in zip(branches, eps, strict=True):
        active[:] = [moved]
        ids = torch.from_numpy(one.input_ids).long()
        gains.append(losses(reference, ids, places(one)).sum() - losses(model, ids, places(one)).sum())
    margin = BETA * (gains[0] - gains[1])
    loss = -torch.nn.functional.logsigmoid(margin)
    omega = BETA * torch.sigmoid(-margin)
    return list(torch.autograd.grad(loss, eps)), float(margin.detach()), float(omega.detach())


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text", "mistral"])
def test_signals_are_those_of_the_loss_of_the_pair(family: str) -> None:
    rows = tiny_pairs()
    found, chosen, scoring = scored(family, rows, estimator="exact", batch_tokens=10_000)
    model, reference = models(family)
    for n, objective in enumerate(("adapt", "stab")):
        named = {m.name: matrix for m, matrix in zip(scoring.maps, chosen[n], strict=True)}
        for row, result in zip(rows, found, strict=True):
            total, margin, omega = by_eps(model, reference, row, named)
            assert result.margin == pytest.approx(margin, abs=1e-5) and result.omega == pytest.approx(omega, abs=1e-6)
            sign = {0: omega, 1: -omega}
            for branch, one in enumerate((row.chosen, row.rejected)):
                mine, ids = result.branches[branch], torch.from_numpy(one.input_ids).long()
                at = np.array(places(one)) - 1
                wanted = total[branch].numpy()[at]
                both = mine[f"{objective}_direct"] + mine[f"{objective}_causal"]
                scale = np.abs(wanted).max()
                np.testing.assert_allclose(both[one.response], wanted, atol=3e-6 * scale, rtol=0)
                matrix = contraction_by_backwards(copy.deepcopy(model), 2, named, ids, places(one)).numpy()
                own = sign[branch] * matrix[at, np.arange(len(at))]
                np.testing.assert_allclose(mine[f"{objective}_direct"][one.response], own, atol=3e-6 * scale, rtol=0)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("estimator", ["published", "exact"])
@pytest.mark.parametrize("shared", [11, 2])
def test_sharing_the_prompt_and_batching_change_nothing(estimator: Any, shared: int) -> None:
    rows = tiny_pairs(shared=shared)[:3]
    start = collate(rows, [0, 1, 2]).start
    assert start == (shared - 1 if shared > 8 else 0)
    whole, _, _ = scored("llama", rows, estimator=estimator, batch_tokens=10_000)
    for n, row in enumerate(rows):
        alone, _, _ = scored("llama", [row], estimator=estimator, batch_tokens=1)
        for branch in (0, 1):
            for name, values in whole[n].branches[branch].items():
                np.testing.assert_allclose(values, alone[0].branches[branch][name], rtol=1e-5, atol=1e-6)
        assert whole[n].omega == pytest.approx(alone[0].omega, rel=1e-6)


def test_the_branches_of_a_pair_weighed_apart_are_plain_rows() -> None:
    """Signals of chosen tokens are omega times those of the same row as SFT, of rejected tokens -omega times."""
    rows = tiny_pairs()
    found, chosen, _ = scored("llama", rows, estimator="published", batch_tokens=64, dtype=torch.float32)
    scoring = ScoringModel(models("llama", torch.float32)[0], 2)
    flat = sequences(rows)
    plain = row_signals(
        PathScorer(scoring, chosen, "published", 4),
        flat,
        [collate(flat, indices) for indices in plan_batches(flat, 64)],
        components=components("published"),
        objectives=("adapt", "stab"),
        stability_weight=1.5,
        reference_nll=None,
        pairs=None,
    )
    for n, result in enumerate(found):
        assert result.omega is not None and result.margin is not None
        assert result.omega == pytest.approx(BETA / (1 + np.exp(result.margin)), rel=1e-6)
        for branch, sign in enumerate((result.omega, -result.omega)):
            alone = plain[2 * n + branch]
            assert alone is not None
            for name in ("adapt_direct", "adapt_causal", "stab_direct", "stab_causal", "value"):
                wanted = sign * alone.branches[0][name]
                scale = np.nanmax(np.abs(wanted))
                np.testing.assert_allclose(result.branches[branch][name], wanted, atol=2e-5 * scale, rtol=0)
            np.testing.assert_allclose(result.branches[branch]["nll"], alone.branches[0]["nll"], rtol=1e-5)


def test_without_a_reference_every_pair_weighs_half_of_beta() -> None:
    rows = tiny_pairs()
    batch = collate(rows, [2, 0])
    nll = np.random.default_rng(0).random(len(batch.target))
    terms = Pairs(beta=0.4, reference=None).terms(batch, nll)
    assert terms.margin.tolist() == [0, 0] and terms.omega.tolist() == [0.2, 0.2]


def test_extreme_margins_do_not_overflow() -> None:
    rows = tiny_pairs()
    batch = collate(rows, [0])
    nll = np.zeros(len(batch.target))
    for large in (1e5, -1e5):
        terms = Pairs(beta=0.1, reference=np.array([large, 0.0])).terms(batch, nll)
        assert np.isfinite(terms.omega).all() and terms.omega[0] == pytest.approx(0.0 if large > 0 else 0.1)


def test_weights_of_token_losses_are_the_signs_of_signals() -> None:
    rows = tiny_pairs()
    pairs = Pairs(beta=0.1, reference=np.arange(8.0))
    batch = collate(rows, [3, 1])
    nll = torch.rand(len(batch.target), dtype=torch.float32)
    weights = pairs.weigh(batch, nll)
    signs = pairs.signs(batch, pairs.terms(batch, nll.double().numpy()))
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), signs, rtol=1e-6)
    assert set(np.sign(signs)[np.isin(batch.row, [0, 2])]) == {1} and set(np.sign(signs)[batch.row % 2 == 1]) == {-1}


def test_families_named_here_are_promised() -> None:
    assert {"llama", "gpt2", "gpt_neox", "gemma3_text", "mistral"} <= set(FAMILIES)
