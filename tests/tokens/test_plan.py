from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_row, tiny_pairs, tiny_rows

from alphatoken_curate.tokens.plan import (
    LEAST_PREFIX,
    collate,
    plan_batches,
    prompt_length,
    shard_ranges,
    token_places,
    token_starts,
)
from alphatoken_curate.tokens.tokenise import TokenRow


@st.composite
def row_lists(draw: st.DrawFn) -> list[TokenRow]:
    rows = []
    for i in range(draw(st.integers(0, 30))):
        length = draw(st.integers(2, 40))
        first = draw(st.integers(1, length - 1))
        last = draw(st.integers(first + 1, length))
        rows.append(make_row(i, list(range(3, 3 + length)), [(first, last)]))
    return rows


@given(rows=row_lists(), budget=st.integers(1, 200))
def test_every_row_runs_exactly_once_within_the_budget(rows: list[TokenRow], budget: int) -> None:
    batches = plan_batches(rows, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert batch
        padded = len(batch) * max(len(rows[i].input_ids) for i in batch)
        assert padded <= budget or len(batch) == 1


@given(rows=row_lists(), budget=st.integers(1, 200), order=st.randoms(use_true_random=False))
def test_a_plan_depends_on_lengths_and_budget_alone(rows: list[TokenRow], budget: int, order: object) -> None:
    same = [make_row(9 * r.row_id, [7] * len(r.input_ids), [(prompt_length(r) + 1, len(r.input_ids))]) for r in rows]
    assert plan_batches(same, budget) == plan_batches(rows, budget) == plan_batches(list(rows), budget)
    assert plan_batches(rows, 10**9) == ([tuple(plan_batches(rows, 10**9)[0])] if rows else [])


def test_rows_of_like_length_run_together() -> None:
    rows = [make_row(i, [5] * n, [(1, n)]) for i, n in enumerate([3, 20, 4, 19, 5, 18])]
    assert [sorted(batch) for batch in plan_batches(rows, 60)] == [[1, 3, 5], [0, 2, 4]]
    assert plan_batches(rows, 1) == [(1,), (3,), (5,), (4,), (2,), (0,)]  # the longest first: memory runs out at once


def test_the_batch_of_some_rows() -> None:
    rows = [
        make_row(0, [10, 11, 12, 13, 14], [(2, 4)]),
        make_row(1, [20, 21, 22], [(1, 3)]),
        make_row(2, [30, 31, 32, 33], [(1, 2), (3, 4)]),
    ]
    batch = collate(rows, (2, 0))
    assert batch.rows == (2, 0) and batch.start == 0
    assert batch.input_ids.tolist() == [[30, 31, 32, 33], [10, 11, 12, 13]]  # the longest row's last token is left out
    assert batch.row.tolist() == [0, 0, 1, 1]
    assert batch.position.tolist() == [0, 2, 1, 2]
    assert batch.target.tolist() == [31, 33, 12, 13]
    assert batch.counts.tolist() == [2, 2]
    assert collate(rows, (0, 1)).input_ids.tolist() == [[10, 11, 12, 13], [20, 21, 22, 0]]
    assert {x.dtype for x in (batch.input_ids, batch.row, batch.position, batch.target)} == {np.dtype(np.int64)}


@given(rows=row_lists().filter(bool), budget=st.integers(1, 200))
def test_every_response_token_is_predicted_once_from_the_column_before_it(rows: list[TokenRow], budget: int) -> None:
    seen = set()
    for indices in plan_batches(rows, budget):
        batch = collate(rows, indices)
        longest = max(len(rows[i].input_ids) for i in indices)
        assert batch.input_ids.shape == (len(indices), longest - 1)
        for row, position, target in zip(batch.row, batch.position, batch.target, strict=True):
            index = indices[row]
            assert rows[index].input_ids[position + 1] == target
            assert batch.input_ids[row, position] == rows[index].input_ids[position]
            assert position >= batch.start
            seen.add((index, int(position) + 1))
    assert seen == {(i, int(t)) for i, row in enumerate(rows) for t in np.flatnonzero(row.response)}


def test_a_prefix_is_shared_where_all_prompts_are_long_enough() -> None:
    ids = list(range(3, 43))
    long, longer, short = ([(n, 40)] for n in (LEAST_PREFIX + 1, LEAST_PREFIX + 9, LEAST_PREFIX))
    rows = [make_row(i, ids, spans) for i, spans in enumerate((long, longer, short))]
    assert collate(rows, (0, 1)).start == LEAST_PREFIX
    assert collate(rows, (1,)).start == LEAST_PREFIX + 8
    assert collate(rows, (0, 1, 2)).start == 0
    assert [prompt_length(row) for row in tiny_rows()] == [10, 0, 12, 9, 11, 0]


@pytest.mark.parametrize(
    ("rows", "size", "ranges"),
    [(0, 3, []), (1, 3, [(0, 1)]), (6, 3, [(0, 3), (3, 6)]), (7, 3, [(0, 3), (3, 6), (6, 7)])],
)
def test_shards_are_ranges_of_row_ids(rows: int, size: int, ranges: list[tuple[int, int]]) -> None:
    assert shard_ranges(rows, size) == ranges


def test_where_the_tokens_of_a_batch_are_among_those_of_all_rows() -> None:
    rows = tiny_rows()
    starts = token_starts(rows)
    assert starts.tolist() == [0, 6, 14, 15, 21, 30, 31]
    assert token_places(collate(rows, [5, 0]), starts).tolist() == [30, *range(6)]
    pairs = tiny_pairs()
    starts = token_starts(pairs)
    assert starts.tolist() == [0, 6, 10, 13, 22, 23, 24, 28, 33]
    assert token_places(collate(pairs, [2, 0]), starts).tolist() == [22, 23, *range(10)]
    assert token_starts([]).tolist() == [0]
