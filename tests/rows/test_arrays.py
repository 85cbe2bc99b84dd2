"""One JSON array as a file of rows: element by element, in any pieces, and every fault with its place."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows import arrays, containers
from alphatoken_curate.rows.arrays import _Scan
from alphatoken_curate.rows.read import ReadRows, read_rows

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Add {i} and 1.", "input": "", "output": f'Say "{i + 1}", \\ no [more] {{}}.'} for i in range(7)
]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "json": lambda data: data,
    "json.gz": gzip.compress,
    "json.zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def read(folder: Path, data: bytes | str, suffix: str = "json") -> ReadRows:
    path = folder / f"data.{suffix}"
    path.write_bytes(PACK.get(suffix, PACK["json"])(data if isinstance(data, bytes) else data.encode()))
    return read_rows([str(path)])


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("indent", [None, 0, 1, 4])
def test_an_array_is_read_as_lines_are(tmp_path: Path, suffix: str, indent: int | None) -> None:
    lines = read(tmp_path, "\n".join(map(json.dumps, ROWS)), "jsonl")
    result = read(tmp_path, json.dumps(ROWS, indent=indent) + "\n\n", suffix)
    assert [row.record for row in result.rows] == [row.record for row in lines.rows] and not result.bad
    assert [(row.row_id, row.line) for row in result.rows] == [(i, i + 1) for i in range(7)]


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"\n \t\r\n", b"\xef\xbb\xbf\n"])
def test_what_may_stand_in_front(tmp_path: Path, start: bytes) -> None:
    assert len(read(tmp_path, start + json.dumps(ROWS).encode()).rows) == 7


def test_an_array_of_any_name_whose_bracket_stands_alone(tmp_path: Path) -> None:
    assert len(read(tmp_path, json.dumps(ROWS, indent=1), "jsonl").rows) == 7
    # There a line is a row, though it be a list: a fault stays within its own line.
    mixed = read(tmp_path, "[1]\n" + json.dumps(ROWS[0]), "jsonl")
    assert len(mixed.rows) == 1 and [bad.line for bad in mixed.bad] == [1]
    assert mixed.bad[0].message.endswith("A file that is one JSON array is named .json")


def test_lines_in_a_file_of_that_name_are_lines(tmp_path: Path) -> None:
    assert len(read(tmp_path, "\n".join(map(json.dumps, ROWS))).rows) == 7


def test_a_bad_element_is_named_by_its_number_and_touches_no_other(tmp_path: Path) -> None:
    elements = [json.dumps(row) for row in ROWS]
    elements[2:2] = ['{"instruction": }', '"text"', '{"output": "x", "output": "y"}', "{} {}", "NaN"]
    result = read(tmp_path, "[\n" + ",\n".join(elements) + "]")
    reasons = ["invalid_json", "not_an_object", "duplicate_key", "two_values", "not_a_number"]
    assert [(bad.line, bad.reason) for bad in result.bad] == list(zip(range(3, 8), reasons, strict=True))
    assert [row.line for row in result.rows] == [1, 2, *range(8, 13)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    whole = read(tmp_path, json.dumps(ROWS, indent=2))
    monkeypatch.setattr(containers, "CHUNK_BYTES", size)
    assert read(tmp_path, json.dumps(ROWS, indent=2)) == whole


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(st.lists(VALUES), st.integers(1, 9), st.sampled_from([None, 0, 2]), st.booleans())
def test_the_scanner_finds_what_the_standard_library_finds(
    values: list[Any], size: int, indent: int | None, ascii_only: bool
) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    scan = _Scan("a.json")
    found = [item for i in range(0, len(data), size) for item in scan.feed(data[i : i + size])]
    scan.end()
    assert [number for number, _ in found] == list(range(1, len(values) + 1))
    assert [json.loads(element.decode("utf-8", "surrogatepass")) for _, element in found] == values


FAULTS = {
    "trailing comma": ('[\n{"a": 1},\n{"a": 2},\n]', "line 4 of the file: a comma before the end of the array, after"),
    "two commas": ('[{"a": 1},\n,{"a": 2}]', "line 2 of the file: a comma without an element before it, after element"),
    "cut within": ('[\n{"a": 1},\n{"a": ', "line 3 of the file: the file ends within the array, after 1 whole element"),
    "cut in a string": ('[\n{"a": "x\\', "line 2 of the file: the file ends within the array, after 0 whole elements"),
    "cut before the end": ('[{"a": 1}', "line 1 of the file: the file ends within the array, after 0 whole elements"),
    "text behind": ('[{"a": 1}]\n\n{"a": 2}', "line 3 of the file: text behind the end of the array. A file holds"),
    "two arrays": ("[]\n[]", "line 2 of the file: text behind the end of the array"),
    "brace": ('[{"a": 1}\n}', "line 2 of the file: a } where the array is open. Close it by ]"),
    "object": ('{\n  "train": [{"a": 1}]\n}', "one JSON object over several lines. Rows are objects on lines of their"),
    "UTF-16": ("[1]".encode("utf-16"), "UTF-16 text, which is not read. Save it as UTF-8"),
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", FAULTS)
def test_an_array_that_is_not_whole_is_refused_with_the_place(tmp_path: Path, name: str, suffix: str) -> None:
    data, told = FAULTS[name]
    with pytest.raises(InputError) as caught:
        read(tmp_path, data, suffix)
    assert f"data.{suffix}: {told}" in str(caught.value)


def test_an_empty_array_has_no_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No row in"):
        read(tmp_path, " [ \n ] ")


def test_an_element_that_is_too_long_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (arrays, containers):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 300)
    long = {"prompt": "x" * 400, "completion": "y"}
    result = read(tmp_path, json.dumps([*ROWS[:2], long, *ROWS[2:]], indent=1))
    assert [(bad.line, bad.reason) for bad in result.bad] == [(3, "line_too_long")] and len(result.rows) == 7


@pytest.mark.long
@pytest.mark.parametrize("filler", ["rows", "spaces", "one string"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, filler: str) -> None:
    """A file of 100 MB, or its like, in the memory of some rows."""
    row = json.dumps({"prompt": "p" * 5000, "completion": "c", "tail": [1] * 500})
    path = tmp_path / "data.json"
    with path.open("w") as sink:
        sink.write("[")
        for _ in range(200):
            sink.write(" " * 500_000 if filler == "spaces" else "")
            sink.write(f'{{"bad": "{"[" * 500_000}"}},' if filler == "one string" else "")
            sink.write(",".join([row] * 77) + ",")
        sink.write(row + "]")
    code = (
        "import resource, sys\nfrom alphatoken_curate.rows.read import RowStream\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "stream = RowStream([sys.argv[1]], limit=9); list(stream); before = peak()\n"
        "stream = RowStream([sys.argv[1]]); n = sum(1 for _ in stream); print(n, len(stream.bad), peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    rows, bad, grown = map(int, done.stdout.split())
    assert (rows, bad) == (200 * 77 + 1, 200 if filler == "one string" else 0)
    assert grown < 30_000  # KiB
