"""The rows of a mask as datasets: `TrainDataset` streams them for any loop, `as_dataset` is for Trainer and TRL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from alphatoken_curate.errors import FingerprintError, UsageError
from alphatoken_curate.reading.trainset import TrainRow, TrainSet, open_train
from alphatoken_curate.runs.card import digest_of
from alphatoken_curate.trainers.fit import check_tokenizer, marked

if TYPE_CHECKING:
    from datasets import Dataset

LISTS = ("input_ids", "labels", "loss_weight")
"""Of each branch of a row."""

SAME = ("seed", "shuffle", "world", "shards_at_once", "batch_size", "max_length")
"""Settings that decide which row comes when; a state goes on only with those it was made with."""


def as_dataset(
    run: str | Path, mask: int | None = None, *, max_length: int | None = None, tokenizer: Any = None
) -> Dataset:
    """The rows of the newest mask, or the one given, as a `datasets.Dataset`: memory-mapped, in order of row_id.

    Columns: row_id, in runs by --turns each turn, and of each branch (`chosen_` and `rejected_` before the names in
    preference runs) input_ids, labels and loss_weight. The bytes of all shards are checked; datasets keeps a copy of
    them in its cache. Longer sequences are cut to `max_length` tokens at the end, ids, labels and weights alike; no row
    is left out, those that have nothing left to train give nothing (of pairs, as `PreferenceCollator` says).
    `tokenizer`: that of the model to train, for a loop of your own (our trainers look at theirs); it must give the
    tokens that the rows are made of. Raises `UsageError` where it does not, where there is no such mask or it has no
    row, and for a path that datasets cannot take; `StoredDataError` for shards that are damaged.
    """
    from datasets import Dataset

    check_length(max_length)
    opened = open_train(run, mask)
    if tokenizer is not None:
        check_tokenizer(opened, tokenizer)
    names = [prefix + name for prefix in opened.layout.branches for name in LISTS]
    whole = zip(opened.files(), opened.mask.shards, strict=True)
    paths = [_literally(path) for path, shard in whole if shard.rows]  # datasets fails at a file without rows
    if not paths:
        raise UsageError(f"{run}: mask {opened.mask.mask} has no row to train on")
    # By path and time alone datasets would take its copy of other bytes that were there.
    told = {"columns": [*key_columns(opened), *names], "description": digest_of(opened.mask.shards)}
    rows = marked(Dataset.from_parquet(paths, **told), opened.run)
    return rows if max_length is None else rows.map(_cut, fn_kwargs={"names": names, "max_length": max_length})


def key_columns(opened: TrainSet) -> tuple[str, ...]:
    """What says which sequence an item is."""
    return ("row_id", "turn") if opened.stored.settings.get("turns") == "each" else ("row_id",)


def check_length(max_length: int | None) -> None:
    """Raise `UsageError` for a length that no sequence can be cut to."""
    if max_length is not None and max_length < 2:
        raise UsageError(
            f"max_length {max_length}: give at least 2, as one token alone is predicted by nothing; None cuts nothing"
        )


def _literally(path: Path) -> str:
    """A path as datasets takes it, which else reads *, ? and [ as patterns and finds other files."""
    if "::" in str(path):
        raise UsageError(
            f"{path}: datasets takes :: for a chain of file systems. Rename the folder, or read it by TrainDataset."
        )
    return escape(str(path))


def _cut(row: Mapping[str, Any], names: list[str], max_length: int) -> dict[str, Any]:
    return {name: row[name][:max_length] for name in names}


class TrainDataset(IterableDataset[dict[str, Any]]):
    """The rows of a mask, read shard by shard, shuffled, shared out among ranks, resumable to the row.

    An item is `{"row_id": int, "input_ids": int64 (T,), "labels": int64 (T,), "loss_weight": float32 (T,)}`, in runs by
    --turns each with `turn` behind `row_id`, in preference runs with `chosen_` and `rejected_` before the names of
    lists: what `WeightedCollator` and `PreferenceCollator` take.

        data = TrainDataset("runs/a", batch_size=8, rank=rank, world=world)
        loader = DataLoader(data, batch_size=8, collate_fn=WeightedCollator(), num_workers=2)
        for epoch in range(data.epoch, 3):
            data.set_epoch(epoch)
            for batch in loader: ...

    Order: by (seed, epoch) shards are drawn in random order, and rows among `shards_at_once` of them, which is what
    memory holds; each rank gets every `world`-th row. All ranks get equally many: up to world - 1 rows of an epoch,
    other ones each time, are left out. Rank and world are told, never guessed: leave them at 0 and 1 under Trainer,
    which shares out by itself, and under Accelerate, which does with `dispatch_batches` False (as our trainers have
    it): else it wants batches of one length. Workers of a DataLoader share the rank's rows out in blocks of
    `batch_size`, so that batches come in the same order with any number of them (give the loader the same). With
    `persistent_workers` a new epoch or mask does not reach them: leave that off.

    `tokenizer`: that of the model to train, which must give the tokens that the rows are made of.

    Raises `UsageError` where it does not and for numbers that cannot be, else as `open_train`.
    """

    def __init__(
        self,
        run: str | Path,
        mask: int | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        shards_at_once: int = 4,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 1,
        max_length: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        if not 0 <= rank < world or shards_at_once < 1 or batch_size < 1:
            raise UsageError(
                f"TrainDataset: rank {rank} of world {world}, {shards_at_once} shards at once, batches of {batch_size};"
                " ranks count from 0, the others from 1"
            )
        check_length(max_length)
        self.run, self.rank = Path(run), rank
        self.seed, self.shuffle, self.world, self.shards_at_once = seed, shuffle, world, shards_at_once
        self.batch_size, self.max_length = batch_size, max_length
        self.epoch = 0
        self._opened = open_train(run, mask)
        if tokenizer is not None:
            check_tokenizer(self._opened, tokenizer)
        self._next: TrainSet | None = None
        # Of this epoch the rank has trained on `_start` rows, and behind them on `_done` of those that are the share of
        # one of `_workers` (None: on all).
        self._start, self._done = 0, 0
        self._workers: int | None = None
        self._loaded: tuple[int, int, int | None] = (0, 0, None)  # of these where this epoch is gone on from

    @property
    def mask(self) -> int:
        """Number of the mask of the rows that are given out; another one counts from the first row of an epoch on."""
        return self._opened.mask.mask

    def __len__(self) -> int:
        """Rows of an epoch, for this rank."""
        return sum(shard.rows for shard in self._opened.mask.shards) // self.world

    def use_mask(self, mask: int | None = None) -> None:
        """Go on with another mask, by default the newest one, from the next first row of an epoch on.

        Raises as `open_train`.
        """
        self._next = open_train(self.run, mask)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; nothing changes where it has begun already, so that a resumed one goes on."""
        if epoch != self.epoch:
            self._begin(epoch)

    def state_dict(self, rows: int | None = None) -> dict[str, Any]:
        """What `load_state_dict` needs to go on behind the last row that was given out; the same for all ranks.

        `rows`: how many rows of this epoch this rank has trained on. Needed where a loader reads ahead of the training:
        with DataLoader workers, which do in copies of this object, and with a loader that Accelerate prepared, which
        takes a batch more than it has given. A loader that asks its workers for their states, as torchdata's does,
        needs no number, and its states go on with as many workers alone.
        """
        start, done = self._passed() if rows is None else (rows, 0)
        following = self._next.mask.mask if self._next is not None else None
        return {
            **{name: getattr(self, name) for name in SAME},
            "mask": self.mask,
            "mask_fingerprint": self._opened.mask.fingerprint,
            "next_mask": following,
            "epoch": self.epoch,
            "start": start,
            "done": done,
            "workers": self._workers if done else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, by its mask. Raises `UsageError` for a state of another order."""
        other = [name for name in SAME if state[name] != getattr(self, name)]
        if other:
            found = ", ".join(f"{name} {state[name]!r}, here {getattr(self, name)!r}" for name in other)
            raise UsageError(f"the state is of another order of rows: {found}. Make the dataset as it was made then.")
        opened = open_train(self.run, state["mask"])
        if opened.mask.fingerprint != state["mask_fingerprint"]:
            raise FingerprintError(
                f"{self.run}: mask {state['mask']} is not the one that the state was made with; name that run",
                ("mask",),
            )
        self._opened = opened
        self._next = open_train(self.run, state["next_mask"]) if state["next_mask"] is not None else None
        self.epoch = state["epoch"]
        self._loaded = state["start"], state["done"], state.get("workers")
        self._start, self._done, self._workers = self._loaded

    def _passed(self) -> tuple[int, int]:
        """`_start` and `_done`, where no share is counted all of it as the first."""
        return (self._start + self._done, 0) if self._workers is None else (self._start, self._done)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows of this epoch, from the first one or where a state that was loaded goes on.

        Behind the last one the next epoch begins by itself. Raises `UsageError` with another number of workers than a
        state was made with by some.
        """
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        self._start, self._done, self._workers = self._loaded
        self._start, self._done = self._passed()
        workers = None if worker is None else count
        if self._done and workers != self._workers:
            raise UsageError(
                f"TrainDataset: the state is one of {self._workers} workers, each behind its own row, and there are"
                f" {workers or 'none'} here. Give the loader num_workers={self._workers}, or state_dict(rows=N)."
            )
        self._workers = workers
        if not self._start and not self._done:
            self._take()
        passed = 0
        for group, places in self._groups(number, count):
            skipped = min(len(places), max(0, self._done - passed))
            passed += skipped
            rows: list[TrainRow] = []
            if skipped < len(places):
                rows = [row for index in group for row in self._opened.read(self._opened.mask.shards[index])]
            for place in places[skipped:]:
                passed += 1
                self._done = passed
                yield _item(rows[place], self._opened, self.max_length)
        if worker is None:
            self._begin(self.epoch + 1)

    def _begin(self, epoch: int) -> None:
        self.epoch, self._loaded = epoch, (0, 0, None)
        self._start, self._done, self._workers = self._loaded
        self._take()

    def _take(self) -> None:
        """Bring the mask that was asked for into force."""
        if self._next is not None:
            self._opened, self._next = self._next, None

    def _groups(self, worker: int, workers: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Indices of shards that are held together, and the places in them of this worker's rows, in their order."""
        shards = self._opened.mask.shards
        draw = np.random.default_rng((self.seed, self.epoch))
        order = draw.permutation(len(shards)) if self.shuffle else np.arange(len(shards))
        before, whole = 0, len(self) * self.world
        for first in range(0, len(order), self.shards_at_once):
            group = order[first : first + self.shards_at_once]
            held = sum(shards[index].rows for index in group)
            places = draw.permutation(held) if self.shuffle else np.arange(held)
            number = before + np.arange(held)
            own = (number % self.world == self.rank) & (number < whole)
            of_rank = number // self.world - self._start
            yield group, places[own & (of_rank >= 0) & (of_rank // self.batch_size % workers == worker)]
            before += held


def _item(row: TrainRow, opened: TrainSet, max_length: int | None) -> dict[str, Any]:
    item: dict[str, Any] = {name: getattr(row, name) for name in key_columns(opened)}
    for prefix, branch in zip(opened.layout.branches, row.branches, strict=True):
        item[prefix + "input_ids"] = torch.from_numpy(branch.input_ids[:max_length].astype(np.int64))
        item[prefix + "labels"] = torch.from_numpy(branch.labels[:max_length].copy())
        item[prefix + "loss_weight"] = torch.from_numpy(branch.loss_weight[:max_length].copy())
    return item
