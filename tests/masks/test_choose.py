from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from alphatoken_curate.errors import CurateError, UsageError
from alphatoken_curate.masks import choose, formulas

Token = tuple[float, int, int]
"""score, row, position."""

SCORE = st.one_of(st.sampled_from([-1.0, -0.5, 0.0, -0.0, 0.5, 1.0]), st.floats(-1e3, 1e3, width=32))
KEEP = st.one_of(st.sampled_from(["positive", 1.0, 0.1, 0.3, 0.5, 0.7]), st.decimals("0.01", "1", places=2).map(float))
SCOPE = st.sampled_from(["global", "row", "batch:1", "batch:2", "batch:3"])
BLOCK = st.sampled_from([1, 2, 3, 7, 1 << 20])
WEIGHTS = st.sampled_from(["binary", "rank", "sigmoid", "relu", "tilt:0.25", "tilt:2", "tilt:100"])


@st.composite
def tokens(draw: st.DrawFn) -> list[Token]:
    found = []
    for row in range(draw(st.integers(0, 6))):
        positions = draw(st.sets(st.integers(1, 12), max_size=6))
        found += [(draw(SCORE), row, position) for position in sorted(positions)]
    return found


def columns(found: list[Token]) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and how many tokens each row has; rows may have none."""
    return np.array([score for score, _, _ in found], np.float32), lengths(*(row for _, row, _ in found))


def lengths(*rows: int) -> np.ndarray:
    """Tokens of each row, from the row of each token."""
    return np.bincount(np.array(rows, np.int64))


# The oracle: plain Python over sorted tuples, sharing nothing with the module.


def scope_of(scope: str, row: int) -> int:
    if ":" in scope:
        return row // int(scope.removeprefix("batch:"))
    return row if scope == "row" else 0


def plain_places(found: list[Token], scope: str) -> dict[Token, tuple[int, int]]:
    """Token -> (place in its scope from 0, size of its scope)."""
    places = {}
    for one in {scope_of(scope, token[1]) for token in found}:
        members = sorted((t for t in found if scope_of(scope, t[1]) == one), key=lambda t: (-t[0], t[1], t[2]))
        places |= {token: (place, len(members)) for place, token in enumerate(members)}
    return places


def plain_kept(found: list[Token], keep: float | str, scope: str) -> set[Token]:
    if keep == "positive":
        return {token for token in found if token[0] > 0}
    share = Decimal(repr(keep))
    places = plain_places(found, scope)
    return {t for t, (place, n) in places.items() if place < int((share * n).to_integral_value(ROUND_CEILING))}


def plain_best(found: list[Token], alive: set[Token]) -> set[Token]:
    lost = {token[1] for token in found} - {token[1] for token in alive}
    return {min((t for t in found if t[1] == row), key=lambda t: (-t[0], t[2])) for row in lost}


def plain_with_always(found: list[Token], keep: float | str, scope: str, always: set[Token]) -> tuple[set[Token], int]:
    """What is kept by its score where some tokens are always kept, and by how many those exceed the shares."""
    by_score = plain_kept(found, keep, scope)
    if keep == "positive":
        return by_score, 0
    kept, over = by_score & always, 0
    for one in {scope_of(scope, token[1]) for token in found}:
        members = [t for t in found if scope_of(scope, t[1]) == one]
        quota = sum(t in by_score for t in members)
        others = sorted((t for t in members if t not in always), key=lambda t: (-t[0], t[1], t[2]))
        taken = len(members) - len(others)
        kept |= set(others[: max(0, quota - taken)])
        over += max(0, taken - quota)
    return kept, over


def plain_weights_with_always(
    found: list[Token], keep: float | str, scope: str, kind: str, allow: bool, always: set[Token]
) -> dict[Token, float]:
    formula = plain_formula(found, scope, kind)
    weight = {token: formula(token) for token in plain_with_always(found, keep, scope, always)[0]}
    alive = {token for token, w in weight.items() if w > 0 and token not in always}
    if allow:
        full = {token[1] for token in alive}
        weight, always = ({t: w for t, w in weight.items() if t[1] in full}, {t for t in always if t[1] in full})
        back = set()
    else:
        back = plain_best([t for t in found if t not in always], alive)
    weight |= {token: formula(token) for token in back}
    least = min((w for w in weight.values() if w > 0), default=1.0)
    weight |= {token: weight[token] or least for token in back}
    weight = {token: w for token, w in weight.items() if w > 0}
    means = {}
    for row in {t[1] for t in always}:
        others = [w for t, w in weight.items() if t[1] == row]
        means[row] = math.fsum(others) / len(others) if others else None
    added = {t: means[t[1]] for t in always if t not in weight}
    trained = [*weight.values(), *(w for w in added.values() if w is not None)]
    mean = math.fsum(trained) / len(trained) if trained else 1.0
    return {t: 1.0 if w is None else w / mean for t, w in {**weight, **added}.items()}


def plain_formula(found: list[Token], scope: str, kind: str) -> Callable[[Token], float]:
    rms = math.sqrt(math.fsum(t[0] ** 2 for t in found) / len(found)) or 1.0 if found else 1.0
    places = plain_places(found, scope)
    by_name: dict[str, Callable[[Token], float]] = {
        "binary": lambda t: 1.0,
        "rank": lambda t: 1 - places[t][0] / places[t][1],
        "sigmoid": lambda t: 1 / (1 + math.exp(-t[0] / rms)),
        "relu": lambda t: max(t[0], 0.0),
    }
    if kind.startswith("tilt:"):
        strength, spread = float(kind.removeprefix("tilt:")), plain_spread([t[0] for t in found])
        if not spread:
            return lambda t: 1.0
        assume(all(abs(1 + strength * t[0] / spread) > 1e-9 for t in found))  # beside 0 the last bit decides
        return lambda t: min(max(1 + strength * t[0] / spread, 0.0), 3.0)
    return by_name[kind]


def plain_spread(numbers: list[float]) -> float:
    """Standard deviation, from exact fractions."""
    if not numbers:
        return 0.0
    exact = [Fraction(one) for one in numbers]
    mean = sum(exact) / len(exact)
    return math.sqrt(sum((one - mean) ** 2 for one in exact) / len(exact))


def plain_weights(found: list[Token], keep: float | str, scope: str, kind: str, allow: bool) -> dict[Token, float]:
    formula = plain_formula(found, scope, kind)
    weight = {token: formula(token) for token in plain_kept(found, keep, scope)}
    back = set() if allow else plain_best(found, {token for token, w in weight.items() if w > 0})
    weight |= {token: formula(token) for token in back}
    least = min((w for w in weight.values() if w > 0), default=1.0)
    weight |= {token: weight[token] or least for token in back}
    trained = [w for w in weight.values() if w > 0]
    return {token: w * len(trained) / math.fsum(trained) for token, w in weight.items() if w > 0}


@given(tokens(), KEEP, SCOPE, st.booleans(), BLOCK)
@settings(max_examples=300, deadline=None)
def test_kept_is_what_sorting_says(found: list[Token], keep: float | str, scope: str, allow: bool, block: int) -> None:
    found = [(float(np.float32(score)), row, position) for score, row, position in found]
    with patch.object(formulas, "BLOCK", block):
        got = choose.kept(*columns(found), keep=keep, scope=scope, allow_empty_rows=allow)
    want = plain_kept(found, keep, scope)
    want |= set() if allow else plain_best(found, want)
    assert {token for token, kept in zip(found, got, strict=True) if kept} == want


def refused_where_nothing_is_left(found: list[Token], want: Collection[Token]) -> Any:
    """A mask that trains nothing would be the newest, and trainings on it train nothing in silence."""
    return nullcontext() if want or not found else pytest.raises(UsageError, match="nothing is left to train")


@given(tokens(), KEEP, SCOPE, WEIGHTS, st.booleans(), BLOCK)
@settings(max_examples=300, deadline=None)
def test_weights_are_what_the_formulas_say(
    found: list[Token], keep: float | str, scope: str, kind: str, allow: bool, block: int
) -> None:
    found = [(float(np.float32(score)), row, position) for score, row, position in found]
    want = plain_weights(found, keep, scope, kind, allow)
    with patch.object(formulas, "BLOCK", block), refused_where_nothing_is_left(found, want):
        got = choose.weighed(*columns(found), keep=keep, scope=scope, weights=kind, allow_empty_rows=allow).weight
    if found and not want:
        return
    assert got.dtype == np.float32
    assert {t for t, w in zip(found, got, strict=True) if w > 0} == set(want)
    np.testing.assert_allclose(got, [want.get(token, 0.0) for token in found], rtol=1e-5, atol=2e-38)
    if want:
        assert got[got > 0].mean(dtype=np.float64) == pytest.approx(1, abs=1e-6)


@st.composite
def with_always(draw: st.DrawFn) -> tuple[list[Token], set[Token]]:
    found = [(float(np.float32(score)), row, position) for score, row, position in draw(tokens())]
    return found, {token for token in found if draw(st.integers(0, 3)) == 0}


def flags(found: list[Token], always: set[Token]) -> np.ndarray:
    return np.array([token in always for token in found], np.bool_)


@pytest.mark.long
@given(with_always(), KEEP, SCOPE, st.booleans(), BLOCK)
@settings(max_examples=400, deadline=None)
def test_kept_with_what_is_always_kept_is_what_sorting_says(
    drawn: tuple[list[Token], set[Token]], keep: float | str, scope: str, allow: bool, block: int
) -> None:
    found, always = drawn
    given = flags(*drawn)
    with patch.object(formulas, "BLOCK", block):
        got = choose.kept(*columns(found), keep=keep, scope=scope, allow_empty_rows=allow, always=given)
    chosen, _ = plain_with_always(found, keep, scope, always)
    others = chosen - always
    if allow:
        full = {token[1] for token in others}
        want = others | {t for t in always if t[1] in full}
    else:
        want = others | always | plain_best([t for t in found if t not in always], others)
    assert {token for token, kept in zip(found, got, strict=True) if kept} == want
    assert given.tolist() == flags(*drawn).tolist(), "what was given is left alone"


@pytest.mark.long
@given(with_always(), KEEP, SCOPE, WEIGHTS, st.booleans(), BLOCK)
@example(([(-1.0, 0, 1), (-0.5, 0, 2)], {(-1.0, 0, 1), (-0.5, 0, 2)}), 1.0, "global", "tilt:2", True, 1)
@settings(max_examples=400, deadline=None)
def test_weights_with_what_is_always_kept_are_what_the_formulas_say(
    drawn: tuple[list[Token], set[Token]], keep: float | str, scope: str, kind: str, allow: bool, block: int
) -> None:
    found, always = drawn
    given = flags(*drawn)
    want = plain_weights_with_always(found, keep, scope, kind, allow, always)
    how = {"keep": keep, "scope": scope, "weights": kind, "allow_empty_rows": allow, "always": given}
    with patch.object(formulas, "BLOCK", block):
        if found and not want:
            weightless = not any(map(plain_formula(found, scope, kind), found))
            told = "no token's --by is above 0" if keep == "positive" else "weighs nothing or is always kept"
            told = "gives every token 0, and nothing is left" if weightless else told
            with pytest.raises(UsageError, match=told):
                choose.weighed(*columns(found), **how)
            return
        got = choose.weighed(*columns(found), **how)
    weight = got.weight
    assert {t for t, w in zip(found, weight, strict=True) if w > 0} == set(want)
    np.testing.assert_allclose(weight, [want.get(token, 0.0) for token in found], rtol=1e-5, atol=2e-38)
    assert got.over_share == plain_with_always(found, keep, scope, always)[1]
    if want:
        assert weight[weight > 0].mean(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert given.tolist() == flags(*drawn).tolist()


@given(tokens(), KEEP, SCOPE, WEIGHTS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_nothing_that_is_always_kept_changes_no_bit(
    found: list[Token], keep: float | str, scope: str, kind: str, allow: bool
) -> None:
    how = {"keep": keep, "scope": scope, "weights": kind, "allow_empty_rows": allow}
    with refused_where_nothing_is_left(found, plain_weights(found, keep, scope, kind, allow)):
        plain = choose.weighed(*columns(found), **how)
    if found and not plain_weights(found, keep, scope, kind, allow):
        return
    got = choose.weighed(*columns(found), **how, always=np.zeros(len(found), np.bool_))
    assert (got.weight.tobytes(), got.given_back, got.over_share) == (plain.weight.tobytes(), plain.given_back, 0)


def test_what_is_always_kept_has_its_rows_mean_weight() -> None:
    score = np.array([8, 4, -1, 2, -3, -5], np.float32)
    always = np.array([False, False, True, False, True, True])
    got = choose.weighed(score, lengths(0, 0, 0, 1, 1, 2), keep=1.0, scope="global", weights="relu", always=always)
    # Row 0 has 8 and 4, row 1 has 2; row 2 has nothing, and weighs the mean of all.
    raw = np.array([8, 4, 6, 2, 2]) / 4.4
    np.testing.assert_allclose(got.weight, [*raw, 1], rtol=1e-6)
    assert got.given_back == 0


def test_what_is_always_kept_stays_beyond_the_share_and_each_row_has_its_best_other() -> None:
    score = np.array([5, 1, 9, 4, 3, 0], np.float32)
    always = np.array([False, False, True, False, False, True])
    got = choose.weighed(score, lengths(0, 0, 0, 1, 1, 1), keep=0.1, scope="global", always=always)
    assert got.weight.tolist() == [1, 0, 1, 1, 0, 1] and (got.over_share, got.given_back) == (1, 2)
    rows = choose.weighed(score, lengths(0, 0, 0, 1, 1, 1), keep=0.6, scope="row", always=always)
    assert rows.weight.tolist() == [1, 0, 1, 1, 0, 1] and (rows.over_share, rows.given_back) == (0, 0)


def test_flags_of_other_tokens_are_an_error() -> None:
    with pytest.raises(CurateError, match="2 scores, and 1 flags"):
        choose.kept(np.zeros(2, np.float32), np.array([2]), keep=0.5, scope="row", always=np.zeros(1, np.bool_))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 20, 30, 70, 100, 1000])
@pytest.mark.parametrize("keep", ["0.1", "0.2", "0.3", "0.6", "0.7", "0.07", "0.57", "0.001", "1"])
def test_exactly_the_ceiling_is_kept(n: int, keep: str) -> None:
    numerator, denominator = (int(x) for x in (Decimal(keep) * 1000, Decimal(1000)))
    want = -(-n * numerator // denominator)
    score = np.zeros(n, np.float32)  # all tie: the first ones in order are kept
    got = choose.kept(score, np.array([n]), keep=float(keep), scope="global")
    assert got.tolist() == [True] * want + [False] * (n - want)


def test_batches_count_scored_rows() -> None:
    score = np.array([9, 8, 7, 6, 1, 2, 3, 4], np.float32)
    got = choose.kept(score, np.full(4, 2), keep=0.25, scope="batch:2", allow_empty_rows=True)
    assert np.flatnonzero(got).tolist() == [0, 7]


def test_rows_given_back_are_counted_once_and_get_the_smallest_weight() -> None:
    score = np.array([4, 2, -1, -3, -2], np.float32)
    got = choose.weighed(score, lengths(0, 0, 1, 2, 2), keep="positive", scope="global", weights="relu")
    raw = np.array([4, 2, 2, 0, 2]) / 2.5
    np.testing.assert_allclose(got.weight, raw, rtol=1e-6)
    assert got.given_back == 2


def test_a_row_whose_kept_tokens_all_weigh_nothing_gets_one_back() -> None:
    score, each = np.array([1, -1], np.float32), lengths(0, 1)
    got = choose.weighed(score, each, keep=1.0, scope="global", weights="relu")
    assert got.weight.tolist() == [1, 1] and got.given_back == 1
    got = choose.weighed(score, each, keep=1.0, scope="global", weights="relu", allow_empty_rows=True)
    assert got.weight.tolist() == [1, 0] and got.given_back == 0


def test_with_no_positive_weight_what_is_given_back_weighs_one() -> None:
    score = np.array([-5, -1, -2], np.float32)
    got = choose.weighed(score, lengths(0, 1, 1), keep="positive", scope="row", weights="relu")
    assert got.weight.tolist() == [1, 1, 0]


def test_weights_neither_vanish_nor_overflow() -> None:
    score = np.array([1e-45, 3e38, 3e38, 1], np.float32)
    got = choose.weighed(score, lengths(0, 0, 0, 0), keep=1.0, scope="row", weights="relu").weight
    assert (got > 0).all() and np.isfinite(got).all()
    outlier = np.array([-1e30, *[0.0] * 999_999], np.float32)
    got = choose.weighed(outlier, np.array([10**6]), keep=1.0, scope="global", weights="sigmoid").weight
    assert (got > 0).all()


def test_tilted_weights_by_hand() -> None:
    score = np.array([-4, -1, 0, 1, 4], np.float32)  # of mean 0 and variance 34 / 5
    sd = math.sqrt(6.8)
    got = choose.weighed(score, lengths(0, 0, 0, 0, 0), keep=1.0, scope="global", weights="tilt:2")
    raw = np.array([0, 1 - 2 / sd, 1, 1 + 2 / sd, 3])
    np.testing.assert_allclose(got.weight, raw / raw[1:].mean(), rtol=1e-6)
    mild = choose.weighed(score, lengths(0, 0, 0, 0, 0), keep=0.6, scope="global", weights="tilt:0.25")
    raw = np.array([0, 0, 1, 1 + 0.25 / sd, 1 + 1 / sd])  # by the spread of all of them, dropped ones too
    np.testing.assert_allclose(mild.weight, raw / raw[2:].mean(), rtol=1e-6)


@pytest.mark.parametrize("number", [0.1, -0.1, 1e-45, -3e38, 0.0])
def test_scores_without_a_spread_weigh_one(number: float) -> None:
    # The mean of a million times 0.1 is another number than 0.1, by which all would seem far from it.
    score = np.full(10**6, number, np.float32)
    got = choose.weighed(score, np.array([10**6]), keep=1.0, scope="global", weights="tilt:100")
    assert (got.weight == 1).all() and got.given_back == 0
    assert not choose.weighed(score[:0], np.empty(0, np.int64), keep=1.0, scope="row", weights="tilt:1").weight.size


def test_tilted_weights_of_the_largest_and_smallest_numbers() -> None:
    for score in ([3.4e38, -3.4e38, 0.0], [1e-45, -1e-45, 0.0]):
        found = np.array(score, np.float32)
        got = choose.weighed(found, np.array([3]), keep=1.0, scope="global", weights="tilt:0.5").weight
        raw = np.array([1 + 0.5 * math.sqrt(1.5), 1 - 0.5 * math.sqrt(1.5), 1])
        np.testing.assert_allclose(got, raw, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_an_error(bad: float) -> None:
    with pytest.raises(CurateError, match="scored row 2, response token 1"):
        choose.kept(np.array([1, 1, bad], np.float32), np.array([1, 0, 2, 0]), keep=0.5, scope="global")


@pytest.mark.parametrize("other", [[], [1], [3], [3, -1], [1, 1, 1]])
def test_lengths_of_other_tokens_are_an_error(other: list[int]) -> None:
    with pytest.raises(CurateError, match="2 scores"):
        choose.kept(np.zeros(2, np.float32), np.array(other, np.int64), keep=0.5, scope="global")


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, "half", float("nan"), float("inf"), "1/0"])
def test_a_share_that_cannot_be_used_is_refused(keep: float | str) -> None:
    with pytest.raises(UsageError, match="keep: found"):
        choose.parse_keep(keep)


@pytest.mark.parametrize(
    "scope", ["", "rows", "batch", "batch:", "batch:0", "batch:-1", "batch:1.5", "batch:9" + "9" * 30]
)
def test_a_scope_that_cannot_be_used_is_refused(scope: str) -> None:
    with pytest.raises(UsageError, match="scope: found"):
        choose.parse_scope(scope)


def test_unknown_weights_are_refused() -> None:
    empty = np.empty(0, np.float32), np.empty(0, np.int64)
    for weights in ("softmax", "tilt", "tilt:0", "tilt:101"):
        with pytest.raises(UsageError, match=r"weights: found .* or tilt:C such as tilt:0.25"):
            choose.weighed(*empty, keep=0.5, scope="row", weights=weights)


def test_what_weighs_nothing_is_told_as_such() -> None:
    """And not as a share that is too small, which no share would mend."""
    score, ends = np.array([-3, -2, -1], np.float32), np.array([False, False, True])
    how: dict[str, Any] = {"keep": 1.0, "scope": "global", "allow_empty_rows": True, "always": ends}
    with pytest.raises(UsageError, match=r"weights: relu gives every token 0.*Give another --by or --weights"):
        choose.weighed(score, lengths(0, 0, 0), weights="relu", **how)
    with pytest.raises(UsageError, match=r"weighs nothing or is always kept.*Give a larger share"):
        choose.weighed(score, lengths(0, 0, 0), weights="binary", **how | {"keep": 0.3})
    for ends in (None, np.zeros(3, np.bool_), how["always"]):
        with pytest.raises(UsageError, match=r"keep: with positive nothing is left.*no token's --by is above 0"):
            choose.weighed(score, lengths(0, 0, 0), weights="sigmoid", **how | {"keep": "positive", "always": ends})
