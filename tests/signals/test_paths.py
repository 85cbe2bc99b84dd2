from __future__ import annotations

import copy
from typing import Any

import oracles
import pytest
import torch
from directed import assert_close, ids_of, places, random_direction
from tiny import CORE, tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.engine.value_rows import find_value_rows
from alphatoken_curate.signals import paths
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import collate, plan_batches
from alphatoken_curate.tokens.tokenise import TokenRow

"""Families tried with every number of blocks; all of them are in `test_architectures`."""


def named(scoring: ScoringModel, direction: list[Tensor]) -> dict[str, Tensor]:
    return {m.name: d for m, d in zip(scoring.maps, direction, strict=True)}


def score_rows(scorer: PathScorer, rows: list[TokenRow], budget: int) -> dict[str, list[Tensor]]:
    """Each signal as one tensor a row, whatever the batches were."""
    found: dict[str, list[Any]] = {name: [None] * len(rows) for name in ("nll", "entropy", "direct", "causal")}
    for indices in plan_batches(rows, budget):
        batch = collate(rows, indices)
        signals = scorer.score(batch)
        for i, index in enumerate(batch.rows):
            mine = torch.from_numpy(batch.row == i)
            for name, per_row in found.items():
                per_row[index] = getattr(signals, name)[..., mine]
    return found


@pytest.mark.one_in(12)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_exact_equals_one_backward_per_token(family: str, layers: int) -> None:
    model = tiny_model(family)
    plain = tiny_model(family)
    scoring = ScoringModel(model, layers)
    rows = tiny_rows()
    directions = [random_direction(scoring, 1), random_direction(scoring, 2)]
    scorer = PathScorer(scoring, directions, "exact", 32)
    for budget in (1, 45, 10_000):
        found = score_rows(scorer, rows, budget)
        for i, row in enumerate(rows):
            t = places(row)
            for n, direction in enumerate(directions):
                matrix = oracles.contraction_by_backwards(plain, layers, named(scoring, direction), ids_of(row), t)
                own = torch.stack([matrix[p - 1, j] for j, p in enumerate(t)])
                later = torch.stack([matrix[p - 1, j + 1 :].sum() for j, p in enumerate(t)])
                assert_close(torch.stack([found["direct"][i][n], found["causal"][i][n]]), torch.stack([own, later]))


