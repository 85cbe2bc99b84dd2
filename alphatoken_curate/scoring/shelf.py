"""Where the tokens of all rows of DATA lie from when they are made until they are scored.

In memory while they are few; then in a file for each shard below `artifacts/rows/` of the run, until its manifest is
written, which names them no more: values/ holds them all. `rows.json` is written last, says what they are made of, and
names each file by its digest. Who finds it made of the same need not read and tokenise DATA again.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.rows.read import BadRow, InputFile
from alphatoken_curate.runs.atomic import atomic_file, unread
from alphatoken_curate.runs.documents import Unreadable, decode, sealed, unsealed
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.folder import MANIFEST
from alphatoken_curate.scoring.budget import NAME as BUDGET
from alphatoken_curate.tokens.dealt import Rows
from alphatoken_curate.tokens.packed import COLUMNS, Columns, columns_of, pack, token_bytes, unpack
from alphatoken_curate.tokens.tokenise import AnyRow

FOLDER, NAME = "rows", "rows.json"
_NAME_OF_COLUMNS = "columns.arrow"

IN_MEMORY = 4 << 20
"""Bytes of tokens, and what goes with them, that are held before they are written to files."""

_COLUMNS = pa.schema([(name, pa.from_numpy_dtype(COLUMNS[name])) for name in COLUMNS.names or ()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a reading of DATA found beside the tokens; of bad rows by row_id."""

    files: tuple[InputFile, ...]
    read: int
    good: Mapping[str, int]
    """Rows that have tokens, by the source they are from."""
    bad: tuple[BadRow, ...]
    told: Mapping[str, int]
    read_as: Mapping[str, int]
    day: str | None
    """That a chat template wrote; None where none writes one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """All of rows.json. `tokens`: the digest of the tokens of all rows, those of `aside` behind the others."""

    key: Mapping[str, Any]
    found: Found
    kind: str
    columns: _File
    shards: Mapping[str, _File]
    aside: tuple[int, ...]
    tokens: str


class Place:
    """A folder for the tokens of rows: below a run that is not finished, or else one that is gone in the end.

    `hold` is called before anything of the run is read or written. Without `writes` nothing is written to it.
    """

    def __init__(self, run: Path | None = None, hold: Callable[[], object] = lambda: None, *, writes: bool = True):
        self._run, self._holds, self._writes, self._held = run, hold, writes, False
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._begun = False

    def hold(self) -> None:
        """Hold the run, unless it is."""
        if not self._held:
            self._holds()
        self._held = True

    @property
    def kept(self) -> Path | None:
        """Where rows are kept that a later command may find; None where they are not."""
        return None if self._run is None or (self._run / MANIFEST).exists() else self._run / "artifacts" / FOLDER

    def found(self) -> Path | None:
        """Where rows of an earlier command are."""
        if (kept := self.kept) is None or not (kept / NAME).is_file():
            return None
        self.hold()
        return kept

    def keep_nothing(self) -> None:
        """Have what is put away from now on be gone in the end."""
        self._writes = False

    def fresh(self) -> Path:
        """A folder for rows, with nothing in it.

        One that a run was begun with stays: these may be of settings that it will refuse.
        """
        kept = self.kept
        if kept is not None and self._writes and not ((kept / NAME).is_file() and (kept.parent / BUDGET).is_file()):
            self.hold()
            self.remove()
            self._begun = True
            return kept
        self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="alphatoken-rows-")
        return Path(self._temporary.name)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """What is written to the run in this block is taken away where it ends by an exception."""
        self._begun = False
        try:
            yield
        except BaseException:
            if self._begun:
                self.remove()
            raise

    def remove(self) -> None:
        """Take rows away from the run, where there are any. The record goes first: what is left of others is none."""
        if self._run is not None:
            folder = self._run / "artifacts" / FOLDER
            (folder / NAME).unlink(missing_ok=True)
            if folder.is_dir():
                shutil.rmtree(folder)

    def close(self) -> None:
        """Take a temporary folder away."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tables:
    """The tokens of each shard: of some in memory, of the others in files of a folder."""

    held: Mapping[int, pa.Table]
    files: Mapping[int, _File]
    folder: Path

    def table(self, shard: int) -> pa.Table:
        """Those of one. Raises StoredDataError where its file is not as it was written."""
        if shard in self.held:
            return self.held[shard]
        return _read(_path(self.folder, shard), self.files[shard])

    def rows(self, shard: int) -> list[AnyRow]:
        """The rows of one."""
        return unpack(self.table(shard))


class Kept:
    """The tokens of all rows, by shard of `per_shard` of the rows that were read."""

    def __init__(self, columns: Columns, per_shard: int, tables: Tables) -> None:
        self._columns, self._per_shard, self.tables = columns, per_shard, tables

    def rows(self, read: int) -> Rows:
        """The rows themselves, of so many that were read. They hold nothing of this."""
        return Rows(self._columns, self.tables.rows, read=read, per_shard=self._per_shard)

    def digest(self, aside: Sequence[AnyRow]) -> str:
        """Digest of the tokens themselves, those of `aside` behind all others.

        Other releases of what makes them change them, and nothing else does. All are read for it.
        """
        found = hashlib.sha256()
        without = np.unique([row.row_id for row in aside]).astype(np.int64)
        for shard in sorted({*self.tables.held, *self.tables.files}):
            _update(found, token_bytes(self.tables.table(shard), without))
        _update(found, token_bytes(pack(aside), np.empty(0, np.int64)))
        return f"sha256:{found.hexdigest()}"

    def commit(self, key: Mapping[str, Json], found: Found, kind: str, aside: Sequence[AnyRow], tokens: str) -> None:
        """Say what the files are, once all are there; where rows are in memory, do nothing."""
        files, folder = self.tables.files, self.tables.folder
        if not files:
            return
        columns = pa.table({name: self._columns[name] for name in _COLUMNS.names}, schema=_COLUMNS)
        nowhere = tuple(replace(file, path="") for file in found.files)  # where they lie is no part of what they are
        record = _Record(
            key=key,
            found=replace(found, files=nowhere),
            kind=kind,
            columns=_write(folder / _NAME_OF_COLUMNS, columns),
            shards={str(number): file for number, file in sorted(files.items())},
            aside=tuple(row.row_id for row in aside),
            tokens=tokens,
        )
        with atomic_file(folder / NAME) as sink:
            sink.write(sealed(asdict(record)))


