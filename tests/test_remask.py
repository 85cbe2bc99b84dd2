from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from small_run import small_run, value_row, value_rows, write_generation

from alphatoken_curate import manifest, shards
from alphatoken_curate.atomic import KILL_AT
from alphatoken_curate.config import MaskConfig, ScoreConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.remask import make_mask, spreads
from alphatoken_curate.schema import TRAIN
from alphatoken_curate.verify import verify

RANK = MaskConfig(keep=0.3, weights="rank", scope="batch:2")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "a")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored_weights(run: Path, mask: int = 0) -> list[list[float]]:
    tables = [shards.read(path, TRAIN) for path in shards.listed(shards.train_folder(run, mask)).values()]
    return [row for table in tables for row in table["loss_weight"].to_pylist()]


def test_the_stored_mask_is_the_top_half_by_value_of_scored_rows(run: Path) -> None:
    scored = [row for row in value_rows() if row.status == "scored"]
    value = [row.signals["value"] for row in scored]
    ranked = sorted((v for row in value for v in row[~np.isnan(row)]), reverse=True)
    threshold = ranked[-(-len(ranked) // 2) - 1]
    want = [(np.nan_to_num(row, nan=-np.inf) >= threshold) for row in value]
    for row, kept in zip(value, want, strict=True):
        if not kept.any():
            kept[np.nanargmax(row)] = True
    assert [[w > 0 for w in row] for row in stored_weights(run)] == [row.tolist() for row in want]
    stored = pl.concat(
        [pl.DataFrame(shards.read(path, TRAIN)) for path in shards.listed(run / "train/mask=0000").values()]
    )
    assert stored["row_id"].to_list() == [row.row_id for row in scored]
    assert stored["value"].to_list() == [[None if np.isnan(x) else float(x) for x in row] for row in value]
    assert stored["labels"].to_list() == [
        np.where(kept, row.input_ids, -100).tolist() for row, kept in zip(scored, want, strict=True)
    ]


def test_a_shard_without_scored_rows_is_written_all_the_same(tmp_path: Path) -> None:
    rows = [value_row(0, 4), value_row(1, 0, "rejected"), value_row(2, 6)]
    run = small_run(tmp_path, rows, per_shard=1)
    assert [shard.rows for shard in manifest.read(run).masks[0].shards] == [1, 0, 1]
    assert verify(run) == []


def test_the_same_settings_are_a_no_op(run: Path) -> None:
    first = make_mask(run, RANK)
    before = contents(run)
    again = make_mask(run, replace(RANK, seed=99))  # the seed matters to `random` alone
    assert (first.created, again.created) == (True, False)
    assert replace(again, created=True) == first
    assert contents(run) == before
    old = make_mask(run, MaskConfig())
    assert (old.mask, old.created, old.newest) == (0, False, False)


@pytest.mark.parametrize(
    "config",
    [
        MaskConfig(keep=0.4),
        MaskConfig(keep="positive"),
        MaskConfig(scope="row"),
        MaskConfig(weights="relu"),
        MaskConfig(by="nll"),
        MaskConfig(stability_weight=0),
        MaskConfig(stability_scale="rms"),
        MaskConfig(allow_empty_rows=True),
        MaskConfig(by="random", seed=1),
    ],
)
def test_other_settings_are_another_mask(run: Path, config: MaskConfig) -> None:
    before = contents(run / "train")
    made = make_mask(run, config)
    assert (made.mask, made.created, made.path.name) == (1, True, "mask=0001")
    assert {name: data for name, data in contents(run / "train").items() if "mask=0000" in name} == before
    assert make_mask(run, config).created is False
    kept = sum(weight > 0 for row in stored_weights(run, 1) for weight in row)
    assert kept == made.kept_tokens


def test_a_seed_makes_another_random_mask(run: Path) -> None:
    one, two = (make_mask(run, MaskConfig(by="random", seed=seed)) for seed in (1, 2))
    assert (one.mask, two.mask) == (1, 2)
    assert stored_weights(run, 1) != stored_weights(run, 2)


def test_score_settings_serve_as_mask_settings(run: Path) -> None:
    assert make_mask(run, ScoreConfig(data=("rows.jsonl",))).created is False


def test_a_new_generation_makes_a_new_mask(run: Path) -> None:
    write_generation(run, value_rows(seed=1), number=1)
    manifest.write(run, manifest.rebuild(run))
    made = make_mask(run, MaskConfig())
    assert made.mask == 1 and manifest.read(run).masks[1].generations == (1,)


@pytest.mark.parametrize(
    "point", ["after-temp-open", "mid-write:9", "after-close:2", "after-rename", "after-rename:2", "before-manifest",
              "after-fsync:4", "after-rename:4"],
)  # fmt: skip
def test_a_killed_mask_is_finished_with_the_same_bytes(run: Path, tmp_path: Path, point: str) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    make_mask(whole, RANK)
    code = (
        "import sys, pathlib; from test_remask import RANK; from alphatoken_curate.remask import make_mask\n"
        "make_mask(pathlib.Path(sys.argv[1]), RANK)"
    )
    searched = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, KILL_AT: point, "PYTHONPATH": searched}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(run)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    made = make_mask(run, RANK)
    assert made.mask == 1
    assert contents(run) == contents(whole)


def test_a_begun_mask_of_other_settings_is_not_touched(run: Path) -> None:
    make_mask(run, RANK)
    (run / "train/mask=0001/part-00002.parquet").unlink()
    manifest.write(run, manifest.rebuild(run))
    before = contents(run / "train")
    made = make_mask(run, MaskConfig(keep=0.1))
    assert made.mask == 2
    assert before.items() <= contents(run / "train").items()


def test_a_lost_shard_of_a_mask_is_made_again(run: Path) -> None:
    before = contents(run)
    (run / "train/mask=0000/part-00001.parquet").unlink()
    made = make_mask(run, MaskConfig())
    assert made.created and made.mask == 0
    assert contents(run) == before


def test_settings_that_cannot_be_used_change_nothing(run: Path) -> None:
    before = contents(run)
    for config in (MaskConfig(by="nope"), MaskConfig(by="nll/0"), MaskConfig(by="nll +")):
        with pytest.raises(UsageError):
            make_mask(run, config)
    assert contents(run) == before


def test_a_run_without_reference_says_so(tmp_path: Path) -> None:
    run = small_run(tmp_path, value_rows(reference=False))
    with pytest.raises(UsageError, match="--reference"):
        make_mask(run, MaskConfig(by="nll - reference_nll"))


def test_values_that_are_not_the_manifests_are_refused(run: Path) -> None:
    path = run / "values/generation=0/part-00001.parquet"
    good = path.read_bytes()
    for content in (
        (run / "values/generation=0/part-00000.parquet").read_bytes(),
        good[:-1],
        bytes([good[0] ^ 1]) + good[1:],
    ):
        path.write_bytes(content)
        with pytest.raises(StoredDataError, match=r"part-00001\.parquet"):
            make_mask(run, RANK)
    path.unlink()
    with pytest.raises(StoredDataError, match="missing"):
        make_mask(run, RANK)


def test_what_stability_changed(run: Path) -> None:
    found = spreads(run, MaskConfig())
    scored = [row for row in value_rows() if row.status == "scored"]
    direct = np.concatenate([row.signals["stab_direct"][row.response] for row in scored])
    assert found.components["stab_direct"] == pytest.approx(np.sqrt(np.mean(direct.astype(float) ** 2)))
    assert found.response_tokens == len(direct)
    make_mask(run, MaskConfig(stability_weight=0))
    changed = [(a > 0) != (b > 0) for x, y in zip(stored_weights(run, 0), stored_weights(run, 1), strict=True)
               for a, b in zip(x, y, strict=True)]  # fmt: skip
    assert found.decisions_changed == sum(changed) > 0
    assert spreads(run, MaskConfig(by="nll")).decisions_changed == 0
