from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import FIELDS, value_row, value_rows

from alphatoken_curate import shards
from alphatoken_curate.atomic import KILL_AT, atomic_file, digest, one_writer, sweep
from alphatoken_curate.errors import CurateError, FingerprintError, StoredDataError, UsageError
from alphatoken_curate.fingerprint import fingerprint
from alphatoken_curate.schema import SIGNALS, TRAIN, VALUES
from alphatoken_curate.shards import Footer, TrainRows

METADATA = Footer(fields=FIELDS, facts={"note": "x"})
POINTS = ("after-temp-open", "mid-write", "after-fsync", "after-close", "after-rename")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "values" / "generation=0" / "part-00000.parquet"


def test_rows_come_back_as_they_were_written(path: Path) -> None:
    rows = value_rows(reference=False)
    shard = shards.write_values(path, rows, METADATA)
    found = shards.read(path, VALUES).to_pylist()
    for row, stored in zip(rows, found, strict=True):
        assert [stored[name] for name in ("row_id", "source", "line", "id", "status")] == [
            row.row_id, row.source, row.line, row.id, row.status,
        ]  # fmt: skip
        assert stored["input_ids"] == row.input_ids.tolist() and stored["response"] == row.response.tolist()
        for name in SIGNALS:
            signal = row.signals.get(name, np.full(len(row.input_ids) if row.signals else 0, np.nan))
            assert stored[name] == [None if np.isnan(x) else float(x) for x in signal]
    assert (shard.path, shard.rows) == ("values/generation=0/part-00000.parquet", len(rows))
    assert shard.tokens == sum(len(row.input_ids) for row in rows)
    assert shard.response_tokens == sum(int(row.response.sum()) for row in rows)
    assert (shard.bytes, shard.sha256) == digest(path)


def test_the_schema_on_disk_is_explicit_with_units_zstd_and_checksums(path: Path) -> None:
    shards.write_values(path, [value_row(0, 2, "rejected")], METADATA)  # nothing to infer types from
    assert pq.read_schema(path).equals(VALUES, check_metadata=False)
    metadata = pq.read_metadata(path)
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert metadata.row_group(0).column(0).is_stats_set
    stored = metadata.metadata
    assert stored[b"alphatoken_curate.schema_version"] == b"1"
    assert stored[b"alphatoken_curate.fingerprint"].decode() == f'"{fingerprint(FIELDS)}"'
    assert b'"nll":"nats"' in stored[b"alphatoken_curate.units"]


def test_no_rows_are_a_shard_too(path: Path) -> None:
    assert shards.write_values(path, [], METADATA).rows == 0
    assert shards.read(path, VALUES).num_rows == 0
    nothing = {"row_id": np.empty(0, np.int64), "lengths": np.empty(0, np.int64), "input_ids": np.empty(0, np.int32)}
    rows = TrainRows(**nothing, weight=np.empty(0, np.float32), value=np.empty(0, np.float32))
    shards.write_train(path, rows, METADATA)
    assert shards.read(path, TRAIN).num_rows == 0


def test_train_columns_follow_from_the_weights(path: Path) -> None:
    rows = TrainRows(
        row_id=np.array([4, 9]),
        lengths=np.array([3, 2]),
        input_ids=np.array([5, 6, 7, 8, 9], np.int32),
        weight=np.array([0, 2, 0, 0, 0.5], np.float32),
        value=np.array([np.nan, 3, 1, np.nan, 2], np.float32),
    )
    shard = shards.write_train(path, rows, METADATA)
    assert shards.read(path, TRAIN).to_pydict() == {
        "row_id": [4, 9],
        "input_ids": [[5, 6, 7], [8, 9]],
        "attention_mask": [[1, 1, 1], [1, 1]],
        "labels": [[-100, 6, -100], [-100, 9]],
        "loss_mask": [[0, 1, 0], [0, 1]],
        "loss_weight": [[0, 2, 0], [0, 0.5]],
        "value": [[None, 3, 1], [None, 2]],
    }
    assert shard.response_tokens == 3
    assert shards.read_footer(path).counts["kept_tokens"] == 2


def test_the_same_rows_give_the_same_bytes(path: Path) -> None:
    first = shards.write_values(path, value_rows(), METADATA)
    path.unlink()
    assert shards.write_values(path, value_rows(), METADATA) == first
    assert shards.write_values(path, value_rows(seed=1), METADATA).sha256 != first.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"status": "done"},
        {"status": "failed"},
        {"signals": {}},
        {"response": np.ones(8, np.bool_)},
        {"response": np.zeros(7, np.bool_)},
        {"signals": {"nll": np.zeros(8, np.float32)}},
        {"signals": {"nll": np.full(8, np.nan, np.float32)}},
        {"signals": {"loss": np.zeros(8, np.float32)}},
        {"signals": {"nll": np.zeros(7, np.float32)}},
    ],
)
def test_rows_that_contradict_themselves_are_not_written(path: Path, change: dict[str, object]) -> None:
    with pytest.raises(CurateError, match=r"row 3 \(rows\.jsonl:4\)"):
        shards.write_values(path, [replace(value_row(3, 8), **change)], METADATA)
    assert not path.exists()


