"""An export beside its export.json: what `verify` finds, and what it never opens."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from exported import TOKEN_FORMS
from small_run import small_run
from tiny_files import command, contents

import alphatoken_curate
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.exports import verify as module
from alphatoken_curate.exports.export import export
from alphatoken_curate.exports.verify import verify_export
from alphatoken_curate.runs import manifest

RECORD = "export.json"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    export(small_run(tmp_path / "a"), trainer="hf", output=tmp_path / "a.hf", max_length=4)
    return tmp_path / "a.hf"


def files(place: Path) -> dict[str, str]:
    return {problem.file: problem.found for problem in verify_export(place)}


def record(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / RECORD).read_bytes())
    return found


@pytest.mark.parametrize("trainer", TOKEN_FORMS)
def test_every_form_as_it_was_written_has_no_problem(tmp_path: Path, trainer: str) -> None:
    run = small_run(tmp_path / "a")
    export(run, trainer=trainer, output=tmp_path / "e", binarize=trainer == "skyrl")
    shutil.copytree(tmp_path / "e", tmp_path / "moved")
    before = contents(tmp_path)
    assert verify_export(tmp_path / "moved") == []
    sources = [one.source for one in manifest.read(run).inputs]
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    done = command("verify", tmp_path / "moved")
    told = f"an export of a run of {sources[0]}{more} (mask 0, for {trainer}): every file is as export.json says."
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'moved'}: {told}\n", "")
    assert contents(tmp_path) == before


def test_every_flipped_bit_is_found(place: Path) -> None:
    names = sorted(contents(place).keys() - {RECORD})
    assert names == ["README.md", "dropped.jsonl", "train.parquet"]
    for name in names:
        data = (place / name).read_bytes()
        for bit in random.Random(1).sample(range(len(data) * 8), 10):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            (place / name).write_bytes(flipped)
            assert list(files(place)) == [name]
        (place / name).write_bytes(data)
    assert files(place) == {}


def test_what_is_cut_missing_added_or_no_file_is_named_by_the_command(place: Path) -> None:
    whole = (place / "train.parquet").read_bytes()
    (place / "train.parquet").write_bytes(whole[:-1])
    (place / "README.md").unlink()
    (place / "more").mkdir()
    (place / "more" / "\x1b[31m.parquet").write_bytes(b"")
    done = command("verify", place)
    assert done.code == 4 and done.out == "" and "\x1b[31m.p" not in done.err
    lines = done.err.splitlines()
    assert lines[0].startswith(f"README.md: missing: {RECORD} names it. restore it, or remove the folder")
    assert (
        lines[1].startswith(f"train.parquet: {len(whole) - 1} bytes, sha256 ") and f"written {len(whole)}" in lines[1]
    )
    assert lines[2].startswith("more/") and f"not named by {RECORD}. move it out" in lines[2]
    assert lines[3] == f"Error: {place}: 3 problems found." and len(lines) == 4
    (place / "train.parquet").unlink()
    (place / "train.parquet").mkdir()
    assert "missing" in files(place)["train.parquet"]


def test_links_are_not_followed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(place / "train.parquet", place.parent / "moved.parquet")
    (place / "train.parquet").symlink_to(place.parent / "moved.parquet")
    os.mkfifo(place / "pipe")
    (place / "folder").symlink_to(place.parent)
    opened: list[Path] = []
    real = module.digest
    monkeypatch.setattr(module, "digest", lambda path: opened.append(path) or real(path))  # type: ignore[func-returns-value]
    assert {name: found.partition(":")[0] for name, found in files(place).items()} == {
        "train.parquet": "a link or a device, not a file",
        "pipe": "not named by export.json",
        "folder": "not named by export.json",
    }
    assert sorted(path.name for path in opened) == ["README.md", "dropped.jsonl"]


@pytest.mark.parametrize(
    "name", ["../secret", "{0}/secret", "more/../../secret", "./README.md", "", "a\x00b", "/dev/zero"]
)
def test_no_file_outside_of_the_folder_is_opened(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = place.parent / "secret"
    secret.write_bytes(b"secret")
    name, about = name.format(place.parent), record(place)
    about["files"].append({**about["files"][0], "path": name})
    (place / RECORD).write_text(json.dumps(about))
    real = module.digest

    def guarded(path: Path) -> tuple[int, str]:
        assert path.parent == place and path.name in ("README.md", "dropped.jsonl", "train.parquet"), path
        return real(path)

    monkeypatch.setattr(module, "digest", guarded)
    assert list(files(place)) == [name] and "missing" in files(place)[name]
    ended = command("verify", place)
    assert ended.code == 4 and "missing" in ended.err and "Traceback" not in ended.err


FILE = {"path": "a", "bytes": 1, "sha256": "0"}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 1_000_000,
        b"null",
        b"\xff",
        b"{}",
        *(
            json.dumps({"files": odd}).encode()
            for odd in ([], {}, "x", [1], [{}], [{**FILE, "path": 3}], [{**FILE, "bytes": -1}], [{**FILE, "x": 1}])
        ),
        json.dumps({"files": [FILE, FILE]}).encode(),
    ],
    ids=range(15),
)
def test_a_torn_or_foreign_record_is_refused(place: Path, content: bytes) -> None:
    (place / RECORD).write_bytes(content)
    with pytest.raises(StoredDataError, match=r"export\.json: damaged, or not written by `export`"):
        verify_export(place)
    ended = command("verify", place)
    assert ended.code == 4 and RECORD in ended.err and ended.out == "" and "Traceback" not in ended.err


def test_a_huge_record_is_refused(place: Path) -> None:
    with (place / RECORD).open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(StoredDataError, match="more than"):
        verify_export(place)


def test_the_python_function_is_of_runs_and_names_the_command(place: Path) -> None:
    with pytest.raises(
        UsageError, match=r"an export of a run of .* To check its files: alphatoken-curate verify .*a\.hf"
    ):
        alphatoken_curate.verify(place)
