"""The engine on a CUDA card, against one backward per token in float64 on the CPU.

`CARD=cpu pytest -m cuda` tries these tests themselves where there is no card.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.engine.placement import Placement, place
from alphatoken_curate.engine.value_rows import find_value_rows
from alphatoken_curate.signals.influence import InfluenceScorer
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import collate, plan_batches
from alphatoken_curate.tokens.tokenise import TokenRow

CARD = torch.device(os.environ.get("CARD", "cuda"))

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(CARD.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA card"),
]
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "mixtral"]
ESTIMATORS = ["published", "exact", "influence"]
LAYERS = 3
WINDOW = 5
SIGNALS = ("nll", "entropy", "direct", "causal", "influence")

FLOAT32 = 2e-4
"""Of the largest value: what a few blocks lose in float32."""

BFLOAT16 = 0.15
"""Root of the mean squared error, of that of the signal: a trunk in bfloat16 rounds each value to one part in 256."""


@pytest.fixture(autouse=True)
def full_precision() -> Any:
    """Products of float32 are of float32, not of the 10 bits that a card may round them to."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def directions_of(scoring: ScoringModel, count: int = 2) -> list[list[Tensor]]:
    """Random directions in float64 on the CPU, the same for every dtype and device."""
    draw = torch.Generator().manual_seed(5)
    return [
        [torch.randn(m.weight.shape, generator=draw, dtype=torch.float64) for m in scoring.maps] for _ in range(count)
    ]


def score(model: Any, estimator: str, rows: list[TokenRow], budget: int) -> list[dict[str, Tensor]]:
    """Every signal of each row, in float64 on the CPU, by the engine on the model's device."""
    scoring = ScoringModel(model, LAYERS)
    kinds = [torch.promote_types(m.weight.dtype, torch.float32) for m in scoring.maps]
    moved = [
        [x.to(m.weight.device, kind) for x, kind, m in zip(direction, kinds, scoring.maps, strict=True)]
        for direction in directions_of(scoring)
    ]
    scorer: Any = InfluenceScorer(scoring, moved)
    if estimator != "influence":
        scorer = PathScorer(scoring, moved, estimator, WINDOW)  # type: ignore[arg-type]
    scorer.settle()
    found: list[dict[str, Tensor]] = [{} for _ in rows]
    for indices in plan_batches(rows, budget):
        batch = collate(rows, indices)
        signals = scorer.score(batch)
        for i, index in enumerate(batch.rows):
            mine = torch.from_numpy(batch.row == i)
            kept = {name: getattr(signals, name) for name in SIGNALS}
            assert all(x.device.type == CARD.type for x in kept.values() if x is not None)
            found[index] = {n: x.detach().cpu().double()[..., mine] for n, x in kept.items() if x is not None}
    return found


def by_oracle(model: Any, estimator: str, row: TokenRow) -> dict[str, Tensor]:
    """The same of one row, by one backward per token on the CPU. `model` is plain and in float64."""
    scoring = ScoringModel(copy.deepcopy(model), LAYERS)
    values = {scoring.maps[index].name: kept for index, kept in find_value_rows(scoring)}
    ids, places = torch.from_numpy(row.input_ids.astype(np.int64)), np.flatnonzero(row.response).tolist()
    found: dict[str, list[Tensor]] = {}
    for direction in directions_of(scoring):
        named = {m.name: d for m, d in zip(scoring.maps, direction, strict=True)}
        if estimator == "published":
            pair = oracles.published(model, LAYERS, named, ids, places, WINDOW, lambda n, _: values.get(n))
            parts = dict(zip(("direct", "causal"), pair, strict=True))
        else:
            c = oracles.contraction_by_backwards(model, LAYERS, named, ids, places)
            parts = {"influence": c.sum(0)}
            if estimator == "exact":
                parts = dict(zip(("direct", "causal"), oracles.along_paths(c, places), strict=True))
        for name, values_of in parts.items():
            found.setdefault(name, []).append(values_of)
    stacked = {name: torch.stack(each) for name, each in found.items()}
    return stacked | {"nll": oracles.losses(model, ids, places).detach()}