@dataclass(slots=True, kw_only=True, eq=False)
class Shelf:
    """Takes the tokens of rows in their order, and puts those of each shard away. `place`: None holds all of them."""

    per_shard: int
    place: Place | None
    good: Counter[str] = field(default_factory=Counter)
    """Rows so far by the source they are from."""
    _open: list[pa.Table] = field(default_factory=list)
    _columns: list[Columns] = field(default_factory=list)
    _tables: dict[int, pa.Table] = field(default_factory=dict)
    _files: dict[int, _File] = field(default_factory=dict)
    _bytes: int = 0
    _folder: Path | None = None

    def add(self, table: pa.Table) -> None:
        """The next rows, as `pack` makes them: all turns of a row come together."""
        self._columns.append(columns_of(table))
        ids = table["row_id"].to_numpy()
        firsts = np.flatnonzero(np.diff(ids, prepend=-1))
        self.good.update(table["source"].take(firsts).to_pylist())
        numbers = ids // self.per_shard
        borders = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), len(ids)]
        for start, end in pairwise(borders):
            if self._open and self._number != numbers[start]:
                self._settle()
            self._open.append(table.slice(start, end - start))

    def close(self) -> Kept:
        """All that was added."""
        if self._open:
            self._settle()
        columns = np.concatenate([np.empty(0, COLUMNS), *self._columns])
        self._columns.clear()
        tables = Tables(held=self._tables, files=self._files, folder=self._folder or Path())
        return Kept(columns, self.per_shard, tables)

    @property
    def _number(self) -> int:
        return int(self._open[0]["row_id"][0].as_py()) // self.per_shard

    def _settle(self) -> None:
        """Put the rows of a shard away, and of all before where they are too many to be held."""
        number, table = self._number, pa.concat_tables(self._open).combine_chunks()
        self._open.clear()
        self._tables[number] = table
        self._bytes += table.nbytes
        if self.place is None or self._bytes <= IN_MEMORY:
            return
        if self._folder is None:
            self._folder = self.place.fresh()
        for waiting in list(self._tables):
            self._files[waiting] = _write(_path(self._folder, waiting), self._tables.pop(waiting))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """What an earlier command kept: `tokens` is the digest of all tokens with the rows of `aside` behind the others."""

    key: Mapping[str, Json]
    found: Found
    kind: str
    aside: tuple[int, ...]
    tokens: str
    files: Mapping[int, _File]
    folder: Path
    _columns: _File

    def kept(self, per_shard: int) -> Kept | None:
        """The tokens themselves; None where they are not whole: of shards that are not read yet, by their sizes."""
        try:
            if not all(_path(self.folder, n).stat().st_size == file.bytes for n, file in self.files.items()):
                return None
            stored = _read(self.folder / _NAME_OF_COLUMNS, self._columns)
        except (OSError, StoredDataError):
            return None  # they are made anew
        columns = np.empty(stored.num_rows, COLUMNS)
        for name in _COLUMNS.names:
            columns[name] = stored[name].to_numpy()
        return Kept(columns, per_shard, Tables(held={}, files=self.files, folder=self.folder))


def known(place: Place) -> Known | None:
    """What an earlier command kept; None where there is nothing, or it does not say what it is."""
    if (folder := place.found()) is None:
        return None
    try:
        record = decode(_Record, unsealed((folder / NAME).read_bytes()))
    except (Unreadable, OSError):
        return None
    told = {name: getattr(record, name) for name in ("key", "found", "kind", "aside", "tokens")}
    files = {int(number): file for number, file in record.shards.items()}
    return Known(**told, files=files, folder=folder, _columns=record.columns)


def _path(folder: Path, shard: int) -> Path:
    return folder / f"part-{shard:05d}.arrow"


def _write(path: Path, table: pa.Table) -> _File:
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    with atomic_file(path) as sink:
        sink.write(memoryview(buffer.getvalue()))
    return _File(bytes=sink.bytes, sha256=sink.sha256)


def _read(path: Path, file: _File) -> pa.Table:
    """A table, all of its bytes checked. Where they are others, the record goes: the next command makes all anew."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unread(path, error) or _lost(path, error.strerror) from error
    if (len(data), hashlib.sha256(data).hexdigest()) != (file.bytes, file.sha256):
        raise _lost(path, "it is not as it was written")
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def _lost(path: Path, why: str | None) -> StoredDataError:
    with suppress(OSError):
        (path.parent / NAME).unlink(missing_ok=True)
    return StoredDataError(f"{path}: missing or damaged ({why}). Run the same command again: rows are read anew.")


def _update(found: Any, parts: Iterator[bytes]) -> None:
    for part in parts:
        found.update(part)
