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
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import FIELDS, kind_of, tokens, value_row, value_rows

from alphatoken_curate.errors import CurateError, FingerprintError, StoredDataError, UsageError
from alphatoken_curate.runs import shards
from alphatoken_curate.runs.atomic import KILL_AT, atomic_file, digest, one_writer, sweep
from alphatoken_curate.runs.fingerprint import fingerprint
from alphatoken_curate.runs.records import read_records
from alphatoken_curate.runs.schema import LAYOUTS, PREFERENCE, SCHEMA_VERSION, SFT, SIGNALS, STATUSES, Layout
from alphatoken_curate.runs.shards import Branch, Footer, Shard, ValueRow

METADATA = Footer(fields=FIELDS, facts={"note": "x"})
POINTS = ("after-temp-open", "mid-write", "after-fsync", "after-close", "after-rename")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "values" / "generation=0" / "part-00000.parquet"


both_kinds = pytest.mark.parametrize("layout", [SFT, PREFERENCE], ids=lambda layout: layout.kind)


def write(path: Path, rows: list[ValueRow]) -> Shard:
    return shards.write_values(path, rows, METADATA, LAYOUTS[kind_of(rows)])


@both_kinds
def test_columns_hold_what_the_rows_do(path: Path, layout: Layout) -> None:
    rows = value_rows(reference=False, kind=layout.kind)
    shard = write(path, rows)
    found = shards.read(path, layout.values).to_pylist()
    for row, stored in zip(rows, found, strict=True):
        for name in ("row_id", "source", "line", "id", "status"):
            assert stored[name] == getattr(row, name)
        for prefix, branch in zip(layout.branches, row.branches, strict=True):
            assert stored[prefix + "input_ids"] == branch.input_ids.tolist()
            assert stored[prefix + "response"] == branch.response.tolist()
            assert stored[prefix + "end_of_turn"] == branch.end_of_turn.tolist()
            for name in SIGNALS:
                signal = branch.signals.get(name, np.full(len(branch.response) if branch.signals else 0, np.nan))
                assert stored[prefix + name] == [None if np.isnan(x) else float(x) for x in signal]
        if layout is PREFERENCE:
            assert (stored["omega"], stored["margin"]) == (row.omega, row.margin)
            assert (row.omega is None) == (row.status != "scored")
    branches = [branch for row in rows for branch in row.branches]
    assert (shard.path, shard.rows) == ("values/generation=0/part-00000.parquet", len(rows))
    assert shard.tokens == sum(len(branch.input_ids) for branch in branches)
    assert shard.response_tokens == sum(int(branch.response.sum()) for branch in branches)
    assert (shard.bytes, shard.sha256) == digest(path)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def drawn_branch(draw: st.DrawFn, status: str) -> Branch:
    length = 0 if status == "rejected" else draw(st.integers(2, 6))
    branch = tokens(draw(st.integers(0, 99)), length)
    names = draw(st.sets(st.sampled_from(SIGNALS), min_size=1)) if status == "scored" else set()
    signals = {}
    for name in names:
        drawn = draw(st.lists(FLOATS, min_size=length, max_size=length))
        signals[name] = np.where(branch.response, np.array(drawn, np.float32), np.float32(np.nan))
    return replace(branch, signals=signals)


@st.composite
def drawn_row(draw: st.DrawFn, layout: Layout) -> ValueRow:
    status = draw(st.sampled_from(STATUSES))
    pair = layout is PREFERENCE and status == "scored"
    return ValueRow(
        row_id=draw(st.integers(0, 1 << 40)),
        source=draw(st.text(st.characters(codec="utf-8"), max_size=5)),
        line=draw(st.integers(1, 1 << 40)),
        id=draw(st.none() | st.text(st.characters(codec="utf-8"), max_size=5)),
        status=status,
        branches=tuple(draw(drawn_branch(status)) for _ in layout.branches),
        omega=draw(FLOATS) if pair else None,
        margin=draw(FLOATS) if pair else None,
    )


def plain(row: ValueRow) -> tuple[object, ...]:
    """All of a row as values that can be compared, types and bits of arrays included."""
    branches = [
        [array.dtype.str + array.tobytes().hex() for array in (one.input_ids, one.response, one.end_of_turn)]
        + [f"{name} {signal.dtype.str}{signal.tobytes().hex()}" for name, signal in sorted(one.signals.items())]
        for one in row.branches
    ]
    return row.row_id, row.source, row.line, row.id, row.status, branches, row.omega, row.margin


@pytest.mark.one_in(2)
@both_kinds
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, layout: Layout, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "values" / "generation=0" / f"part-{layout.kind}.parquet"
    rows = data.draw(st.lists(drawn_row(layout), max_size=4))
    shard = shards.write_values(path, rows, METADATA, layout)
    assert [plain(row) for row in read_records(path.parents[2], shard, layout)] == [plain(row) for row in rows]


@both_kinds
def test_the_schema_on_disk_is_explicit_with_units_zstd_and_checksums(path: Path, layout: Layout) -> None:
    write(path, [value_row(0, 2, "rejected", kind=layout.kind)])  # nothing to infer types from
    assert pq.read_schema(path).equals(layout.values, check_metadata=False)
    metadata = pq.read_metadata(path)
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert metadata.row_group(0).column(0).is_stats_set
    stored = metadata.metadata
    assert stored[b"alphatoken_curate.schema_version"] == str(SCHEMA_VERSION).encode()
    assert stored[b"alphatoken_curate.fingerprint"].decode() == f'"{fingerprint(FIELDS)}"'
    assert f'"{layout.branches[-1]}nll":"nats"'.encode() in stored[b"alphatoken_curate.units"]