def joined(rows: list[dict[str, Tensor]], name: str) -> Tensor:
    """A signal of all rows, end to end."""
    return torch.cat([row[name] for row in rows], dim=-1)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert torch.isfinite(found).all()
    assert ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item() < tolerance


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_on_the_card_equals_the_oracle(family: str, estimator: str) -> None:
    plain, rows = tiny_model(family), tiny_rows()
    found = score(tiny_model(family).float().to(CARD), estimator, rows, 45)
    wanted = [by_oracle(plain, estimator, row) for row in rows]
    for name in wanted[0]:
        assert_close(joined(found, name), joined(wanted, name), FLOAT32)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bfloat16_on_the_card_is_near_the_oracle_of_the_same_weights(estimator: str) -> None:
    narrow, rows = tiny_model("llama", initializer_range=0.2).bfloat16(), tiny_rows()
    plain = copy.deepcopy(narrow).double()
    found = score(narrow.to(CARD), estimator, rows, 45)
    wanted = [by_oracle(plain, estimator, row) for row in rows]
    for name in wanted[0]:
        error = joined(found, name) - joined(wanted, name)
        assert (error.square().mean().sqrt() / joined(wanted, name).square().mean().sqrt()).item() < BFLOAT16


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_batches_padding_and_order_change_nothing(family: str, estimator: str) -> None:
    rows = tiny_rows()
    alone = score(tiny_model(family).float().to(CARD), estimator, rows, 1)
    for budget in (45, 10_000):
        together = score(tiny_model(family).float().to(CARD), estimator, rows, budget)
        backwards = score(tiny_model(family).float().to(CARD), estimator, rows[::-1], budget)[::-1]
        for name in alone[0]:
            assert_close(joined(together, name), joined(alone, name), FLOAT32 / 2)
            assert_close(joined(backwards, name), joined(alone, name), FLOAT32 / 2)


@pytest.mark.parametrize("estimator", ["published", "exact"])
def test_a_prompt_run_as_prefix_changes_nothing(estimator: str) -> None:
    row = tiny_rows()[0]
    batch = collate([row], [0])
    assert batch.start
    scoring = ScoringModel(tiny_model("llama").float().to(CARD), "all")
    moved = [[matrix.float().to(CARD) for matrix in direction] for direction in directions_of(scoring)]
    scorer = PathScorer(scoring, moved, estimator, WINDOW)  # type: ignore[arg-type]
    split, whole = scorer.score(batch), scorer.score(replace(batch, start=0))
    for name in ("nll", "direct", "causal"):
        assert_close(getattr(split, name), getattr(whole, name), FLOAT32 / 2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_trunk_in_memory_of_the_host_changes_no_bit(estimator: str) -> None:
    rows, model = tiny_rows(), tiny_model("llama").float()
    place(model, Placement(devices=(CARD,), trunk="cpu"), layers=LAYERS, directions=2)
    found = score(model, estimator, rows, 45)
    assert {p.device.type for p in model.model.layers[0].parameters()} == {"cpu"}
    wanted = score(tiny_model("llama").float().to(CARD), estimator, rows, 45)
    assert all(torch.equal(joined(found, name), joined(wanted, name)) for name in wanted[0])


@pytest.mark.skipif(CARD.type == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA cards")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_over_two_cards_give_what_one_card_gives(family: str, estimator: str) -> None:
    rows, model = tiny_rows(), tiny_model(family).float()
    cards = tuple(torch.device(CARD.type, n) for n in range(2))
    place(model, Placement(devices=cards), layers=LAYERS, directions=2)
    found, wanted = score(model, estimator, rows, 45), score(tiny_model(family).float().to(CARD), estimator, rows, 45)
    for name in wanted[0]:
        assert_close(joined(found, name), joined(wanted, name), FLOAT32)
