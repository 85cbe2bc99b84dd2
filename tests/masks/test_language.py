"""Every function and operator that there is: against numpy, and against polars' own SQL."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks import language
from alphatoken_curate.masks.expression import read

N = 60
rng = np.random.default_rng(3)
FRAME = pl.DataFrame(
    {
        "nll": rng.uniform(0.1, 5, N).astype(np.float32),
        "entropy": rng.uniform(0.1, 3, N).astype(np.float32),
        "row_id": np.repeat(np.arange(6.0), 10),
        "position": np.tile(np.arange(1.0, 11), 6),
    }
)
NAMES = tuple(FRAME.columns)
A, B = (FRAME[name].to_numpy().astype(np.float64) for name in ("nll", "entropy"))
ROWS = A.reshape(6, 10)


def ours(by: str) -> np.ndarray:
    return FRAME.select(read(by, NAMES, {}).expr).to_series().cast(pl.Float64).to_numpy()


def each_row(numbers: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.repeat(numbers, 10)


def placed(key: np.ndarray) -> np.ndarray:
    """From 1, of each row."""
    return np.concatenate([np.argsort(np.argsort(row)) + 1.0 for row in key.reshape(6, 10)])


OVER = "OVER (PARTITION BY row_id)"
ORDER = "OVER (PARTITION BY row_id ORDER BY"

WANTED = {
    "ABS(entropy - nll)": abs(B - A),
    "CEIL(nll)": np.ceil(A),
    "CEILING(nll)": np.ceil(A),
    "EXP(nll)": np.exp(A),
    "FLOOR(nll)": np.floor(A),
    "LN(nll)": np.log(A),
    "LOG10(nll)": np.log10(A),
    "LOG1P(nll)": np.log1p(A),
    "LOG2(nll)": np.log2(A),
    "POWER(nll, 2)": A**2,
    "pow(nll, entropy)": A**B,
    "ROUND(nll, 1)": np.round(A, 1),
    "ROUND(nll)": np.round(A),
    "SIGN(nll - entropy)": np.sign(A - B),
    "SQRT(nll)": np.sqrt(A),
    "GREATEST(nll, entropy, 2)": np.maximum(np.maximum(A, B), 2),
    "LEAST(nll, entropy)": np.minimum(A, B),
    "COALESCE(NULLIF(position, 3), -7) + 0 * nll": np.where(
        np.tile(np.arange(1, 11), 6) == 3, -7, np.tile(np.arange(1, 11), 6)
    ),
    "IF(nll > entropy, nll, -entropy)": np.where(A > B, A, -B),
    "position % 4": np.tile(np.arange(1, 11), 6) % 4,
    "1 / 2 * nll": A / 2,
    "- nll - - entropy": B - A,
    "CAST(position IN (1, 2, 9) AS INT)": np.isin(np.tile(np.arange(1, 11), 6), [1, 2, 9]),
    "CAST(NOT nll BETWEEN 1 AND 3 OR entropy >= 2.5 AND nll <> 0 AS INTEGER)": ~((A >= 1) & (A <= 3)) | (B >= 2.5),
    "CAST(position NOT IN (1, 2) AND nll NOT BETWEEN 1 AND 2 AS DOUBLE)": ~np.isin(np.tile(np.arange(1, 11), 6), [1, 2])
    & ~((A >= 1) & (A <= 2)),
    "CASE WHEN nll > 4 THEN 9 WHEN nll > 2 THEN entropy ELSE nll END": np.where(A > 4, 9, np.where(A > 2, B, A)),
    f"AVG(nll) {OVER}": each_row(ROWS.mean(1)),
    f"MAX(nll) {OVER}": each_row(ROWS.max(1)),
    f"MEDIAN(nll) {OVER}": each_row(np.median(ROWS, 1)),
    f"MIN(nll) {OVER}": each_row(ROWS.min(1)),
    f"STDDEV(nll) {OVER}": each_row(ROWS.std(1, ddof=1)),
    f"SUM(nll) {OVER}": each_row(ROWS.sum(1)),
    f"VARIANCE(nll) {OVER}": each_row(ROWS.var(1, ddof=1)),
    f"COUNT(*) {OVER}": np.full(N, 10),
    f"QUANTILE_CONT(nll, 0.9) {OVER}": each_row(np.quantile(ROWS, 0.9, axis=1)),
    "ROW_SUM(nll)": each_row([math.fsum(row) for row in ROWS]),
    "row_mean(nll - 2 * entropy)": each_row([math.fsum(row) / 10 for row in (A - 2 * B).reshape(6, 10)]),
    "nll - row_mean(nll)": A - each_row(ROWS.mean(1)),
    "row_sum(CAST(nll > entropy AS INT)) / row_sum(ABS(entropy))": each_row(
        (A > B).reshape(6, 10).sum(1) / B.reshape(6, 10).sum(1)
    ),
    "nll - AVG(ROW_SUM(nll))": A - ROWS.sum(1).mean(),
    "nll - AVG(nll)": A - A.mean(),
    "nll / MEDIAN(nll)": A / np.median(A),
    "nll - MAX(nll) OVER ()": A - A.max(),
    "nll * COUNT(*)": A * N,
    f"RANK() {ORDER} nll DESC)": placed(-A),
    f"DENSE_RANK() {ORDER} nll ASC)": placed(A),
    f"ROW_NUMBER() {ORDER} nll)": placed(A),
    "RANK() OVER (ORDER BY nll)": np.argsort(np.argsort(A)) + 1,
    f"COALESCE(LAG(nll) {ORDER} position), -1)": np.concatenate([np.r_[-1, row[:-1]] for row in ROWS]),
    f"COALESCE(LEAD(nll, 2) {ORDER} position), -1)": np.concatenate([np.r_[row[2:], -1, -1] for row in ROWS]),
    f"COALESCE(LAG(nll) {ORDER} position DESC), -1)": np.concatenate([np.r_[row[1:], -1] for row in ROWS]),
}


@pytest.mark.parametrize("by", WANTED)
def test_each_function_is_that_of_numpy(by: str) -> None:
    np.testing.assert_allclose(ours(by), WANTED[by], rtol=2e-5, atol=2e-6)


def test_each_function_is_among_them() -> None:
    tried = "".join(WANTED).upper()
    assert [name for name in language.FUNCTIONS if f"{name}(" not in tried] == []
    assert [
        name for name in (*language.LEVELS, *language.COMPARE) if f" {name} " not in tried and name not in "=!=<<="
    ] == []


def test_nothing_is_no_number_in_a_comparison_and_is_seen_everywhere_else() -> None:
    low = A < 1
    assert low.any() and not low.all()
    log = "LN(nll - 1)"
    for compare, wanted in ((">", ~low & (A > 2)), ("<=", ~low & (A <= 2)), ("=", 0 * A), ("<>", ~low)):
        np.testing.assert_array_equal(ours(f"CASE WHEN {log} {compare} 0 THEN 1 ELSE 0 END"), wanted)
    np.testing.assert_array_equal(ours(f"IF({log} BETWEEN -99 AND 99, 1, 0)"), ~low)
    np.testing.assert_array_equal(ours(f"IF({log} NOT IN (7), 1, 0)"), ~low)
    for by in (f"GREATEST({log}, -9)", f"LEAST(0, {log})", f"POWER({log}, 1)"):
        np.testing.assert_array_equal(np.isnan(ours(by)), low)
    for by in (f"nll + MAX({log})", f"nll + MIN({log})", f"nll + MEDIAN({log})", f"nll + QUANTILE_CONT({log}, 0.5)"):
        assert np.isnan(ours(by)).all()
    of_row = each_row(low.reshape(6, 10).any(1))
    np.testing.assert_array_equal(np.isnan(ours(f"MAX({log}) {OVER}")), of_row)
    np.testing.assert_array_equal(np.isnan(ours(f"RANK() {ORDER} {log})")), low)


def numbers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(" ".join),
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda part: f"({' '.join(part)})"),
        inner.map(lambda part: f"-({part})"),
        inner.map(lambda part: f"ABS({part})"),
        st.tuples(inner, inner).map(lambda part: f"greatest({part[0]}, {part[1]})"),
        st.tuples(conditions(inner), inner, inner).map(
            lambda part: f"CASE WHEN {part[0]} THEN {part[1]} ELSE {part[2]} END"
        ),
    )


def conditions(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    one = st.one_of(
        st.tuples(inner, st.sampled_from(["<", ">", "<=", ">=", "=", "<>", "!="]), inner).map(" ".join),
        st.tuples(inner, inner, inner).map(lambda part: f"{part[0]} BETWEEN {part[1]} AND {part[2]}"),
        st.tuples(inner, inner).map(lambda part: f"{part[0]} NOT IN ({part[1]}, 2)"),
    )
    return st.one_of(
        one,
        one.map(lambda part: f"NOT {part}"),
        st.tuples(one, st.sampled_from(["AND", "or", "AND NOT"]), one, st.sampled_from(["And", "OR"]), one).map(
            " ".join
        ),
    )


LEAVES = st.sampled_from(
    ["nll", "entropy", "position", "1.5", "2", "0.25", "1e-1", f"MAX(nll) {OVER}", "AVG(entropy) OVER ()"]
)


@settings(max_examples=150, deadline=None)
@given(st.recursive(LEAVES, numbers, max_leaves=8))
def test_what_is_read_is_what_polars_reads(by: str) -> None:
    by = f"nll * 0 + ({by})"
    theirs = FRAME.select(pl.sql_expr(by)).to_series().cast(pl.Float64).to_numpy()
    np.testing.assert_allclose(ours(by), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("by", "at", "why"),
    [
        ("nll ? 1", 5, "found '?'"),
        ("nll −1", 5, "found '−'"),
        ("nll -- 1", 5, "begins a comment"),
        ("nll /* 1 */", 5, "no comments"),
        ('"nll"', 0, "without quotes"),
        ("`nll`", 0, "without quotes"),
        ("nll; drop table x", 4, "one expression, and no statement"),
        ("nll || entropy", 5, "nothing here is text"),
        ("nll > 'a'", 7, "nothing here is text"),
        ("nll // 2", 5, "FLOOR"),
        ("nll[1]", 4, "one number a token"),
        ("nll.x", 4, "found '.'"),
        ("2nll", 0, "found '2'"),
        ("0x10", 0, "found '0'"),
        ("nll + 1_000", 7, "found '1'"),
        ("nll +", 6, "ends too early"),
        ("(nll", 5, "it ends where ) has to stand"),
        ("nll)", 4, "found ')'"),
        ("nll entropy", 5, "found 'entropy'; not an expression of --by. It takes columns, numbers"),
        ("", 0, "ends too early"),
        ("SELECT nll FROM x", 0, "reads no tables"),
        ("row_sum(nll) OVER (PARTITION BY turn)", 14, "ROW_MEAN and ROW_SUM are over their row as they are"),
        ("nll + row_sum", 7, "names no column 'row_sum'"),
        ("row_sums(nll)", 0, "there is no function 'row_sums'. Did you mean ROW_SUM?"),
        ("row_sum(nll, 2)", 8, "ROW_SUM takes 1, and not 2 numbers"),
        ("row_sum(row_mean(nll))", 0, "give it one of single tokens"),
        ("row_mean(nll > 1)", 10, "a condition where a number has to stand"),
        ("(SELECT nll)", 2, "reads no tables"),
    ],
)
def test_a_word_that_there_is_not_is_told_with_its_place(by: str, at: int, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(by, NAMES, {})
    assert why in str(caught.value)
    assert (f"at character {at}: " in str(caught.value)) == bool(at)
