"""Find the files that hold rows: DATA arguments become a list of files in a stable order.

A folder that `datasets` wrote with `save_to_disk` gives the Arrow files that it names itself; of several splits one is
read. A run of ours, an export, and what lies in them is named for what it is: its rows would be read as other rows.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from alphatoken_curate.errors import InputError
from alphatoken_curate.runs import stores
from alphatoken_curate.runs.folder import EXPORT, export_in_words, export_with, run_with
from alphatoken_curate.urls import names_url
from alphatoken_curate.wording import pasted

SUFFIXES = (".parquet", *(kind + packed for kind in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst")))
"""Names of files that are taken from a folder."""

ARROW = ".arrow"
"""Files of Arrow are read where they are named, or where `datasets` saved them; others in a folder are its caches."""

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_FROM_EXPORT = ("messages.jsonl",)
"""Files of JSON lines in an export that hold the rows and all that is to be known of them."""

EXCERPT_CHARS = 200
"""Most characters of a row or name that a message shows."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[A-Za-z0-9][\w.-]*)?")
_RUN_PART = re.compile(r"/(values/generation=\d+|train/mask=\d+)/part-\d+\.parquet$")
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A file, object of a store or Hub dataset to read; `source` is what its rows are called by, of objects the URL."""

    path: str
    source: str
    is_hub: bool = False
    subset: str | None = None
    """Of a dataset of the Hub: its configuration."""
    split: str | None = None
    """Of a dataset of the Hub: the split, where its name gives none."""

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine; else a dataset of the Hub or an object of a store."""
        return not self.is_hub and not names_url(self.path)


_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_PACKED = (".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz", ".tar.gz", ".tar.zst")


def visible(text: str, limit: int = EXCERPT_CHARS) -> str:
    r"""`text` cut to `limit` characters, with control, direction and surrogate characters written as \u escapes."""
    shown = _UNSEEN.sub(lambda m: f"\\u{ord(m[0]):04x}", text[:limit])
    return shown if len(text) <= limit and len(shown) <= limit else shown[: limit - 1] + "…"


def legible(text: str) -> str:
    r"""`text` whole, lines kept, with what `visible` escapes escaped: what a terminal may be sent."""
    return "\n".join(_UNSEEN.sub(lambda m: f"\\u{ord(m[0]):04x}", line) for line in text.split("\n"))


def find_files(data: Sequence[str], subset: str | None = None, split: str | None = None) -> list[DataFile]:
    """The files that `data` names, in that order; folders and globs give theirs sorted by relative path.

    Each item is a file, a folder (every file below it whose name ends in one of `SUFFIXES`, hidden ones left out; or
    one of `save_to_disk`, also as `folder:split`), a glob, or, where nothing of that name exists, a Hugging Face
    dataset `name`, `owner/name`, `name:split`. `subset` and `split` (default: train) are of datasets. A URL (s3, gs,
    hf) is an object, a prefix or a glob.
    Raises InputError for an item that names nothing, a thing that is not a regular file, a part of a run or an export,
    or a file named twice.
    """
    files = [file for item in data for file in _find(os.fspath(item), subset, split)]
    seen: set[str] = set()
    for file in files:
        place = os.path.realpath(file.path) if file.is_local else file.path
        if place in seen:
            raise InputError(f"{visible(file.path)} is named twice: its rows would count twice. Name it once.")
        seen.add(place)
    if not files:
        raise InputError("No data was named. Give files, folders, globs or a Hugging Face dataset name.")
    return _told_apart(files)


def is_of_hub(item: str) -> bool:
    """Whether an item of DATA names a dataset of the Hub: nothing of that name is here."""
    return not (names_url(item) or _is_there(_at_home(item)) or glob.has_magic(item))


def has_splits(item: str) -> bool:
    """Whether `--split` is read of an item of DATA: a dataset of the Hub, or a folder that has several."""
    return is_of_hub(item) or os.path.isfile(os.path.join(_at_home(item), _SPLITS))


def _told_apart(files: list[DataFile]) -> list[DataFile]:
    """Files of one name get as much of their folders' names as it takes to tell them apart."""
    named, depth = files, 1
    while len({file.source for file in named}) < len(named):
        depth += 1
        counts = Counter(file.source for file in named)
        named = [
            replace(file, source="/".join(Path(os.path.realpath(file.path)).parts[-depth:]))
            if counts[file.source] > 1 and file.is_local
            else file
            for file in named
        ]
    return named


