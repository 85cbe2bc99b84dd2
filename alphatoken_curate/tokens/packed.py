"""Rows as columns of Arrow, a sequence a row: 5 bytes a token and some tens for each sequence, where objects take 400.

What is asked of all rows at once, draws and sizes, is in `Columns`, of 24 bytes a row; the tokens can lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alphatoken_curate.runs.shards import entries
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow, branches

SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        ("turn", pa.int32()),
        ("branch", pa.int8()),  # 1 of the rejected sequence of a pair, which follows the chosen one
        ("source", pa.string()),
        ("line", pa.int64()),
        ("id", pa.string()),
        ("truncated", pa.int64()),
        ("input_ids", pa.large_list(pa.int32())),
        ("flags", pa.large_list(pa.uint8())),
    ]
)

_RESPONDS, _ENDS = 1, 2
"""Bits of a token's flags."""

Columns: TypeAlias = NDArray[np.void]
"""(R,) records of `COLUMNS`, a row each, or one turn of it, by row_id."""

COLUMNS = np.dtype([("row_id", "i8"), ("turn", "i4"), ("width", "i4"), ("tokens", "i4"), ("truncated", "i4")])
"""`width`: the tokens of its longest sequence times its sequences, what it takes in a batch of its own; `tokens` and
`truncated` of all of them."""


def pack(rows: Sequence[AnyRow]) -> pa.Table:
    """Rows as a table of `SCHEMA`."""
    both = [(number, one) for row in rows for number, one in enumerate(branches(row))]
    parts = [one for _, one in both]
    lengths = np.array([len(one.input_ids) for one in parts], np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    flags = [one.response * np.uint8(_RESPONDS) | one.end_of_turn * np.uint8(_ENDS) for one in parts]
    ids = np.concatenate([np.empty(0, np.int32), *(one.input_ids for one in parts)])
    told = {name: [getattr(one, name) for one in parts] for name in ("row_id", "turn", "source", "line", "id")}
    return (
        pa.table(
            {
                **told,
                "branch": [number for number, _ in both],
                "truncated": [one.truncated for one in parts],
                "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
                "flags": pa.LargeListArray.from_arrays(
                    offsets, pa.array(np.concatenate([np.empty(0, np.uint8), *flags]))
                ),
            }
        )
        .select(SCHEMA.names)
        .cast(SCHEMA)
    )


def unpack(table: pa.Table) -> list[AnyRow]:
    """The rows that were packed. Their arrays lie in those of all rows of the table: a copy of one frees the others."""
    found: list[AnyRow] = []
    ids, flags, ends = _flat(table)
    response, end_of_turn = flags & _RESPONDS != 0, flags & _ENDS != 0
    told = table.select(["row_id", "turn", "source", "line", "id", "truncated"]).to_pylist()
    for about, branch, start, end in zip(told, table["branch"].to_pylist(), [0, *ends], ends, strict=False):
        here = slice(start, end)
        one = TokenRow(**about, input_ids=ids[here], response=response[here], end_of_turn=end_of_turn[here])
        if branch:
            first = found.pop()
            assert isinstance(first, TokenRow)
            found.append(PairRow(chosen=first, rejected=one))
        else:
            found.append(one)
    return found


def columns_of(table: pa.Table) -> Columns:
    """Of each row of a table what is asked of all at once."""
    first = table["branch"].to_numpy() == 0
    starts = np.flatnonzero(first)
    found = np.empty(len(starts), COLUMNS)
    if not len(starts):
        return found
    lengths = entries(table["input_ids"])[1]
    each = np.diff(np.append(starts, len(first)))
    for name in ("row_id", "turn"):
        found[name] = table[name].to_numpy()[first]
    found["width"] = np.maximum.reduceat(lengths, starts) * each
    found["tokens"] = np.add.reduceat(lengths, starts)
    found["truncated"] = np.add.reduceat(table["truncated"].to_numpy(), starts)
    return found


def columns_of_rows(rows: Sequence[AnyRow]) -> Columns:
    """The same of rows as they are."""
    found = np.empty(len(rows), COLUMNS)
    for i, row in enumerate(rows):
        lengths = [len(one.input_ids) for one in branches(row)]
        found[i] = row.row_id, row.turn, max(lengths) * len(lengths), sum(lengths), row.truncated
    return found


def token_bytes(table: pa.Table, without: NDArray[np.int64]) -> Iterator[bytes]:
    """What a digest of the tokens is of, sequence by sequence: length, ids, what responds and what ends an answer.

    `without`: row_ids of rows that are left out.
    """
    ids, flags, ends = _flat(table)
    response, end_of_turn = flags & _RESPONDS != 0, flags & _ENDS != 0
    kept = ~np.isin(table["row_id"].to_numpy(), without)
    for keep, start, end in zip(kept.tolist(), [0, *ends], ends, strict=False):
        if keep:
            yield (end - start).to_bytes(8, "little") + ids[start:end].tobytes() + response[start:end].tobytes()
            yield end_of_turn[start:end].tobytes()


def _flat(table: pa.Table) -> tuple[NDArray[np.int32], NDArray[np.uint8], list[int]]:
    """Ids and flags of all tokens, (T,) each, and where each sequence ends among them."""
    ids, lengths = entries(table["input_ids"])
    flags, _ = entries(table["flags"])
    return np.array(ids, np.int32), np.array(flags, np.uint8), np.cumsum(lengths).tolist()
