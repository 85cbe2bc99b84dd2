"""Shards of train/: the rows of a mask, with what follows from their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alphatoken_curate.runs.documents import LATER
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.schema import IGNORE_INDEX, Layout, rows_and_turns
from alphatoken_curate.runs.shards import Footer, Shard, commit, lists_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainLists:
    """One branch of the rows of a train shard, flat: R rows of N tokens in all.

    `lengths` (R,) int64, `input_ids` (N,) int32, `weight` (N,) float32 >= 0, `value` (N,) float32, NaN off the
    response, `end_of_turn` (N,) bool, None where values/ does not say it: it is counted, and not a column of train/.
    """

    lengths: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    weight: NDArray[np.float32]
    value: NDArray[np.float32]
    end_of_turn: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFacts:
    """What a train shard's footer tells along: `generations` ascend, the counts are the whole mask's."""

    generations: tuple[int, ...]
    settings: Mapping[str, Json]
    rows_given_back: int
    over_share: int | None = field(default=None, metadata=LATER)

    def as_json(self) -> dict[str, Json]:
        """For `Footer.facts`."""
        return {name: told for name, told in asdict(self).items() if told is not None}


def write_train(
    path: Path, keys: NDArray[np.int64], branches: Sequence[TrainLists], metadata: Footer, layout: Layout
) -> Shard:
    """Commit one train shard of the sequences `keys` (R,) (`schema.sequence_keys`).

    Labels, loss_mask and attention_mask follow from the weights. `branches`: as many as the layout has, in its order.
    The same rows and metadata give the same bytes. Raises `CurateError` where the disk refuses.
    """
    row_id, turn = rows_and_turns(keys)
    columns: dict[str, pa.Array] = {"row_id": pa.array(row_id, pa.int64()), "turn": pa.array(turn, pa.int32())}
    for prefix, lists in zip(layout.branches, branches, strict=True):
        columns |= _columns(lists, layout.train, prefix)
    counts = {"rows": len(keys), "tokens": sum(len(lists.input_ids) for lists in branches)}
    counts["response_tokens"] = sum(int((~np.isnan(lists.value)).sum()) for lists in branches)
    counts["kept_tokens"] = sum(int((lists.weight > 0).sum()) for lists in branches)
    ends = [(lists.end_of_turn, lists.weight > 0) for lists in branches if lists.end_of_turn is not None]
    if ends:
        counts["end_of_turn_tokens"] = sum(int(end.sum()) for end, _ in ends)
        counts["end_of_turn_kept"] = sum(int((end & trains).sum()) for end, trains in ends)
    return commit(path, pa.table(columns, schema=layout.train), metadata, counts)


def _columns(lists: TrainLists, schema: pa.Schema, prefix: str) -> dict[str, pa.Array]:
    trains = lists.weight > 0
    flat: dict[str, NDArray[Any]] = {
        "input_ids": lists.input_ids,
        "attention_mask": np.ones(len(trains), np.int8),
        "labels": np.where(trains, lists.input_ids, IGNORE_INDEX).astype(np.int64),
        "loss_mask": trains.astype(np.int8),
        "loss_weight": lists.weight,
    }
    columns = {prefix + name: lists_of(values, lists.lengths, schema, prefix + name) for name, values in flat.items()}
    off = np.isnan(lists.value)
    return columns | {prefix + "value": lists_of(lists.value, lists.lengths, schema, prefix + "value", null=off)}
