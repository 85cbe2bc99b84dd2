"""Check an export: each file beside what export.json says of it. Reports problems, repairs nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.exports.guide import RECORD
from alphatoken_curate.reading.verify import Problem
from alphatoken_curate.runs.atomic import digest
from alphatoken_curate.runs.documents import Unreadable, decode, unsealed
from alphatoken_curate.runs.manifest import File

AGAIN = "remove the folder and run the `export` command that made it again"
_MOST_BYTES = 64 << 20


def verify_export(folder: Path) -> list[Problem]:
    """Every file that is not as export.json says, is missing, or is there and not named; an empty list where none is.

    Only files that lie in the folder are opened, whatever export.json names, and no link is followed. Nothing says
    what export.json itself was. Raises `StoredDataError` where that is none, or damaged.
    """
    named, there = _named(folder), dict(_there(folder))
    problems = [_problem(folder, file, there) for file in named.values()]
    do = f"move it out of the folder, or {AGAIN}"
    strangers = sorted(there.keys() - named.keys() - {RECORD})
    added = [Problem(file=name, found=f"not named by {RECORD}", do=do) for name in strangers]
    return [*(problem for problem in problems if problem), *added]


def _named(folder: Path) -> dict[str, File]:
    """The files of the record, by name."""
    path = folder / RECORD
    try:
        with path.open("rb") as file:
            if len(content := file.read(_MOST_BYTES + 1)) > _MOST_BYTES:
                raise Unreadable(f"it has more than {_MOST_BYTES} bytes")
        files = decode(tuple[File, ...], unsealed(content).get("files"))
        if len(named := {file.path: file for file in files}) < len(files) or not files:
            raise Unreadable("`files` does not name files, each once")
    except OSError as error:
        raise StoredDataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except Unreadable as error:
        raise StoredDataError(f"{path}: damaged, or not written by `export` ({error}); {AGAIN}") from error
    return named


def _there(folder: Path) -> Iterator[tuple[str, bool]]:
    """All that lies below a folder and is no folder, by name: whether it is a file, not a link or a device."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode):
                yield path.relative_to(folder).as_posix(), stat.S_ISREG(mode)


def _problem(folder: Path, file: File, there: dict[str, bool]) -> Problem | None:
    if file.path not in there:
        return Problem(file=file.path, found=f"missing: {RECORD} names it", do=f"restore it, or {AGAIN}")
    if not there[file.path]:
        return Problem(file=file.path, found="a link or a device, not a file", do=f"put the file there, or {AGAIN}")
    try:
        size, sha256 = digest(folder / file.path)
    except StoredDataError as error:
        return Problem(file=file.path, found=str(error), do=AGAIN)
    if (size, sha256) == (file.bytes, file.sha256):
        return None
    written = f"written {file.bytes} bytes, {file.sha256}"
    return Problem(file=file.path, found=f"{size} bytes, sha256 {sha256}; {written}", do=AGAIN)
