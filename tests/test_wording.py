from __future__ import annotations

import pytest

from alphatoken_curate.wording import count, nearest, ranges


def test_one_is_no_plural() -> None:
    assert [count(n, "row") for n in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]
    assert [count(n, "branch", "branches") for n in (1, 2)] == ["1 branch", "2 branches"]


def test_a_name_that_is_near_is_told() -> None:
    assert nearest("nul", ("nll", "entropy")) == " Did you mean nll?"
    assert nearest("xyz", ("nll", "entropy")) == ""


@pytest.mark.parametrize(
    ("numbers", "most", "told"),
    [
        ([3], 10, "3"),
        ([3, 7, 9, 10, 11], 10, "3, 7, 9-11"),
        ([1, 2, 4, 6, 8, 9, 10], 3, "1-2, 4, 6 and 3 more"),
        (list(range(5, 2000)), 10, "5-1999"),
    ],
)
def test_lines_are_told_in_ranges(numbers: list[int], most: int, told: str) -> None:
    assert ranges(numbers, most) == told
