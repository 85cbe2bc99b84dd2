"""The rows of a values shard as they were before they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alphatoken_curate.runs import shards
from alphatoken_curate.runs.schema import PAIR_COLUMNS, SIGNALS, Layout
from alphatoken_curate.runs.shards import Branch, Shard, ValueRow

_OF_TOKENS = ("input_ids", "response", "end_of_turn")


def read_records(run: Path, shard: Shard, layout: Layout, *, signals: bool = True) -> list[ValueRow]:
    """The records of a values shard: what `shards.write_values` was given. Raises as `shards.read_shard`.

    Signals are NaN where null; those that are null everywhere in a row are left out, and all where none are asked for.
    """
    names = [prefix + name for prefix in layout.branches for name in _OF_TOKENS]
    table = shards.read_shard(run, shard, layout.values, None if signals else (*shards.OF_ROW, *PAIR_COLUMNS, *names))
    branches = [_branches(table, prefix) for prefix in layout.branches]
    rows = table.select([name for name in (*shards.OF_ROW, *PAIR_COLUMNS) if name in table.column_names]).to_pylist()
    return [ValueRow(**row, branches=tuple(one[i] for one in branches)) for i, row in enumerate(rows)]


def _branches(table: pa.Table, prefix: str) -> list[Branch]:
    def rows_of(name: str, kind: type[np.generic]) -> list[NDArray[Any]]:
        flat, lengths = shards.entries(table[prefix + name])
        return np.split(flat.astype(kind), np.cumsum(lengths)[:-1])

    ids, response, ends = (rows_of(name, np.int32 if name == "input_ids" else np.bool_) for name in _OF_TOKENS)
    signals = {name: rows_of(name, np.float32) for name in SIGNALS if prefix + name in table.column_names}
    return [
        Branch(
            input_ids=ids[i],
            response=response[i],
            end_of_turn=ends[i],
            signals={name: rows[i] for name, rows in signals.items() if not np.isnan(rows[i]).all()},
        )
        for i in range(table.num_rows)
    ]
