"""The rows of a mask as a trainer sees them: what exports and trainers read. No model is needed.

The mask is resolved once, when the set is opened, so that a mask made later does not mix with the rows of this one.
Memory is one shard at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.reading.scan import choose_mask
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.manifest import Manifest, Mask
from alphatoken_curate.runs.schema import Layout
from alphatoken_curate.runs.shards import Shard, entries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBranch:
    """A sequence of T tokens, token-aligned: index i is about predicting `input_ids[i]`, and index 0 never trains.

    `input_ids` (T,) int32; `labels` (T,) int64, -100 exactly where the weight is 0; `loss_weight` (T,) float32 >= 0,
    whose mean over the trainable tokens of the whole mask is 1.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int64]
    loss_weight: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainRow:
    """A row of a mask, or one turn of it: one branch, or the chosen and the rejected one of a pair."""

    row_id: int
    turn: int = 0
    branches: tuple[TrainBranch, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainSet:
    """The train/ shards of one mask of a run."""

    run: Path
    stored: Manifest
    mask: Mask
    layout: Layout

    def rows(self) -> Iterator[TrainRow]:
        """All rows in order of row_id and turn. Raises `StoredDataError` for a shard that is missing or damaged."""
        for shard in self.mask.shards:
            yield from self.read(shard)

    def files(self) -> list[Path]:
        """The shards in order, every byte checked. Raises `StoredDataError` as `read` does."""
        for shard in self.mask.shards:
            shards.check(self.run, shard)
        return [self.run / shard.path for shard in self.mask.shards]

    def read(self, shard: Shard) -> list[TrainRow]:
        """The rows of one of the mask's shards. Raises `StoredDataError` where it is missing, damaged or another."""
        table = shards.read_shard(self.run, shard, self.layout.train)
        lists = [
            [_split(table, prefix + name) for name in ("input_ids", "labels", "loss_weight")]
            for prefix in self.layout.branches
        ]
        return [
            TrainRow(
                row_id=row_id,
                turn=turn,
                branches=tuple(
                    TrainBranch(input_ids=ids[i], labels=labels[i], loss_weight=weights[i])
                    for ids, labels, weights in lists
                ),
            )
            for i, (row_id, turn) in enumerate(
                zip(*(table[name].to_pylist() for name in ("row_id", "turn")), strict=True)
            )
        ]


def open_train(run: str | Path, mask: int | None = None) -> TrainSet:
    """The rows of the newest mask or the one given.

    Raises `UsageError` where there is no such mask, `StoredDataError` for a run without a manifest.
    """
    folder = Path(run)
    stored = manifest.read(folder)
    return TrainSet(run=folder, stored=stored, mask=choose_mask(folder, stored, mask), layout=manifest.layout(stored))


def _split(table: Any, name: str) -> list[NDArray[Any]]:
    flat, lengths = entries(table[name])
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