def anywhere(name: str) -> str:
    """What lies on this machine, or a pattern, by a path that holds in any working folder; anything else as it is."""
    name = _at_home(name)
    if _is_there(name):
        return os.path.abspath(name)
    return os.path.abspath(os.path.join(glob.escape(os.getcwd()), name)) if glob.has_magic(name) else name


def _at_home(name: str) -> str:
    """`name` with the folder that its `~` stands for, in which a pattern matches nothing but itself."""
    path = os.path.expanduser(name)
    if path == name or _is_there(path) or not glob.has_magic(name):
        return path
    home, slash, below = name.partition("/")
    return glob.escape(os.path.expanduser(home)) + slash + below


def _is_there(name: str) -> bool:
    return os.path.lexists(name) or saved_folder(name) is not None


def _find(item: str, subset: str | None, split: str | None) -> list[DataFile]:
    if names_url(item):
        return _in_store(item)
    item = _at_home(item)
    if os.path.lexists(item):
        return _in_folder(item, split) if os.path.isdir(item) else [_file(item, os.path.basename(item))]
    if folder := saved_folder(item):
        return _in_folder(folder, item.removeprefix(f"{folder}:"))
    if glob.has_magic(item):
        return _in_glob(item)
    if _HUB_NAME.fullmatch(item) and not item.endswith(SUFFIXES):
        return [DataFile(path=item, source=item, is_hub=True, subset=subset, split=split)]
    raise InputError(
        f"{visible(item)}: no such file or folder, and not the name of a Hugging Face dataset (`name`, `owner/name`,"
        " `owner/name:split`). Check the path."
    )


def _unread(name: str) -> str:
    """Why no rows are read from what has such a name, and what to do."""
    if name.lower().endswith(_TABLES):
        return (
            "tables of text are not read: their columns have no types. Make it Parquet, in Python"
            ' `polars.read_csv("rows.csv").write_parquet("rows.parquet")`, and name columns by --map.'
        )
    if name.lower().endswith(_PACKED):
        return f"of what is packed only gzip and zstd are read ({', '.join(SUFFIXES[2:4])}). Unpack it first."
    return f"the name of a file of rows ends in one of {', '.join((*SUFFIXES, ARROW))}. Rename it."


def _in_store(url: str) -> list[DataFile]:
    """The objects that a URL names; below a prefix, or by a glob, those of `SUFFIXES` that are not hidden."""
    found = stores.found(url)
    if any(_RUN_PART.search(one) for one in found) or any(one.endswith(f"/{EXPORT}") for one in found):
        raise InputError(f"{visible(url)}: a run, an export or a part of one, not rows. Name the rows it is of.")
    if len(found) == 1 and found[0].partition("://")[2] == url.partition("://")[2]:
        if not url.endswith((*SUFFIXES, ARROW)):
            raise InputError(f"{visible(url)}: {_unread(url)}")
        return [DataFile(path=found[0], source=found[0])]
    shown = [one for one in found if "/." not in one or "/." in url]
    named = [DataFile(path=one, source=one) for one in shown if one.endswith(SUFFIXES)]
    if not named:
        raise InputError(f"{visible(url)}: no object that it names ends in {', '.join(SUFFIXES)}.")
    return named


def saved_folder(item: str) -> str | None:
    """The folder of `folder:split`, where `datasets` saved one of that name with several splits."""
    folder, colon, _ = item.rpartition(":")
    return folder if colon and os.path.isfile(os.path.join(folder, _SPLITS)) else None


def _in_folder(folder: str, split: str | None = None) -> list[DataFile]:
    if folder.endswith(SUFFIXES):
        raise InputError(f"{visible(folder)} is a folder with the name of a file. Name its files: {visible(folder)}/*")
    _check_not_ours(folder)
    if os.path.isfile(os.path.join(folder, _SPLITS)):
        folder = _split_of(folder, split or "train")
    found = []
    for place, folders, names in os.walk(folder, followlinks=False):
        _check_not_ours(place)
        if _SPLITS in names:
            raise InputError(f"{visible(place)}: a dataset of several splits. Name it itself, with --split.")
        saved = _saved_in(place) if _STATE in names else None
        folders[:] = [name for name in folders if not name.startswith(".") and saved is None]
        shown = [name for name in names if not name.startswith(".") and name.endswith(SUFFIXES)]
        paths = [os.path.join(place, name) for name in (shown if saved is None else saved)]
        found += [_file(path, os.path.relpath(path, folder)) for path in paths]
    if not found:
        raise InputError(f"{visible(folder)}: no file below this folder ends in {', '.join(SUFFIXES)}.")
    return sorted(found, key=lambda file: file.source)


