from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from alphatoken_curate.tokens.dealt import Rows, Shards, columns_in, pick_in, tokens_in
from alphatoken_curate.tokens.packed import columns_of_rows
from alphatoken_curate.tokens.plan import Cut, by_shard
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow


def row(row_id: int, turn: int = 0, length: int = 3, truncated: int = 0) -> TokenRow:
    return TokenRow(
        row_id=row_id,
        turn=turn,
        source="",
        line=row_id + 1,
        id=None,
        input_ids=np.full(length, row_id, np.int32),
        response=np.arange(length) > 0,
        end_of_turn=np.zeros(length, np.bool_),
        truncated=truncated,
    )


# Of 14 rows read, in shards of 4: 1, 5 to 8 and 12 are bad; 9 has two turns; the third shard begins with a bad one.
LISTED: list[AnyRow] = [row(0, 0, 5), row(2), row(3, 0, 2, 4), row(4), row(9, 0), row(9, 1, 9, 1), row(10), row(13)]


@pytest.fixture
def loads() -> Counter[int]:
    return Counter()


@pytest.fixture
def rows(loads: Counter[int]) -> Rows:
    dealt = by_shard(LISTED, 14, 4)

    def load(shard: int) -> list[AnyRow]:
        loads[shard] += 1
        return list(dealt[shard])

    return Rows(columns_of_rows(LISTED), load, read=14, per_shard=4)


def keys(found: list[AnyRow]) -> list[tuple[int, int]]:
    return [(one.row_id, one.turn) for one in found]


def test_rows_are_a_sequence(rows: Rows) -> None:
    assert len(rows) == 8 and keys(list(rows)) == keys(LISTED)
    assert keys([rows[i] for i in range(-8, 8)]) == keys(LISTED * 2)
    assert keys(rows[1:6:2]) == keys(LISTED[1:6:2]) and rows[5:5] == []
    with pytest.raises(IndexError):
        rows[8]


def test_the_shards_of_rows_are_read_when_asked_for_and_not_twice_in_a_row(rows: Rows, loads: Counter[int]) -> None:
    assert [keys(shard) for shard in rows.shards] == [keys(shard) for shard in by_shard(LISTED, 14, 4)]
    assert loads == {0: 1, 1: 1, 2: 1, 3: 1}
    assert keys(rows.shards[3]) == [(13, 0)] == keys(rows.shards[-1]) and loads[3] == 1
    assert [keys(one) for one in rows.shards[1:3]] == [keys(rows.shard(1)), keys(rows.shard(2))]
    assert [keys(one) for one in Shards(rows, [2, 0])] == [keys(rows.shard(2)), keys(rows.shard(0))]


def test_what_is_held_of_rows_needs_no_reading(rows: Rows, loads: Counter[int]) -> None:
    assert [len(one) for one in columns_in(rows.shards)] == [3, 1, 3, 1] and tokens_in(rows.shards) == 31
    assert tokens_in(Shards(rows, [2])) == 15 and rows.cut() == Cut(rows=2, tokens=5)
    assert [rows.cut(shard).rows for shard in range(4)] == [1, 0, 1, 0]
    assert not loads
    assert tokens_in([LISTED[:2], LISTED[2:]]) == 31  # of lists


def test_rows_are_picked_with_one_reading_of_each_shard(rows: Rows, loads: Counter[int]) -> None:
    assert keys(rows.pick([7, 0, 5, 2, 0])) == [(13, 0), (0, 0), (9, 1), (3, 0), (0, 0)]
    assert loads == {0: 1, 2: 1, 3: 1}
    assert keys(pick_in(Shards(rows, [2, 0]), [3, 0])) == [(0, 0), (9, 0)]
    assert keys(pick_in([LISTED[:3], LISTED[3:]], [4, 2])) == [(9, 0), (3, 0)]


def test_a_picked_row_holds_no_other(rows: Rows) -> None:
    held = np.arange(100, dtype=np.int32)
    one = row(0)
    one = TokenRow(**{name: getattr(one, name) for name in one.__slots__} | {"input_ids": held[:3]})
    assert Rows.of([one])[0].input_ids.base is None  # type: ignore[union-attr]


def test_some_rows_may_be_left_out(rows: Rows, loads: Counter[int]) -> None:
    left = rows.without([9]).without([0, 13])
    assert keys(list(left)) == [(2, 0), (3, 0), (4, 0), (10, 0)] and len(left) == 4
    assert [keys(shard) for shard in left.shards] == [[(2, 0), (3, 0)], [(4, 0)], [(10, 0)], []]
    assert loads[3] == 0  # where none is left, none is read
    assert keys(list(rows)) == keys(LISTED)
