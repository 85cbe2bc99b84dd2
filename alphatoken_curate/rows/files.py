"""Find the files that hold rows: DATA arguments become a list of files in a stable order."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alphatoken_curate.errors import InputError

SUFFIXES = (".parquet", *(kind + packed for kind in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst")))
"""Names of files that are taken from a folder."""

EXCERPT_CHARS = 200
"""Most characters of a row or name that a message shows."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[A-Za-z0-9][\w.-]*)?")
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A file or Hub dataset to read; `source` is what its rows are called by."""

    path: str
    source: str
    is_hub: bool = False


def visible(text: str, limit: int = EXCERPT_CHARS) -> str:
    r"""`text` cut to `limit` characters, with control, direction and surrogate characters written as \u escapes."""
    shown = _UNSEEN.sub(lambda m: f"\\u{ord(m[0]):04x}", text[:limit])
    return shown if len(text) <= limit and len(shown) <= limit else shown[: limit - 1] + "…"


def legible(text: str) -> str:
    r"""`text` whole, lines kept, with what `visible` escapes escaped: what a terminal may be sent."""
    return "\n".join(_UNSEEN.sub(lambda m: f"\\u{ord(m[0]):04x}", line) for line in text.split("\n"))


def find_files(data: Sequence[str]) -> list[DataFile]:
    """The files that `data` names, in that order; folders and globs give theirs sorted by relative path.

    Each item is a file, a folder (every file below it whose name ends in one of `SUFFIXES`, hidden ones left out), a
    glob, or, where nothing of that name exists, a Hugging Face dataset `name`, `owner/name`, `name:split`.
    Raises InputError for an item that names nothing, a thing that is not a regular file, or a file named twice.
    """
    files = [file for item in data for file in _find(os.fspath(item))]
    seen: set[str] = set()
    for file in files:
        place = file.path if file.is_hub else os.path.realpath(file.path)
        if place in seen:
            raise InputError(f"{visible(file.path)} is named twice: its rows would count twice. Name it once.")
        seen.add(place)
    if not files:
        raise InputError("No data was named. Give files, folders, globs or a Hugging Face dataset name.")
    return _told_apart(files)


def _told_apart(files: list[DataFile]) -> list[DataFile]:
    """Files of one name get as much of their folders' names as it takes to tell them apart."""
    named, depth = files, 1
    while len({file.source for file in named}) < len(named):
        depth += 1
        counts = Counter(file.source for file in named)
        named = [
            replace(file, source="/".join(Path(os.path.realpath(file.path)).parts[-depth:]))
            if counts[file.source] > 1
            else file
            for file in named
        ]
    return named


def _find(item: str) -> list[DataFile]:
    if os.path.lexists(item):
        return _in_folder(item) if os.path.isdir(item) else [_file(item, os.path.basename(item))]
    if glob.has_magic(item):
        return _in_glob(item)
    if _HUB_NAME.fullmatch(item) and not item.endswith(SUFFIXES):
        return [DataFile(path=item, source=item, is_hub=True)]
    raise InputError(
        f"{visible(item)}: no such file or folder, and not the name of a Hugging Face dataset (`name`, `owner/name`,"
        " `owner/name:split`). Check the path."
    )


def _in_folder(folder: str) -> list[DataFile]:
    if folder.endswith(SUFFIXES):
        raise InputError(f"{visible(folder)} is a folder with the name of a file. Name its files: {visible(folder)}/*")
    found = []
    for place, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [os.path.join(place, name) for name in names if not name.startswith(".") and name.endswith(SUFFIXES)]
        found += [_file(path, os.path.relpath(path, folder)) for path in paths]
    if not found:
        raise InputError(f"{visible(folder)}: no file below this folder ends in {', '.join(SUFFIXES)}.")
    return sorted(found, key=lambda file: file.source)


def _in_glob(pattern: str) -> list[DataFile]:
    base = Path(pattern)
    while glob.has_magic(str(base)):
        base = base.parent
    parts = Path(pattern).relative_to(base).parts
    if parts[-1] == "**":
        parts += ("*",)
    try:
        # not glob.glob: its ** follows links, round and round
        matches = [(str(path), str(path.relative_to(base))) for path in base.glob("/".join(parts))]
    except (ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{visible(pattern)}: not a pattern: {why}.") from error
    shown = [(path, name) for path, name in matches if not re.search(r"(^|/)\.", name) or "/." in pattern]
    found = [_file(path, name) for path, name in shown if path.endswith(SUFFIXES)]
    if not found:
        raise InputError(f"{visible(pattern)}: this pattern matches no file that ends in {', '.join(SUFFIXES)}.")
    return sorted(found, key=lambda file: file.source)


def _file(path: str, source: str) -> DataFile:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise InputError(f"{visible(path)}: cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder with the name of a file" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise InputError(f"{visible(path)} is {kind}, not a regular file. Write its rows to a file first.")
    if not path.endswith(SUFFIXES):
        raise InputError(f"{visible(path)}: the name of a data file ends in one of {', '.join(SUFFIXES)}. Rename it.")
    # a name may hold bytes that are no text; they are stored as \xNN
    name = os.fsencode(source).decode(errors="backslashreplace").replace(os.sep, "/")
    return DataFile(path=path, source=name)
