"""What `--by` reads and what it refuses; nothing that it is told reaches a file or the network, or takes long."""

from __future__ import annotations

import builtins
import os
import re
import shlex
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alphatoken_curate.cli.mask import command as mask
from alphatoken_curate.cli.options import read_config
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks import criteria, expression, language
from alphatoken_curate.runs.schema import SFT, components

KNOWN = components("published")
MOST_SECONDS = 5.0  # with what else two shared cores do; the work takes less than one


def stored(rows: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    n = rows * 10
    return {name: rng.uniform(0.05, 6, n).astype(np.float32) for name in criteria.known_columns(SFT)} | {
        "row_id": np.repeat(np.arange(rows), 10),
        "turn": np.zeros(n, np.int32),
        "position": np.tile(np.arange(1, 11, dtype=np.int32), rows),
        "token_id": rng.integers(0, 99, n).astype(np.int32),
    }


STORED = stored()


def selected(by: str) -> np.ndarray:
    return criteria.selection(by, STORED, components=KNOWN, stability_weight=1.5)


# ------------------------------------------------------------------------------------------------- refused, and told


@pytest.mark.parametrize(
    ("by", "why"),
    [
        ("nul - 1", "names no column 'nul'. Did you mean nll?"),
        ("1 + NLL", "at character 5: names no column 'NLL'. Did you mean nll?"),
        ("avgg(nll)", "there is no function 'avgg'. Did you mean AVG? The functions are ABS, AVG, CEIL"),
        ("read_parquet('x')", "nothing here is text"),
        ("read_parquet(nll)", "there is no function 'read_parquet'"),
        ("now()", "there is no function 'now'"),
        ("random()", "a draw by itself"),
        ("nll + random", "at character 7: found 'random'; `random` is a draw by itself"),
        ("COLUMNS(nll)", "there is no function"),
        ("nll + *", "found '*'"),
        ("log(nll)", "write LN, LOG2 or LOG10"),
        ("nll > 1", "a condition is no number"),
        ("1 < nll < 3", "at character 9: '<' compares numbers"),
        ("(nll > 1) + 1", "+ joins numbers"),
        ("1 + (nll > 1)", "at character 5: a condition where a number has to stand"),
        ("IF(nll, 1, 2)", "at character 4: a number where a condition has to stand"),
        ("nll AND entropy", "AND joins conditions"),
        ("CAST(nll AS INT)", "floating point already"),
        ("CAST(nll > 1 AS TEXT)", "found 'TEXT'; a condition is cast AS INT"),
        ("CASE nll WHEN 1 THEN 2 END", "at character 6: found 'nll' where WHEN has to stand"),
        ("CASE WHEN nll > 1 THEN NULL END", "a CASE without ELSE gives none"),
        ("nll IS NULL", "COALESCE"),
        ("nll + 1e999", "1e999 is larger than any number"),
        ("POWER(nll)", "POWER takes 2, and not 1 numbers"),
        ("LEAST(nll)", "LEAST takes 2 or more, and not 1 numbers"),
        ("ROUND(nll, 0.5)", "ROUND takes a whole number from 0 to 15 as its second"),
        ("ROUND(nll, nll)", "ROUND takes a whole number from 0 to 15 as its second"),
        ("nll - QUANTILE_CONT(nll, 2)", "takes a number from 0 to 1"),
        ("SUM(nll)", "one number for all tokens together"),
        ("AVG(nll) OVER ()", "one number for all tokens together"),
        ("COUNT(*)", "names no column at all"),
        ("COUNT(nll)", "found 'nll' where * has to stand"),
        ("SUM(1) OVER (PARTITION BY row_id)", "SUM of no column"),
        ("RANK() OVER (ORDER BY 1)", "ORDER BY of RANK of no column"),
        ("AVG(nll - AVG(nll))", "give that one an OVER (...)"),
        ("AVG(nll - AVG(nll) OVER ()) OVER (PARTITION BY row_id)", "give it one of single tokens"),
        ("RANK() OVER (ORDER BY nll - AVG(nll))", "give it one of single tokens"),
        ("SUM(nll) OVER (PARTITION BY nll)", "PARTITION BY takes row_id, turn, position, token_id"),
        ("SUM(nll) OVER (PARTITION BY row_id ORDER BY position)", "SUM takes no ORDER BY"),
        ("RANK() OVER (PARTITION BY row_id)", "RANK takes OVER (PARTITION BY row_id, turn ORDER BY position)"),
        ("LAG(nll)", "it ends where OVER has to stand"),
        ("nll - LAG(nll, 0) OVER (ORDER BY position)", "LAG takes a whole number from 1"),
        ("SUM(nll) FILTER (WHERE nll > 1)", "found 'FILTER'; put a CASE inside the function"),
        ("nll WHERE nll > 1", "found 'WHERE'"),
        ("AVG(DISTINCT nll)", "names no column 'DISTINCT'"),
    ],
)
def test_what_is_refused_says_where_and_why(by: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        selected(by)
    assert why in str(caught.value) and str(caught.value).startswith("by: ")


@pytest.mark.parametrize("function", ["LAG(nll)", "LEAD(nll, 2)", "ROW_NUMBER()", "RANK()", "DENSE_RANK()"])
def test_an_order_by_position_does_not_mix_the_turns_of_a_row(function: str) -> None:
    turns = STORED | {"row_id": np.repeat(np.arange(3), 20), "turn": np.tile(np.repeat([0, 1], 10), 3)}

    def of(window: str, found: dict[str, np.ndarray]) -> np.ndarray:
        by = f"nll + COALESCE({function} OVER ({window}), 0)"
        assert {"turn", "row_id", "position"} <= {*criteria.columns_needed(by, KNOWN)}
        return criteria.selection(by, found, components=KNOWN, stability_weight=1.5)

    for window in ("PARTITION BY row_id ORDER BY position", "PARTITION BY row_id ORDER BY 2 * position DESC"):
        with pytest.raises(UsageError, match="write PARTITION BY row_id, turn"):
            of(window, turns)
    named = of("PARTITION BY row_id, turn ORDER BY position", turns)
    np.testing.assert_array_equal(named, of("PARTITION BY row_id ORDER BY position", STORED))
    np.testing.assert_array_equal(named, of("PARTITION BY row_id, turn ORDER BY position", STORED))
    ordered = of("PARTITION BY row_id ORDER BY 1000 * turn + position", turns)
    assert (ordered != named).any()  # across the turns, as it says


def test_the_rank_of_a_number_within_its_row_is_over_all_turns() -> None:
    turns = STORED | {"row_id": np.repeat(np.arange(3), 20), "turn": np.tile(np.repeat([0, 1], 10), 3)}
    by = "RANK() OVER (PARTITION BY row_id ORDER BY nll)"
    found = criteria.selection(by, turns, components=KNOWN, stability_weight=1.5)
    np.testing.assert_array_equal(found, STORED["nll"].reshape(3, 20).argsort(1).argsort(1).reshape(-1) + 1)


LARGE = {
    "chain": "nll" + "-1" * 4900,
    "chain that is read": "nll" + "-1" * 99,
    "chain that is too deep": "nll" + "-1" * 1900,
    "brackets": "(" * 1900 + "nll" + ")" * 1900,
    "minus signs": "nll " + "- " * 1900 + "1",
    "denied": "IF(" + "NOT " * 900 + "nll > 1, 1, 0)",
    "nullif": "NULLIF(" * 40 + "nll" + ", 1)" * 40,
    "greatest": "GREATEST(" * 40 + "EXP(nll)" + ", 1)" * 40,
    "cases": "CASE WHEN nll > 1 THEN 1 ELSE " * 45 + "0" + " END" * 45,
    "compared cases": "CASE WHEN EXP(" * 20 + "nll" + ") > 1 THEN 1 ELSE nll END" * 20,
    "in": "IF(EXP(nll) IN (" + ", ".join(["1"] * 900) + "), 1, 0)",
    "windows": " + ".join(["AVG(nll) OVER (PARTITION BY row_id)"] * 90),
    "row sums": " + ".join(["ROW_SUM(nll - ROUND(entropy))"] * 90),
    "names": " + ".join(["surprise"] * 90),
}


@pytest.mark.parametrize("kind", LARGE)
def test_what_is_large_is_refused_or_computed_soon(kind: str) -> None:
    before = time.perf_counter()
    try:
        selected(LARGE[kind])
    except UsageError as error:
        assert re.search(r"at most [\d,]+ (parts|are read)", str(error))
        assert kind not in ("chain that is read", "windows", "row sums", "names", "cases")
    assert time.perf_counter() - before < MOST_SECONDS


def test_no_pipe_is_waited_for_and_no_file_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="nothing here is text"):
        selected(f"read_csv('{pipe}')")


# ---------------------------------------------------------------------------------------------------- nothing else

WORDS = [
    *(*language.FUNCTIONS, *language.WORDS, *language.HINTS, *language.COMPARE, *language.LEVELS, *STORED),
    *("(", ")", ",", "surprise", "random", "1", "0", "-1", "2.5", "1e300", "'x'", "*", "read_csv", "read_parquet"),
    *("'/etc/passwd'", "'http://127.0.0.1:9/x'", "TABLE", "JOIN", "WITH", "UNION", "now", "\x00", "é", "ſ", "\u202e"),
    *("OVER (PARTITION BY row_id)", "OVER (ORDER BY nll)", "CASE WHEN nll > 1 THEN", "CAST(", "IN (1, 2)"),
]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def outside(*_: Any, **__: Any) -> None:
        raise AssertionError("an expression reached outside")

    def tried(by: str) -> None:
        with monkeypatch.context() as patched:
            for place, name in ((builtins, "open"), (os, "open"), (socket, "socket"), (socket, "create_connection")):
                patched.setattr(place, name, outside)
            for name in ("sql_expr", "sql", "SQLContext", "read_csv", "scan_csv", "read_parquet", "scan_parquet"):
                patched.setattr(pl, name, outside)
            before = time.perf_counter()
            try:
                found = selected(by)
            except UsageError as error:
                assert str(error).startswith("by: ")
            else:
                assert found.shape == (60,) and found.dtype == np.float32 and np.isfinite(found).all()
            assert time.perf_counter() - before < MOST_SECONDS

    return tried


FUZZED = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZED
@given(by=st.text(max_size=60))
def test_any_text_is_refused_or_computed(guarded: Callable[[str], None], by: str) -> None:
    guarded(by)


@FUZZED
@given(words=st.lists(st.sampled_from(WORDS), max_size=25), between=st.sampled_from([" ", "", "\n"]))
def test_any_words_are_refused_or_computed(guarded: Callable[[str], None], words: list[str], between: str) -> None:
    guarded(between.join(words))


FUNCTION_CALLS = st.sampled_from([f"{name}({{}})" for name in language.FUNCTIONS])


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    window = st.sampled_from(["", " OVER ()", " OVER (PARTITION BY row_id)", " OVER (PARTITION BY turn ORDER BY nll)"])
    several = st.lists(inner, max_size=3).map(", ".join)
    return st.one_of(
        st.tuples(FUNCTION_CALLS, several, window).map(lambda part: part[0].format(part[1]) + part[2]),
        st.tuples(inner, st.sampled_from([*language.LEVELS, *language.COMPARE]), inner).map(" ".join),
        st.tuples(inner, inner, inner).map(lambda part: f"CASE WHEN {part[0]} THEN {part[1]} ELSE {part[2]} END"),
    )


@FUZZED
@given(by=st.recursive(st.sampled_from(["nll", "value", "row_id", "2", "0.5", "nll > 1"]), grown, max_leaves=12))
def test_any_tree_is_refused_or_computed(guarded: Callable[[str], None], by: str) -> None:
    guarded(by)


# ------------------------------------------------------------------------------------------ selectors of the literature

PAGE = Path(__file__).parents[2] / "sample_data/README.md"


def documented() -> dict[str, MaskConfig]:
    table = PAGE.read_text(encoding="utf-8").partition("<!-- test: selectors -->")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[3:]]
    parsed = {}
    for name, flags, source in rows:
        assert "arxiv.org/abs/" in source
        with mask.make_context("mask", ["RUN", *shlex.split(flags.strip("`"))]) as context:
            parsed[name] = read_config(context, MaskConfig)
    return parsed


