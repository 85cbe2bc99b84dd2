"""Reading: every kind of file, every shape of row, and every fault kept within its own row."""

from __future__ import annotations

import datetime
import decimal
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from small_run import small_run
from tiny_files import write_jsonl

from alphatoken_curate import export
from alphatoken_curate.errors import InputError
from alphatoken_curate.rows import containers
from alphatoken_curate.rows.fields import BRANCHES
from alphatoken_curate.rows.files import anywhere, find_files
from alphatoken_curate.rows.read import BadRow, ReadRows, RowStream, grouped, kind_of, read_rows, refuse, rows_of
from alphatoken_curate.rows.shapes import Messages, Pair, Passage, Prompt, PromptCompletion, Tokens

GOOD = {"prompt": "1 + 1 =", "completion": " 2"}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "jsonl": lambda data: data,
    "jsonl.gz": gzip.compress,
    "jsonl.zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def line(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def read(folder: Path, data: bytes, suffix: str = "jsonl") -> ReadRows:
    path = folder / f"data.{suffix}"
    path.write_bytes(PACK[suffix](data))
    return read_rows([str(path)])


def one(folder: Path, record: Any) -> Any:
    """The record of a single row, or its BadRow."""
    result = read(folder, line(record))
    return result.rows[0].record if result.rows else result.bad[0]


BAD_LINES = {
    "cut object": (b'{"prompt": "a", "compl', "invalid_json"),
    "invalid UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "invalid_utf8"),
    "null prompt": (b'{"prompt": null, "completion": "b"}', "null_field"),
    "missing prompt": (b'{"completion": "b"}', "unknown_shape"),
    "wrong type": (b'{"prompt": 3, "completion": "b"}', "wrong_type"),
    "array": (b'["a", "b"]', "not_an_object"),
    "duplicate key": (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "duplicate_key"),
    "nested duplicate key": (b'{"messages": [{"role": "user", "role": "user"}]}', "duplicate_key"),
    "NaN": (b'{"prompt": "a", "completion": "b", "score": NaN}', "not_a_number"),
    "lone surrogate": (b'{"prompt": "\\ud83d", "completion": "b"}', "lone_surrogate"),
    "two objects": (line(GOOD).strip() + b" " + line(GOOD).strip(), "two_values"),
    "large integer": (b'{"prompt": "a", "completion": "b", "id": 18446744073709551617}', "integer_too_large"),
    "huge integer": (b'{"prompt": "a", "completion": "b", "id": ' + b"9" * 5000 + b"}", "integer_too_large"),
    "nesting": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
    "control character": (b'{"prompt": "a\x00", "completion": "b"}', "invalid_json"),
    "binary": (b"\x00\x01\x02\x80", "invalid_utf8"),
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_touches_no_other(tmp_path: Path, case: str, suffix: str) -> None:
    bad_line, reason = BAD_LINES[case]
    good = [line({**GOOD, "id": i}) for i in range(20)]
    result = read(tmp_path, b"".join(good[:10]) + bad_line + b"\n" + b"".join(good[10:]), suffix)
    assert [(bad.row_id, bad.source, bad.line, bad.reason) for bad in result.bad] == [
        (10, f"data.{suffix}", 11, reason)
    ]
    assert [(row.row_id, row.line, row.id) for row in result.rows] == [
        (i + (i >= 10), i + 1 + (i >= 10), str(i)) for i in range(20)
    ]
    assert len(result.bad[0].excerpt) <= 200
    assert result.bad[0].excerpt.isprintable()


@pytest.mark.parametrize("suffix", PACK)
def test_last_line_cut_and_last_line_without_end(tmp_path: Path, suffix: str) -> None:
    cut = read(tmp_path, line(GOOD) + line(GOOD)[:-5], suffix)
    assert (len(cut.rows), [bad.line for bad in cut.bad]) == (1, [2])
    whole = read(tmp_path, line(GOOD) + line(GOOD)[:-1], suffix)
    assert (len(whole.rows), whole.bad) == (2, [])


@pytest.mark.parametrize("suffix", PACK)
def test_an_empty_file_has_no_rows_and_empty_input_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(PACK[suffix](b""))
    with pytest.raises(InputError, match="No row in"):
        read_rows([str(tmp_path)])
    (tmp_path / "b.jsonl").write_bytes(line(GOOD))
    result = read_rows([str(tmp_path)])
    assert [file.source for file in result.files] == [f"a.{suffix}", "b.jsonl"]
    assert len(result.rows) == 1


def test_line_ends_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    data = (
        b"\xef\xbb\xbf" + line(GOOD).replace(b"\n", b"\r\n") + b"\r\n \n\n" + line(GOOD) + b"\xef\xbb\xbf" + line(GOOD)
    )
    result = read(tmp_path, data)
    assert [row.line for row in result.rows] == [1, 5]
    assert [(bad.row_id, bad.line) for bad in result.bad] == [(2, 6)]


def test_a_million_empty_lines_do_not_take_long(tmp_path: Path) -> None:
    start = time.monotonic()
    assert read(tmp_path, b"\n" * 1_000_000 + line(GOOD)).rows[0].line == 1_000_001
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("suffix", PACK)
def test_a_line_that_is_too_long(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(containers, "CHUNK_BYTES", 64)
    fits = line({**GOOD, "x": "y" * (100 - len(line({**GOOD, "x": ""})) + 1)})
    assert len(fits) == 101
    result = read(tmp_path, line(GOOD) + line({**GOOD, "x": "y" * 500}) + fits + line(GOOD), suffix)
    assert [row.line for row in result.rows] == [1, 3, 4]
    assert [(bad.line, bad.reason) for bad in result.bad] == [(2, "line_too_long")]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_bomb_is_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_RATIO_FLOOR_BYTES", 2**20)
    bomb = line(GOOD) + b" " * 2**24
    with pytest.raises(InputError, match=rf"data\.{suffix}: .*decompression bomb"):
        read(tmp_path, bomb, suffix)
    monkeypatch.setattr(containers, "MAX_DATA_BYTES", 100)
    with pytest.raises(InputError, match=r"stored bytes hold \d+ or more"):
        read(tmp_path, line(GOOD) * 100, "jsonl")


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("fault", ["torn", "flipped"])
def test_a_torn_or_damaged_archive_is_refused_by_name(tmp_path: Path, suffix: str, fault: str) -> None:
    records = b"".join(line({**GOOD, "id": i}) for i in range(1000))
    data = gzip.compress(records) if suffix == "jsonl.gz" else _zstd(records)
    broken = data[: len(data) // 2] if fault == "torn" else data[:200] + bytes([data[200] ^ 8]) + data[201:]
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(broken)
    with pytest.raises(InputError, match=r"data\..*torn or damaged"):
        read_rows([str(path)])


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def test_archives_of_several_members(tmp_path: Path) -> None:
    for suffix in ("jsonl.gz", "jsonl.zst"):
        parts = PACK[suffix](line(GOOD)) + PACK[suffix](line(GOOD) + line(GOOD)[:-1])
        (tmp_path / f"data.{suffix}").write_bytes(parts)
        assert len(read_rows([str(tmp_path / f"data.{suffix}")]).rows) == 3


def _skipped(content: bytes, number: int = 0) -> bytes:
    """A skippable frame of Zstandard, of which there are 16 kinds."""
    return (0x184D2A50 + number).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content


_ROWS = [line({**GOOD, "id": number}) for number in range(4)]
FRAMES = {
    "skipped first": [_skipped(b"made by pzstd"), _zstd(_ROWS[0] + _ROWS[1])],
    "of every kind": [part for n in range(16) for part in (_skipped(b"x" * n, n), _zstd(_ROWS[n % 4]))],
    "skipped and large": [_skipped(bytes(1 << 20), 7), _skipped(b"", 3), _zstd(_ROWS[2])],
    "skipped last": [_zstd(_ROWS[0]), _skipped(b"index")],
    "a row over frames": [_zstd(_ROWS[0][:9]), _skipped(b"|"), _zstd(b""), _zstd(_ROWS[0][9:] + _ROWS[1])],
}


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("suffix", ["jsonl.zst", "jsonl"])
def test_frames_are_read_as_zstd_reads_them(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(b"".join(FRAMES[kind]))
    texts = [zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read()]
    if shutil.which("zstd"):
        texts.append(subprocess.run(["zstd", "-dc"], input=path.read_bytes(), capture_output=True, check=True).stdout)
    result = read_rows([str(path)])
    for text in texts:
        assert [row.id for row in result.rows] == [str(json.loads(one)["id"]) for one in text.splitlines()]
    assert not result.bad and result.files[0].digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize(
    "data",
    [
        _skipped(b"long")[:-1],
        _skipped(b"")[:6],
        _skipped(b"x") + _zstd(_ROWS[0])[:-9],
        _zstd(_ROWS[0]) + b"and more",
        _skipped(b"x") + b"and more",
        _skipped(b"x") + _ROWS[0],
    ],
)
def test_what_zstd_refuses_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"data\.jsonl\.zst: torn or damaged"):
        read_rows([str(path)])


def test_what_a_file_holds_is_told_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for data in (gzip.compress(line(GOOD)), _zstd(line(GOOD)), _parquet(tmp_path, [GOOD]).read_bytes(), line(GOOD)):
        path.write_bytes(data)
        result = read_rows([str(path)])
        assert len(result.rows) == 1
        assert result.files[0].digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert result.files[0].bytes == len(data)
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(InputError, match=r"data\.jsonl: this is a zip file"):
        read_rows([str(path)])


# --- Parquet ---


def _parquet(folder: Path, records: list[dict[str, Any]] | pa.Table, name: str = "data.parquet") -> Path:
    table = records if isinstance(records, pa.Table) else pa.Table.from_pylist(records)
    parquet.write_table(table, folder / name)
    return folder / name


def test_parquet_rows(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"x": 1}]}]
    path = _parquet(tmp_path, [{"id": i, "messages": chat, "other": None} for i in range(600)])
    result = read_rows([str(path)])
    assert [(row.row_id, row.line, row.id) for row in result.rows] == [(i, i + 1, str(i)) for i in range(600)]
    # a null key that only the column brings is gone
    assert isinstance(result.rows[0].record, Messages)
    assert result.rows[0].record.messages == chat
    assert result.files[0].digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


