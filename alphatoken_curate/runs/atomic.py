"""Files that appear whole or not at all: temp file in the same folder, fsync, rename, fsync of the folder.

The rename is the only commit point. A temp file is named `.<name>.<random>.tmp`; who holds a run (`one_writer`) may
sweep those that a killed writer left behind.

Test hook: with ALPHATOKEN_CURATE_KILL_AT=<point>[@<file name>][:n] in the environment the process ends itself by
SIGKILL when it passes that point, of a file of that name where one is given, for the n-th time (default: the first).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alphatoken_curate.errors import BusyError, CurateError, StoredDataError, UsageError, is_of_a_name, refused

_NOT_OF_THE_FILE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)

KILL_AT = "ALPHATOKEN_CURATE_KILL_AT"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)

LOCK = ".writer.lock"
"""In every run that was written to: what is locked of it while it is."""

_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}
_passed: Counter[str] = Counter()
_held: dict[Path, tuple[int, int]] = {}
"""The run folders that this process holds, each with its device and inode."""


def kill_point(name: str, path: Path | None = None) -> None:
    """Test hook, see the top of this module: a place where a test may have the process killed."""
    wanted, _, count = os.environ.get(KILL_AT, "").partition(":")
    if wanted == name or (path is not None and wanted == f"{name}@{path.name}"):
        _passed[wanted] += 1
        if _passed[wanted] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def check_replaces(path: Path, ending: str) -> None:
    """Raise `UsageError` for a file that is there, and by its name not of the kind that would take its place."""
    if path.is_file() and path.suffix.lower() != ending:
        raise UsageError(f"{path}: it is there, and its name does not end in {ending}. Name another one.")


class Sink(io.RawIOBase):
    """A file being written that counts and, if `hashed`, hashes what passes through it."""

    def __init__(self, path: Path, descriptor: int, *, hashed: bool = True) -> None:
        super().__init__()
        self._path = path
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._hash = hashlib.sha256() if hashed else None
        self.bytes = 0
        """Bytes written so far."""

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes written so far."""
        assert self._hash is not None, "not hashed"
        return self._hash.hexdigest()

    def writable(self) -> bool:
        """True, as a file that can be written answers."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Write all of `data`. Raises `CurateError` where the disk refuses."""
        view = memoryview(data).cast("B")
        half = len(view) // 2
        self.write_parts([view[:half], view[half:]])
        return len(view)

    def write_parts(self, parts: Sequence[memoryview]) -> None:
        """Write all bytes of each in turn. Raises `CurateError` where the disk refuses."""
        for n, part in enumerate(parts):
            if n == len(parts) // 2:
                kill_point("mid-write", self._path)
            self._write(part)

    def _write(self, part: memoryview) -> None:
        if self._hash is not None:
            self._hash.update(part)
        self.bytes += len(part)
        with _refusal(self._path):
            while part:
                part = part[self._file.write(part) or 0 :]

    def sync(self) -> None:
        """Have the bytes on disk. Raises `CurateError` where the disk refuses."""
        with _refusal(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; without `sync` the bytes may not be on disk yet. Raises `CurateError` as `sync` does."""
        with _refusal(self._path):
            self._file.close()
        super().close()


@contextlib.contextmanager
def atomic_file(path: Path, *, hashed: bool = True) -> Iterator[Sink]:
    """A `Sink` whose bytes appear at `path` when the block ends, whole; on any exception nothing appears.

    Missing folders are made. Replaces what lies at `path`. Raises `CurateError` where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with _refusal(path):
        check_in_place(path)
        _make_folder(path.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with Sink(path, descriptor, hashed=hashed) as sink:
            kill_point("after-temp-open", path)
            yield sink
            sink.sync()
            kill_point("after-fsync", path)
        kill_point("after-close", path)
        with _refusal(path):
            check_in_place(path)
            os.replace(temporary, path)
            kill_point("after-rename", path)
            _sync_folder(path.parent)
    finally:
        _remove(temporary)  # gone already where it was renamed


def unread(path: Path, error: Exception) -> StoredDataError | None:
    """The error where the system did not let a file be read, which says nothing of the file; None for any other."""
    number = getattr(error, "errno", None)
    if number not in _NOT_OF_THE_FILE:
        return None
    return StoredDataError(f"{path}: cannot be read ({os.strerror(number)}); check its permissions")


def digest(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 (hex) of a file. Raises `StoredDataError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), sha256
    except FileNotFoundError as error:
        raise StoredDataError(f"{path}: missing; restore it, or run the command that wrote it again") from error
    except OSError as error:
        raise StoredDataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def sweep(folder: Path) -> int:
    """Remove temp files of writers that were killed; returns how many. Call it only while holding the run alone."""
    if not folder.is_dir():
        return 0
    return sum(_remove(path) for path in folder.iterdir() if TEMPORARY.fullmatch(path.name))


def _remove(temporary: Path) -> bool:
    """Remove a temp file, where the disk lets us: what is left is swept by the next writer, and `verify` names it."""
    try:
        temporary.unlink()
    except OSError:
        return False
    return True


def _unheard(_: str) -> None:
    pass


@contextlib.contextmanager
def one_writer(run: Path, warn: Callable[[str], object] = _unheard, *, shared: bool = False) -> Iterator[None]:
    """Hold a run folder against other processes while writing to it; the hold ends with the process, however it ends.

    Temp files of writers that were killed are swept, and what ends the block by an exception leaves none. `shared`: it
    is held together with others that say so, and against those that do not; whose a temp file is cannot be told then,
    and all stay until one holds the run alone. Raises `BusyError` where another process holds it. Not re-entrant. On
    Windows nothing is held; nor where the file system has no locks at all, of which `warn` is told.
    """
    with _refusal(run):
        _make_folder(run)
    with contextlib.nullcontext() if sys.platform == "win32" else _locked(run, warn, shared=shared):
        _held[run] = _identity(run)
        if not shared:
            _sweep_below(run)
        try:
            yield
        except BaseException:  # an interrupt may fall between making a temp file and the `try` that removes it
            if not shared:
                _sweep_below(run)
            raise
        finally:
            _held.pop(run, None)


@contextlib.contextmanager
def in_place(run: Path) -> Iterator[None]:
    """Hold on to a run folder that another process holds: nothing in this block is written to one in its place."""
    if run in _held:
        yield
        return
    _held[run] = _identity(run)
    try:
        yield
    finally:
        del _held[run]


@contextlib.contextmanager
def _locked(run: Path, warn: Callable[[str], object], *, shared: bool) -> Iterator[None]:
    """A lock on the folder itself, and one on a file in it that is opened for writing, both in the same mode.

    Earlier releases lock the folder alone, so that it keeps apart what runs on one machine. Over NFS a lock on a folder
    is one machine's own, or none at all, and one on a file holds for all, if the file can be written. It stays when it
    is let go: a file that is removed while another opens it holds nothing.
    """
    with _refusal(run):
        descriptors = [os.open(run, os.O_RDONLY)]
    try:
        alone = _lock(descriptors[0], run, shared=shared)
        descriptors += _opened(run / LOCK, needed=not alone)
        if len(descriptors) > 1 and not _lock(descriptors[1], run, shared=shared):
            warn(
                f"{run}: its file system has no locks, so nothing keeps a second process from writing to it: see to"
                " it that there is none."
            )
        elif len(descriptors) > 1 and not _is_at(descriptors[1], run / LOCK):
            raise _busy(run)  # somebody removed it in between
        yield
    finally:
        for descriptor in reversed(descriptors):
            os.close(descriptor)


def _opened(file: Path, *, needed: bool) -> list[int]:
    """The file of a lock, opened; none where it may not be written, as nothing else may then, unless it is `needed`.

    Raises `CurateError` where the disk refuses.
    """
    try:
        return [os.open(file, os.O_RDWR | os.O_CREAT, 0o666)]
    except OSError as error:
        if error.errno in _READ_ONLY and not needed:
            return []
        with _refusal(file):
            raise


def _lock(descriptor: int, run: Path, *, shared: bool) -> bool:
    """Whether an open file or folder could be locked at all. Raises `BusyError` where another process holds it."""
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(run) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        with _refusal(run):
            raise
    return True


def _busy(run: Path) -> BusyError:
    return BusyError(f"{run}: another process is writing to it; wait for it, or use another folder.")


def _is_at(descriptor: int, file: Path) -> bool:
    found = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == _identity(file)


def _identity(folder: Path) -> tuple[int, int]:
    """Of what has this name now; where nothing has, that of none."""
    try:
        found = folder.stat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def check_in_place(path: Path) -> None:
    """Raise where the run folder above a file is no longer the one that is held: a file would make it anew, in part."""
    for folder in path.parents:
        if folder in _held and _identity(folder) != _held[folder]:
            raise CurateError(
                f"{folder}: was moved, removed or replaced while it was written to. Put it back where it was, or name"
                " its new place, and run the same command again: files that are finished are kept"
            )


def _sweep_below(run: Path) -> None:
    for folder, _, _ in os.walk(run):
        sweep(Path(folder))


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:  # some network file systems cannot; the rename stands all the same
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _refusal(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        check_in_place(path)
        if is_of_a_name(error):
            raise refused(error, path) from error
        raise CurateError(
            f"{path}: cannot be written ({error.strerror}); make room or set its permissions right, then run the same"
            " command again: files that are finished are kept"
        ) from error