def _split_of(folder: str, split: str) -> str:
    """The folder of one split of a folder that has several."""
    splits = _listed(os.path.join(folder, _SPLITS), "splits")
    if split not in splits:
        there = ", ".join(map(visible, splits))
        raise InputError(f"{visible(folder)}: it has no split {split!r}, but {there}. Name one of them with --split.")
    return os.path.join(folder, split)


def _saved_in(folder: str) -> list[str] | None:
    """The Arrow files of a saved dataset, in their order; None where it is none."""
    files = _listed(os.path.join(folder, _STATE), "_data_files")
    names = [one.get("filename") if isinstance(one, dict) else None for one in files]
    known = [name for name in names if isinstance(name, str) and name == os.path.basename(name)]
    return known if known and len(known) == len(names) else None


def _listed(path: str, key: str) -> list[Any]:
    """A list in one of the small files of JSON that `datasets` writes; empty where it is none."""
    try:
        found = orjson.loads(Path(path).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return []
    listed = found.get(key) if isinstance(found, dict) else None
    return listed if isinstance(listed, list) else []


def _check_not_ours(path: str) -> None:
    """Raise InputError for a run or an export, or what lies in one and holds the rows in part."""
    if run := run_with(Path(path)):
        raise InputError(
            f"{visible(path)}: {'a run' if run == Path(path) else f'a part of the run {visible(str(run))}'}, not rows."
            f" config.yaml names the rows it was made of; score --config {visible(pasted(run / 'config.yaml'))}"
            " -o OTHER scores them anew, refresh at a checkpoint."
        )
    is_file = os.path.isfile(path)
    if (export := export_with(Path(path))) and (export == Path(path) or (is_file and not _reads_alone(path))):
        raise InputError(
            f"{visible(path)}: {export_in_words(export)}, whose weights are not read from here. Name the rows the run"
            f" was made of{_readable_of(export)}."
        )


def _readable_of(export: Path) -> str:
    """The files of an export that are read by themselves, in words."""
    there = sorted(path.name for path in export.iterdir() if path.is_file() and _reads_alone(str(path)))
    return f", or of this folder {visible(' or '.join(there[:3]))} by itself" if there else ""


def _reads_alone(path: str) -> bool:
    """Whether a file, were it of an export, says what trains in words that rows have.

    Beside tokens these are labels: weights and a mask may be of positions, which are one before.
    """
    if os.path.basename(path) in _FROM_EXPORT or path.endswith(ARROW):
        return True
    if not path.endswith(".parquet"):
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowInvalid):
        return True  # its reader meets it too, and says so
    return any(name.endswith("labels") for name in names) or not any(name.endswith("input_ids") for name in names)


def _in_glob(pattern: str) -> list[DataFile]:
    base, parts = Path(), Path(pattern).parts
    while len(parts) > 1 and (name := _alone(parts[0])) is not None:
        base, parts = base / name, parts[1:]
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


def _alone(part: str) -> str | None:
    """The one name that a part of a pattern stands for, without its escapes; None where it stands for others."""
    name = re.sub(r"\[([*?[])\]", r"\1", part)
    return name if glob.escape(name) == part else None


def _file(path: str, source: str) -> DataFile:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise InputError(f"{visible(path)}: cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder with the name of a file" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise InputError(f"{visible(path)} is {kind}, not a regular file. Write its rows to a file first.")
    if not path.endswith((*SUFFIXES, ARROW)):
        raise InputError(f"{visible(path)}: {_unread(path)}")
    _check_not_ours(path)
    # a name may hold bytes that are no text; they are stored as \xNN
    name = os.fsencode(source).decode(errors="backslashreplace").replace(os.sep, "/")
    return DataFile(path=path, source=name)