def test_committed_lists_what_is_whole_and_names_what_differs(path: Path) -> None:
    assert shards.committed(path.parent, FIELDS) == {}
    second = path.with_name("part-00001.parquet")
    made = {1: shards.write_values(second, value_rows(), METADATA), 0: shards.write_values(path, [], METADATA)}
    (path.parent / ".part-00002.parquet.0123456789abcdef.tmp").write_bytes(b"PAR1")
    assert shards.committed(path.parent, FIELDS) == made
    with pytest.raises(FingerprintError) as caught:
        shards.committed(path.parent, {**FIELDS, "seed": 4, "layers": 3})
    assert caught.value.fields == ("layers", "seed") and caught.value.exit_code == 4
    assert "layers, seed" in str(caught.value)


def test_foreign_files_are_named(path: Path) -> None:
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(StoredDataError, match=r"part-00000\.parquet: not written by alphatoken-curate"):
        shards.committed(path.parent, FIELDS)
    shards.write_values(path, [], METADATA)
    with pytest.raises(StoredDataError, match="its columns are not those"):
        shards.read(path, TRAIN)
    with pytest.raises(StoredDataError, match="missing"):
        shards.read(path.with_name("part-00007.parquet"), VALUES)


def test_no_flipped_bit_is_read_in_silence(path: Path) -> None:
    shards.write_values(path, value_rows(4), METADATA)
    good, footer, data = shards.read(path, VALUES), shards.read_footer(path), path.read_bytes()
    refused = 0
    for bit in random.Random(0).sample(range(len(data) * 8), 600):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            same = shards.read(path, VALUES).equals(good) and shards.read_footer(path) == footer
            assert same, f"bit {bit} changed what was read"
        except StoredDataError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 200  # the rest lies in statistics and the like, which reading does not use


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(path: Path, share: float) -> None:
    shards.write_values(path, value_rows(), METADATA)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(StoredDataError, match=r"part-00000\.parquet: damaged"):
        shards.committed(path.parent, FIELDS)


# ------------------------------------------------------------------------------------------------------ atomic files


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_by_a_writer_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "new" / "x"
    with pytest.raises(error), atomic_file(target) as sink:
        sink.write(b"half")
        raise error
    assert list(target.parent.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    with atomic_file(target) as sink:
        sink.write(b"new")
        assert target.read_bytes() == b"old"
    assert (target.read_bytes(), sink.bytes, sink.sha256) == (b"new", *digest(target))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda p, f, m=0o777: real("/dev/full", os.O_WRONLY) if f & os.O_CREAT else real(p, f)
    )
    with pytest.raises(CurateError, match=r"No space left.*same\s+command again"):
        shards.write_values(tmp_path / "part-00000.parquet", value_rows(), METADATA)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CurateError, match="cannot be written"), atomic_file(tmp_path / "file" / "x"):
        pass


def test_sweep_takes_stale_temp_files_only(tmp_path: Path) -> None:
    (tmp_path / ".part-00000.parquet.0123456789abcdef.tmp").write_bytes(b"")
    (tmp_path / "notes.tmp").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    assert sweep(tmp_path) == 1 and sweep(tmp_path / "absent") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes.tmp"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from alphatoken_curate.atomic import one_writer\n"
        "with one_writer(pathlib.Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path)]
    with one_writer(tmp_path), pytest.raises(UsageError, match="another process"), one_writer(tmp_path):
        pass
    with one_writer(tmp_path):
        assert b"another process is writing" in subprocess.run(command, capture_output=True, check=False).stderr
    assert subprocess.run(command, check=False).returncode == 0


def test_a_writer_that_is_interrupted_leaves_no_temp_file(tmp_path: Path) -> None:
    stale = tmp_path / "artifacts" / ".run.json.0123456789abcdef.tmp"
    stale.parent.mkdir()
    with pytest.raises(KeyboardInterrupt), one_writer(tmp_path):
        stale.write_bytes(b"")  # as if the interrupt came before the writer could clear up
        raise KeyboardInterrupt
    assert not stale.exists()


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_writer_leaves_all_or_nothing(path: Path, point: str) -> None:
    code = (
        "import sys, pathlib; from small_run import value_rows; from test_shards import METADATA\n"
        "from alphatoken_curate import shards\n"
        "shards.write_values(pathlib.Path(sys.argv[1]), value_rows(), METADATA)"
    )
    searched = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, KILL_AT: point + (":3" if point == "mid-write" else ""), "PYTHONPATH": searched}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(path)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = [item.name for item in path.parent.iterdir()]
    assert path.exists() == (point == "after-rename")
    assert len(left) == 1
    whole = shards.committed(path.parent, FIELDS)
    assert sweep(path.parent) == (0 if whole else 1)
    again = path.with_name("part-00001.parquet")
    want = shards.write_values(again, value_rows(), METADATA)
    assert [replace(shard, path=want.path) for shard in whole.values()] in ([], [want])
