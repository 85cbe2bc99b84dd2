from __future__ import annotations

import numpy as np
import pytest
from tiny import make_row

from alphatoken_curate.directions.groups import deal, mean_and_error
from alphatoken_curate.tokens.tokenise import TokenRow


def rows(lengths: list[int]) -> list[TokenRow]:
    return [make_row(i, list(range(3, 4 + n)), [(1, 1 + n)]) for i, n in enumerate(lengths)]


def tokens(group: list[TokenRow]) -> int:
    return sum(int(row.response.sum()) for row in group)


def test_groups_hold_every_row_once_and_about_equal_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 100).tolist()
    dealt = deal(rows(lengths), 8, seed=0)
    assert len(dealt) == 8
    assert sorted(row.row_id for group in dealt for row in group) == list(range(100))
    sizes = [tokens(group) for group in dealt]
    assert max(sizes) - min(sizes) <= min(lengths) + 1
    assert all(group == sorted(group, key=lambda row: row.row_id) for group in dealt)


def test_no_group_is_empty_where_rows_are_few() -> None:
    assert [len(group) for group in deal(rows([5, 1, 9]), 8, seed=0)] == [1, 1, 1]


def test_rows_of_equal_length_are_dealt_by_the_seed_and_not_by_where_they_stand() -> None:
    same = rows([4] * 20)
    one, other = deal(same, 4, seed=0), deal(same, 4, seed=1)
    names = [[[row.row_id for row in group] for group in dealt] for dealt in (one, other, deal(same[::-1], 4, seed=0))]
    assert names[0] != names[1]
    assert [sorted(group) for group in names[0]] == [sorted(group) for group in names[2]]


def test_mean_and_error_are_those_of_a_ratio_by_the_jackknife() -> None:
    """Where groups are equal, that of a mean; else near what leaving out one group after the other says."""
    draw = np.random.default_rng(1)
    values = draw.normal(size=(8, 5))
    mean, error = mean_and_error(values, [10] * 8)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(error, values.std(0, ddof=1) / np.sqrt(8))
    sizes = [10, 11, 12, 10, 11, 10, 12, 11]
    mean, error = mean_and_error(values, sizes)
    np.testing.assert_allclose(mean, np.average(values, axis=0, weights=sizes))
    left = np.stack([np.average(np.delete(values, g, 0), axis=0, weights=np.delete(sizes, g)) for g in range(8)])
    jackknife = np.sqrt(7 / 8 * ((left - left.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(error, jackknife, rtol=0.03)


def test_the_error_covers_what_other_target_rows_would_have_given() -> None:
    """Two errors to each side hold the true mean in about 92 of 100 draws of 8 groups (Student, 7 degrees)."""
    draw = np.random.default_rng(2)
    mean, error = mean_and_error(draw.normal(3.0, 2.0, size=(8, 20_000)), [5] * 8)
    assert (np.abs(mean - 3.0) < 2 * error).mean() == pytest.approx(0.914, abs=0.01)


def test_of_one_group_there_is_no_error() -> None:
    mean, error = mean_and_error(np.array([[1.0, 2.0]]), [3])
    assert mean.tolist() == [1.0, 2.0] and np.isnan(error).all()
