from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from small_run import small_run, value_rows, write_generation

from alphatoken_curate import manifest, shards
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.remask import make_mask
from alphatoken_curate.scan import scan, scan_tokens
from alphatoken_curate.schema import SIGNALS, TRAIN, VALUES


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "a [1]*")  # a name that would be a pattern


def weights(run: Path, mask: int) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for path in shards.listed(shards.train_folder(run, mask)).values():
        table = shards.read(path, TRAIN)
        found |= dict(zip(table["row_id"].to_pylist(), table["loss_weight"].to_pylist(), strict=True))
    return found


def plain_tokens(run: Path, mask: int) -> list[dict[str, Any]]:
    """The same table by loops over the rows that were written."""
    stored = weights(run, mask)
    found = []
    for row in value_rows():
        for i in np.flatnonzero(row.response) if row.status == "scored" else ():
            token = {"row_id": row.row_id, "position": int(i), "token_id": int(row.input_ids[i])}
            token |= {"text": f"<{row.input_ids[i]}>", **{name: float(row.signals[name][i]) for name in SIGNALS}}
            weight = stored[row.row_id][i]
            found.append({**token, "kept": weight > 0, "loss_weight": weight})
    return found


def test_scan_gives_the_shards_in_order(run: Path) -> None:
    values = scan(run).collect()
    assert values["row_id"].to_list() == list(range(12))
    assert values.columns == VALUES.names
    train = scan(str(run), "train").collect()
    assert train.columns == TRAIN.names
    assert dict(zip(train["row_id"], train["loss_weight"].to_list(), strict=True)) == weights(run, 0)


def test_scan_tokens_is_what_loops_give(run: Path) -> None:
    make_mask(run, MaskConfig(keep=0.3, weights="rank"))
    for mask, newest in ((0, False), (1, True)):
        frame = scan_tokens(run, mask=None if newest else mask)
        want = plain_tokens(run, mask)
        for engine in ("streaming", "in-memory"):
            assert frame.collect(engine=engine).to_dicts() == want  # type: ignore[call-overload]
    assert frame.collect_schema() == {
        "row_id": pl.Int64, "position": pl.Int32, "token_id": pl.Int32, "text": pl.String,
        **dict.fromkeys(SIGNALS, pl.Float32), "kept": pl.Boolean, "loss_weight": pl.Float32,
    }  # fmt: skip


def test_without_mask_vocabulary_or_reference_the_columns_stay(tmp_path: Path) -> None:
    run = tmp_path / "a"
    write_generation(run, value_rows(reference=False))
    manifest.write(run, manifest.rebuild(run))
    frame = scan_tokens(run).collect()
    assert frame.schema == scan_tokens(small_run(tmp_path / "b")).collect_schema()
    assert frame.height == sum(int(row.response.sum()) for row in value_rows() if row.status == "scored")
    for name in ("text", "kept", "loss_weight", "reference_nll"):
        assert frame[name].null_count() == frame.height


def test_only_what_the_manifest_names_is_read(run: Path) -> None:
    before = scan(run, "train").collect()
    folder = run / "train/mask=0000"
    shutil.copy(folder / "part-00000.parquet", folder / "part-00003.parquet")
    shutil.copytree(folder, run / "train/mask=0007")
    assert_frame_equal(scan(run, "train").collect(), before)


def test_a_run_that_is_not_whole_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StoredDataError, match=r"manifest\.json: missing"):
        scan(tmp_path)
    path = run / "values/generation=0/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoredDataError, match=r"part-00001\.parquet: missing or not"):
        scan_tokens(run)


def test_numbers_that_are_not_there_are_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="has no generation 4; it has 0"):
        scan(run, generation=4)
    with pytest.raises(UsageError, match="has no mask 1; it has 0"):
        scan_tokens(run, mask=1)
    with pytest.raises(UsageError, match="give `values` or `train`"):
        scan(run, "tokens")  # type: ignore[arg-type]


def test_a_run_before_its_first_mask_has_no_train(tmp_path: Path) -> None:
    write_generation(tmp_path, value_rows())
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    with pytest.raises(UsageError, match="has no mask; run the `mask` command"):
        scan(tmp_path, "train")


def test_generations_are_told_apart(run: Path) -> None:
    write_generation(run, value_rows(seed=1), number=1)
    manifest.write(run, manifest.rebuild(run))
    assert not scan(run).select("nll").collect().equals(scan(run, generation=0).select("nll").collect())
