"""Whether a path is a run folder, and what it is where it is none: a file of rows, an export, a part of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import orjson

from alphatoken_curate.errors import UsageError, is_of_a_name, refused
from alphatoken_curate.urls import OUT_ADVICE, RUN_ADVICE, check_local, expanded
from alphatoken_curate.wording import pasted

MANIFEST = "manifest.json"
EXPORT = "export.json"
"""An export has it, and no `MANIFEST`."""

_BEGUN = ("values/generation=*", "train/mask=*", "artifacts/run.json")
"""One of these makes a run of a folder without a manifest: one that was begun, or that lost it."""
FOLDERS = frozenset({"artifacts", "train", "values"})
"""Folders of a run; what a killed writer leaves before its first file lies in one of them."""
_PARTS = FOLDERS | {MANIFEST, "config.yaml", "rejects.jsonl", "README.md", "report.html"}
_ROWS = re.compile(r".*\.(parquet|(jsonl|ndjson|json)(\.gz|\.zst)?)")
_MOST_CHARS = 80
_MOST_BYTES = 64 << 20


def check_is_run(path: Path) -> None:
    """Raise `UsageError` for what is no run folder, a URL too; it says what it is, and what to name or do instead.

    A run that was begun, or that lost its manifest, and a folder that has nothing in it pass: whoever reads the
    manifest says what they lack.
    """
    check_local(path, RUN_ADVICE)
    _check_text(path)
    try:
        os.lstat(path / MANIFEST)
        return
    except PermissionError:
        return  # the reader meets it too, and says so
    except OSError:
        pass
    if not os.path.lexists(path):
        do = f"Make one with: alphatoken-curate score DATA -o {pasted(path)}"
        raise UsageError(f"{path}: no such run folder. {do}")
    if not (os.path.isdir(path) and _begun(path)):
        raise UsageError(f"{path}: {_instead(path)}")


def run_with(path: Path) -> Path | None:
    """The run that a path is, or lies in as a part of it."""
    if os.path.isdir(path) and (_is_marked(path) or _is_whole(path)):
        return path
    return next(_around(path), None)


def export_with(path: Path) -> Path | None:
    """The export that a path is, or lies in; only one with a record that is whole."""
    return next((one for one in (path, *path.parents) if is_export(one) and _recorded(one)), None)


def destination(path: Path) -> Path:
    """A folder to write to, without `..`: behind a folder that is not there it hides what it leads to.

    Raises `UsageError` for a URL, a name that cannot be written to, a file where a folder is needed, and for a symbolic
    link that leads nowhere, on the way or at its end.
    """
    check_local(path, OUT_ADVICE)
    path = expanded(path)
    plain = Path(os.path.normpath(path))
    for part in (path, *path.parents, plain, *plain.parents):
        if os.path.islink(part) and not os.path.exists(part):
            raise UsageError(
                f"{path}: {part} is a symbolic link to {os.readlink(part)}, where nothing is. Make that folder, or name"
                " another one."
            )
    place = Path(os.path.realpath(path)) if ".." in path.parts else path
    if file := next((part for part in place.parents if os.path.lexists(part) and not os.path.isdir(part)), None):
        raise UsageError(f"{path}: {file} is a file, and a folder is needed there. Name another place.")
    _check_text(Path(os.path.abspath(place)))
    try:
        os.lstat(place)
    except OSError as error:
        if is_of_a_name(error):
            raise refused(error) from error
    return place


def _check_text(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{path}: its name is not UTF-8, and no Parquet or safetensors file opens there. Rename it, or name another"
            " folder."
        ) from error


def is_export(folder: Path) -> bool:
    """Whether this is a folder with the record of an export in it, whole or damaged, and not a run."""
    return os.path.isfile(folder / EXPORT) and not os.path.lexists(folder / MANIFEST)


def export_in_words(folder: Path) -> str:
    """`an export of a run of rows.jsonl (mask 0, for hf)`, where its record says so."""
    return _recorded(folder) or f"an export by its {EXPORT}, which is damaged or was not written by `export`"


def _recorded(folder: Path) -> str | None:
    """An export in words; None where there is no record, or none that is whole."""
    try:
        with (folder / EXPORT).open("rb") as file:
            told = orjson.loads(file.read(_MOST_BYTES))
        mask, trainer = told["mask"]["mask"], told["trainer"]
        sources = [str(one["source"])[:_MOST_CHARS] for one in told["run"]["inputs"]]
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        return f"an export of a run of {sources[0]}{more} (mask {str(mask)[:9]}, for {str(trainer)[:_MOST_CHARS]})"
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _begun(folder: Path) -> bool:
    """Whether a folder without a manifest is a run all the same, or has nothing in it that is not a run's."""
    try:
        names = {name for name in os.listdir(folder) if not name.startswith(".")}
    except OSError:
        return True  # the reader meets it too, and says so
    return _is_marked(folder) or (names <= FOLDERS and next(_around(folder), None) is None)


def _is_marked(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in _BEGUN)


def _instead(path: Path) -> str:
    """What a path is that is there and no run, and what to do."""
    kind = "folder" if os.path.isdir(path) else "file"
    if run := next(_around(path), None):
        return f"a {kind} of the run {run}, not a run folder. Name the run itself: {pasted(run)}"
    if is_export(path):
        check = f"To check its files: alphatoken-curate verify {pasted(path)}"
        return f"{export_in_words(path)}, not a run folder. Name the run it was made from. {check}"
    for export in path.parents:
        if is_export(export) and (told := _recorded(export)):
            return f"a {kind} of {export}, {told}, not a run folder. Name the run it was made from."
    if kind == "folder":
        do = "Name the folder that `score` made, or make one with: alphatoken-curate score DATA -o NEW"
        return f"not a run folder: it has no {MANIFEST}. {do}"
    if _ROWS.fullmatch(path.name):
        return f"a file of rows, not a run folder. Score it first: alphatoken-curate score {pasted(path)}"
    return "a file, not a run folder. Name the folder that `score` made."


def _around(path: Path) -> Iterator[Path]:
    """The runs that a path is a part of, the nearest first; by its own words where these name one."""
    for place in (path, Path(os.path.realpath(path))):
        for folder in place.parents:
            part = place.relative_to(folder).parts[0]
            if part in _PARTS and (_is_marked(folder) or _is_whole(folder)):
                yield folder


def _is_whole(folder: Path) -> bool:
    return os.path.isfile(folder / MANIFEST) and os.path.isdir(folder / "values")
