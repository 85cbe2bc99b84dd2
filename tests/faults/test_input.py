"""Bad, odd and hostile input, whole: each fault is told by its line, touches no other row, and memory stays bounded.

`pytest --rewrite` of this file writes what the fourteen faults give into the table of tests/benchmarks/README.md.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from light import fake_sums
from pyarrow import parquet
from tiny import tiny_model
from tiny_files import NAN_TOKEN, command, quiet, token_records, write_jsonl

from alphatoken_curate import InputError, ScoreConfig, scan, score, verify
from alphatoken_curate.rows import tables
from alphatoken_curate.rows.read import read_rows
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import components
from alphatoken_curate.scoring import loop
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.signals.stored import RowResult
from alphatoken_curate.tokens.tokenise import AnyRow, branches

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "tests" / "benchmarks" / "README.md"
ROWS, LINE = 1000, 501

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": lambda data: data,
    ".jsonl.gz": lambda data: gzip.compress(data, 1),
    ".jsonl.zst": lambda data: zstandard.ZstdCompressor().compress(data),
}

# --- the fourteen faults


@dataclass(frozen=True)
class Fault:
    """A fault, what takes the place of line `at` (None: the whole file is `data`), and what ours makes of it."""

    data: bytes
    reason: str | None
    at: int | None = LINE


def good(number: int) -> bytes:
    return json.dumps({"id": number, "prompt": f"{number} + 1 =", "completion": f" {number + 1}"}).encode()


_RECORD = b'{"id": 501, "prompt": %s, "completion": "b"}'
FAULTS = {
    "cut object": Fault(good(LINE)[:30], "invalid_json"),
    "invalid UTF-8": Fault(_RECORD % b'"\xff\xfe"', "invalid_utf8"),
    "null or missing prompt": Fault(_RECORD % b"null", "null_field"),
    "wrong types": Fault(_RECORD % b'{"text": 3}', "wrong_type"),
    "JSON array as row": Fault(b'["a", "b"]', "not_an_object"),
    "duplicate key": Fault(_RECORD % b'"a", "prompt": "c"', "duplicate_key"),
    "`NaN` literal": Fault(_RECORD % b'"a", "weight": NaN', "not_a_number"),
    "UTF-8 BOM": Fault(b"\xef\xbb\xbf" + good(1), None, at=1),
    "lone surrogate": Fault(_RECORD % b'"\\ud83d"', "lone_surrogate"),
    "two objects on a line": Fault(good(LINE) + b" " + good(LINE), "two_values"),
    "integer > 2^64": Fault(_RECORD.replace(b"501", b"18446744073709551617") % b'"a"', "integer_too_large"),
    "nesting 100,000": Fault(_RECORD % (b"[" * 100_000 + b"]" * 100_000), "too_deep"),
    "last line cut": Fault(good(ROWS)[:30], "invalid_json", at=ROWS),
    "empty file": Fault(b"", None, at=None),
}


def written(folder: Path, fault: Fault, suffix: str) -> Path:
    lines = [good(number) for number in range(1, ROWS + 1)]
    data = fault.data
    if fault.at is not None:
        lines[fault.at - 1] = fault.data
        data = b"\n".join(lines) + (b"" if fault.at == ROWS else b"\n")
    path = folder / f"rows{suffix}"
    path.write_bytes(PACK[suffix](data))
    return path


def outcome(path: Path) -> str:
    """What comes of a file, in the words of the table."""
    try:
        result = read_rows([str(path)])
    except InputError as error:
        assert path.name in str(error)
        return "error, file named"
    told = "".join(f", line {bad.line}: `{bad.reason}`" for bad in result.bad)
    return f"{len(result.rows)}{told}"


@pytest.mark.one_in(5)
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("case", FAULTS)
def test_each_of_the_fourteen_faults_costs_its_own_row_alone(tmp_path: Path, case: str, suffix: str) -> None:
    fault = FAULTS[case]
    path = written(tmp_path, fault, suffix)
    if fault.at is None:
        with pytest.raises(InputError, match=rf"No row in .*rows\{suffix}"):
            read_rows([str(path)])
        return
    result = read_rows([str(path)])
    wanted = [] if fault.reason is None else [(fault.at - 1, path.name, fault.at, fault.reason)]
    assert [(bad.row_id, bad.source, bad.line, bad.reason) for bad in result.bad] == wanted
    kept = [number for number in range(1, ROWS + 1) if not wanted or number != fault.at]
    assert [(row.row_id, row.line, row.id) for row in result.rows] == [(n - 1, n, str(n)) for n in kept]
    assert [row.record.completion for row in result.rows] == [f" {n + 1}" for n in kept]  # type: ignore[union-attr]
    if wanted:
        assert result.bad[0].message and result.bad[0].excerpt.isprintable()


RIVALS = {
    "cut object": ("999", 'error "row 500"', "error, no line", 'error "row 500"', 'error "line 502"'),
    "invalid UTF-8": ("498", "1000 (passes)", "error, no line", "1000 (passes)", 'error "line 502"'),
    "null or missing prompt": ("999", "1000", "1000", "1000", "1000"),
    "wrong types": ("1000", "1000, all columns become Json", "error, no line", 'error "row 500"', "1000"),
    "JSON array as row": ("crash", 'error "row 0"', "error", 'error "row 500"', "binder error"),
    "duplicate key": ("1000", "error", "1000", "error", 'error "line 501"'),
    "`NaN` literal": ("999", "1000", "error", "1000", "1000"),
    "UTF-8 BOM": ("999", "1000", "error", "1000", "error"),
    "lone surrogate": ("999", "error", "1000", "error", "error"),
    "two objects on a line": ("999", "1001", "error", "1001", "error"),
    "integer > 2^64": ("1000", "1000, id becomes float64", "error", "1000, id becomes double", "1000"),
    "nesting 100,000": ("999", "error", "error", "error", "error"),
    "last line cut": ("999", "error", "error", "error", "error"),
    "empty file": ("0", "`StopIteration`", "error", "error", "error"),
}
"""What others made of the same files, measured once."""

_BEGIN, _END = "<!-- test: faults -->\n", "<!-- end of faults -->"


def table() -> str:
    heads = (
        "alphatoken-curate",
        "datatrove 0.10.1",
        "HF datasets 5.2.0",
        "polars 2.1.0",
        "pyarrow 26.0.1",
        "duckdb 2.0.0",
    )
    lines = [f"| fault | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for case, fault in FAULTS.items():
            found = {outcome(written(Path(folder), fault, suffix)) for suffix in PACK}
            assert len(found) == 1, "the same in every container"
            lines.append(f"| {' | '.join((case, found.pop(), *RIVALS[case]))} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    start, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    return text[:start] + table() + text[end:]


def test_the_table_of_faults_is_what_comes_of_them(same_text: Callable[[Path, str], None]) -> None:
    same_text(PAGE, with_table(PAGE.read_text(encoding="utf-8")))
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text.replace("`too_deep`", "`fine`")) == text


# --- the same in columns


def _columns(column: Any) -> pa.Table:
    return pa.table({"prompt": column, "completion": ["b"] * len(column)})


_TEXT = ["a", "b", "c"]
COLUMNS: dict[str, tuple[pa.Table, list[int], str | None]] = {
    "wrong type": (_columns(pa.array([1, 2, 3])), [1, 2, 3], "wrong_type"),
    "decimal": (_columns(pa.array([1, 2, 3], pa.decimal128(5, 2))), [1, 2, 3], "wrong_type"),
    "struct": (_columns(pa.array([{"a": {"b": 1}}] * 3)), [1, 2, 3], "wrong_type"),
    "binary": (_columns(pa.array([b"a", b"b", b"c"])), [1, 2, 3], "wrong_type"),
    "time": (_columns(pa.array([1, 2, 3], pa.timestamp("ns"))), [1, 2, 3], "wrong_type"),
    "null": (_columns(pa.array(["a", None, "c"])), [2], "null_field"),
    "invalid UTF-8": (_columns(pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())), [2], "invalid_utf8"),
    "null list": (pa.table({"messages": pa.array([None], pa.list_(pa.string()))}), [1], "null_field"),
    "empty list": (pa.table({"messages": pa.array([[]], pa.list_(pa.string()))}), [1], "no_response"),
    "list of null": (pa.table({"messages": pa.array([[None]], pa.list_(pa.string()))}), [1], "wrong_type"),
    "all null": (pa.table({"messages": pa.nulls(2)}), [1, 2], "null_field"),
    "missing column": (pa.table({"prompt": ["a"]}), [1], "unknown_shape"),
    "dictionary": (_columns(pa.array(_TEXT).dictionary_encode()), [], None),
    "large string": (_columns(pa.array(_TEXT, pa.large_string())), [], None),
    "string view": (_columns(pa.array(_TEXT, pa.string_view())), [], None),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_faults_in_columns(tmp_path: Path, case: str) -> None:
    columns, lines, reason = COLUMNS[case]
    parquet.write_table(columns, tmp_path / "rows.parquet", row_group_size=2)
    result = read_rows([str(tmp_path / "rows.parquet")])
    assert [(bad.line, bad.reason) for bad in result.bad] == [(line, reason) for line in lines]
    assert [row.line for row in result.rows] == [n for n in range(1, columns.num_rows + 1) if n not in lines]


def test_parquet_without_rows_or_row_groups(tmp_path: Path) -> None:
    empty = _columns(pa.array(_TEXT)).slice(0, 0)
    with parquet.ParquetWriter(tmp_path / "none.parquet", empty.schema):
        pass
    assert parquet.read_metadata(tmp_path / "none.parquet").num_row_groups == 0
    parquet.write_table(empty, tmp_path / "empty.parquet")
    for name in ("none.parquet", "empty.parquet"):
        with pytest.raises(InputError, match=f"No row in .*{name}"):
            read_rows([str(tmp_path / name)])


# --- every row that is read is accounted for

_FAILS = 45
"""A row with this token is one whose loss is not finite, to the scorer below."""


def _signals(self: ShardScorer, _: int, rows: list[AnyRow], *__: object) -> list[RowResult | None]:
    """Of nothing, and rows that fail."""

    def of(row: AnyRow) -> RowResult:
        names = ("nll", "entropy", *components(self.spec.config.estimator).of_value, "value")
        parts = tuple(
            {name: np.where(p.response, p.input_ids, np.nan).astype(np.float32) for name in names}
            for p in branches(row)
        )
        pair = len(parts) > 1
        return RowResult(branches=parts, omega=0.05 if pair else None, margin=0.0 if pair else None)

    return [None if any(_FAILS in part.input_ids for part in branches(row)) else of(row) for row in rows]


_ids = st.lists(st.integers(3, _FAILS), min_size=1, max_size=6)
_name = st.none() | st.integers(-3, 3) | st.sampled_from(["a", "1", "../x", ""])


@st.composite
def _lines(draw: st.DrawFn) -> tuple[str, str]:
    """A line and what becomes of its row: good, failed or rejected."""
    ids, start = draw(_ids), draw(st.integers(0, 3))
    record = {"id": draw(_name), "input_ids": ids, "labels": [-100] * start + ids[start:]}
    fate = draw(st.sampled_from(["good"] * 6 + ["cut", "label", "shape", "range", "blank"]))
    text = json.dumps(record)
    if fate == "blank":
        return "  ", "blank"
    spoiled = {
        "cut": text[:-3],
        "label": json.dumps(record | {"labels": [*record["labels"][:-1], 1]}),
        "shape": json.dumps({"tokens": ids}),
        "range": json.dumps(record | {"input_ids": [*ids, 10**6], "labels": [-100] * len(ids) + [10**6]}),
    }
    if fate in spoiled:
        return spoiled[fate], "rejected"
    if len(ids) != len(record["labels"]) or not any(label != -100 for label in record["labels"][1:]):
        return text, "rejected"
    return text, "failed" if _FAILS in ids else "scored"


def _accounted(model: str, items: list[tuple[str, str]], target: str | None, per_shard: int, suffix: str) -> None:
    wanted = [fate for _, fate in items if fate != "blank"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / f"rows{suffix}"
        data.write_bytes(PACK[suffix]("".join(line + "\n" for line, _ in items).encode()))
        config = {"model": model, "rows_per_shard": per_shard, "batch_tokens": 64, "bad_rows": "quarantine"}
        run = Path(folder) / "run"
        usable = sum(fate != "rejected" for fate in wanted)
        try:
            made = score(ScoreConfig(data=(str(data),), target=target, layers=1, **config), run)  # type: ignore[arg-type]
        except InputError as error:
            if "no row was scored" in str(error):
                assert "failed" in wanted and wanted.count("scored") <= (0 if target else max(1, usable // 10))
            else:
                assert usable < (1 if target else 2)
            return
        counts = made.manifest.counts
        assert counts.read == len(wanted) == counts.scored + counts.target + counts.failed + counts.rejected
        found = scan(run).select("row_id", "line", "status", "id").collect()
        assert found["row_id"].to_list() == list(range(len(wanted)))
        assert found["line"].to_list() == [n for n, (_, fate) in enumerate(items, 1) if fate != "blank"]
        status = found["status"].to_list()
        assert [now for now in status if now != "target"] == [
            fate for fate, now in zip(wanted, status, strict=True) if now != "target"
        ]
        assert all(fate != "rejected" for fate, now in zip(wanted, status, strict=True) if now == "target")
        assert counts.target == status.count("target") == (0 if target else max(1, usable // 10))
        given_ids = [json.loads(line)["id"] for line, fate in items if fate in ("scored", "failed")]
        assert [one for one, fate in zip(found["id"], wanted, strict=True) if fate in ("scored", "failed")] == [
            None if one is None else str(one) for one in given_ids
        ]


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring without a model or a mask, and without waiting for a disk."""
    monkeypatch.setattr(ShardScorer, "__call__", _signals)
    monkeypatch.setattr(ShardScorer, "ready", lambda *_: None)
    monkeypatch.setattr(ShardScorer, "gradient", lambda *_: fake_sums("tokens"))
    monkeypatch.setattr(loop, "mask_and_card", lambda run, *_, **__: (None, manifest.read(run)))
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _campaign(examples: int) -> Callable[[Any], Any]:
    def decorate(check: Any) -> Any:
        items = st.lists(_lines(), min_size=1, max_size=12)
        drawn = given(items, st.booleans(), st.integers(1, 5), st.sampled_from(sorted(PACK)))
        return settings(
            max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
        )(drawn(check))

    return decorate


