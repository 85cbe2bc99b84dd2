from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.capture import ScoringModel
from alphatoken_curate.paths import PathScorer
from alphatoken_curate.plan import collate, plan_batches
from alphatoken_curate.tokens import TokenRow

EXACT = 1e-10
"""Of the largest value, in float64 throughout (`all_float64`)."""


@pytest.fixture
def all_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep transformers' norms and eager softmax from dropping to float32 inside a float64 model."""
    to, single, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def keep_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lowered = torch.float32 in args or kwargs.get("dtype") is torch.float32
        return self if lowered and self.dtype is torch.float64 else to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep_to)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype is torch.float64 else single(self))
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **_: softmax(x, dim=dim))


def random_direction(scoring: ScoringModel, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m.weight.shape, generator=generator, dtype=m.weight.dtype) for m in scoring.maps]


def named(scoring: ScoringModel, direction: list[Tensor]) -> dict[str, Tensor]:
    return {m.name: d for m, d in zip(scoring.maps, direction, strict=True)}


def places(row: TokenRow) -> list[int]:
    return np.flatnonzero(row.response).tolist()


def ids_of(row: TokenRow) -> Tensor:
    return torch.from_numpy(row.input_ids.astype(np.int64))


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


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = EXACT) -> None:
    largest = wanted.abs().max().clamp_min(1e-30)
    assert torch.isfinite(found).all()
    assert ((found - wanted).abs().max() / largest).item() < tolerance


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_published_equals_the_paper_by_loops(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    scoring = ScoringModel(model, 3)
    rows = tiny_rows()
    direction = random_direction(scoring, 3)
    rows_of = {scoring.maps[index].name: kept for index, kept in scoring.value_rows}
    for window in (2, 32):
        for budget in (1, 45, 10_000):
            found = score_rows(PathScorer(scoring, [direction], "published", window), rows, budget)
            for i, row in enumerate(rows):
                direct, causal = oracles.published(
                    plain, 3, named(scoring, direction), ids_of(row), places(row), window, lambda n, _: rows_of.get(n)
                )
                assert_close(torch.stack([found["direct"][i][0], found["causal"][i][0]]), torch.stack([direct, causal]))