@both_kinds
def test_no_rows_are_a_shard_too(path: Path, layout: Layout) -> None:
    shard = shards.write_values(path, [], METADATA, layout)
    assert shard.rows == 0
    assert shards.read(path, layout.values).num_rows == 0
    assert read_records(path.parents[2], shard, layout) == []


@both_kinds
def test_the_same_rows_give_the_same_bytes(path: Path, layout: Layout) -> None:
    first = write(path, value_rows(kind=layout.kind))
    path.unlink()
    assert write(path, value_rows(kind=layout.kind)) == first
    assert write(path, value_rows(seed=1, kind=layout.kind)).sha256 != first.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"signals": {}},
        {"response": np.ones(8, np.bool_)},
        {"response": np.zeros(7, np.bool_)},
        {"end_of_turn": np.zeros(7, np.bool_)},
        {"end_of_turn": np.ones(8, np.bool_)},
        {"signals": {"nll": np.zeros(8, np.float32)}},
        {"signals": {"nll": np.full(8, np.nan, np.float32)}},
        {"signals": {"loss": np.zeros(8, np.float32)}},
        {"signals": {"nll": np.zeros(7, np.float32)}},
    ],
)
@both_kinds
def test_branches_that_contradict_themselves_are_not_written(
    path: Path, layout: Layout, change: dict[str, object]
) -> None:
    good = value_row(3, 8, kind=layout.kind)
    last = replace(value_row(3, 8).branches[0], **change)
    which = "" if layout is SFT else " rejected:"
    with pytest.raises(CurateError, match=rf"row 3 \(rows\.jsonl:4\):{which}"):
        write(path, [replace(good, branches=(*good.branches[:-1], last))])
    assert not path.exists()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sft", {"status": "done"}, "'done' is none of"),
        ("sft", {"status": "failed"}, "signals"),
        ("sft", {"branches": ()}, "0 branches; sft rows have 1"),
        ("sft", {"omega": 0.1}, "omega is 0.1"),
        ("preference", {"status": "target"}, "signals"),
        ("preference", {"omega": None}, "omega is None"),
        ("preference", {"margin": None}, "margin is None"),
        ("preference", {"margin": float("nan")}, "margin is nan"),
        ("preference", {"omega": float("inf")}, "omega is inf"),
        ("preference", {"branches": value_row(3, 8).branches}, "1 branches; preference rows have 2"),
    ],
)
def test_rows_that_contradict_themselves_are_not_written(
    path: Path, kind: str, change: dict[str, object], message: str
) -> None:
    row = replace(value_row(3, 8, kind=kind), **change)
    with pytest.raises(CurateError, match=rf"row 3 \(rows\.jsonl:4\).*{message}"):
        shards.write_values(path, [row], METADATA, LAYOUTS[kind])
    assert not path.exists()


def test_committed_lists_what_is_whole_and_names_what_differs(path: Path) -> None:
    assert shards.committed(path.parent, FIELDS) == {}
    second = path.with_name("part-00001.parquet")
    made = {1: write(second, value_rows()), 0: write(path, [])}
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
    write(path, [])
    with pytest.raises(StoredDataError, match="its columns are not those"):
        shards.read(path, SFT.train)
    with pytest.raises(StoredDataError, match="its columns are not those"):
        shards.read(path, PREFERENCE.values)
    with pytest.raises(StoredDataError, match="missing"):
        shards.read(path.with_name("part-00007.parquet"), SFT.values)


@pytest.mark.one_in(2)
@both_kinds
def test_no_flipped_bit_is_read_in_silence(path: Path, layout: Layout) -> None:
    write(path, value_rows(4, kind=layout.kind))
    good, footer, data = shards.read(path, layout.values), shards.read_footer(path), path.read_bytes()
    refused = 0
    for bit in random.Random(0).sample(range(len(data) * 8), 500):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            same = shards.read(path, layout.values).equals(good) and shards.read_footer(path) == footer
            assert same, f"bit {bit} changed what was read"
        except StoredDataError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 150  # the rest lies in statistics and the like, which reading does not use


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(path: Path, share: float) -> None:
    write(path, value_rows())
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
        write(tmp_path / "part-00000.parquet", value_rows())


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CurateError, match="x: File exists; a file lies where a folder"),
        atomic_file(tmp_path / "file" / "x"),
    ):
        pass


def test_sweep_takes_stale_temp_files_only(tmp_path: Path) -> None:
    (tmp_path / ".part-00000.parquet.0123456789abcdef.tmp").write_bytes(b"")
    (tmp_path / "notes.tmp").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    assert sweep(tmp_path) == 1 and sweep(tmp_path / "absent") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes.tmp"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from alphatoken_curate.runs.atomic import one_writer\n"
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


@pytest.mark.one_in(5)
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_writer_leaves_all_or_nothing(path: Path, point: str) -> None:
    code = (
        "import sys, pathlib; from small_run import value_rows; from test_shards import write\n"
        "write(pathlib.Path(sys.argv[1]), value_rows())"
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
    want = write(again, value_rows())
    assert [replace(shard, path=want.path) for shard in whole.values()] in ([], [want])