def _check_rows(models: dict[str, str], folder: Path, items: Any, has_target: bool, each: int, suffix: str) -> None:
    target = folder / "target.jsonl"
    if not target.exists():
        write_jsonl(target, token_records(2, seed=9))
    _accounted(models["base"], items, str(target) if has_target else None, each, suffix)


@pytest.mark.usefixtures("light")
@_campaign(40)
def test_any_rows_are_accounted_for_and_keep_their_order(
    models: dict[str, str], folder: Path, items: Any, has_target: bool, each: int, suffix: str
) -> None:
    _check_rows(models, folder, items, has_target, each, suffix)


@pytest.mark.stress
@pytest.mark.usefixtures("light")
@_campaign(2000)
def test_two_thousand_sets_of_rows_are_accounted_for(
    models: dict[str, str], folder: Path, items: Any, has_target: bool, each: int, suffix: str
) -> None:
    _check_rows(models, folder, items, has_target, each, suffix)


# --- bytes of any kind


def child(script: str, *arguments: object, timeout: float = 900) -> dict[str, Any]:
    """What a script of this folder prints, run in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _fuzzed(most: int, seconds: float) -> None:
    found = child("fuzz_rows.py", most, seconds, timeout=40 * seconds)
    assert found["inputs"] == most or found["seconds"] >= seconds
    assert found["refused"] > 0 and found["rows"] > 0 and found["bad"] > 0
    assert found["peak"] < 300


@pytest.mark.long
def test_damaged_and_random_files_are_read_or_refused() -> None:
    _fuzzed(3_000, 15)


@pytest.mark.stress
def test_a_hundred_thousand_damaged_and_random_files() -> None:
    _fuzzed(100_000, 60)


# --- large, packed and odd files


def _repeated(path: Path, piece: bytes, times: int, around: tuple[bytes, bytes] = (b"", b"")) -> str:
    """A file of `piece` many times over, packed as its name says, made in little memory."""
    packer: Any = {".gz": zlib.compressobj(1, zlib.DEFLATED, 31), ".zst": zstandard.ZstdCompressor(1).compressobj()}
    with path.open("wb") as sink:
        if path.suffix == ".jsonl":
            sink.write(around[0])
            for _ in range(times):
                sink.write(piece)
            sink.write(around[1])
        else:
            packed = packer[path.suffix]
            for part in (around[0], *[piece] * times, around[1]):
                sink.write(packed.compress(part))
            sink.write(packed.flush())
    return str(path)


ENDS = good(1) + b'\n{"id": 2, "completion": "b", "prompt": "', b'"}\n' + good(3) + b"\n"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("suffix", PACK)
def test_a_line_of_200_megabytes_is_refused_alone_in_little_memory(tmp_path: Path, suffix: str) -> None:
    found = child("read_rows.py", _repeated(tmp_path / f"rows{suffix}", b"x" * 10**6, 200, ENDS))
    assert (found["rows"], found["bad"]) == ([1, 3], [[2, "line_too_long"]])
    assert found["peak"] - found["before"] < 250


def test_a_line_of_60_megabytes_is_read(tmp_path: Path) -> None:
    found = child("read_rows.py", _repeated(tmp_path / "rows.jsonl", b"x" * 10**6, 60, ENDS))
    assert (found["rows"], found["bad"]) == ([1, 2, 3], [])
    assert found["peak"] - found["before"] < 60 * 8


@pytest.mark.one_in(4)
@pytest.mark.parametrize("piece", [b" " * 10**6, b"\n" * 10**6], ids=["one line", "empty lines"])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_bomb_of_gigabytes_is_refused_in_little_memory(tmp_path: Path, suffix: str, piece: bytes) -> None:
    path = _repeated(tmp_path / f"bomb{suffix}", piece, 2_000)
    assert os.path.getsize(path) * 100 < 2 * 10**9
    found = child("read_rows.py", path)
    assert "decompression bomb" in found["refused"] and "bomb.jsonl" in found["refused"]
    assert found["peak"] - found["before"] < 250


@pytest.mark.stress
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_ten_megabytes_that_hold_ten_thousand(tmp_path: Path, suffix: str) -> None:
    found = child("read_rows.py", _repeated(tmp_path / f"bomb{suffix}", b"x" * 10**7, 1_000))
    assert "decompression bomb" in found["refused"]
    assert found["peak"] - found["before"] < 250


@pytest.mark.long
def test_a_value_that_many_rows_of_parquet_repeat_is_a_bomb(tmp_path: Path) -> None:
    value = pa.array(["x" * 8_000_000])
    places = pa.array(np.zeros(10_000, np.int32))
    columns = _columns(pa.DictionaryArray.from_arrays(places, value))
    path = tmp_path / "bomb.parquet"
    parquet.write_table(columns, path, compression="zstd", dictionary_pagesize_limit=10**8, store_schema=False)
    assert path.stat().st_size < 20_000
    found = child("read_rows.py", path)
    assert "decompression bomb" in found["refused"]
    assert found["peak"] - found["before"] < 1500


def test_a_value_of_parquet_that_is_too_large(tmp_path: Path) -> None:
    texts = pa.array(["a", "x" * (65 * 2**20), "c"])
    parquet.write_table(_columns(texts), tmp_path / "rows.parquet", compression="zstd", use_dictionary=False)
    result = read_rows([str(tmp_path / "rows.parquet")])
    assert [row.line for row in result.rows] == [1, 3]
    assert [(bad.line, bad.reason) for bad in result.bad] == [(2, "line_too_long")]


def test_a_row_group_that_unpacks_to_too_much_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write_table(_columns(pa.array(["x" * 2**25])), tmp_path / "rows.parquet", compression="zstd")
    monkeypatch.setattr("alphatoken_curate.rows.containers.MAX_RATIO_FLOOR_BYTES", 2**24)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(InputError, match="decompression bomb"):
        read_rows([str(tmp_path / "rows.parquet")])


def test_few_rows_are_unpacked_at_once_where_one_may_be_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = _columns(pa.array([f"{i}" for i in range(600)]))
    parquet.write_table(columns, tmp_path / "rows.parquet", row_group_size=300)
    asked: list[int] = []
    whole = parquet.ParquetFile.iter_batches

    def spied(self: Any, batch_size: int, **how: Any) -> Any:
        asked.append(batch_size)
        return whole(self, batch_size=batch_size, **how)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", spied)
    assert len(read_rows([str(tmp_path / "rows.parquet")]).rows) == 600
    monkeypatch.setattr(tables, "MAX_RATIO_FLOOR_BYTES", 50_000)
    assert [row.line for row in read_rows([str(tmp_path / "rows.parquet")]).rows] == list(range(1, 601))
    assert asked[:2] == [64, 64] and all(8 <= size < 64 for size in asked[2:])


def test_more_bad_rows_than_can_be_told_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphatoken_curate.rows.read.MAX_BAD_ROWS", 10)
    data = write_jsonl(tmp_path / "rows.jsonl", ["[]"] * 10)
    assert len(read_rows([data]).bad) == 10
    with pytest.raises(InputError, match=r"rows\.jsonl: more than 10 rows .* line 11: not_an_object"):
        read_rows([write_jsonl(tmp_path / "rows.jsonl", ["[]"] * 30)])


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_runs_of_empty_lines_are_counted_across_chunks(
    tmp_path: Path, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alphatoken_curate.rows.containers.CHUNK_BYTES", 64)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(end * 1000 + good(1) + end * 777 + good(2)[:20] + end * 333 + good(3))
    result = read_rows([str(path)])
    assert [row.line for row in result.rows] == [1001, 1001 + 777 + 333]
    assert [bad.line for bad in result.bad] == [1001 + 777]


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("x" * 10_000, str(tmp_path / ("y" * 10_000 + ".jsonl")), "a\0b.jsonl", "x" * 10_000 + "/*.jsonl"):
        with pytest.raises(InputError):
            read_rows([name])


# --- numbers that are none


@pytest.fixture(scope="module")
def infinite(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of base whose embedding of one token is infinite."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(models["base"])
        with torch.no_grad():
            model.get_input_embeddings().weight[NAN_TOKEN] = torch.inf
        folder = tmp_path_factory.mktemp("infinite") / "model"
        model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_loss_that_is_not_finite_fails_its_row_and_the_run_goes_on(
    kind: str, infinite: str, models: dict[str, str], tmp_path: Path
) -> None:
    records = token_records(12)
    for i in (3, 7):
        records[i]["input_ids"][0], records[i]["labels"][0] = NAN_TOKEN, -100
    data = write_jsonl(tmp_path / "rows.jsonl", records)
    target = write_jsonl(tmp_path / "target.jsonl", token_records(2, seed=9))
    model = models["broken"] if kind == "nan" else infinite
    ended = command("score", data, "--target", target, "--model", model, "--layers", 1, "-o", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "10 scored of 12 (2 failed)" in ended.out
    found = scan(tmp_path / "run").collect()
    assert found.filter(status="failed")["row_id"].to_list() == [3, 7]
    stored = found.filter(status="scored").explode("response", "value").filter("response")["value"]
    assert len(stored) and stored.is_finite().all()
    assert verify(tmp_path / "run") == []


def test_a_model_of_logits_of_minus_infinity_is_refused(tmp_path: Path) -> None:
    model = tiny_model("phi", dtype=torch.float32)
    with torch.no_grad(), quiet():
        model.lm_head.bias.fill_(-torch.inf)
        model.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", token_records(12))
    ended = command("score", data, "--model", tmp_path / "model", "--layers", 1, "-o", tmp_path / "run")
    assert ended.code == 2 and "its logits are not finite: some weight is NaN or infinite" in ended.err


def test_rows_of_one_token_over_and_over_are_scored(models: dict[str, str], tmp_path: Path) -> None:
    rows = [{"input_ids": [7] * n, "labels": [-100] + [7] * (n - 1)} for n in (2, 3, 9, 40)]
    data, target = write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "target.jsonl", token_records(2))
    flags = ("--target", target, "--model", models["tuned"], "--reference", models["base"], "--layers", 1)
    assert command("score", data, *flags, "-o", tmp_path / "run").code == 0
    found = scan(tmp_path / "run").explode("response", "value").filter("response").collect()
    assert len(found) == 1 + 2 + 8 + 39 and found["value"].is_finite().all()
    assert verify(tmp_path / "run") == []


# --- ids


def test_ids_that_repeat_are_missing_or_are_of_two_kinds(models: dict[str, str], tmp_path: Path) -> None:
    ids: list[Any] = ["a", "a", 1, "1", None, 1, "", "../x", -5]
    records = [record | {"id": one} for record, one in zip(token_records(len(ids)), ids, strict=True)]
    del records[4]["id"]
    data = write_jsonl(tmp_path / "rows.jsonl", [*records, records[0] | {"id": True}, records[0] | {"id": [1]}])
    target = write_jsonl(tmp_path / "target.jsonl", token_records(2, seed=9))
    flags = ("--target", target, "--model", models["base"], "--layers", 1, "--bad-rows", "quarantine")
    assert command("score", data, *flags, "-o", tmp_path / "run").code == 0
    found = scan(tmp_path / "run").collect()
    assert found["row_id"].to_list() == list(range(len(ids) + 2))
    assert found["id"].to_list() == ["a", "a", "1", "1", None, "1", "", "../x", "-5", None, None]
    assert found["status"].to_list() == ["scored"] * len(ids) + ["rejected"] * 2
    assert found["input_ids"].to_list()[: len(ids)] == [record["input_ids"] for record in records]
    # Rows are told by their number; an id that several have is not enough to show one.
    assert command("show", tmp_path / "run", "--row", 1).code == 0
    several = command("show", tmp_path / "run", "--id", "a")
    assert several.code == 2 and "rows 0, 1 have the id" in several.err
