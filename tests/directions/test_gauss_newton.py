"""Products with the Gauss-Newton matrix against explicit matrices: the gradient of every label's log-probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from curved import batches, root_of, rows_of
from directed import assert_close, random_direction
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.directions.gauss_newton import Products, product_sums
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.engine.moving import Moving
from alphatoken_curate.signals.preference import Pairs
from alphatoken_curate.tokens.tokenise import AnyRow

LONG = pytest.mark.long
REFERENCE = np.linspace(5.0, 90.0, 8)
"""Of four pairs: margins well away from 0."""


def flat(direction: list[Tensor]) -> Tensor:
    return torch.cat([matrix.reshape(-1) for matrix in direction])


def products(
    scoring: ScoringModel, along: list[list[Tensor]], rows: list[AnyRow], budget: int, pairs: Pairs | None
) -> Products:
    bend = None if pairs is None else pairs.bend
    return product_sums(scoring, Moving(scoring, along), len(along), batches(rows, budget), bend)


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize(
    ("family", "pairs"),
    [
        ("llama", False),
        ("gemma2", True),
        ("mixtral", True),
        *(pytest.param(*one, marks=LONG) for one in (("gpt2", False), ("gemma2", False), ("qwen3_moe", False))),
        *(pytest.param(*one, marks=LONG) for one in (("llama", True), ("gpt_oss", False), ("granite", True))),
    ],
)
def test_products_are_those_of_the_explicit_matrix(family: str, pairs: bool) -> None:
    """With padding, prompts and answers of one token, soft caps and experts, whatever the batches."""
    rows, reference = rows_of(True) if pairs else [*tiny_rows()[1:3], tiny_rows()[5]], REFERENCE if pairs else None
    scoring = ScoringModel(tiny_model(family), 2)
    root = root_of(tiny_model(family), 2, rows, [m.name for m in scoring.maps], reference=reference)
    along = [random_direction(scoring, seed) for seed in (0, 1)]
    for budget in (1, 45, 10_000):
        found = products(scoring, along, rows, budget, Pairs(beta=0.1, reference=REFERENCE) if pairs else None)
        assert found.units == len(rows)
        for n, x in enumerate(along):
            moves = root @ flat(x)
            assert_close(flat(found.along[n]) / len(rows), root.t() @ moves, 1e-10)
            assert_close(found.forms[n] / len(rows), moves.square().sum(), 1e-10)
        counts = [1.0] * len(rows) if pairs else [1 / int(row.response.sum()) for row in rows]  # type: ignore[union-attr]
        assert found.shares == pytest.approx(sum(counts), rel=1e-12)


def scoring_of(dtype: torch.dtype) -> ScoringModel:
    return ScoringModel(tiny_model("llama", dtype=dtype), 2)


@pytest.mark.usefixtures("all_float64")
def test_without_a_reference_a_pair_bends_as_ekfac_squares_it() -> None:
    """At a margin of 0 the second derivative of the loss is the square of the first."""
    rows = rows_of(True)
    pairs, (batch,) = Pairs(beta=0.3, reference=None), batches(rows, 10_000)
    nll = torch.linspace(0.1, 3, len(batch.target), dtype=torch.float64)
    assert_close(pairs.bend(batch, nll), pairs.weigh(batch, nll), 1e-15)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_in_narrow_numbers_what_is_made_before_it_settles_comes_close(narrow: torch.dtype) -> None:
    rows = list(tiny_rows())
    found = {}
    for dtype in (narrow, torch.float64):
        scoring = ScoringModel(tiny_model("llama", dtype=narrow).to(dtype), 2)
        along = [[x.to(m.weight.dtype) for x, m in zip(random_direction(scoring, 0), scoring.maps, strict=True)]]
        found[dtype] = products(scoring, along, rows, 1000, None)
    low, high = found.values()
    assert all(matrix.dtype is torch.float32 for matrix in low.along[0])
    assert float(low.forms[0]) == pytest.approx(float(high.forms[0]), rel=0.3)
    small = products(
        scoring_of(narrow), [[1e-4 * x for x in random_direction(scoring_of(narrow), 0)]], rows, 1000, None
    )
    ratio = flat(small.along[0]).norm() / flat(low.along[0]).norm()
    assert float(ratio) == pytest.approx(1e-4, rel=0.05), "nothing is lost of what is small"