PARQUET_BAD = {
    "wrong type": (pa.array([["a"], ["b"]]), "wrong_type"),
    "decimal": (pa.array([1, 2], pa.decimal128(5, 2)), "wrong_type"),
    "nested struct": (pa.array([{"a": {"b": 1}}] * 2), "wrong_type"),
    "null": (pa.array([None, None], pa.string()), "null_field"),
    "invalid UTF-8": (pa.array([b"\xff\xfe"] * 2, pa.binary()).view(pa.string()), "invalid_utf8"),
}


@pytest.mark.parametrize("case", PARQUET_BAD)
def test_bad_parquet_rows(tmp_path: Path, case: str) -> None:
    column, reason = PARQUET_BAD[case]
    path = _parquet(tmp_path, pa.table({"prompt": column, "completion": ["x", "y"]}))
    result = read_rows([str(path)])
    assert [(bad.row_id, bad.line, bad.reason) for bad in result.bad] == [(0, 1, reason), (1, 2, reason)]


def test_one_bad_text_does_not_take_its_batch_along(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    result = read_rows([str(_parquet(tmp_path, pa.table({"prompt": texts, "completion": texts})))])
    assert [row.line for row in result.rows] == [1, 3]
    assert [(bad.line, bad.reason) for bad in result.bad] == [(2, "invalid_utf8")]


def test_parquet_lists_of_tokens(tmp_path: Path) -> None:
    ids = pa.array([[1, 2, 3], None, [1, None, 3], [1, 2, 3]], pa.list_(pa.int32()))
    labels = pa.array([[-100, 2, 3], [1], [-100, 2, 3], [-100, 2, 3]], pa.large_list(pa.int64()))
    result = read_rows([str(_parquet(tmp_path, pa.table({"input_ids": ids, "labels": labels})))])
    assert [row.line for row in result.rows] == [1, 4]
    assert [(bad.line, bad.reason) for bad in result.bad] == [(2, "null_field"), (3, "wrong_type")]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_kinds_of_parquet_text(tmp_path: Path, kind: pa.DataType) -> None:
    column = (
        pa.array(["a", "b"]).cast(kind)
        if not pa.types.is_dictionary(kind)
        else pa.array(["a", "b"]).dictionary_encode()
    )
    result = read_rows([str(_parquet(tmp_path, pa.table({"prompt": column, "completion": column})))])
    assert [row.record for row in result.rows] == [PromptCompletion(prompt=x, completion=x) for x in "ab"]


def test_parquet_without_rows_or_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No row in"):
        read_rows([str(_parquet(tmp_path, pa.table({"prompt": pa.array([], pa.string())})))])
    bad = read_rows([str(_parquet(tmp_path, [{"prompt": "a", "embedding": [1.0]}]))]).bad[0]
    assert bad.reason == "unknown_shape"
    assert "prompt, embedding" in bad.message
    bad = read_rows([str(_parquet(tmp_path, [{"text": "a"}]))]).bad[0]
    assert (bad.reason, bad.excerpt) == ("unknown_shape", '{"text": "a"}')


def test_torn_parquet_is_refused_by_name(tmp_path: Path) -> None:
    path = _parquet(tmp_path, [{**GOOD, "id": str(i)} for i in range(1000)])
    whole = path.read_bytes()
    for data in (
        b"",
        whole[:3],
        whole[: len(whole) // 2],
        whole[:-1],
        b"no parquet at all",
        whole[:40] + b"!" + whole[41:],
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"data\.parquet: not a whole Parquet file"):
            read_rows([str(path)])


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    with pytest.raises(InputError, match="two columns have one name"):
        read_rows([str(_parquet(tmp_path, table))])


# --- finding ---


def test_a_folder_is_read_in_the_order_of_its_relative_paths(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "a/c.ndjson.gz", ".hidden.jsonl", ".git/x.jsonl", "notes.txt", "c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(line(GOOD))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    result = read_rows([str(tmp_path)])
    assert [row.source for row in result.rows] == ["a/c.ndjson.gz", "a/z.jsonl", "b.jsonl", "c.json"]
    assert [row.row_id for row in result.rows] == [0, 1, 2, 3]
    globbed = find_files([f"{tmp_path}/**/*.jsonl"])
    assert [file.source for file in globbed] == ["a/z.jsonl", "b.jsonl"]
    assert [file.source for file in find_files([f"{tmp_path}/a/**"])] == ["c.ndjson.gz", "z.jsonl"]
    with pytest.raises(InputError, match=r"no file|not a pattern"):
        find_files([f"{tmp_path}/**b"])
    given_order = find_files([f"{tmp_path}/b.jsonl", f"{tmp_path}/a"])
    assert [file.source for file in given_order] == ["b.jsonl", "c.ndjson.gz", "z.jsonl"]
    assert not any(os.path.isabs(file.source) for file in globbed + given_order)


def test_a_pattern_holds_in_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder above it has a name that would be a pattern, and the folder it would be of is there."""
    for name in ("g[1]/rows/x.jsonl", "g1/rows/x.jsonl", "g[1]/lone[2].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(line(GOOD))
    monkeypatch.chdir(tmp_path / "g[1]")
    monkeypatch.setenv("HOME", str(tmp_path / "g[1]"))
    for pattern in ("*/*.jsonl", "../g[[]1]/*/*.jsonl", "~/*/*.jsonl", f"{tmp_path}/g[[]1]/**"):
        there = anywhere(pattern)
        assert anywhere(there) == there == os.path.abspath(there)
        (here,), (away,) = find_files([pattern])[-1:], find_files([there])[-1:]
        assert os.path.abspath(here.path) == away.path == str(tmp_path / "g[1]/rows/x.jsonl")
        assert here.source == away.source == "rows/x.jsonl"
    for name in ("rows", "rows/x.jsonl", "lone[2].jsonl", "~/lone[2].jsonl"):
        assert anywhere(name) == str(tmp_path / "g[1]" / name.removeprefix("~/"))
    for name in ("owner/name", "~no-such-user/x"):
        assert anywhere(name) == name


def test_what_lies_below_the_home_folder_is_named_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "x.jsonl").write_bytes(line(GOOD))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/rows/x.jsonl", "~/rows", "~/rows/*.jsonl"):
        (file,) = find_files([name])
        assert (file.path, file.source) == (str(tmp_path / "rows" / "x.jsonl"), "x.jsonl")
    with pytest.raises(InputError, match=f"{tmp_path}/none: no such file or folder"):
        find_files(["~/none"])


def test_what_is_no_data_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "rows.csv").write_text("prompt,response\n")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    for item, said in {
        "folder.jsonl": "a folder with the name of a file",
        "notes.txt": "ends in one of",
        "rows.csv": "tables of text are not read",
        "dangling.jsonl": "No such file",
        "pipe.jsonl": "a pipe, socket or device",
        "empty": "no file below this folder",
        "absent.jsonl": "no such file or folder",
        "*.csv": "matches no file",
    }.items():
        with pytest.raises(InputError, match=said) as caught:
            read_rows([str(tmp_path / item)])
        assert item in str(caught.value)
    with pytest.raises(InputError, match="regular file"):
        find_files([f"{tmp_path}/p*.jsonl"])
    with pytest.raises(InputError, match="No data was named"):
        find_files([])


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line(GOOD))
    with pytest.raises(InputError, match="named twice"):
        find_files([str(tmp_path), f"{tmp_path}/a.jsonl"])


@pytest.mark.parametrize("name", ["new\nline", "%s", "..x", "-rf", "[a]", "x" * 240])
def test_odd_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(line(GOOD) + b"{\n")
    result = read_rows([str(path)])
    assert result.rows[0].source == f"{name}.jsonl"
    assert "\nline" not in str(refuse(result.bad))


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.jsonl"
    Path(os.fsdecode(path)).write_bytes(line(GOOD))
    result = read_rows([os.fsdecode(path)])
    assert result.rows[0].source == "\\xff.jsonl"


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        if name == "owner/absent":
            raise datasets.exceptions.DatasetNotFoundError("doesn't exist")
        return datasets.Dataset.from_list([{**GOOD, "id": 1}, {"prompt": None, "completion": "b", "id": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    result = read_rows(["owner/name:test", "plain"])
    assert asked == [("owner/name", "test"), ("plain", "train")]
    assert [(row.row_id, row.source, row.line) for row in result.rows] == [(0, "owner/name:test", 1), (2, "plain", 1)]
    assert [(bad.row_id, bad.line, bad.reason) for bad in result.bad] == [(1, 2, "null_field"), (3, 2, "null_field")]
    assert result.files[0].digest == result.files[1].digest
    with pytest.raises(InputError, match=r"'owner/absent' \(split 'train'\) cannot be read"):
        read_rows(["owner/absent"])


def test_a_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets, constants = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub").constants
    asked: list[float] = []

    def unreachable(self: object, name: str, timeout: float) -> None:
        asked.append(timeout)
        raise TimeoutError("no answer")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        with pytest.raises(InputError, match="owner/name: no such file or folder, and the Hugging Face dataset"):
            read_rows(["owner/name"])
        assert (offline, offline) == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    assert len(asked) == 2 and max(asked) <= 10
    assert "Retry" not in caplog.text + capfd.readouterr().err


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("limit", [1, 3, 4, 5, 6, 9])
def test_a_limit_reads_the_first_rows_and_no_file_behind_them(tmp_path: Path, suffix: str, limit: int) -> None:
    paths = []
    for name in ("a", "b"):
        rows = [GOOD | {"id": f"{name}{n}"} for n in range(4)]
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            text = b"".join(map(line, rows))
            path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
        paths.append(str(path))
    whole, stream = read_rows(paths), RowStream(paths, limit=limit)
    rows = list(stream)
    assert [row.id for row in rows] == [row.id for row in whole.rows][:limit] and stream.read == min(limit, 8)
    # What is known of a file is known of the whole file.
    assert stream.files == whole.files[: 1 if limit <= 4 else 2]


def test_a_limit_counts_bad_rows_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n" + line(GOOD) + line(GOOD))
    stream = RowStream([str(path)], limit=2)
    assert [row.row_id for row in stream] == [1] and [bad.row_id for bad in stream.bad] == [0] and stream.read == 2


# --- shapes ---

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def test_messages(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    record = one(tmp_path, {"messages": [USER, call, {"role": "tool", "content": "1"}, ANSWER], "tools": tools})
    without_content: dict[str, Any] = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    expected = [USER, without_content, {"role": "tool", "content": "1"}, ANSWER]
    assert record == Messages(messages=expected, tools=tools)
    as_text = one(tmp_path, {"messages": [USER, ANSWER], "tools": json.dumps(tools)})
    assert as_text == Messages(messages=[USER, ANSWER], tools=tools)
    parts = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}
    assert one(tmp_path, {"messages": [parts, ANSWER]}).messages[0] == {"role": "user", "content": "xy"}


def test_other_chats_become_messages(tmp_path: Path) -> None:
    chat = Messages(messages=[USER, ANSWER])
    human, gpt = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
    assert one(tmp_path, {"conversations": [human, gpt]}) == chat
    assert one(tmp_path, {"conversations": [USER, ANSWER]}) == chat
    assert one(tmp_path, {"prompt": "a", "response": "b"}) == chat
    assert one(tmp_path, {"instruction": "a", "output": "b"}) == chat
    assert one(tmp_path, {"instruction": "a", "input": "", "output": "b"}) == chat
    assert one(tmp_path, {"instruction": "a", "input": "c", "output": "b"}).messages[0]["content"] == "a\n\nc"
    assert one(tmp_path, {"prompt": "a", "response": "b", "messages": None}) == chat
    system = {"role": "system", "content": "s"}
    assert one(tmp_path, {"conversations": [human, gpt], "system": "s"}).messages == [system, USER, ANSWER]
    split = one(tmp_path, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert split == Messages(messages=[USER, ANSWER, USER, ANSWER], respond_from=3)


def test_prompt_completion_is_raw_text(tmp_path: Path) -> None:
    row = read(tmp_path, line({"prompt": "", "completion": " b", "id": "x"})).rows[0]
    assert (row.shape, row.id, row.record) == ("prompt_completion", "x", PromptCompletion(prompt="", completion=" b"))


def test_tokens_are_aligned_and_the_first_never_responds(tmp_path: Path) -> None:
    record = one(tmp_path, {"input_ids": [5, 6, 7], "labels": [5, -100, 7]})
    assert record == Tokens(input_ids=[5, 6, 7], labels=[-100, -100, 7])


BAD_RECORDS = {
    "two shapes": ({"messages": [USER, ANSWER], "prompt": "a", "completion": "b"}, "ambiguous_shape"),
    "unknown": ({"text": "a"}, "unknown_shape"),
    "no keys": ({}, "unknown_shape"),
    "no messages": ({"messages": []}, "no_response"),
    "only system": ({"messages": [{"role": "system", "content": "a"}]}, "no_response"),
    "empty answer": ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "no_response"),
    "empty answer before another": (
        {"messages": [USER, {"role": "assistant", "content": ""}, USER, ANSWER]},
        "no_response",
    ),
    "prompt alone answers": ({"prompt": [USER, ANSWER], "completion": [USER]}, "no_response"),
    "empty completion": ({"prompt": "a", "completion": ""}, "no_response"),
    "empty output": ({"instruction": "a", "output": ""}, "no_response"),
    "unknown role": ({"messages": [{"role": "critic", "content": "a"}, ANSWER]}, "unknown_role"),
    "role of a wrong type": ({"messages": [{"role": ["user"], "content": "a"}, ANSWER]}, "unknown_role"),
    "unknown sender": ({"conversations": [{"from": "bot", "value": "a"}]}, "unknown_role"),
    "message that is text": ({"messages": ["a", "b"]}, "wrong_type"),
    "messages that are text": ({"messages": "a"}, "wrong_type"),
    "null content": ({"messages": [{"role": "user", "content": None}, ANSWER]}, "wrong_type"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]}, "wrong_type"),
    "calls that are a number": ({"messages": [USER, ANSWER | {"tool_calls": 3}]}, "wrong_type"),
    "calls that are true": ({"messages": [USER, ANSWER | {"tool_calls": True}]}, "wrong_type"),
    "one call": ({"messages": [USER, ANSWER | {"tool_calls": {"name": "f"}}]}, "wrong_type"),
    "a number for a call": ({"messages": [USER, ANSWER | {"tool_calls": [1]}]}, "wrong_type"),
    "a name for a function": ({"messages": [USER, ANSWER | {"tool_calls": [{"function": "f"}]}]}, "wrong_type"),
    "a number and a list": ({"prompt": [USER], "completion": 5}, "wrong_type"),
    "tools": ({"messages": [USER, ANSWER], "tools": ["f"]}, "wrong_type"),
    "tools that are no JSON": ({"messages": [USER, ANSWER], "tools": "f"}, "wrong_type"),
    "id": ({**GOOD, "id": True}, "wrong_type"),
    "lengths": ({"input_ids": [1, 2], "labels": [-100]}, "length_mismatch"),
    "shifted labels": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "label_mismatch"),
    "no labels": ({"input_ids": [1, 2], "labels": [1, -100]}, "no_response"),
    "empty tokens": ({"input_ids": [], "labels": []}, "no_response"),
    "negative token": ({"input_ids": [1, -2], "labels": [-100, -2]}, "token_out_of_range"),
    "large token": ({"input_ids": [1, 2**31], "labels": [-100, 2**31]}, "token_out_of_range"),
    "boolean token": ({"input_ids": [1, True], "labels": [-100, 1]}, "wrong_type"),
    "float token": ({"input_ids": [1, 2.0], "labels": [-100, 2]}, "wrong_type"),
    "tokens as text": ({"input_ids": "1 2", "labels": [1, 2]}, "wrong_type"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_records(tmp_path: Path, case: str) -> None:
    record, reason = BAD_RECORDS[case]
    result = read(tmp_path, line(GOOD) + line(record) + line(GOOD))
    assert [(bad.row_id, bad.line, bad.reason) for bad in result.bad] == [(1, 2, reason)]
    assert [row.row_id for row in result.rows] == [0, 2]
    assert result.bad[0].message


def test_an_unknown_shape_says_what_was_found_and_what_is_read(tmp_path: Path) -> None:
    message = one(tmp_path, {"question": "a", "answer": "b"}).message
    assert "question, answer" in message
    assert "instruction + output" in message


# --- preference rows ---

OTHER, SYSTEM = {"role": "assistant", "content": "c"}, {"role": "system", "content": "s"}
DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


def pair_of_chats(prompt: list[Any], chosen: list[Any], rejected: list[Any], **options: Any) -> Pair:
    parts = {"chosen": chosen, "rejected": rejected}
    return Pair(
        **{key: Messages(messages=prompt + part, respond_from=len(prompt), **options) for key, part in parts.items()}
    )


def pair_of_texts(prompt: str, chosen: str, rejected: str) -> Pair:
    parts = {"chosen": chosen, "rejected": rejected}
    return Pair(**{key: PromptCompletion(prompt=prompt, completion=part) for key, part in parts.items()})


def test_preference_texts_are_chats_that_may_be_plain_text(tmp_path: Path) -> None:
    record = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 8.5, "images": None, "id": 7}
    row = read(tmp_path, line(record)).rows[0]
    assert (row.shape, row.id) == ("preference", "7")
    assert row.record == Pair(
        chosen=Messages(messages=[USER, ANSWER], plain=PromptCompletion(prompt="a", completion="b")),
        rejected=Messages(messages=[USER, OTHER], plain=PromptCompletion(prompt="a", completion="c")),
    )
    with_system = one(tmp_path, {**record, "system": "s", "tools": [{"name": "f"}]})
    assert with_system.chosen == Messages(messages=[SYSTEM, USER, ANSWER], tools=[{"name": "f"}])


def test_preference_messages(tmp_path: Path) -> None:
    expected = pair_of_chats([USER], [ANSWER], [OTHER])
    prompt, chosen, rejected = [USER], [ANSWER], [OTHER]
    for record in (
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": prompt, "chosen": "b", "rejected": rejected},
        {"prompt": prompt, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": chosen, "rejected": rejected},
        # branches that repeat the prompt
        {"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected},
        {"prompt": "a", "chosen": prompt + chosen, "rejected": prompt + rejected},
        # the chosen chat once more, as some data sets have it
        {"chosen": prompt + chosen, "rejected": prompt + rejected, "messages": prompt + chosen},
        {"chosen": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "rejected": [USER, OTHER]},
    ):
        assert one(tmp_path, record) == expected, record
    assert read(tmp_path, line({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]})).rows[0].shape == "preference"
    ambiguous = one(tmp_path, {"chosen": prompt + chosen, "rejected": prompt + rejected, "messages": prompt + rejected})
    assert ambiguous.reason == "ambiguous_shape"
    with_system = one(tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": rejected, "system": "s"})
    assert with_system == pair_of_chats([SYSTEM, USER], [ANSWER], [OTHER])
    repeated = one(tmp_path, {"prompt": "a", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]})
    assert repeated == with_system


def test_the_common_beginning_of_chats_is_the_prompt(tmp_path: Path) -> None:
    more = {"role": "user", "content": "more"}
    chosen, rejected = [USER, ANSWER, more, ANSWER], [USER, ANSWER, more, OTHER, USER, ANSWER]
    tools = [{"name": "f"}]
    record = one(tmp_path, {"chosen": chosen, "rejected": rejected, "tools": tools})
    assert record == pair_of_chats(chosen[:3], chosen[3:], rejected[3:], tools=tools)
    record = one(tmp_path, {"chosen": [USER, ANSWER], "rejected": [USER, OTHER], "system": "s"})
    assert record == pair_of_chats([SYSTEM, USER], [ANSWER], [OTHER])


COMMON = {
    "dialogue": (DIALOGUE + " Yes.", DIALOGUE + " Yet", (DIALOGUE, " Yes.", " Yet")),
    "one continues the other": (DIALOGUE + " Yes", DIALOGUE + " Yes, it is", (DIALOGUE, " Yes", " Yes, it is")),
    "space": ("Q: 1 + 1\nA: 2", "Q: 1 + 1\nA: 3", ("Q: 1 + 1\nA:", " 2", " 3")),
    "within a word": ("the sky is blue", "the sky is black", ("the sky is", " blue", " black")),
    "within a number": ("it costs 3.50", "it costs 3.75", ("it costs", " 3.50", " 3.75")),
    "a longer word": ("he has a cat", "he has a cats", ("he has a", " cat", " cats")),
    "last word": ("Is it? Yes!", "Is it? Yes! It is", ("Is it?", " Yes!", " Yes! It is")),
    "line end": ("Sum:\n2", "Sum:\n3", ("Sum:\n", "2", "3")),
    "no spaces": ("答えは：はい", "答えは：いいえ", ("答えは：", "はい", "いいえ")),
    "combining mark": ("so: e\u0301", "so: e\u0300", ("so:", " e\u0301", " e\u0300")),
}


@pytest.mark.parametrize("case", COMMON)
def test_the_common_beginning_of_texts_is_the_prompt(tmp_path: Path, case: str) -> None:
    chosen, rejected, parts = COMMON[case]
    assert one(tmp_path, {"chosen": chosen, "rejected": rejected}) == pair_of_texts(*parts)
    swapped = one(tmp_path, {"chosen": rejected, "rejected": chosen})
    assert swapped == pair_of_texts(parts[0], parts[2], parts[1])


TOKEN_PAIR = {
    "chosen_input_ids": [5, 6, 7],
    "chosen_labels": [-100, -100, 7],
    "rejected_input_ids": [5, 8],
    "rejected_labels": [5, 8],
}


def test_preference_tokens(tmp_path: Path) -> None:
    row = read(tmp_path, line(TOKEN_PAIR)).rows[0]
    assert row.shape == "preference_tokens"
    assert row.record == Pair(
        chosen=Tokens(input_ids=[5, 6, 7], labels=[-100, -100, 7]), rejected=Tokens(input_ids=[5, 8], labels=[-100, 8])
    )
    assert read_rows([str(_parquet(tmp_path, [TOKEN_PAIR]))]).rows[0].record == row.record


def test_preference_columns(tmp_path: Path) -> None:
    chats = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    extra = {"score_chosen": 1.0, "images": [], "margin": 2}
    result = read_rows([str(_parquet(tmp_path, [{**chats, **extra, "messages": chats["chosen"]}] * 2))])
    assert [row.record for row in result.rows] == [pair_of_chats([USER], [ANSWER], [OTHER])] * 2
    guessed = read_rows([str(_parquet(tmp_path, [{"question": "q", "chosen": "It is 1", "rejected": "It is 2"}]))])
    assert guessed.bad[0].reason == "no_prompt"


def test_preference_rows_of_llama_factory(tmp_path: Path) -> None:
    """A prompt by another name, and each answer one message."""
    asks = {"from": "human", "value": USER["content"]}
    told = {name: {"from": "gpt", "value": one["content"]} for name, one in (("chosen", ANSWER), ("rejected", OTHER))}
    texts = {"chosen": ANSWER["content"], "rejected": OTHER["content"]}
    question = {"role": "user", "content": "Add.\n\n1 and 2"}
    for record, prompt in (
        ({"conversations": [asks], **told}, [USER]),
        ({"conversations": [asks], **texts}, [USER]),
        ({"conversations": [asks], "system": SYSTEM["content"], **told}, [SYSTEM, USER]),
        ({"prompt": USER["content"], **told}, [USER]),
        ({"instruction": USER["content"], "input": "", **told}, [USER]),
        ({"instruction": "Add.", "input": "1 and 2", **told}, [question]),
        ({"instruction": "not looked at", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER]),
        ({"instruction": "not looked at", "prompt": [USER], **texts}, [USER]),
    ):
        assert read(tmp_path, line(record)).rows[0].record == pair_of_chats(prompt, [ANSWER], [OTHER]), record
    (row,) = read(tmp_path, line({"instruction": "Add.", "input": "1 and 2", "history": [["a", "b"]], **texts})).rows
    assert isinstance(row.record, Pair) and isinstance(row.record.chosen, Messages)
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert row.record.chosen.messages == [*earlier, question, ANSWER] and row.record.chosen.respond_from == 3
    advised = read(tmp_path, line({"system": "s", "question": "q", **texts})).bad[0]
    assert advised.message.endswith("put the whole prompt under prompt, as --map question=prompt does")


def test_what_stands_twice_and_two_prompts_are_told(tmp_path: Path) -> None:
    prompt, twice = "Which is the longest river?", "which stands twice"
    texts = {"prompt": prompt, "chosen": f"{prompt} The Nile.", "rejected": f"{prompt} The Rhine."}
    answer = {"prompt": prompt, "response": f" {prompt} The Nile."}
    for record, says in (
        (texts, twice),
        (answer, twice),
        ({"instruction": prompt, "output": answer["response"]}, twice),
        (texts | {"rejected": "The Rhine."}, None),
        ({"prompt": "Yes", "response": "Yes, of course."}, None),
        (TOKEN_PAIR, "they are two prompts"),
        ({**TOKEN_PAIR, "rejected_input_ids": [5, 6, 8], "rejected_labels": [-100, -100, 8]}, None),
    ):
        stream = RowStream([write_jsonl(tmp_path / "rows.jsonl", [record])])
        assert len(list(stream)) == 1
        told = list(stream.told)
        assert [says in one for one in told] == [True] if says else not told, record


SAME = [USER, ANSWER]
BAD_PAIRS = {
    "same texts": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same_branches", "neither"),
    "same messages": ({"prompt": [USER], "chosen": "b", "rejected": [ANSWER]}, "same_branches", "neither"),
    "same chats": ({"chosen": SAME, "rejected": SAME}, "same_branches", "neither"),
    "same whole texts": ({"chosen": "a b", "rejected": "a b"}, "same_branches", "neither"),
    "same tokens whatever responds": (
        {**TOKEN_PAIR, "rejected_input_ids": [5, 6, 7], "rejected_labels": [-100, 6, 7]},
        "same_branches",
        "neither",
    ),
    "two prompts": (
        {"prompt": [USER], "chosen": [{"role": "user", "content": "z"}, ANSWER], "rejected": [OTHER]},
        "prompt_mismatch",
        "chosen begins with a message of role user",
    ),
    "another prompt in the other branch": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "user", "content": "z"}, OTHER]},
        "prompt_mismatch",
        "rejected begins with a message of role user",
    ),
    "an answered conversation": (
        {"conversations": SAME, "chosen": ANSWER, "rejected": OTHER},
        "ambiguous_shape",
        "conversations end with an answer",
    ),
    "an instruction beside chats of another question": (
        {"instruction": "q", "chosen": [ANSWER], "rejected": [OTHER]},
        "no_prompt",
        "give the prompt",
    ),
    "same tokens": (
        {**TOKEN_PAIR, "rejected_input_ids": [5, 6, 7], "rejected_labels": [-100, -100, 7]},
        "same_branches",
        "neither",
    ),
    "chat that begins the other": ({"chosen": [*SAME, USER, OTHER], "rejected": SAME}, "no_response", "rejected is"),
    "chats of different prompts": (
        {"chosen": SAME, "rejected": [{"role": "user", "content": "z"}, ANSWER]},
        "no_prompt",
        "different messages",
    ),
    "chats that share a system message alone": (
        {"chosen": [SYSTEM, *SAME], "rejected": [SYSTEM, {"role": "user", "content": "z"}, ANSWER]},
        "no_prompt",
        "different messages",
    ),
    "answers alone": ({"chosen": [ANSWER], "rejected": [OTHER]}, "no_prompt", "give the prompt"),
    "unanswered chat": ({"chosen": SAME, "rejected": [USER, USER]}, "no_response", "rejected: no message"),
    "empty answer": (
        {"chosen": [USER, {"role": "assistant", "content": " "}], "rejected": SAME},
        "no_response",
        "chosen: a message",
    ),
    "texts of nothing shared": ({"chosen": "Yes.", "rejected": "Yet"}, "no_prompt", "the same words"),
    "no marker to begin at": ({"chosen": "a", "rejected": "a b"}, "no_prompt", "the same words"),
    "guess beside a question": (
        {"question": "q", "chosen": "It is 1", "rejected": "It is 2"},
        "no_prompt",
        "question beside",
    ),
    "guess beside a system text": ({"system": "q", "chosen": "It is 1", "rejected": "It is 2"}, "no_prompt", "system"),
    "dialogue without an answer": ({"chosen": DIALOGUE, "rejected": DIALOGUE + " b"}, "no_response", "chosen is"),
    "dialogue that goes on": (
        {"chosen": DIALOGUE + " b", "rejected": DIALOGUE + " c\n\nHuman: d\n\nAssistant: e"},
        "several_turns",
        "rejected goes on",
    ),
    "empty prompt": ({"prompt": " ", "chosen": "b", "rejected": "c"}, "no_prompt", "prompt is empty"),
    "null prompt": ({"prompt": None, "chosen": "It is 1", "rejected": "It is 2"}, "null_field", "prompt is null"),
    "empty chosen": ({"prompt": "a", "chosen": "", "rejected": "c"}, "no_response", "chosen is empty"),
    "empty rejected": ({"prompt": [USER], "chosen": "b", "rejected": "\n"}, "no_response", "rejected is empty"),
    "empty list": ({"prompt": [USER], "chosen": [], "rejected": "c"}, "no_response", "chosen is an empty list"),
    "null rejected": ({"prompt": "a", "chosen": "b", "rejected": None}, "null_field", "rejected is null"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "unknown_shape", "chosen + rejected"),
    "another prompt": (
        {"prompt": "z", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        "prompt_mismatch",
        "chosen begins",
    ),
    "text and chat": ({"chosen": "a b", "rejected": [USER, ANSWER]}, "wrong_type", "rejected is a list"),
    "number": ({"prompt": "a", "chosen": 3, "rejected": "b"}, "wrong_type", "chosen is an integer"),
    "prompt that is a number": ({"prompt": 3, "chosen": "a", "rejected": "b"}, "wrong_type", "prompt is an integer"),
    "message that is text": ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "wrong_type", "chosen[0] is text"),
    "unknown role": (
        {"prompt": "a", "chosen": "b", "rejected": [{"role": "bot", "content": "c"}]},
        "unknown_role",
        "rejected[0].role",
    ),
    "answer too": ({"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}, "ambiguous_shape", "at once"),
    "tools": ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": "f"}, "wrong_type", "tools"),
    "token lengths": ({**TOKEN_PAIR, "rejected_labels": [5]}, "length_mismatch", "1 rejected_labels"),
    "token labels": ({**TOKEN_PAIR, "chosen_labels": [-100, 7, 7]}, "label_mismatch", "chosen_labels[1] is 7"),
    "token range": ({**TOKEN_PAIR, "chosen_input_ids": [5, -6, 7]}, "token_out_of_range", "chosen_input_ids[1]"),
    "no token labels": ({**TOKEN_PAIR, "rejected_labels": [5, -100]}, "no_response", "all rejected_labels"),
    "token type": ({**TOKEN_PAIR, "rejected_input_ids": [5, True]}, "wrong_type", "rejected_input_ids[1]"),
    "tokens without labels": ({"chosen_input_ids": [1], "rejected_input_ids": [1]}, "unknown_shape", "chosen_labels"),
    "null labels": ({**TOKEN_PAIR, "chosen_labels": None}, "null_field", "chosen_labels is null"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs(tmp_path: Path, case: str) -> None:
    record, reason, words = BAD_PAIRS[case]
    good = line({"prompt": "a", "chosen": "b", "rejected": "c"})
    result = read(tmp_path, good + line(record) + good)
    assert [(bad.row_id, bad.line, bad.reason) for bad in result.bad] == [(1, 2, reason)]
    assert [row.row_id for row in result.rows] == [0, 2]
    assert words in result.bad[0].message


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_touches_no_pair(tmp_path: Path, case: str) -> None:
    good = line({"prompt": "a", "chosen": "b", "rejected": "c"})
    bad_line = BAD_LINES[case][0].replace(b'"completion"', b'"rejected": "x", "chosen"').replace(b"compl", b"chose")
    result = read(tmp_path, good + bad_line + b"\n" + good)
    assert ([row.line for row in result.rows], [bad.line for bad in result.bad]) == ([1, 3], [2])
    assert result.bad[0].reason == ("no_prompt" if case == "missing prompt" else BAD_LINES[case][1])


def test_a_run_holds_rows_of_one_kind(tmp_path: Path) -> None:
    answered, preferred = line(GOOD), line({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert kind_of(read(tmp_path, answered * 2).rows) == "sft"
    assert kind_of(read(tmp_path, preferred * 2).rows) == "preference"
    assert kind_of([]) == "sft"
    for data, places in {
        answered * 2 + preferred * 2: (1, 3),
        preferred * 2 + b"{\n" + answered: (4, 1),
    }.items():
        with pytest.raises(InputError) as caught:
            kind_of(read(tmp_path, data).rows)
        sft, preference = places
        assert f"data.jsonl:{sft} is an SFT row, data.jsonl:{preference} is a preference row" in str(caught.value)
        assert "split the data" in str(caught.value)


# --- rows that are read where they are asked for ---


def also(folder: Path, record: Any, *names: Any) -> Any:
    (folder / "also.jsonl").write_bytes(line(record))
    result = read_rows([str(folder / "also.jsonl")], also=names)
    return result.rows[0].record if result.rows else result.bad[0]


def test_passages_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    assert also(tmp_path, {"text": " a b"}, "text") == Passage(text=" a b")
    assert also(tmp_path, {"text": "a", **GOOD}, "text") == also(tmp_path, GOOD)
    assert also(tmp_path, {"text": " \n"}, "text").reason == "no_response"
    assert also(tmp_path, {"text": 3}, "text").reason == "wrong_type"
    assert also(tmp_path, {"text": None}, "text").reason == "null_field"
    path = _parquet(tmp_path, [{"text": "a", "other": 1}])
    assert read_rows([str(path)], also=("text",)).rows[0].record == Passage(text="a")
    unknown, asked = also(tmp_path, {"title": "a"}), also(tmp_path, {"title": "a"}, "text")
    assert unknown.message + "; text" == asked.message


def test_prompts_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    assert also(tmp_path, {"prompt": "a"}, "prompt") == Prompt(messages=[USER], plain="a")
    assert also(tmp_path, {"prompt": "a", "completion": None}, "prompt") == Prompt(messages=[USER], plain="a")
    assert also(tmp_path, {"prompt": "a", "system": "s"}, "prompt") == Prompt(messages=[SYSTEM, USER])
    waiting = [USER, ANSWER, USER]
    tools = [{"name": "f"}]
    for record in ({"prompt": waiting}, {"messages": waiting}, {"conversations": waiting}):
        assert also(tmp_path, {**record, "tools": tools}, "prompt") == Prompt(messages=waiting, tools=tools)
    assert also(tmp_path, {"prompt": [USER], "system": "s"}, "prompt") == Prompt(messages=[SYSTEM, USER])
    assert also(tmp_path, {"prompt": [USER, ANSWER]}, "prompt").reason == "no_prompt"
    assert also(tmp_path, {"prompt": " "}, "prompt").reason == "no_prompt"
    assert also(tmp_path, {"prompt": 3}, "prompt").reason == "wrong_type"
    # rows with an answer are what they are without
    for record in (
        GOOD,
        {"messages": SAME},
        {"conversations": SAME, "system": "s"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"input_ids": [1, 2], "labels": [1, 2]},
    ):
        assert also(tmp_path, record, "prompt") == also(tmp_path, record)
    # and a chat that waits for an answer is one where prompts are not asked for
    assert also(tmp_path, {"messages": waiting}) == Messages(messages=waiting)
    assert also(tmp_path, {"prompt": "a"}).reason == "unknown_shape"
    assert also(tmp_path, {"prompt": "a", "text": "b"}, "prompt", "text").reason == "ambiguous_shape"
    assert rows_of([{"prompt": "a"}], "memory", also=("prompt",)).rows[0].shape == "prompt"


def test_refuse_names_the_first_and_counts_the_others() -> None:
    bad = [
        BadRow(row_id=i, source="a.jsonl", line=i + 1, reason="invalid_json", message=f"it is cut at {i}", excerpt="")
        for i in range(25)
    ]
    text = str(refuse(bad))
    assert text.startswith("25 rows cannot be used:\n  a.jsonl:1: invalid_json: it is cut at 0\n")
    assert "a.jsonl:20:" in text
    assert "a.jsonl:21:" not in text
    assert "and 5 more" in text
    assert "--bad-rows quarantine" in text
    assert str(refuse(bad[:1])).startswith("1 row cannot")
    assert "more" not in str(refuse(bad[:20]))


def test_a_reason_is_told_once_in_each_file_with_the_lines_it_holds_for() -> None:
    places = [*(("a.jsonl", line) for line in (3, 4, 9)), ("b.jsonl", 1), *(("a.jsonl", 2 * n) for n in range(10, 30))]
    bad = [
        BadRow(row_id=i, source=source, line=line, reason="null_field", message="prompt is null", excerpt="")
        for i, (source, line) in enumerate(places)
    ]
    lines = list(grouped(bad))
    ranges = "3-4, 9, 20, 22, 24, 26, 28, 30, 32, 34 and 12 more"
    assert lines == [
        f"  a.jsonl:3: null_field: prompt is null (lines {ranges})",
        "  b.jsonl:1: null_field: prompt is null",
    ]


# --- properties ---

_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_texts, _texts, st.booleans()), min_size=1, max_size=8), st.sampled_from(sorted(PACK)))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, str, bool]], suffix: str
) -> None:
    lines = [line({"prompt": p, "completion": c}) if good else line({"prompt": p}) for p, c, good in items]
    result = read(tmp_path_factory.mktemp("rows"), b"".join(lines), suffix)
    assert [row.record for row in result.rows] == [
        PromptCompletion(prompt=p, completion=c) for p, c, good in items if good
    ]
    assert sorted([r.row_id for r in result.rows] + [b.row_id for b in result.bad]) == list(range(len(items)))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(data)
    try:
        result = read_rows([str(path)])
    except InputError as error:
        assert str(error)
    else:
        assert len(result.rows) + len(result.bad) == sum(bool(x.strip()) for x in data.split(b"\n"))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(_texts, _texts, _texts, st.booleans())
def test_any_preference_texts_are_read(prompt: str, chosen: str, rejected: str, implicit: bool) -> None:
    texts = {"chosen": chosen, "rejected": rejected}
    record = {key: prompt + text for key, text in texts.items()} if implicit else {"prompt": prompt, **texts}
    result = rows_of([record], "memory")
    if chosen == rejected:
        assert result.bad[0].reason == "same_branches"
    elif not implicit:
        for name, text in texts.items():
            branch = getattr(result.rows[0].record, name)
            assert branch.plain == PromptCompletion(prompt=prompt, completion=text)
            assert [message["content"] for message in branch.messages] == [prompt, text]
    elif result.rows:
        found = [getattr(result.rows[0].record, name) for name in BRANCHES]
        assert [part.prompt + part.completion for part in found] == [prompt + chosen, prompt + rejected]
        assert found[0].prompt == found[1].prompt and found[0].prompt.strip()
        assert found[0].completion.strip() and found[1].completion.strip()
    else:
        assert result.bad[0].reason in ("no_prompt", "no_response", "several_turns")


_turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.sampled_from("ab")), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(_turns, _turns, _turns)
def test_any_whole_chats_are_read_or_set_aside(prompt: Any, chosen: Any, rejected: Any) -> None:
    chats = [[{"role": role, "content": text} for role, text in prompt + part] for part in (chosen, rejected)]
    result = rows_of([dict(zip(BRANCHES, chats, strict=True))], "memory")
    shared = 0
    while shared < min(map(len, chats)) and chats[0][shared] == chats[1][shared]:
        shared += 1
    answers = [[message for message in chat[shared:] if message["role"] == "assistant"] for chat in chats]
    if all(answers):
        expected = pair_of_chats(chats[0][:shared], chats[0][shared:], chats[1][shared:])
        assert result.rows[0].record == expected
    else:
        assert result.bad[0].reason == ("same_branches" if chats[0] == chats[1] else "no_response")


_keys = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "response", "instruction", "input", "output"]
) | st.sampled_from(["input_ids", "labels", "id", "tools", "system", "chosen", "rejected", "text", "question"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_keys, _json, max_size=4))
def test_any_object_is_read_or_set_aside(tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "objects.jsonl"
    path.write_bytes(json.dumps(record).encode() + b"\n")
    for names in ((), ("text", "prompt")):
        result = read_rows([str(path)], also=names)
        assert len(result.rows) + len(result.bad) == 1


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text('{"prompt": "q", "response": "' + folder + '"}\n')
    (tmp_path / "c.jsonl").write_text('{"prompt": "q", "response": "c"}\n')
    names = [str(tmp_path / name) for name in ("a/train.jsonl", "b/train.jsonl", "c.jsonl")]
    assert [file.source for file in read_rows(names).files] == ["a/train.jsonl", "b/train.jsonl", "c.jsonl"]


# --- ids


IDS: dict[str, tuple[Any, str | None]] = {
    "text": ("a", "a"),
    "integer": (3, "3"),
    "a whole float": (1.0, "1.0"),
    "float": (1.5, "1.5"),
    "a large float": (1e22, "1e+22"),
    "no number": (float("nan"), None),
    "date": (datetime.date(2026, 1, 2), "2026-01-02"),
    "time stamp": (datetime.datetime(2026, 1, 2, 3, 4, 5, 600), "2026-01-02T03:04:05.000600"),
    "with a zone": (datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "2026-01-02T00:00:00+00:00"),
    "time": (datetime.time(3, 4), "03:04:00"),
    "decimal": (decimal.Decimal("1.50"), "1.50"),
}


@pytest.mark.parametrize("case", IDS)
def test_an_id_is_text(tmp_path: Path, case: str) -> None:
    given, told = IDS[case]
    parquet.write_table(pa.Table.from_pylist([{**GOOD, "id": given}, {**GOOD, "id": None}]), tmp_path / "a.parquet")
    assert [row.id for row in read_rows([str(tmp_path / "a.parquet")]).rows] == [told, None]
    if isinstance(given, str | int | float) and told is not None:
        assert read(tmp_path, line({**GOOD, "id": given})).rows[0].id == told


@pytest.mark.parametrize("given", [True, [1], {"a": 1}])
def test_an_id_that_is_none(tmp_path: Path, given: Any) -> None:
    bad = one(tmp_path, {**GOOD, "id": given})
    assert (bad.reason, bad.message.split("; ")[1]) == ("wrong_type", "it must be text, a number or a time")


# --- what stands beside an answer


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "record",
    [
        GOOD,
        {"prompt": "a", "response": "b"},
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": "a", "output": "b"},
    ],
    ids="+".join,
)
def test_an_answer_not_to_be_learnt_is_refused(tmp_path: Path, record: dict[str, Any], key: str) -> None:
    bad = one(tmp_path, {**record, key: False})
    assert bad.reason == "unwanted_answer" and bad.message.startswith(f"{key} is false: an answer that is not to be")
    for zero in (0, 0.0):  # as columns of numbers hold it
        bad = one(tmp_path, {**record, key: zero})
        assert bad.reason == "unwanted_answer" and f"Where {key} says something else, leave it out" in bad.message
    # One that is wanted is plain SFT; other numbers, words and objects are classes of something else.
    for value in (True, None, 1, 1.0, 3, "bad", {"class": 0}):
        assert one(tmp_path, {**record, key: value}) == one(tmp_path, record)


def test_another_answer_beside_a_chat_makes_a_pair(tmp_path: Path) -> None:
    before, other = [{"role": "system", "content": "s"}, USER], {"role": "assistant", "content": "no"}
    whole = {"prompt": before, "chosen": [ANSWER], "rejected": [other]}
    pair = one(tmp_path, whole)
    assert isinstance(pair, Pair)
    assert one(tmp_path, {"messages": [*before, ANSWER], "rejected_response": "no"}) == pair
    assert one(tmp_path, {"messages": [*before, ANSWER], "rejected_response": [other]}) == pair
    assert one(tmp_path, {"messages": [*before, ANSWER], "rejected_messages": [*before, other]}) == pair
    texts = {"prompt": USER["content"], "response": ANSWER["content"], "rejected_response": "no", "system": "s"}
    assert one(tmp_path, texts) == pair
    assert one(tmp_path, {"messages": [*before, ANSWER], "rejected_response": None}).messages == [*before, ANSWER]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [USER, ANSWER], "rejected_response": ANSWER["content"]}, "same_branches"),
        ({"messages": [USER, ANSWER], "rejected_response": " "}, "no_response"),
        ({"messages": [USER, ANSWER, USER], "rejected_response": "no"}, "no_response"),
        ({"messages": [ANSWER], "rejected_response": "no"}, "no_response"),
        ({"messages": [USER, ANSWER], "rejected_response": 3}, "wrong_type"),
        ({"conversations": [USER, ANSWER], "rejected_response": "no"}, "ambiguous_shape"),
        ({"instruction": "a", "output": "b", "rejected_response": "no"}, "ambiguous_shape"),
        ({**GOOD, "rejected_response": "no"}, "ambiguous_shape"),
        ({"messages": [USER, ANSWER], "rejected": "no"}, "ambiguous_shape"),
        ({**GOOD, "rejected": [ANSWER]}, "ambiguous_shape"),
        ({"messages": [USER, ANSWER], "rejected_response": "no", "rejected_messages": [USER]}, "ambiguous_shape"),
    ],
)
def test_another_answer_that_makes_none_is_refused(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    assert one(tmp_path, record).reason == reason


def test_what_only_looks_like_another_answer_says_nothing(tmp_path: Path) -> None:
    for beside in (False, 0, "", [], None):
        assert one(tmp_path, {**GOOD, "rejected": beside, "rejected_response": beside or None}) == one(tmp_path, GOOD)


# --- what is no data


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run `a`, its exports, and rows beside them, in the working folder."""
    monkeypatch.chdir(tmp_path)
    small_run(Path("a"))
    for trainer in ("hf", "llamafactory"):
        export("a", trainer=trainer, output=f"a.{trainer}")
    (tmp_path / "rows.jsonl").write_bytes(line(GOOD))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.jsonl").write_bytes(line(GOOD))
    shutil.copytree("a", "folder/a")
    return tmp_path


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a", "a: a run, not rows. config.yaml names the rows it was made of; score --config a/config.yaml -o OTHER"),
        ("a/values", "a/values: a part of the run a, not rows"),
        ("a/values/generation=0/part-00000.parquet", "part-00000.parquet: a part of the run a, not rows"),
        ("a/train/*/*.parquet", ".parquet: a part of the run a, not rows"),
        ("folder", "folder/a: a run, not rows"),
        ("a.hf", "a.hf: an export of a run of "),
        ("a.hf/export.json", "a.hf/export.json: an export of a run of "),
        ("a.llamafactory", "a.llamafactory: an export of a run of "),
    ],
)
def test_a_run_and_an_export_are_named_for_what_they_are(ours: Path, name: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        read_rows([name])
    assert told in str(caught.value)


def test_files_of_an_export_that_say_what_trains_are_rows(ours: Path) -> None:
    by_table = read_rows(["a.hf/train.parquet"])
    assert by_table.rows and isinstance(by_table.rows[0].record, Tokens)
    assert [row.record for row in read_rows(["a.llamafactory/train"]).rows] == [row.record for row in by_table.rows]
    assert len(read_rows(["rows.jsonl"]).rows) == 1
