"""The mask that a training goes by at the moment, where it changes between epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.errors import UsageError
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import IGNORE_INDEX, MOST_TURNS, sequence_keys
from alphatoken_curate.trainers.dataset import as_dataset

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = "row_ids"
"""Column of packed rows: of each token the key of its sequence (`sequence_key`)."""


def sequence_key(row: Mapping[str, Any]) -> int:
    """One number for the sequence that a row of `as_dataset` is."""
    return int(sequence_keys(np.array(row["row_id"]), np.array(row.get("turn", 0))))


class CurrentMask:
    """Gives rows the labels and weights of one mask of a run, whatever their own say.

    A row of the run that the mask does not have, since a checkpoint could not score it, trains nothing. Raises
    `UsageError` for a folder that is no run, `StoredDataError` for one that is not finished.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        stored = manifest.read(self.run)
        self.branches = manifest.layout(stored).branches
        self.number: int | None = None
        """The mask in force; None until `use` is called."""
        self._read = stored.counts.read
        self._rows: Dataset | None = None
        self._keys: NDArray[np.int64] = np.empty(0, np.int64)

    def use(self, number: int) -> None:
        """Go by this mask from now on. Raises as `as_dataset`."""
        self._rows = as_dataset(self.run, number)
        turns = self._rows["turn"][:] if "turn" in self._rows.column_names else 0
        self._keys = sequence_keys(np.asarray(self._rows["row_id"][:], dtype=np.int64), np.asarray(turns, np.int32))
        self.number = number

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows, or packed rows, with labels and weights of the mask in force.

        Raises `UsageError` for rows that are not those of the run.
        """
        return [self._packed(one) if ROWS in one else self._row(one) for one in features]

    def _row(self, feature: Mapping[str, Any]) -> dict[str, Any]:
        if "row_id" not in feature:
            raise UsageError(
                f"a row has no row_id, by which its mask is found; train on `as_dataset({str(self.run)!r})`"
            )
        found = dict(feature)
        for prefix in self.branches:
            ids = feature.get(prefix + "input_ids")
            if ids is None:
                raise UsageError(f"row {feature['row_id']} has no {prefix}input_ids, which the rows of {self.run} have")
            lists = self._branch(sequence_key(feature), ids, prefix)
            found[prefix + "labels"], found[prefix + "loss_weight"] = lists
        return found

    def _packed(self, feature: Mapping[str, Any]) -> dict[str, Any]:
        labels: list[int] = []
        weight: list[float] = []
        start = 0
        for length in feature["seq_lengths"]:
            part = feature["input_ids"][start : start + length]
            found = self._branch(int(feature[ROWS][start]), part, "")
            labels += found[0]
            weight += found[1]
            start += length
        return {**feature, "labels": labels, "loss_weight": weight}

    def _branch(self, key: int, ids: Any, prefix: str) -> tuple[list[int], list[float]]:
        """Labels and weights of a sequence, which may be cut at its end."""
        place, row_id = int(np.searchsorted(self._keys, key)), key // MOST_TURNS
        length = len(ids)
        if self._rows is None or not 0 <= row_id < self._read:
            raise UsageError(f"{self.run} has no row {row_id}; train on `as_dataset({str(self.run)!r})`")
        if place == len(self._keys) or self._keys[place] != key:
            return [IGNORE_INDEX] * length, [0.0] * length
        row = self._rows[place]
        if list(row[prefix + "input_ids"][:length]) != [int(one) for one in ids]:
            raise UsageError(
                f"row {row_id}: its {prefix}input_ids are not those that {self.run} has; train on"
                f" `as_dataset({str(self.run)!r})`"
            )
        return row[prefix + "labels"][:length], row[prefix + "loss_weight"][:length]


@dataclass(kw_only=True, slots=True)
class Served:
    """A collator of training rows that goes by the mask in force, where something sets one."""

    collator: Callable[[Any], Any]
    current: CurrentMask | None = None

    def __call__(self, features: Any) -> Any:
        """A batch."""
        return self.collator(features if self.current is None else self.current(features))
