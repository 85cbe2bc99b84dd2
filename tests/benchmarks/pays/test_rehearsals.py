"""The arithmetic of tests/benchmarks/pays/rehearsals.py, and that its values and masks are those of the tool."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_files import pair_records, quiet, rows_of, token_records, write_jsonl
from transformers import AutoModelForCausalLM

import alphatoken_curate as atc
from alphatoken_curate.directions.course import plan_steps
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.runs.artifacts import Store

ROWS, TARGET = token_records(9, seed=2), token_records(10, seed=9)


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("rehearsals")


def numbers(rehearsals: Any, *groups: list[float]) -> Any:
    """Values by group, groups counting alike."""
    return rehearsals.GroupedNumbers(np.array(groups, float), np.ones(len(groups), np.int64))


def test_values_and_weights_are_those_of_the_tool(rehearsals: Any, models: dict[str, str], tmp_path: Path) -> None:
    settings = {"direction": "rehearsal", "rehearse_lr": 1e-2, "rehearse_rows_per_step": 4, "dtype": "float32"}
    settings |= {"rehearse_denominator": "sum", "target_groups": 3, "batch_tokens": rehearsals.BATCH_TOKENS}
    data, target = (
        str(write_jsonl(tmp_path / name, rows)) for name, rows in {"rows.jsonl": ROWS, "target.jsonl": TARGET}.items()
    )
    run = tmp_path / "run"
    atc.score(atc.ScoreConfig(data=(data,), target=target, model=models["base"], **settings), run)
    columns = atc.scan_tokens(run).select("adapt_influence", "adapt_error").collect().to_numpy().T

    rows, with_model = rows_of(ROWS), models["base"]
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(with_model, dtype=torch.float32)
    steps = plan_steps(rows, epochs=1, rows_per_step=4, seed=0)
    groups, store = deal(rows_of(TARGET), 3, seed=0), Store(folder=tmp_path / "states", fields={})
    found = rehearsals.rehearse(model, rows, steps, groups, Optimiser(lr=1e-2, steps=len(steps)), store)
    mine = rehearsals.GroupedNumbers(found.own + found.denominator, found.tokens)
    for own, stored in zip((mine.mean, mine.error), columns, strict=True):
        np.testing.assert_allclose(own, stored, rtol=1e-5, atol=1e-9)

    lengths = np.array([int(row.response.sum()) for row in rows])
    # The tool reads its factor with three digits, as `student.factor` gives it.
    upper = f"adapt_influence + {rehearsals.factor(3)} * adapt_error"
    same = {
        "value": ("adapt_influence", {"weights": "tilt:0.5"}),
        "-value": ("-adapt_influence", {"keep": 0.9}),
        "value + q error": (upper, {"keep": "positive"}),
        "row sum": ("ROW_SUM(adapt_influence)", {"weights": "tilt:0.5"}),
    }
    for name, (by, mask) in same.items():
        told = atc.MaskConfig(by=by, always_keep="none", allow_empty_rows=True, **mask)
        lines = atc.scan(run, "train", mask=atc.mask(run, told).mask).sort("row_id").collect()
        weights = np.concatenate([np.array(w)[r.response] for w, r in zip(lines["loss_weight"], rows, strict=True)])
        np.testing.assert_allclose(rehearsals.flat_weights(mine, lengths, {"by": name, **mask}), weights, rtol=1e-4)


@pytest.mark.long
def test_values_and_weights_of_pairs_are_those_of_the_tool(
    rehearsals: Any, models: dict[str, str], tmp_path: Path
) -> None:
    settings = {"direction": "rehearsal", "rehearse_lr": 1e-2, "rehearse_rows_per_step": 4, "dtype": "float32"}
    # The reference's losses are rounded in another way, of which Adam makes more with a smaller root.
    settings |= {
        "rehearse_root": 1e-6,
        "target_groups": 3,
        "batch_tokens": rehearsals.BATCH_TOKENS,
        "beta": rehearsals.BETA,
    }
    records = pair_records(9, seed=2)
    data, target = (
        str(write_jsonl(tmp_path / name, rows)) for name, rows in {"p.jsonl": records, "t.jsonl": TARGET}.items()
    )
    run = tmp_path / "run"
    atc.score(atc.ScoreConfig(data=(data,), target=target, model=models["base"], **settings), run)
    frame = atc.scan(run, "values").collect().sort("row_id")
    both = [frame[f"{branch}_adapt_influence"] for branch in ("chosen", "rejected")]
    stored = [x.drop_nulls().to_numpy() for pair in zip(*both, strict=True) for x in pair]

    pairs = importlib.import_module("settings").pair_rows(
        [
            rehearsals_row(record[f"{branch}_input_ids"], record[f"{branch}_labels"])
            for record in records
            for branch in ("chosen", "rejected")
        ]
    )
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32)
    steps = plan_steps(pairs, epochs=1, rows_per_step=4, seed=0)
    groups, store = deal(rows_of(TARGET), 3, seed=0), Store(folder=tmp_path / "states", fields={})
    found = rehearsals.rehearse(model, pairs, steps, groups, Optimiser(lr=1e-2, steps=len(steps), root=1e-6), store)
    mine = rehearsals.GroupedNumbers(found.own + found.denominator, found.tokens)
    np.testing.assert_allclose(mine.mean, np.concatenate(stored), rtol=1e-4, atol=2e-4 * np.abs(mine.mean).max())

    lengths = np.array([len(one) for one in stored])
    for mask in ({"weights": "tilt:0.5"}, {"keep": 0.8}):
        told = atc.MaskConfig(by="adapt_influence", always_keep="none", allow_empty_rows=True, **mask)
        lines = atc.scan(run, "train", mask=atc.mask(run, told).mask).sort("row_id").collect()
        each = zip(lines["chosen_loss_weight"], lines["rejected_loss_weight"], strict=True)
        whole = [np.array(w) for pair in each for w in pair]
        weights = np.concatenate([w[len(w) - n :] for w, n in zip(whole, lengths, strict=True)])
        np.testing.assert_allclose(rehearsals.pair_weights(mine, lengths, {"by": "value", **mask}), weights, atol=2e-3)


def rehearsals_row(ids: list[int], labels: list[int]) -> Any:
    """A row whose answer is good."""
    response = np.array(labels) != -100
    return importlib.import_module("settings").Row(ids=np.array(ids, np.int32), response=response, good=response)


def tiny_setting() -> Any:
    """Twelve rows to train on, and sixteen of a target."""
    settings = importlib.import_module("settings")
    made = [
        settings.Row(ids=row.input_ids, response=row.response, good=row.response)
        for row in rows_of(token_records(28, seed=3))
    ]
    parts = {"train": made[:12], "target": made[12:], "held": [], "retention": [], "remember": [], "beside": []}
    return settings.Setting(name="tiny", **parts, learning_rate=1e-2, epochs=1, batch=3)


def test_selections_by_the_tool_go_through_score_and_mask(
    rehearsals: Any, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_look, selections = (importlib.import_module(name) for name in ("first_look", "selections"))
    monkeypatch.setattr(selections, "MODEL", models["base"])
    where = tiny_setting()
    for name, chosen in first_look.TOOL.items():
        weights = selections.weights_of(chosen, where, tmp_path, 0)
        flat = np.concatenate([w[row.response] for w, row in zip(weights, where.train, strict=True)])
        assert flat[flat > 0].mean() == pytest.approx(1), name
        assert len(set(flat.tolist())) > (2 if "tilt" in name else 1), name


@pytest.fixture
def loads(rehearsals: Any, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is rehearsed is a tiny model; how often it was loaded."""
    found = []

    def load() -> Any:
        found.append(1)
        with quiet():
            return AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32)

    monkeypatch.setattr(rehearsals, "load", load)
    return found


