from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from curved import batches, rows_of
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.directions.losses import row_means
from alphatoken_curate.directions.precondition import estimate, precondition
from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.errors import InputError
from alphatoken_curate.tokens.plan import Batch
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow

EXACT = 1e-10
LAYERS = 2
DAMPING = 0.1
BUDGETS = (1, 45, 10_000)
ROWS = [("llama", False), ("gpt2", False), ("phi3", False), ("gemma2", True), ("gpt_neox", True)]
MIXTURES = [("mixtral", False), ("gpt_oss", True)]
"""Families, and whether their rows are pairs."""


def signed(batch: Batch, nll: Tensor) -> Tensor:
    """A weight that depends on the loss, and is negative in rejected branches."""
    return torch.from_numpy(1.0 - 2 * (batch.row % 2)) * torch.sigmoid(nll)


def random_direction(scoring: ScoringModel, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m.weight.shape, generator=generator, dtype=m.weight.dtype) for m in scoring.maps]


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = EXACT) -> None:
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < tolerance


class Plain:
    """Gradients, inputs and error signals of each map, one sequence at a time, by autograd and plain hooks."""

    def __init__(self, family: str, rows: list[AnyRow], **changes: Any) -> None:
        self.model = oracles.eager(tiny_model(family, **changes)).requires_grad_(True)
        self.h: dict[str, list[Tensor]] = {}
        self.delta: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[Tensor]] = {}
        for row in rows:
            if isinstance(row, PairRow):
                one, other = self.sequence(row.chosen, 1.0), self.sequence(row.rejected, -1.0)
            else:
                one, other = self.sequence(row, None), {}
            for name, gradient in one.items():
                self.gradients.setdefault(name, []).append(gradient + other[name] if other else gradient)

    def sequence(self, row: TokenRow, sign: float | None) -> dict[str, Tensor]:
        """The gradient of its weighted loss; without a sign, of its mean loss."""
        places = np.flatnonzero(row.response).tolist()
        with oracles.kept_products(self.model, LAYERS) as seen:
            nll = oracles.losses(self.model, torch.from_numpy(row.input_ids.astype(np.int64)), places)
        loss = nll.mean() if sign is None else sign * (torch.sigmoid(nll).detach() * nll).sum()
        grads = torch.autograd.grad(loss, [p.z for p in seen], retain_graph=True)
        for product, grad in zip(seen, grads, strict=True):
            for name, where, h, delta in product.rows(grad):
                self.h.setdefault(name, []).append(h[where < places[-1]])
                self.delta.setdefault(name, []).append(delta[where < places[-1]])
        return oracles.weight_gradients(self.model, LAYERS, loss)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and S, position by position."""
        h, delta = torch.cat(self.h[name]), torch.cat(self.delta[name])
        inputs = sum(torch.outer(x, x) for x in h) / len(h)
        outputs = sum(torch.outer(x, x) for x in delta) / len(self.gradients[name])
        return inputs, outputs  # type: ignore[return-value]


def stacked(matrix: Tensor) -> Tensor:
    """Vec: columns one below the other, so that vec(S G A) = (A (x) S) vec(G)."""
    return matrix.t().reshape(-1)


def solved(curvature: Tensor, matrix: Tensor) -> Tensor:
    """(curvature + damping * mean eigenvalue * I)^-1 vec(matrix), as a matrix."""
    size = len(curvature)
    damped = curvature + DAMPING * curvature.trace() / size * torch.eye(size, dtype=curvature.dtype)
    return torch.linalg.solve(damped, stacked(matrix)).reshape(matrix.t().shape).t()


def found_direction(kind: str, family: str, pairs: bool, budget: int) -> tuple[ScoringModel, Any, Any, Any]:
    scoring, rows = ScoringModel(tiny_model(family), LAYERS), rows_of(pairs)
    stored = estimate(kind, scoring, lambda: iter(batches(rows, budget)), signed if pairs else row_means)
    direction = random_direction(scoring)
    return scoring, stored, direction, precondition(kind, stored, scoring, direction, eps=1e-8, damping=DAMPING)


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize(("family", "pairs"), ROWS + MIXTURES)
def test_adam_divides_by_the_root_of_second_moments_of_unit_gradients(family: str, pairs: bool) -> None:
    plain = Plain(family, rows_of(pairs))
    for budget in BUDGETS:
        scoring, stored, direction, found = found_direction("adam", family, pairs, budget)
        assert set(stored) == {f"{m.parameter}.second_moment" for m in scoring.maps}
        for m, g, scaled in zip(scoring.maps, direction, found, strict=True):
            moment = sum(u**2 for u in plain.gradients[m.name]) / len(plain.gradients[m.name])
            assert_close(stored[f"{m.parameter}.second_moment"], moment)  # type: ignore[arg-type]
            assert_close(scaled, g / (moment**0.5 + 1e-8))


@pytest.mark.one_in(7)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize(("family", "pairs"), ROWS + MIXTURES)
def test_kfac_solves_with_the_explicit_kronecker_matrix(family: str, pairs: bool) -> None:
    plain = Plain(family, rows_of(pairs))
    wanted = {}
    for budget in BUDGETS:
        scoring, stored, direction, found = found_direction("kfac", family, pairs, budget)
        for m, g, scaled in zip(scoring.maps, direction, found, strict=True):
            inputs, outputs = plain.factors(m.name)
            for side, factor in (("input", inputs), ("output", outputs)):
                vectors, values = stored[f"{m.parameter}.{side}_vectors"], stored[f"{m.parameter}.{side}_values"]
                assert_close(vectors @ torch.diag(values) @ vectors.t(), factor)
            if m.name not in wanted:
                wanted[m.name] = solved(torch.kron(inputs, outputs), g)
            assert_close(scaled, wanted[m.name])


@pytest.mark.one_in(7)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize(("family", "pairs"), ROWS + MIXTURES)
def test_ekfac_has_the_exact_diagonal_in_the_kronecker_eigenbasis(family: str, pairs: bool) -> None:
    plain = Plain(family, rows_of(pairs))
    for budget in BUDGETS[::2]:
        scoring, stored, direction, found = found_direction("ekfac", family, pairs, budget)
        for m, g, scaled in zip(scoring.maps, direction, found, strict=True):
            bases = [stored[f"{m.parameter}.{side}_vectors"] for side in ("input", "output")]
            for vectors, factor in zip(bases, plain.factors(m.name), strict=True):
                assert_close(vectors.t() @ vectors, torch.eye(len(vectors), dtype=torch.float64))
                rotated = vectors.t() @ factor @ vectors
                assert_close(torch.diag(rotated.diagonal()), rotated)
            units = torch.stack([stacked(u) for u in plain.gradients[m.name]])
            basis = torch.kron(*bases)
            diagonal = (basis.t() @ (units.t() @ units / len(units)) @ basis).diagonal()
            assert_close(stacked(stored[f"{m.parameter}.second_moment"]), diagonal)
            assert_close(scaled, solved(basis @ torch.diag(diagonal) @ basis.t(), g))


@pytest.mark.usefixtures("all_float64")
def test_one_unit_of_one_position_is_its_own_outer_product() -> None:
    """Nothing is approximated there: A (x) S is vec(g) vec(g)^T, whatever the number of copies of the row."""
    row = tiny_rows()[5]
    plain = Plain("llama", [row])
    scoring = ScoringModel(tiny_model("llama"), LAYERS)
    for copies in (1, 3):
        many = batches([row] * copies, 10_000)
        stored = estimate("kfac", scoring, lambda many=many: many, row_means)  # type: ignore[misc]
        for m in scoring.maps:
            if not m.name.endswith(("q_proj", "k_proj")):
                gradient = stacked(plain.gradients[m.name][0])
                sides = [
                    stored[f"{m.parameter}.{s}_vectors"]
                    @ torch.diag(stored[f"{m.parameter}.{s}_values"])
                    @ stored[f"{m.parameter}.{s}_vectors"].t()
                    for s in ("input", "output")
                ]
                assert_close(torch.kron(*sides), torch.outer(gradient, gradient))


@pytest.mark.parametrize("kind", ["adam", "kfac", "ekfac"])
def test_a_map_without_curvature_stays_zero_or_is_refused(kind: str) -> None:
    """One position attends to itself alone, so that no gradient reaches queries and keys."""
    one = batches([tiny_rows()[5]], 1)
    scoring = ScoringModel(tiny_model("llama"), 1)
    stored = estimate(kind, scoring, lambda: one, row_means)
    gradient = target_gradient(scoring, one, all_positions=True)
    found = precondition(kind, stored, scoring, gradient, eps=1e-8, damping=DAMPING)
    dead = [m.name.endswith(("q_proj", "k_proj")) for m in scoring.maps]
    assert sum(dead) == 2
    assert [not scaled.any() for scaled in found] == dead
    with pytest.raises(
        InputError, match=rf"--precondition {kind}: model\.layers\.3\.self_attn\.\w_proj\.weight has no"
    ):
        precondition(kind, stored, scoring, random_direction(scoring), eps=1e-8, damping=DAMPING)


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("kind", ["adam", "kfac", "ekfac"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_that_no_row_reached_take_the_mean_of_the_others(kind: str, family: str) -> None:
    many = {"num_experts" if family == "qwen3_moe" else "num_local_experts": 12}
    rows = tiny_rows()[1:2]
    plain = Plain(family, rows, **many)  # type: ignore[arg-type]
    scoring, told = ScoringModel(tiny_model(family, **many), LAYERS), list[str]()
    stored = estimate(kind, scoring, lambda: batches(rows, 1000), row_means, told.append)  # type: ignore[arg-type]
    direction = random_direction(scoring)
    found = precondition(kind, stored, scoring, direction, eps=1e-8, damping=DAMPING)
    without = []
    for m, g, scaled in zip(scoring.maps, direction, found, strict=True):
        if m.expert is None or plain.gradients[m.name][0].any():
            continue
        without.append((m.owner, m.expert))
        alike = (other.name for other in scoring.maps if (other.owner, other.slot) == (m.owner, m.slot))
        others = [name for name in alike if plain.gradients[name][0].any()]
        if kind == "adam":
            moment = sum(plain.gradients[name][0] ** 2 for name in others) / len(others)
            assert_close(scaled, g / (moment**0.5 + 1e-8))
            continue
        h = torch.cat([x for name in others for x in plain.h[name]])
        outputs = sum(plain.factors(name)[1] for name in others) / len(others)
        assert_close(scaled, solved(torch.kron(h.t() @ h / len(h), outputs), g))
    assert without
    assert told == [
        f"--precondition {kind}: {len(set(without))} of 24 experts have no gradient in any of the rows the curvature is"
        " estimated from. They take the mean of the others of their block; a larger --precondition-rows may reach them."
    ]


@pytest.mark.parametrize("kind", ["adam", "kfac", "ekfac"])
def test_rows_without_gradient_or_with_a_broken_one_are_refused(kind: str) -> None:
    scoring = ScoringModel(tiny_model("llama"), 1)
    some = batches(rows_of(False), 1000)
    with pytest.raises(InputError, match=f"{kind}: the loss of the rows .* has a gradient of zero everywhere"):
        estimate(kind, scoring, lambda: some, lambda _, nll: 0 * nll)
    with pytest.raises(InputError, match=f"{kind}: .* zero everywhere"):
        estimate(kind, scoring, lambda: [], row_means)
    with pytest.raises(InputError, match="no finite gradient"):
        estimate(kind, scoring, lambda: some, lambda _, nll: torch.nan * nll)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adam", "kfac", "ekfac"])
def test_lower_precision_keeps_float32_and_comes_close(kind: str, dtype: torch.dtype) -> None:
    rounded = tiny_model("llama", dtype=torch.float32).to(dtype)
    precise = ScoringModel(copy.deepcopy(rounded).double(), "all")
    scoring, some = ScoringModel(rounded, "all"), batches(rows_of(False), 1000)
    direction = random_direction(scoring)
    found = {}
    for name, one in (("low", scoring), ("high", precise)):
        stored = estimate(kind, one, lambda: some, row_means)
        assert {t.dtype for t in stored.values()} == {torch.float32 if name == "low" else torch.float64}
        given = [g.to(m.weight.dtype) for g, m in zip(direction, one.maps, strict=True)]
        found[name] = precondition(kind, stored, one, given, eps=1e-3, damping=DAMPING)
    for low, high in zip(found["low"], found["high"], strict=True):
        assert low.dtype is torch.float32
        assert_close(low.double(), high, 1e-3 if dtype is torch.float32 else 0.2)


def test_what_is_stored_is_of_the_promised_shapes() -> None:
    scoring, some = ScoringModel(tiny_model("gpt2", dtype=torch.float32), 1), batches(rows_of(False), 1000)
    sizes = {m.parameter: m.weight.shape for m in scoring.maps}
    for kind in ("adam", "kfac", "ekfac"):
        for name, tensor in estimate(kind, scoring, lambda: some).items():
            parameter, part = name.rsplit(".", 1)
            d_out, d_in = sizes[parameter]
            assert tensor.is_contiguous()
            assert (
                tensor.shape
                == {
                    "second_moment": (d_out, d_in),
                    "input_vectors": (d_in, d_in),
                    "input_values": (d_in,),
                    "output_vectors": (d_out, d_out),
                    "output_values": (d_out,),
                }[part]
            )
