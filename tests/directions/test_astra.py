"""Iterations from EK-FAC on against the exact solution of an explicit system."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from curved import batches, root_of, rows_of
from directed import assert_close, random_direction
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.directions.astra import Iterate, Solver
from alphatoken_curate.directions.gauss_newton import product_sums
from alphatoken_curate.directions.losses import row_means
from alphatoken_curate.directions.precondition import estimate, precondition
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.engine.moving import Moving
from alphatoken_curate.errors import InputError, ModelError
from alphatoken_curate.signals.preference import Pairs
from alphatoken_curate.tokens.tokenise import AnyRow

DAMPING = 30.0
"""In so few rows the curvature lies in a few dimensions: with as much of it a few iterations come to the end."""
PAIRS = Pairs(beta=0.1, reference=None)


class Bench:
    """A tiny model, its curvature over some rows, and the system that is to be solved, as explicit as can be."""

    def __init__(self, family: str, rows: Sequence[AnyRow], *, pairs: bool = False, **changes: Any) -> None:
        self.rows, self.pairs = list(rows), PAIRS if pairs else None
        self.scoring = ScoringModel(tiny_model(family, **changes), 1)
        weigh = row_means if self.pairs is None else self.pairs.weigh
        self.stored = estimate("astra", self.scoring, lambda: batches(self.rows, 1000), weigh)
        self.solver = Solver(self.scoring, self.stored, DAMPING)
        self.changes, self.family = changes, family

    def explicit(self) -> Tensor:
        """H + lambda (P, P): what EK-FAC stores decides lambda, and nothing else of ours is in it."""
        maps = self.scoring.maps
        root = root_of(tiny_model(self.family, **self.changes), 1, self.rows, [m.name for m in maps])
        share = 1.0
        if self.pairs is None:
            share = sum(1 / int(row.response.sum()) for row in self.rows) / len(self.rows)  # type: ignore[union-attr]
        means = [self.stored[f"{m.parameter}.second_moment"].mean() for m in maps]
        lambdas = [DAMPING * mean.expand(m.weight.numel()) for m, mean in zip(maps, means, strict=True)]
        return share * root.t() @ root + torch.diag(torch.cat(lambdas))

    def iterates(self, v: list[Tensor], count: int) -> list[Iterate]:
        """That of EK-FAC, and so many after it."""
        found = [self.solver.begin(v)]
        bend = None if self.pairs is None else self.pairs.bend
        for _ in range(count):
            moving = Moving(self.scoring, [found[-1].along])
            made = product_sums(self.scoring, moving, 1, batches(self.rows, 45), bend)
            scale = made.shares / made.units**2
            product = [h * scale for h in made.along[0]]
            found.append(self.solver.step(found[-1], product, float(made.forms[0]) * scale))
        return found

    def ekfac(self, v: list[Tensor]) -> list[Tensor]:
        return precondition("ekfac", self.stored, self.scoring, v, eps=0.0, damping=DAMPING)


def flat(direction: list[Tensor]) -> Tensor:
    return torch.cat([matrix.reshape(-1) for matrix in direction])


@pytest.mark.long
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize(
    ("family", "pairs"),
    [("gpt2", True), ("llama", False), ("gemma2", False)],
)
def test_iterates_come_to_the_exact_solution(family: str, pairs: bool) -> None:
    bench = Bench(family, rows_of(True) if pairs else tiny_rows()[1:4], pairs=pairs)
    v, system = random_direction(bench.scoring, 3), bench.explicit()
    wanted = torch.linalg.solve(system, flat(v))
    each = bench.iterates(v, 40)
    assert_close(flat(each[0].x), flat(bench.ekfac(v)), 1e-15)
    # The norm that conjugate gradients make smaller each time, by as much as any method of as many products can.
    errors = [float((e := flat(one.x) - wanted) @ system @ e) for one in each]
    assert all(later < before * (1 + 1e-9) + 1e-18 for before, later in pairwise(errors[1:]))
    assert errors[1] <= errors[0]
    assert_close(flat(each[-1].x), wanted, 1e-8)
    for k, one in enumerate(each):
        told = each[-1].residuals[k]
        assert told == pytest.approx(
            float((flat(v) - system @ flat(one.x)).norm() / flat(v).norm()), rel=1e-5, abs=1e-9
        )
    # The first is EK-FAC's own, at the length that is best.
    line = flat(each[0].x)
    assert_close(flat(each[1].x), line * (flat(v) @ line) / (line @ system @ line), 1e-12)


@pytest.mark.usefixtures("all_float64")
def test_what_is_not_there_is_solved_by_nothing() -> None:
    bench = Bench("llama", rows_of(False))
    for one in bench.iterates(bench.scoring.zeros(), 2):
        assert not flat(one.x).any() and set(one.residuals) <= {0.0}


@pytest.mark.usefixtures("all_float64")
def test_experts_that_no_row_reaches_keep_what_ekfac_gives_them() -> None:
    bench = Bench("qwen3_moe", tiny_rows()[1:2], num_experts=12)
    v = random_direction(bench.scoring, 3)
    wanted, (*_, last) = bench.ekfac(v), bench.iterates(v, 30)
    moments = [bench.stored[f"{m.parameter}.second_moment"] for m in bench.scoring.maps]
    alone = [m.expert is not None and not last.left[i].any() for i, m in enumerate(bench.scoring.maps)]
    assert 0 < sum(alone) < len(alone) and all(moment.any() for moment in moments)
    for x, own, out in zip(last.x, wanted, alone, strict=True):
        assert torch.equal(x, own) == out
    assert last.residuals[-1] < 1e-3 * last.residuals[0]


@pytest.mark.usefixtures("all_float64")
def test_a_map_without_curvature_is_left_out() -> None:
    """One position attends to itself alone, so that nothing reaches queries and keys."""
    bench = Bench("llama", [tiny_rows()[5]])
    v = random_direction(bench.scoring, 3)
    with pytest.raises(InputError, match=r"--precondition astra: .*q_proj\.weight has no gradient"):
        bench.solver.begin(v)
    dead = [m.name.endswith(("q_proj", "k_proj")) for m in bench.scoring.maps]
    v = [torch.zeros_like(x) if out else x for x, out in zip(v, dead, strict=True)]
    (*_, last) = bench.iterates(v, 40)
    assert last.residuals[-1] < 1e-9
    assert [not x.any() for x in last.x] == dead


def test_float32_comes_as_near_as_it_can_tell() -> None:
    bench = Bench("llama", rows_of(False), dtype=torch.float32)
    v = random_direction(bench.scoring, 3)
    (*_, last) = bench.iterates(v, 25)
    assert last.residuals[-1] < 1e-4
    assert all(x.dtype is torch.float32 for x in last.x)


def test_what_does_not_last_or_agree_is_refused() -> None:
    bench = Bench("llama", rows_of(False))
    at = bench.iterates(random_direction(bench.scoring, 3), 1)[1]
    product = [1e-3 * x for x in at.along]
    form = float(flat(product).double() @ flat(at.along).double())
    bench.solver.step(at, product, form)
    with pytest.raises(ModelError, match=r"--precondition astra misses a part of it.*Use --precondition ekfac"):
        bench.solver.step(at, product, form * 1.1)
    again = r"iteration 2 does not come to finite numbers\. Raise --precondition-damping, which is 30, or give"
    with pytest.raises(InputError, match=again):
        bench.solver.step(at, [torch.full_like(x, torch.nan) for x in product], form)
    bent = [-1e9 * x for x in at.along]
    with pytest.raises(InputError, match=again):
        bench.solver.step(at, bent, float(flat(bent).double() @ flat(at.along).double()))
