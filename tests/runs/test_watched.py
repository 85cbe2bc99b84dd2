"""Files that are looked at again: what is another file, and what only looks like one."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alphatoken_curate.errors import FingerprintError
from alphatoken_curate.runs.watched import Source, Watched, digest_of_one


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(bytes(100))
    return tmp_path / "weights"


def watch(path: Path, what: str = "model") -> Watched:
    watched = Watched(
        [Source(what=what, files=(path,), digest=digest_of_one), Source(what="none", files=(), digest=str)]
    )
    watched.settle({what: digest_of_one([path])})
    return watched


def in_place(path: Path) -> None:
    """As `dd conv=notrunc` and `rsync --inplace` write; the time is put back after that."""
    was = path.stat()
    with path.open("r+b") as file:
        file.seek(50)
        file.write(b"x")
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(bytes(99) + b"x")
    path.with_name("new").replace(path)


CHANGES: list[Callable[[Path], object]] = [in_place, replaced, lambda path: os.truncate(path, 40)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_another_is_named(change: Callable[[Path], object], path: Path) -> None:
    watched = watch(path, "rows a b")
    for check in (watched.check, watched.check_digests):
        check()
    change(path)
    for check in (watched.check, watched.check_digests, pickle.loads(pickle.dumps(watched)).check):
        with pytest.raises(
            FingerprintError, match=rf"^{path}: it changed while it was in use: .* stays\. Put"
        ) as caught:
            check()
        assert caught.value.fields == ("rows",) and caught.value.exit_code == 4


def test_the_same_bytes_are_the_same_file(path: Path) -> None:
    watched = watch(path)
    os.utime(path)
    watched.check()
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)
    watched.check()
    content = path.read_bytes()
    in_place(path)
    path.write_bytes(content)
    watched.check()
    in_place(path)
    with pytest.raises(FingerprintError):
        watched.check()


def test_what_is_deleted_is_no_other_file(path: Path) -> None:
    """The Trainer deletes old checkpoints: what was read of them is in memory."""
    watched = watch(path)
    path.unlink()
    watched.check()
    watched.check_digests()
    path.write_bytes(b"of another training")
    with pytest.raises(FingerprintError):
        watched.check()


def test_a_file_that_changes_while_it_is_read(path: Path) -> None:
    watched = Watched([Source(what="model", files=(path,), digest=digest_of_one)])
    in_place(path)
    with pytest.raises(FingerprintError, match=r"it changed while it was read\. Run the same command again"):
        watched.settle({"model": digest_of_one([path])})
    watched.settle({})  # it plays no part
    watched.check_digests()


def test_two_that_are_watched_together(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    watched = watch(path)
    watched.include(watch(tmp_path / "other", "reference"))
    watched.check()
    (tmp_path / "other").write_text("y")
    with pytest.raises(FingerprintError, match="other: it changed"):
        watched.check()
