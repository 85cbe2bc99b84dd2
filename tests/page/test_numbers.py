from __future__ import annotations

import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphatoken_curate.page.numbers import (
    Group,
    bands,
    correlation,
    density,
    groups,
    overlaid,
    place_edges,
    quantile_edges,
    rank_correlation,
    reach,
    same_sign,
    signed_log,
    symmetric_edges,
    unusual,
)

NUMBERS = st.lists(st.integers(-6, 6), min_size=2, max_size=30)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def test_every_token_is_in_one_bin() -> None:
    values, kept = drawn(1000), np.arange(1000) % 3 == 0
    edges = symmetric_edges(values)
    found = overlaid(values, kept, edges)
    bounds = [-np.inf, *edges.tolist(), np.inf]
    for i, (low, high) in enumerate(pairwise(bounds)):
        inside = [low <= value < high for value in values.tolist()]
        assert found.kept[i] == sum(a and b for a, b in zip(inside, kept, strict=True))
        assert found.kept[i] + found.other[i] == sum(inside)
    assert found.kept.sum() + found.other.sum() == 1000
    assert overlaid(values, None, edges).kept.sum() == 0


def test_an_axis_reaches_most_values() -> None:
    values = np.r_[np.linspace(-1, 1, 99), 1000].astype(np.float32)
    assert reach(values) == pytest.approx(1)
    assert symmetric_edges(values)[[0, -1]].tolist() == [-reach(values), reach(values)]
    assert symmetric_edges(np.abs(values))[0] == 0
    assert reach(np.zeros(5)) == 1 == reach(np.array([np.nan])) and reach(np.r_[np.zeros(99), 5.0]) == 5


def test_a_density_counts_what_lies_beyond_at_its_rim() -> None:
    x, y = np.array([-9.0, 0.5, 0.5, 9.0, np.nan]), np.array([0.5, 0.5, 1.5, -9.0, 0.0])
    found = density(x, y, np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0]))
    assert found.count.tolist() == [[2, 1], [1, 0]]


def test_the_bent_scale_is_linear_near_zero_and_odd() -> None:
    assert signed_log(np.array([1e-6]), 1.0)[0] == pytest.approx(1e-6)
    assert signed_log(np.array([-5.0]), 0.1)[0] == -signed_log(np.array([5.0]), 0.1)[0]
    assert np.diff(signed_log(np.array([1e3, 1e4, 1e5]), 1.0)) == pytest.approx([np.log(10)] * 2, rel=1e-5)


def test_quartiles_by_bin() -> None:
    x, values = np.array([0.0, 0.0, 0.0, 1.0, 2.0, np.nan]), np.array([1.0, 2.0, 6.0, 4.0, 5.0, 9.0])
    kept = np.array([True, False, False, True, True, True])
    found = bands(x, values, kept, np.array([0.0, 1.0, 1.5, 2.0]))
    assert found.count.tolist() == [3, 1, 1]
    assert found.low[0], found.high[0] == statistics.quantiles([1, 2, 6], n=4, method="inclusive")[::2]
    assert found.middle.tolist() == [2, 4, 5]
    assert found.kept == pytest.approx([1 / 3, 1, 1])
    assert np.isnan(bands(x, values, None, np.array([0.0, 1.0, 2.0])).kept).all()
    empty = bands(x, values, kept, np.array([0.0, 0.5, 0.7, 2.0]))
    assert empty.count[1] == 0 and np.isnan(empty.middle[1]) and np.isnan(empty.kept[1])


def test_edges_by_quantile_hold_as_many_tokens_each() -> None:
    values = np.random.default_rng(1).permutation(1000).astype(np.float64)
    assert bands(values, values, None, quantile_edges(values, 10)).count.tolist() == [100] * 10
    assert quantile_edges(np.array([2.0, 2.0]), 10).tolist() == [2, 2]
    assert len(quantile_edges(np.array([np.nan]), 10)) == 0


def test_places_in_a_response_are_told_in_growing_steps() -> None:
    assert place_edges(1).tolist() == [1, 2]
    assert place_edges(5).tolist() == [1, 2, 3, 4, 6]
    found = place_edges(10_000)
    assert found[-1] == 10_001 and (np.diff(found) > 0).all() and len(found) < 40


@given(NUMBERS, st.randoms(use_true_random=False))
def test_rank_correlation_is_that_of_the_counted_ranks(numbers: list[int], random: object) -> None:
    other = list(numbers)
    random.shuffle(other)  # type: ignore[attr-defined]

    def plain(values: list[int]) -> list[float]:
        return [sum(v < x for v in values) + (1 + sum(v == x for v in values)) / 2 for x in values]

    found = rank_correlation(np.array(numbers, np.float32), np.array(other, np.float32))
    if len(set(numbers)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(statistics.correlation(plain(numbers), plain(other)), abs=1e-9)


def test_correlations_leave_out_what_is_missing_and_keep_apart_tiny_numbers() -> None:
    x = np.array([1.0, 2.0, np.nan, 3.0])
    assert correlation(x, np.array([2.0, 4.0, 1.0, 6.0])) == pytest.approx(1)
    assert correlation(x * 1e-30, -x * 1e-30) == pytest.approx(-1)
    assert correlation(x, np.ones(4)) is None and correlation(np.array([1.0]), np.array([1.0])) is None
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 100, 10_000])) == pytest.approx(1)


def test_signs_are_compared_where_both_have_one() -> None:
    assert same_sign(np.array([1.0, -1, 2, 0, np.nan]), np.array([3.0, 1, 5, 7, 1])) == pytest.approx(2 / 3)
    assert same_sign(np.zeros(3), np.ones(3)) is None


def test_groups() -> None:
    names, values = np.array([3, 1, 3, 3]), np.array([1.0, 5.0, 2.0, 6.0], np.float32)
    found = groups(names, values, np.array([True, False, False, True]))
    assert found == [Group(name=1, count=1, kept=0, value=5), Group(name=3, count=3, kept=2, value=3)]
    assert found[1].share == pytest.approx(2 / 3)
    assert [one.kept for one in groups(names, values, None)] == [None, None]


def test_what_is_unusual_is_what_moves_most_tokens() -> None:
    made = [
        Group(name=i, count=count, kept=kept, value=0.0)
        for i, (count, kept) in enumerate([(100, 90), (2, 2), (10, 5), (50, 0), (4, 0)])
    ]
    more, less = unusual(made, 0.5, 5)
    assert [one.name for one in more] == [0, 1] and [one.name for one in less] == [3, 4]
    assert [len(part) for part in unusual(made, 0.5, 1)] == [1, 1]
