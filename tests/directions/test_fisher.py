from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from tiny import make_row, tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.directions.fisher import fisher_diagonal, fisher_sums
from alphatoken_curate.directions.generate import prompt_tokens, sample_answers
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.progress import Silent
from alphatoken_curate.tokens.draws import keyed_uniform
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches
from alphatoken_curate.tokens.tokenise import TokenRow


def batches(rows: list[TokenRow], budget: int) -> list[Batch]:
    return [collate(rows, indices) for indices in plan_batches(rows, budget)]


def by_sequences(
    rows: list[TokenRow], labels: dict[int, list[int]] | None = None, family: str = "llama"
) -> dict[str, Tensor]:
    """E[(delta^2)^T (h^2)] with plain hooks and one backward per sequence; `labels` replace the response tokens."""
    model = oracles.eager(tiny_model(family)).requires_grad_(True)
    sums: dict[str, Tensor] = {}
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        with oracles.kept_products(model, 2) as seen:
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        places = np.flatnonzero(row.response).tolist()
        wanted = labels[row.row_id] if labels else [int(ids[t]) for t in places]
        loss = sum(-torch.log_softmax(logits[t - 1], -1)[y] for t, y in zip(places, wanted, strict=True))
        for product, grad in zip(seen, torch.autograd.grad(loss, [p.z for p in seen]), strict=True):
            for name, _, h, delta in product.rows(grad):
                for x, error in zip(h, delta, strict=True):
                    sums[name] = sums.get(name, 0) + torch.outer(error**2, x**2)
    return {name: total / len(rows) for name, total in sums.items()}


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("budget", [1, 45, 1000])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_empirical_against_one_backward_per_sequence(family: str, budget: int) -> None:
    rows = tiny_rows()
    scoring = ScoringModel(tiny_model(family), 2)
    found = fisher_diagonal(scoring, rows, batches(rows, budget), sampled=False, seed=0)
    wanted = by_sequences(rows, family=family)
    for linear, diagonal in zip(scoring.maps, found, strict=True):
        error = (diagonal - wanted[linear.name]).abs().max() / wanted[linear.name].abs().max()
        assert error.item() < 1e-10


def test_sampled_is_the_same_whatever_the_batches_and_changes_with_the_seed() -> None:
    rows = tiny_rows()
    scoring = ScoringModel(tiny_model("llama"), 2)
    one, other = (fisher_diagonal(scoring, rows, batches(rows, n), sampled=True, seed=7) for n in (1, 1000))
    for a, b in zip(one, other, strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-6
    changed = fisher_diagonal(scoring, rows, batches(rows, 1000), sampled=True, seed=8)
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(changed, other, strict=True))


@pytest.mark.usefixtures("all_float64")
def test_sampled_is_empirical_on_the_drawn_labels() -> None:
    """Labels drawn by hand from the plain model with the same keyed draws give the same diagonal."""
    rows = tiny_rows()
    plain = tiny_model("llama")
    labels = {}
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        prediction = torch.softmax(plain(input_ids=ids[None]).logits[0].detach(), dim=-1)
        drawn = []
        for t in np.flatnonzero(row.response).tolist():
            draw = float(keyed_uniform(7, row.row_id, t))
            total, y = 0.0, 0
            while (total := total + float(prediction[t - 1, y])) <= draw:
                y += 1
            drawn.append(y)
        labels[row.row_id] = drawn
    scoring = ScoringModel(tiny_model("llama"), 2)
    found = fisher_diagonal(scoring, rows, batches(rows, 1000), sampled=True, seed=7)
    wanted = by_sequences(rows, labels)
    for linear, diagonal in zip(scoring.maps, found, strict=True):
        assert ((diagonal - wanted[linear.name]).abs().max() / wanted[linear.name].abs().max()).item() < 1e-10


@pytest.mark.usefixtures("all_float64")
def test_generated_is_empirical_on_what_the_model_answers() -> None:
    """Answers sampled by hand after the prompts, a full forward each, give the same diagonal."""
    plain = tiny_model("llama", eos_token_id=None)
    by_hand, answers = [], sample_answers(plain, tiny_rows(), new_tokens=5, seed=7, batch_tokens=60, progress=Silent())
    for row in tiny_rows():
        ids = row.input_ids[: prompt_tokens(row)].tolist()
        for _ in range(5):
            prediction = torch.softmax(plain(input_ids=torch.tensor([ids])).logits[0, -1].detach(), dim=-1)
            ids.append(int((prediction.cumsum(0) <= float(keyed_uniform(7, row.row_id, len(ids)))).sum()))
        by_hand.append(make_row(row.row_id, ids, [(len(ids) - 5, len(ids))]))
    scoring = ScoringModel(tiny_model("llama"), 2)
    found = fisher_diagonal(scoring, answers, batches(answers, 60), sampled=False, seed=0)
    wanted = by_sequences(by_hand)
    for linear, diagonal in zip(scoring.maps, found, strict=True):
        assert ((diagonal - wanted[linear.name]).abs().max() / wanted[linear.name].abs().max()).item() < 1e-10


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("sampled", [False, True])
def test_sums_of_parts_add_up(sampled: bool) -> None:
    rows = tiny_rows()
    scoring = ScoringModel(tiny_model("llama"), 2)
    whole = fisher_diagonal(scoring, rows, batches(rows, 1000), sampled=sampled, seed=3)
    parts = [
        fisher_sums(scoring, part, batches(part, 45), sampled=sampled, seed=3)
        for part in (rows[:1], rows[1:4], rows[4:])
    ]
    assert [count for _, count in parts] == [1, 3, 2]
    for wanted, *sums in zip(whole, *(sums for sums, _ in parts), strict=True):
        assert ((sum(sums) / 6 - wanted).abs().max() / wanted.abs().max()).item() < 1e-12
