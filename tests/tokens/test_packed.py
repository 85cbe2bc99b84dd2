from __future__ import annotations

import hashlib

import numpy as np
import pytest

from alphatoken_curate.tokens.packed import COLUMNS, columns_of, columns_of_rows, pack, token_bytes, unpack
from alphatoken_curate.tokens.plan import sequences
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow, branches


def row(row_id: int, length: int, *, turn: int = 0, truncated: int = 0, name: str | None = None) -> TokenRow:
    draw = np.random.default_rng(1000 * row_id + 10 * turn + length)
    response = draw.random(length) < 0.5
    return TokenRow(
        row_id=row_id,
        turn=turn,
        source=f"rows-{row_id % 3}.jsonl",
        line=2 * row_id + 1,
        id=name,
        input_ids=draw.integers(0, 2**31 - 1, length).astype(np.int32),
        response=response,
        end_of_turn=response & (draw.random(length) < 0.5),
        truncated=truncated,
    )


ROWS: list[AnyRow] = [
    row(0, 5, name="a"),
    row(2, 1, truncated=7),
    PairRow(chosen=row(3, 4, truncated=2), rejected=row(3, 6, truncated=1)),
    row(4, 3, turn=0),
    row(4, 7, turn=2, name="Zoë\n\U0001f600"),
    row(2**40, 9),
]


def plain(found: AnyRow) -> list[object]:
    names = ("row_id", "turn", "source", "line", "id", "truncated")
    return [
        (type(found).__name__, *(getattr(one, name) for name in names), *map(bytes, _arrays(one)))
        for one in branches(found)
    ]


def _arrays(one: TokenRow) -> list[bytes]:
    kinds = one.input_ids.dtype, one.response.dtype, one.end_of_turn.dtype
    assert kinds == (np.int32, np.bool_, np.bool_)
    return [one.input_ids.tobytes(), one.response.tobytes(), one.end_of_turn.tobytes()]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[2:3], []])
def test_rows_come_back_as_they_were(rows: list[AnyRow]) -> None:
    table = pack(rows)
    found = unpack(table)
    assert [plain(one) for one in found] == [plain(one) for one in rows]
    for one in (one for row in found for one in branches(row)):
        assert one.input_ids.flags.writeable and one.response.flags.writeable  # torch takes no others
    assert columns_of(table).tolist() == columns_of_rows(rows).tolist()


def test_the_columns_of_rows() -> None:
    found = columns_of(pack(ROWS))
    assert found.dtype == COLUMNS and COLUMNS.itemsize == 24
    assert found["row_id"].tolist() == [0, 2, 3, 4, 4, 2**40] and found["turn"].tolist() == [0, 0, 0, 0, 2, 0]
    assert found["width"].tolist() == [5, 1, 12, 3, 7, 9] and found["tokens"].tolist() == [5, 1, 10, 3, 7, 9]
    assert found["truncated"].tolist() == [0, 7, 3, 0, 0, 0]


def test_the_bytes_of_a_digest_are_those_of_each_sequence() -> None:
    found, expected = hashlib.sha256(), hashlib.sha256()
    for part in token_bytes(pack(ROWS), np.array([0, 4])):
        found.update(part)
    for one in sequences([one for one in ROWS if one.row_id not in (0, 4)]):
        expected.update(len(one.input_ids).to_bytes(8, "little") + one.input_ids.tobytes())
        expected.update(one.response.tobytes() + one.end_of_turn.tobytes())
    assert found.digest() == expected.digest()


def test_what_a_packed_token_takes() -> None:
    table = pack([row(i, 400) for i in range(50)])
    assert table.nbytes < 50 * (5 * 400 + 100)
