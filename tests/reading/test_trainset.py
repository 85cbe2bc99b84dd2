"""Rows of a mask as trainers see them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_run import published, small_run

from alphatoken_curate import mask
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.reading.trainset import open_train
from alphatoken_curate.runs.schema import LAYOUTS


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rows_are_those_of_the_files(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path / "run", kind=kind)
    opened = open_train(run)
    stored = [row for shard in opened.mask.shards for row in pq.read_table(run / shard.path).to_pylist()]
    assert len(opened.mask.shards) > 1 and stored
    for found, row in zip(opened.rows(), stored, strict=True):
        assert found.row_id == row["row_id"]
        for branch, prefix in zip(found.branches, LAYOUTS[kind].branches, strict=True):
            assert branch.input_ids.tolist() == row[f"{prefix}input_ids"]
            assert branch.labels.tolist() == row[f"{prefix}labels"]
            assert branch.loss_weight.tolist() == row[f"{prefix}loss_weight"]


def test_a_mask_made_later_does_not_change_an_open_set(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    opened = open_train(run)
    before = [row.loss_weight.tolist() for found in opened.rows() for row in found.branches]
    mask(run, published(keep="0.1"))
    assert [row.loss_weight.tolist() for found in opened.rows() for row in found.branches] == before
    assert open_train(run).mask.mask > opened.mask.mask
    assert open_train(run, opened.mask.mask).mask == opened.mask


def test_what_is_not_there_or_damaged_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    with pytest.raises(UsageError, match="has no mask 9"):
        open_train(run, 9)
    opened = open_train(run)
    path = run / opened.mask.shards[0].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(StoredDataError, match=rf"{path.name}: damaged"):
        next(opened.rows())
    path.write_bytes(bytes([whole[0], whole[1], whole[2], whole[3], whole[4] ^ 1]) + whole[5:])
    with pytest.raises(StoredDataError, match=path.name):
        next(opened.rows())
