"""The arithmetic of few_to_many.py: whose rows are held out, what a column scores, what models see."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROWS, EACH = 24, 12


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("few_to_many")


def made(few: Any, seed: int = 0, **more: Any) -> Any:
    """Tokens whose value is a product of two columns, and a little noise; `more`: columns beside them."""
    draws = np.random.default_rng(seed)
    one, other = draws.normal(size=(2, ROWS * EACH))
    value = 1e-4 * (one * other + 0.05 * draws.normal(size=ROWS * EACH))
    columns = {"nll": one, "entropy": other, **{name: column(value) for name, column in more.items()}}
    kind = draws.choice(["digits", "words", "special"], ROWS * EACH)
    token = np.arange(ROWS * EACH) % 5
    return few.Tokens(value=value, columns=columns, token=token, kind=kind, row=np.repeat(np.arange(ROWS), EACH))


def test_rows_are_held_out_whole_and_each_once_in_a_draw(few: Any) -> None:
    sets = list(few.held_sets(64, held=16, draws=3))
    assert len(sets) == 12
    for draw in range(3):
        mine = sets[4 * draw : 4 * draw + 4]
        assert sorted(i for _, held in mine for i in held) == list(range(64))
        assert all(sorted(pool + held) == list(range(64)) for pool, held in mine)
    assert sets[0][1] != sets[4][1]
    tokens = made(few)
    for train, test in few.inner_sets(tokens.row):
        assert (train ^ test).all() and not set(tokens.row[train]) & set(tokens.row[test])
    left_out = np.sum([test for _, test in few.inner_sets(tokens.row)], axis=0)
    assert (left_out == 1).all()


def test_an_answer_that_noise_moved_is_not_fitted_on_where_its_row_is_held(few: Any) -> None:
    rows = [
        few.Row(ids=np.array([i, 9 - i]), response=np.array([False, True]), good=np.ones(2, bool)) for i in range(4)
    ]
    moved = [few.Row(ids=np.array([i, 9 - (i + 1) % 4]), response=r.response, good=r.good) for i, r in enumerate(rows)]
    assert few.unshared([0, 1, 2], rows, [3], moved) == [1, 2]
    assert few.unshared([0, 1, 2], rows, [3], rows) == [0, 1, 2]


def test_a_column_that_is_the_value_scores_one_whatever_its_sign(few: Any) -> None:
    tokens = made(few, same=lambda value: -3 * value)
    fitted, held = tokens.of(range(8)), tokens.of(range(8, ROWS))
    found = few.measures(few.signed("same", fitted, held), held.value, held.row)
    assert found == pytest.approx(dict.fromkeys(found, 1.0))
    assert tuple(found) == importlib.import_module("tables").MEASURES


def test_the_sign_of_a_column_is_chosen_on_fitted_rows_alone(few: Any) -> None:
    turned = np.repeat(np.where(np.arange(ROWS) < 8, -1.0, 1.0), EACH)
    tokens = made(few, turned=lambda value: turned * value)
    fitted, held = tokens.of(range(8)), tokens.of(range(8, ROWS))
    found = few.measures(few.signed("turned", fitted, held), held.value, held.row)
    assert found["tokens"] == pytest.approx(-1.0)


def test_overlap_of_the_lowest_by_hand(few: Any) -> None:
    value = np.arange(20.0)
    assert few.overlap(value, value, 0.1) == 1.0
    assert few.overlap(np.where(value == 1, 30.0, value), value, 0.1) == 0.5
    assert few.overlap(-value, value, 0.1) == 0.0
    assert few.caught(value, value - 4, 0.1) == 1.0
    assert few.caught(np.where(value == 1, 30.0, value), value - 4, 0.1) == pytest.approx((-4 - 2) / (-4 - 3))


def test_a_ridge_finds_a_product_that_no_column_shows_and_sees_no_held_value(few: Any) -> None:
    tokens = made(few)
    fitted, held = tokens.of(range(12)), tokens.of(range(12, ROWS))
    found = few.ridge(fitted, fitted.value, held)
    assert few.spearman(found, held.value) > 0.8
    assert all(abs(few.spearman(held.columns[name], held.value)) < 0.3 for name in held.columns)
    unknown = replace(held, value=held.value * np.nan)
    np.testing.assert_array_equal(few.ridge(fitted, fitted.value, unknown), found)


def test_intervals_hold_what_they_say_and_a_sure_prediction_errs_little(few: Any) -> None:
    tokens = made(few)
    fitted, held = tokens.of(range(12)), tokens.of(range(12, ROWS))
    noise = np.random.default_rng(5).normal(size=len(tokens.value))

    def guess(_fitted: Any, _wanted: Any, other: Any) -> Any:
        return other.value + noise[np.isin(tokens.row, other.row)]

    found = few.error(guess, fitted, held, guess(fitted, None, held))
    mine, width, spread = noise[12 * EACH :], np.quantile(np.abs(noise[: 12 * EACH]), few.NOMINAL), held.value.std()
    wanted = {"residual": mine.std() / spread, "width": width / spread, "covered": (np.abs(mine) <= width).mean()}
    assert found == pytest.approx(wanted) and found["covered"] == pytest.approx(few.NOMINAL, abs=0.08)
    exact = few.error(lambda _f, _w, other: other.value, fitted, held, held.value)
    assert exact == {"residual": 0.0, "width": 0.0, "covered": 1.0}


def test_the_margin_is_over_the_column_that_turned_out_best(few: Any) -> None:
    found = {"ridge": [{"tokens": 0.5}, {"tokens": 0.4}], "a": [{"tokens": 0.1}] * 2, "b": [{"tokens": 0.2}] * 2}
    told = few.compared(found, ["a", "b"])
    assert told["best column"] == "b"
    assert told["margin"] == {"ridge": {"mean": 0.25, "least": 0.2}}


def test_what_is_known_of_a_label_by_hand(few: Any) -> None:
    labels, wanted = np.array(["a", "a", "b"]), np.array([1.0, 2.0, 6.0])
    found = few.known(labels, wanted, np.array(["b", "a", "c"]))
    np.testing.assert_allclose(found, [3 / 6, -3 / 7, 0.0])


def test_what_a_token_is_worth_is_never_told_by_its_own_row(few: Any) -> None:
    tokens = made(few)
    tokens = replace(tokens, token=tokens.row)
    for both in few._taught(tokens.of(range(8)), tokens.of(range(8)).value, tokens.of(range(8, ROWS))):
        assert not both.columns["worth"].any()


def test_what_stands_beside_a_token_is_of_its_own_row(few: Any) -> None:
    column, row = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([0, 0, 1, 1, 1])
    assert few._beside(column, row, -1).tolist() == [0, 1, 0, 3, 4]
    assert few._beside(column, row, 1).tolist() == [2, 0, 4, 5, 0]
    assert few._beside(column, np.zeros(5, np.int64), 1).tolist() == [2, 3, 4, 5, 0]


@pytest.mark.long
def test_every_model_and_column_is_told_beside_another(few: Any) -> None:
    pytest.importorskip("sklearn")
    tokens = made(few, same=lambda value: value)
    fitted, held = tokens.of(range(12)), tokens.of(range(12, ROWS))
    found = few.predictions(fitted, held)
    assert set(found) == {
        "ridge",
        "trees",
        "ridge of ranks",
        "trees of ranks",
        "nll",
        "entropy",
        "same",
        "class",
        "token",
    }
    for name in ("ridge", "trees", "ridge of ranks", "trees of ranks"):
        assert few.spearman(found[name], held.value) > 0.9


@pytest.mark.long
def test_lines_are_of_what_is_asked_as_it_is(few: Any, smollm2_tokenizer: Any) -> None:
    data = Path(__file__).parents[4] / "shared" / "data"
    if not data.is_dir():
        pytest.skip(f"needs real rows in {data}")
    for line in few.lines.read("few_to_many"):
        told = line["config"]
        assert told == few.config_of(told["fit"], told["setting"], told["rows"], data)