@pytest.mark.one_in(4)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", CORE)
def test_published_equals_the_paper_by_loops(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    scoring = ScoringModel(model, 3)
    rows = tiny_rows()
    direction = random_direction(scoring, 3)
    rows_of = {scoring.maps[index].name: kept for index, kept in find_value_rows(scoring)}
    for window in (2, 32):
        for budget in (1, 45, 10_000):
            found = score_rows(PathScorer(scoring, [direction], "published", window), rows, budget)
            for i, row in enumerate(rows):
                direct, causal = oracles.published(
                    plain, 3, named(scoring, direction), ids_of(row), places(row), window, lambda n, _: rows_of.get(n)
                )
                assert_close(torch.stack([found["direct"][i][0], found["causal"][i][0]]), torch.stack([direct, causal]))


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral"])
def test_the_two_oracles_agree(family: str) -> None:
    """One backward per token, and the derivative in eps of y = W h + eps (M h): two routes to C[s, t]."""
    plain = tiny_model(family)
    scoring = ScoringModel(tiny_model(family), 3)
    direction = named(scoring, random_direction(scoring, 1))
    row = tiny_rows()[3]
    one = oracles.contraction_by_backwards(plain, 3, direction, ids_of(row), places(row))
    other = oracles.contraction_by_eps(plain, 3, direction, ids_of(row), places(row))
    assert_close(one, other)


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_parts_of_a_row_sum_to_its_gradient(family: str) -> None:
    """direct + upstream over all tokens == <sum of gradients, M>, and so does delta^T M h over all positions."""
    plain = tiny_model(family)
    scoring = ScoringModel(tiny_model(family), 4)
    direction = random_direction(scoring, 5)
    row = tiny_rows()[0]
    t = places(row)
    matrix = oracles.contraction_by_backwards(plain, 4, named(scoring, direction), ids_of(row), t)
    grads = oracles.mean_loss_gradient(plain, 4, [(ids_of(row), t)])
    whole = sum((g * d).sum() for g, d in zip(grads.values(), direction, strict=True)) * len(t)
    assert_close(matrix.sum(), whole)
    found = score_rows(PathScorer(scoring, [direction], "exact", 32), [row], 1000)
    at_predictions = matrix[[p - 1 for p in t]].sum()
    assert_close((found["direct"][0] + found["causal"][0]).sum(), at_predictions)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("estimator", ["published", "exact"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox", "mixtral", "gpt_oss", "bloom"])
def test_batches_order_and_padding_do_not_change_values(family: str, estimator: Any) -> None:
    scoring = ScoringModel(tiny_model(family, dtype=torch.float32), 3)
    scorer = PathScorer(scoring, [random_direction(scoring, 1), random_direction(scoring, 2)], estimator, 32)
    rows = tiny_rows()
    alone = score_rows(scorer, rows, 1)
    for budget, order in ((50, 1), (10_000, 1), (10_000, -1)):
        found = score_rows(scorer, rows[::order], budget)
        for name, per_row in found.items():
            for mine, wanted in zip(per_row[::order], alone[name], strict=True):
                assert_close(mine, wanted, 1e-5)


@pytest.mark.parametrize("estimator", ["published", "exact"])
def test_signals_are_linear_in_the_direction(estimator: Any) -> None:
    scoring = ScoringModel(tiny_model("llama"), 3)
    one, two = random_direction(scoring, 1), random_direction(scoring, 2)
    mixed = [3.0 * a - 0.5 * b for a, b in zip(one, two, strict=True)]
    zero = [torch.zeros_like(m) for m in one]
    batch = collate(tiny_rows(), range(6))
    found = PathScorer(scoring, [one, two, mixed, zero], estimator, 4).score(batch)
    for signal in (found.direct, found.causal):
        assert_close(signal[2], 3.0 * signal[0] - 0.5 * signal[1])
        assert not signal[3].any()


@pytest.mark.parametrize("estimator", ["published", "exact"])
def test_all_blocks_are_the_sum_of_slices_of_blocks(estimator: Any) -> None:
    """A direction that is zero below the last K blocks of `all` scores as K does."""
    whole, last = ScoringModel(tiny_model("llama"), "all"), ScoringModel(tiny_model("llama"), 2)
    assert (whole.layers, last.layers) == (4, 2)
    direction = random_direction(last, 1)
    below = [torch.zeros_like(m.weight) for m in whole.maps[: len(whole.maps) - len(last.maps)]]
    batch = collate(tiny_rows(), range(6))
    one = PathScorer(whole, [[*below, *direction]], estimator, 4).score(batch)
    two = PathScorer(last, [direction], estimator, 4).score(batch)
    assert_close(one.direct, two.direct)
    assert_close(one.causal, two.causal)


def test_nll_and_entropy_are_those_of_the_plain_model() -> None:
    plain = tiny_model("gemma2")
    scoring = ScoringModel(tiny_model("gemma2"), 2)
    rows = tiny_rows()
    found = score_rows(PathScorer(scoring, [random_direction(scoring, 1)], "exact", 4), rows, 60)
    for i, row in enumerate(rows):
        logits = plain(input_ids=ids_of(row)[None]).logits[0]
        logs = torch.log_softmax(logits, dim=-1)[[t - 1 for t in places(row)]]
        assert_close(found["nll"][i], -logs.gather(1, ids_of(row)[places(row)][:, None]).squeeze(1).detach(), 1e-6)
        assert_close(found["entropy"][i], -(logs.exp() * logs).sum(-1).detach(), 1e-6)


@pytest.mark.parametrize("estimator", ["published", "exact"])
def test_s_computes_in_float32_until_it_settles(estimator: Any) -> None:
    """With every block in S, the head alone differs (`test_precision` has what settles)."""
    rounded = tiny_model("llama", dtype=torch.float32).to(torch.bfloat16)
    exact, lower = ScoringModel(copy.deepcopy(rounded).float(), "all"), ScoringModel(rounded, "all")
    assert all(m.weight.dtype is torch.float32 for m in lower.maps)
    direction = random_direction(exact, 1)
    batch = collate(tiny_rows(), range(6))
    one = PathScorer(exact, [direction], estimator, 4).score(batch)
    two = PathScorer(lower, [direction], estimator, 4).score(batch)
    for name in ("direct", "causal"):
        error = getattr(two, name).float() - getattr(one, name)
        assert (error.norm() / getattr(one, name).norm()).item() < 0.05
    lower.release_model()
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("widened", [1 << 20, 20 * 192, 1])
def test_dot_products_of_rows_are_not_rounded(widened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(paths._WIDENED, "cpu", widened)
    generator = torch.Generator().manual_seed(0)
    stacked, x = (torch.randn(64, *size, generator=generator).bfloat16() for size in ((2 * 96,), (3, 96)))
    found = paths._row_dots(stacked, x)
    assert found.dtype == torch.float32
    wanted = (x.double()[:, :, None] * stacked.double().unflatten(1, (2, 96))[:, None]).sum(-1).permute(1, 2, 0)
    assert_close(found.double(), wanted, 1e-6)


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_target_gradient_against_autograd_on_the_weights(family: str) -> None:
    plain = tiny_model(family)
    scoring = ScoringModel(tiny_model(family), 3)
    rows = tiny_rows()
    batches = [collate(rows, indices) for indices in plan_batches(rows, 45)]
    found = target_gradient(scoring, batches, all_positions=True)
    wanted = oracles.mean_loss_gradient(plain, 3, [(ids_of(row), places(row)) for row in rows])
    for linear, gradient in zip(scoring.maps, found, strict=True):
        assert_close(gradient, wanted[linear.name].detach())
    over_responses = target_gradient(scoring, batches, all_positions=False)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(found, over_responses, strict=True))


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("estimator", ["published", "exact"])
def test_a_prompt_without_gradient_changes_nothing(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring = ScoringModel(tiny_model("mistral"), 2)
    batch = collate(tiny_rows()[:1] + tiny_rows()[4:5], range(2))
    assert batch.start == 10
    found = []
    for share in (0.0, 9.0):
        monkeypatch.setattr(paths, "PREFIX_PAYS", share)
        scorer = PathScorer(scoring, [random_direction(scoring, 1)], estimator, 4)
        assert scorer.splits_prompt == (share == 0)
        found.append(scorer.score(batch))
    assert_close(found[0].direct, found[1].direct)
    assert_close(found[0].causal, found[1].causal)
