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


def read_records(run: Path, shard: Shard, layout: Layout) -> list[ValueRow]:
    """The records of a values shard: what `shards.write_values` was given. Raises as `shards.read_shard`.

    Signals are NaN where null; those that are null everywhere in a row are left out.
    """
    table = shards.read_shard(run, shard, layout.values)
    branches = [_branches(table, prefix) for prefix in layout.branches]
    rows = table.select([name for name in (*shards.OF_ROW, *PAIR_COLUMNS) if name in table.column_names]).to_pylist()
    return [ValueRow(**row, branches=tuple(one[i] for one in branches)) for i, row in enumerate(rows)]


def _branches(table: pa.Table, prefix: str) -> list[Branch]:
    def rows_of(name: str, kind: type[np.generic]) -> list[NDArray[Any]]:
        flat, lengths = shards.entries(table[prefix + name])
        return np.split(flat.astype(kind), np.cumsum(lengths)[:-1])

    ids, response, ends = (rows_of("input_ids", np.int32), *(rows_of(n, np.bool_) for n in ("response", "end_of_turn")))
    signals = {name: rows_of(name, np.float32) for name in SIGNALS}
    return [
        Branch(
            input_ids=ids[i],
            response=response[i],
            end_of_turn=ends[i],
            signals={name: rows[i] for name, rows in signals.items() if not np.isnan(rows[i]).all()},
        )
        for i in range(table.num_rows)
    ]