def flow(nll: np.ndarray) -> np.ndarray:
    losses = nll.reshape(-1, 10).mean(1)
    return np.repeat(np.exp(-losses / np.median(losses)), 10)


def middling(nll: np.ndarray) -> np.ndarray:
    losses = nll.reshape(-1, 10).mean(1)
    return np.repeat(np.where((losses >= 1) & (losses <= 3), 1.0, -1.0), 10)


ORACLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Rho-1, Token Cleaning": lambda nll: nll - STORED["reference_nll"],
    "low perplexity": lambda nll: 2.5 - np.exp(nll),
    "DFT": lambda nll: np.exp(-nll),
    "EAFT": lambda nll: np.minimum(1, STORED["entropy"].astype(np.float64) / np.log(20)),
    "generalised cross-entropy": lambda nll: np.exp(-nll) ** 0.7,
    "FLOW": flow,
    "rows of a middling loss": middling,
}


def test_each_selector_has_its_oracle() -> None:
    assert list(documented()) == list(ORACLES)


@pytest.mark.parametrize("name", ORACLES)
def test_selectors_of_the_literature(name: str) -> None:
    found = selected(documented()[name].by)
    np.testing.assert_allclose(found, ORACLES[name](STORED["nll"].astype(np.float64)), rtol=1e-5, atol=1e-5)
    assert len(np.unique(found)) > 1


def test_every_function_is_documented() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## What `--by` takes")[2].partition("<!-- test")[0]
    assert [name for name in language.FUNCTIONS if not re.search(rf"\b{name}\b", text)] == []
    assert f"{language.MOST_CHARACTERS:,} characters, {language.MOST_NESTED} nested" in text
    assert all(f"`{name}`" in text for name in expression.PARTITIONS)