@pytest.mark.long
def test_a_second_round_is_of_what_the_first_left(
    rehearsals: Any, loads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsals, "COURSE_ROWS", 6)
    where, place = tiny_setting(), rehearsals.Place(work=tmp_path / "work", values=tmp_path / "values")
    first, second = {"by": "value", "keep": 0.7}, {"by": "value", "keep": 0.8}

    def weights(mask: dict[str, Any], **more: Any) -> Any:
        chosen = rehearsals.Selection(
            who="rehearsal", score={"target_rows": 244, "denominator": "sum", **more}, mask=mask
        )
        return rehearsals.rehearsed_weights(chosen, where, place)

    once, twice = weights(first), weights(second, first=first)
    assert len(loads) == 4, "two rehearsals of six rows each in either round"
    left, kept = (sum(int((w > 0).sum()) for w in both) for both in (once, twice))
    assert kept == -(-8 * left // 10)
    assert all((a[b > 0] > 0).all() for a, b in zip(once, twice, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(weights(second, first=first), twice, strict=True))
    assert len(loads) == 4, "what was rehearsed is read"
    assert not list((tmp_path / "work").glob("*.states"))


@pytest.mark.long
def test_all_groups_are_as_good_as_one(rehearsals: Any, loads: list[int], tmp_path: Path) -> None:
    where, place = tiny_setting(), rehearsals.Place(work=tmp_path / "work", values=tmp_path / "values")
    one = rehearsals.values_of(where, place, groups=1)
    rehearsals.values_of(where, place)
    found = rehearsals.values_of(where, place, groups=1)
    assert len(loads) == 2 and found.tokens == one.tokens
    for name in ("own", "denominator"):
        wanted = getattr(one, name)
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_weights_by_hand(rehearsals: Any) -> None:
    lengths = np.array([2, 0, 3])
    values = numbers(rehearsals, [3.0, -1.0, -4.0, 1.0, 1.0], [1.0, -3.0, 2.0, 1.0, 1.0])

    def weights(**mask: Any) -> list[float]:
        return [round(float(w), 3) for w in rehearsals.flat_weights(values, lengths, mask)]

    assert weights(by="value", keep=0.8) == [1, 0, 1, 1, 1]
    assert weights(by="-value", keep=0.8) == [0, 1, 1, 1, 1]
    assert weights(by="value", keep="positive") == [1, 0, 0, 1, 1]
    assert weights(by="value + q error", keep="positive") == [1, 1, 1, 1, 1]
    assert weights(by="row sum", rows=0.5) == [0, 0, 1, 1, 1]
    # Means 2, -2, -1, 1, 1 and errors 1, 1, 3, 0, 0.
    assert rehearsals.NUMBERS["shrunk value"](values, lengths) == pytest.approx([1.6, -1.6, -0.1, 1, 1])


def test_branches_are_masked_apart_and_pairs_dropped_whole(rehearsals: Any) -> None:
    lengths = np.array([2, 1, 1, 2])
    values = numbers(rehearsals, [3.0, -1.0, 5.0, 1.0, -4.0, 2.0])

    def weights(**mask: Any) -> list[float]:
        return [round(float(w), 3) for w in rehearsals.pair_weights(values, lengths, mask)]

    assert weights(by="value", keep=0.6) == [1, 0, 1, 1, 0, 1]
    assert weights(by="value", keep="positive") == [1, 0, 1, 1, 0, 1]
    assert weights(by="row sum", rows=0.5) == [1, 1, 1, 0, 0, 0]


def test_target_rows_are_dealt_in_their_order(rehearsals: Any) -> None:
    groups = rehearsals.dealt(list(range(244)))
    assert [x for group in groups for x in group] == list(range(244))
    assert np.cumsum([len(group) for group in groups]).tolist() == list(rehearsals.GROUP_ENDS)
    assert [len(group) for group in rehearsals.dealt(list(range(16)))] == [2] * 8


def test_values_of_fewer_target_rows_are_of_the_first_groups(rehearsals: Any) -> None:
    draws = np.random.default_rng(0)
    own, denominator = draws.normal(size=(2, 8, 5))
    values = rehearsals.GroupValues(own=own, denominator=denominator, tokens=np.arange(1, 9), root_share=0.0)
    assert values.of(32, "count").mean == pytest.approx(own[0])
    wanted = (np.arange(1, 5)[:, None] * (own + denominator)[:4]).sum(0) / 10
    assert values.of(128, "sum").mean == pytest.approx(wanted)
    with pytest.raises(ValueError, match="one group"):
        _ = values.of(32, "sum").error
