"""Rows of a mask as datasets: their order, ranks, workers, and going on to the row."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hand import sft_loss, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import published, small_run, value_row
from torch.utils.data import DataLoader
from trainer_runs import tiny

from alphatoken_curate import mask
from alphatoken_curate.errors import FingerprintError, StoredDataError, UsageError
from alphatoken_curate.trainers import TrainDataset, WeightedCollator, as_dataset, weighted_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),  # workers of loaders
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more of them than cores
]

COUNT = 23


def made(folder: Path, kind: str = "sft", count: int = COUNT) -> Path:
    rows = [value_row(i, 3 + (i * 5) % 9, kind=kind) for i in range(count)]
    return small_run(folder, rows, kind=kind, config=published(weights="rank"), per_shard=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("run") / "run")


@contextmanager
def in_worker(number: int | None, count: int) -> Iterator[None]:
    """As in one of the workers of a loader; None: outside of them."""
    info = None if number is None else mock.Mock(id=number, num_workers=count)
    with mock.patch("alphatoken_curate.trainers.dataset.get_worker_info", return_value=info):
        yield


def seen(data: Any) -> list[int]:
    return [item["row_id"] for item in data]


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_rows_are_those_of_the_files(tmp_path: Path, kind: str) -> None:
    run = made(tmp_path / "run", kind)
    rows = stored(run, 0)
    branches = ("",) if kind == "sft" else ("chosen_", "rejected_")
    names = [branch + name for branch in branches for name in ("input_ids", "labels", "loss_weight")]
    whole = as_dataset(run)
    assert whole.column_names == ["row_id", *names]
    assert whole[:] == {name: [row[name] for row in rows] for name in ["row_id", *names]}
    for item, row in zip(TrainDataset(run, shuffle=False), rows, strict=True):
        assert list(item) == ["row_id", *names]
        assert {name: one.tolist() for name, one in item.items() if name != "row_id"} == {n: row[n] for n in names}
        assert all(item[n].dtype == (torch.float32 if n.endswith("weight") else torch.int64) for n in names)


def test_lists_are_cut_alike(run: Path) -> None:
    rows = {row["row_id"]: row for row in stored(run, 0)}
    for data in (as_dataset(run, max_length=5), TrainDataset(run, max_length=5)):
        for item in data:
            for name in ("input_ids", "labels", "loss_weight"):
                assert list(item[name]) == rows[int(item["row_id"])][name][:5]


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(run: Path) -> None:
    data = TrainDataset(run, seed=3, shards_at_once=2)
    orders = []
    for epoch in range(3):
        data.set_epoch(epoch)
        orders.append(seen(data))
        assert sorted(orders[-1]) == list(range(COUNT)) and len(data) == COUNT
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])
    assert seen(TrainDataset(run, seed=3, shards_at_once=2)) == orders[0]
    assert seen(TrainDataset(run, seed=4, shards_at_once=2)) != orders[0]
    # Without being told, the next pass is the next epoch.
    again = TrainDataset(run, seed=3, shards_at_once=2)
    assert [seen(again), seen(again)] == orders[:2] and again.epoch == 2


def test_no_more_shards_are_held_than_said(run: Path) -> None:
    """Rows that come together are of that many shards."""
    for shards, limit in ((1, 1), (3, 3)):
        order = seen(TrainDataset(run, shards_at_once=shards))
        for first in range(0, COUNT, 4 * shards):
            together = {row_id // 4 for row_id in order[first : first + 4 * shards]}
            assert len(together) <= limit + 1  # the last shard is shorter, and may come first


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_the_rows_out(run: Path, world: int) -> None:
    left_out = set()
    for epoch in range(4):
        parts = []
        for rank in range(world):
            data = TrainDataset(run, rank=rank, world=world)
            data.set_epoch(epoch)
            parts.append(seen(data))
        assert {len(part) for part in parts} == {COUNT // world}
        joined = [row for part in parts for row in part]
        assert len(set(joined)) == len(joined)
        left_out |= set(range(COUNT)) - set(joined)
    assert len(left_out) > COUNT % world or COUNT % world == 0  # other rows each time


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_with_any_number_of_workers(run: Path, workers: int) -> None:
    def loader(count: int) -> DataLoader[Any]:
        data = TrainDataset(run, batch_size=2, rank=1, world=2)
        return DataLoader(data, batch_size=2, num_workers=count, collate_fn=WeightedCollator())

    for found, wanted in zip(loader(workers), loader(0), strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@given(st.integers(0, COUNT), st.integers(1, 3), st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=25)
def test_a_resumed_epoch_goes_on_at_the_next_row(run: Path, stop: int, world: int, batch: int, shuffle: bool) -> None:
    def dataset() -> TrainDataset:
        return TrainDataset(run, seed=1, shuffle=shuffle, rank=world - 1, world=world, batch_size=batch)

    data = dataset()
    data.set_epoch(5)
    whole = seen(data)
    data.set_epoch(5)
    stop = min(stop, len(whole))
    rows = iter(data)
    before = [next(rows)["row_id"] for _ in range(stop)]
    later = dataset()
    later.load_state_dict(data.state_dict())
    later.set_epoch(5)
    assert before + seen(later) == whole
    told = dataset()
    told.set_epoch(5)
    told.load_state_dict(told.state_dict(rows=stop))
    assert before + seen(told) == whole
    # Resumed twice, the second time within what the first left.
    if stop + 2 <= len(whole):
        third = dataset()
        third.load_state_dict({**data.state_dict(), "start": 0, "done": stop})
        more = iter(third)
        next(more)
        fourth = dataset()
        fourth.load_state_dict(third.state_dict())
        assert seen(fourth) == whole[stop + 1 :]


def test_a_state_at_the_end_is_the_beginning_of_the_next_epoch(run: Path) -> None:
    data = TrainDataset(run)
    seen(data)
    later = TrainDataset(run)
    later.load_state_dict(data.state_dict())
    data.set_epoch(1)
    assert later.epoch == 1 and seen(later) == seen(data)


def test_workers_states_go_on_too(run: Path) -> None:
    """As torchdata's loader does: each worker's own copy gives its state, and takes it."""

    def copies(states: list[dict[str, Any]] | None, take: int) -> tuple[list[list[int]], list[dict[str, Any]]]:
        found, kept = [], []
        for number in range(2):
            data = TrainDataset(run, batch_size=3)
            if states:
                data.load_state_dict(states[number])
            with in_worker(number, 2):
                rows = iter(data)
                got = [item["row_id"] for _, item in zip(range(take), rows, strict=False)]
            found.append(got)
            kept.append(data.state_dict())
        return found, kept

    whole, _ = copies(None, COUNT)
    first, states = copies(None, 4)
    rest, _ = copies(states, COUNT)
    assert [a + b for a, b in zip(first, rest, strict=True)] == whole
    assert sorted(row for part in whole for row in part) == list(range(COUNT))


def test_another_mask_comes_with_the_next_epoch(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    data = TrainDataset(run)
    rows = iter(data)
    next(rows)
    mask(run, published(keep=0.2))
    data.use_mask()
    assert data.mask == 0
    state = data.state_dict()
    first = {row["row_id"]: row["loss_weight"] for row in stored(run, 0)}
    assert all(item["loss_weight"].tolist() == first[item["row_id"]] for item in rows)
    second = {row["row_id"]: row["loss_weight"] for row in stored(run, 1)}
    assert data.mask == 1 and first != second
    assert all(item["loss_weight"].tolist() == second[item["row_id"]] for item in data)
    # Resumed before the swap: the rest of the epoch by the old mask, the next one by the new.
    later = TrainDataset(run)
    assert later.mask == 1
    later.load_state_dict(state)
    assert later.mask == 0 and all(item["loss_weight"].tolist() == first[item["row_id"]] for item in later)
    assert later.mask == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_mask_made_behind_an_epoch_trains_the_next_one(tmp_path: Path, workers: int) -> None:
    """The loop of sample_data/README.md. Without workers the next epoch has begun by then, and given nothing out."""
    run = made(tmp_path / "run")
    data = TrainDataset(run, 0, batch_size=2)
    mask(run, published(keep=0.9))
    data.use_mask()  # before the first one, too
    loader = DataLoader(data, batch_size=2, collate_fn=lambda items: items, num_workers=workers)
    for epoch in range(3):
        data.set_epoch(epoch)
        in_force = {row["row_id"]: row["loss_weight"] for row in stored(run, epoch + 1)}
        given = {item["row_id"]: item["loss_weight"].tolist() for batch in loader for item in batch}
        assert given == in_force
        mask(run, published(keep=(0.6, 0.3, 0.1)[epoch]))
        data.use_mask()
        if epoch < 2:  # a state that is saved here goes on by it too
            later = TrainDataset(run, 0, batch_size=2)
            later.load_state_dict(data.state_dict(rows=COUNT if workers else None))
            later.set_epoch(epoch + 1)
            newest = {row["row_id"]: row["loss_weight"] for row in stored(run, epoch + 2)}
            assert newest != in_force and {item["row_id"]: item["loss_weight"].tolist() for item in later} == newest


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_state_made_without_workers_goes_on_with_any_number(run: Path, workers: int) -> None:
    data = TrainDataset(run, batch_size=2)
    whole = seen(TrainDataset(run, batch_size=2))
    rows = iter(data)
    assert [next(rows)["row_id"] for _ in range(8)] == whole[:8]
    later = TrainDataset(run, batch_size=2)
    later.load_state_dict(data.state_dict())
    loader = DataLoader(later, batch_size=2, collate_fn=lambda items: items, num_workers=workers)
    assert [item["row_id"] for batch in loader for item in batch] == whole[8:]


def test_a_state_of_workers_goes_on_with_as_many_alone(run: Path) -> None:
    with in_worker(0, 2):
        data = TrainDataset(run, batch_size=3)
        rows = iter(data)
        first = [next(rows)["row_id"] for _ in range(4)]
        state = data.state_dict()
    for number, count in ((0, 1), (0, 3), (None, 0)):
        later = TrainDataset(run, batch_size=3)
        later.load_state_dict(state)
        with in_worker(number, count), pytest.raises(UsageError, match=r"one of 2 workers.*num_workers=2"):
            next(iter(later))
    later = TrainDataset(run, batch_size=3)
    later.load_state_dict(state)
    with in_worker(0, 2):
        assert not set(seen(later)) & set(first)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", ["v[1]", "a*b", "q?x", "lr=[1e-4]", "[!a]", "x{1,2}"])
def test_a_folder_whose_name_is_a_pattern_is_read_itself(tmp_path: Path, name: str) -> None:
    for other in ("v1", "ab", "aab", "qax", "lr=1", "b", "x1"):
        made(tmp_path / other, count=9)
    run = made(tmp_path / name, count=5)
    assert as_dataset(run)[:]["input_ids"] == [row["input_ids"] for row in stored(run, 0)]
    assert len(as_dataset(run)) == 5


def test_a_run_that_was_made_anew_at_the_same_time_is_read_anew(tmp_path: Path) -> None:
    """As an image or an unpacked archive is, whose files all have one time."""
    for weights in ("rank", "binary"):
        shutil.rmtree(tmp_path, ignore_errors=True)
        run = small_run(tmp_path / "run", config=published(keep=0.5, weights=weights))
        for path in run.rglob("*"):
            os.utime(path, (1.7e9, 1.7e9))
        assert as_dataset(run)["loss_weight"][:] == [row["loss_weight"] for row in stored(run, 0)]
    copies = {file["filename"] for file in as_dataset(run).cache_files}
    assert copies == {file["filename"] for file in as_dataset(run).cache_files}  # none is made at each call


def test_what_does_not_go_together_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rank 2 of world 2"):
        TrainDataset(run, rank=2, world=2)
    for wrong in (-1, 0, 1):
        for kind in (as_dataset, TrainDataset):
            with pytest.raises(UsageError, match=f"max_length {wrong}: give at least 2"):
                kind(run, max_length=wrong)
    with pytest.raises(UsageError, match="takes :: for a chain"):
        as_dataset(made(tmp_path / "a::b"))
    with pytest.raises(UsageError, match="has no mask 4"):
        TrainDataset(run, 4)
    with pytest.raises(UsageError, match="has no mask 4"):
        TrainDataset(run).use_mask(4)
    with pytest.raises(UsageError, match="seed 1, here 0"):
        TrainDataset(run).load_state_dict(TrainDataset(run, seed=1).state_dict())
    other = made(tmp_path / "other", count=9)
    with pytest.raises(FingerprintError, match="mask 0 is not the one"):
        TrainDataset(other).load_state_dict(TrainDataset(run).state_dict())


def test_a_damaged_or_empty_mask_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    path = sorted((run / "train" / "mask=0000").iterdir())[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(StoredDataError, match=path.name):
        as_dataset(run)
    with pytest.raises(StoredDataError, match=path.name):
        list(TrainDataset(run))
    nothing = small_run(tmp_path / "nothing", [value_row(0, 4, "failed")])
    with pytest.raises(UsageError, match="no row to train on"):
        as_dataset(nothing)
    assert list(TrainDataset(nothing)) == []


def test_a_plain_loop_has_the_loss_by_hand(run: Path) -> None:
    model = tiny()
    data = TrainDataset(run, batch_size=COUNT)
    (batch,) = DataLoader(data, batch_size=COUNT, collate_fn=WeightedCollator())
    labels, weight = batch.pop("labels"), batch.pop("loss_weight")
    found = weighted_loss(model(**batch).logits, labels, weight)
    assert abs(found.item() - sft_loss(model, stored(run, 0), "count").item()) < 1e-6


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_only_looked_into_is_whole(run: Path, workers: int) -> None:
    data = TrainDataset(run, batch_size=2)
    loader = DataLoader(data, batch_size=2, collate_fn=lambda items: items, num_workers=workers)
    first = next(iter(loader))
    whole = [item["row_id"] for batch in loader for item in batch]
    assert sorted(whole) == list(range(COUNT)) and [item["row_id"] for item in first] == whole[:2]
    data.set_epoch(0)
    # What was loaded stays where it is, however often it is looked into.
    data.load_state_dict(TrainDataset(run, batch_size=2).state_dict(rows=8))
    assert [item["row_id"] for item in next(iter(loader))] == whole[8:10]
    assert [item["row_id"] for batch in loader for item in batch] == whole[8:]
