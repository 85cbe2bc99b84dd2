"""Folders of `save_to_disk`, of one split or several, and files of Arrow."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny_files import quiet

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows import containers
from alphatoken_curate.rows.read import Reading, RowStream, read_rows

datasets: Any = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def without_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    with quiet():
        yield
    datasets.enable_progress_bars()


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "id": i} for i in range(start, start + count)]


def ids(data: str, **reading: Any) -> list[str | None]:
    return [row.id for row in RowStream([data], reading=Reading(**reading))]


def test_the_files_of_a_saved_dataset_in_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows(25)).save_to_disk(folder, num_shards=3)
    (folder / "cache-0123.arrow").write_bytes(b"not one of them")
    result = read_rows([str(folder)])
    assert [row.id for row in result.rows] == [str(i) for i in range(25)]
    names = [f"data-{n:05d}-of-00003.arrow" for n in range(3)]
    assert [file.source for file in result.files] == names
    digests = [f"sha256:{hashlib.sha256((folder / name).read_bytes()).hexdigest()}" for name in names]
    assert [file.digest for file in result.files] == digests
    assert [(row.source, row.line) for row in result.rows][8:10] == [(names[0], 9), (names[1], 1)]
    # Named by itself, and found below another folder.
    assert [row.id for row in read_rows([str(folder / names[1])]).rows] == [str(i) for i in range(9, 17)]
    assert [row.id for row in read_rows([str(tmp_path)]).rows] == [str(i) for i in range(25)]


def test_columns_of_json_are_parsed(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    datasets.Dataset.from_list([{"messages": chat}], features=features).save_to_disk(tmp_path / "saved")
    record: Any = read_rows([str(tmp_path / "saved")]).rows[0].record
    assert record.messages == chat


def test_a_split_of_several(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(rows(3)), "test": datasets.Dataset.from_list(rows(2, 10))}
    folder = str(tmp_path / "saved")
    datasets.DatasetDict(parts).save_to_disk(folder)
    assert ids(folder) == ids(folder, split="train") == ids(f"{folder}:train") == ["0", "1", "2"]
    assert ids(folder, split="test") == ids(f"{folder}:test") == ids(f"{folder}:test", split="train") == ["10", "11"]
    with pytest.raises(InputError, match=r"it has no split 'dev', but train, test\. Name one of them with --split"):
        ids(folder, split="dev")
    with pytest.raises(InputError, match=r"saved: a dataset of several splits\. Name it itself, with --split"):
        ids(str(tmp_path))


def test_a_file_with_a_footer(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(9))
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=4)
    assert ids(str(tmp_path / "rows.arrow")) == [str(i) for i in range(9)]


@pytest.mark.parametrize("change", ["cut", "flipped", "empty"])
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, change: str) -> None:
    datasets.Dataset.from_list(rows(50)).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    data = bytearray(path.read_bytes())
    if change == "flipped":
        data[len(data) // 2 : len(data) // 2 + 200] = b"\xff" * 200
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b""}.get(change, data))
    with pytest.raises(InputError, match=r"data-00000-of-00001\.arrow: not a whole Arrow file: .* Get the file again"):
        read_rows([str(tmp_path / "saved")])


def test_a_state_that_names_files_elsewhere_is_not_followed(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows(2)).save_to_disk(tmp_path / "other")
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows(2)).save_to_disk(folder)
    names = [{"filename": "../other/data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    with pytest.raises(InputError):
        read_rows([str(folder)])


def test_a_row_that_is_too_large_is_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphatoken_curate.rows.batches.MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(containers, "MAX_LINE_BYTES", 2000)
    large = [*rows(3), {"prompt": "x" * 3000, "completion": "y", "id": 3}, *rows(3, 4)]
    datasets.Dataset.from_list(large).save_to_disk(tmp_path / "saved")
    result = read_rows([str(tmp_path / "saved")])
    assert [(bad.line, bad.reason) for bad in result.bad] == [(4, "line_too_long")] and len(result.rows) == 6


@pytest.mark.long
def test_memory_is_that_of_some_batches(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"prompt": ["p" * 20_000] * 6000, "completion": ["c"] * 6000})
    made.save_to_disk(tmp_path / "saved")
    code = (
        "import re, sys\nfrom alphatoken_curate.rows.read import RowStream\n"
        # what is mapped of the file is not held
        "held = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "stream, most = iter(RowStream([sys.argv[1]])), 0\nnext(stream); before = held()\n"
        "for number, _ in enumerate(stream): most = max(most, held()) if number % 50 == 0 else most\n"
        "print(number, most - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved")], capture_output=True, text=True, check=True
    )
    number, grown = map(int, done.stdout.split())
    assert number == 5998 and grown < 30_000  # KiB, of 120 MB
