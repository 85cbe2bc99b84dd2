"""One writer at a time, of a folder that stays where it is; how files appear whole is tested with the shards."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import published, small_run
from tiny_files import Notes

from alphatoken_curate import mask, verify
from alphatoken_curate.errors import BusyError, CurateError, UsageError
from alphatoken_curate.runs.atomic import LOCK, atomic_file, in_place, one_writer
from alphatoken_curate.scoring.folder import check_ours


def test_a_file_is_not_written_beside_a_run_that_was_moved(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    with one_writer(run):
        with atomic_file(run / "values/a") as sink:
            sink.write(b"a")
        run.rename(moved)
        with pytest.raises(CurateError, match="was moved, removed or replaced"), atomic_file(run / "values/b") as sink:
            sink.write(b"b")
        assert not run.exists()
        run.mkdir()
        with pytest.raises(CurateError, match="was moved, removed or replaced"), atomic_file(run / "values/b") as sink:
            sink.write(b"b")
        assert list(run.iterdir()) == []
        run.rmdir()
        moved.rename(run)
        with atomic_file(run / "values/b") as sink:
            sink.write(b"b")
    with one_writer(moved), pytest.raises(CurateError, match="moved, removed"), atomic_file(moved / "c") as sink:
        moved.rename(tmp_path / "third")
    with atomic_file(moved / "c") as sink:  # nobody holds it any more
        sink.write(b"c")


def test_nor_beside_one_that_another_process_holds(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    with in_place(run):
        with atomic_file(run / "a") as sink:
            sink.write(b"a")
        run.rename(moved)
        with pytest.raises(CurateError, match="was moved, removed or replaced"), atomic_file(run / "b") as sink:
            sink.write(b"b")
    assert not run.exists()
    with one_writer(moved):
        with in_place(moved):
            pass
        moved.rename(run)
        with pytest.raises(CurateError, match="moved, removed"), atomic_file(moved / "c") as sink:
            sink.write(b"c")


FLOCK = fcntl.flock


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Locks as some file systems have them: an error for folders alone, or for files too."""

    def refuse(number: int, files: bool) -> None:
        def flock(descriptor: int, operation: int) -> None:
            if files or stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR  # as NFS asks of a lock
            FLOCK(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


UNABLE = [errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("number", UNABLE)
def test_where_a_folder_has_no_lock_a_file_has(
    refusing: Callable[[int, bool], None], tmp_path: Path, number: int
) -> None:
    refusing(number, False)
    run = small_run(tmp_path / "run")
    notes = Notes()
    with one_writer(run, notes.warn):
        assert (run / LOCK).is_file() and verify(run) == []
        with pytest.raises(BusyError, match="another process is writing to it"), one_writer(run):
            pass
    assert notes.warnings == []
    mask(run, published(keep=0.25))
    assert (run / LOCK).read_bytes() == b"" and verify(run) == []


def test_where_a_lock_on_a_folder_holds_for_one_machine_alone_the_file_holds_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS: another machine's lock on the folder is not seen, and one on a file is."""

    def flock(descriptor: int, operation: int) -> None:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            FLOCK(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    run = tmp_path / "run"
    for first in (False, True):
        for second in (False, True):
            with one_writer(run, shared=first):
                if first and second:
                    with one_writer(run, shared=True):
                        pass
                    continue
                with pytest.raises(BusyError), one_writer(run, shared=second):
                    pass


def test_a_folder_that_may_not_be_written_is_held_without_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`publish` writes nothing to it."""
    plain = os.open

    def opened(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return plain(path, flags, *mode)

    run, notes = tmp_path / "run", Notes()
    run.mkdir()
    monkeypatch.setattr(os, "open", opened)
    with one_writer(run, notes.warn), pytest.raises(BusyError), one_writer(run):
        pass
    assert not notes.warnings and not (run / LOCK).exists()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("number", UNABLE)
def test_where_nothing_has_a_lock_that_is_said_in_one_line(
    refusing: Callable[[int, bool], None], tmp_path: Path, number: int
) -> None:
    run = small_run(tmp_path / "run")
    refusing(number, True)
    notes = Notes()
    mask(run, published(keep=0.25), notes)
    assert [told for told in notes.warnings if "has no locks, so nothing keeps a second process from" in told] == (
        notes.warnings
    )
    assert len(notes.warnings) == 1 and verify(run) == []


def test_the_lock_of_a_killed_writer_makes_no_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    check_ours(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"not empty \(it has 'notes\.txt'\)"):
        check_ours(tmp_path)


def test_another_error_of_a_lock_is_one(refusing: Callable[[int, bool], None], tmp_path: Path) -> None:
    refusing(errno.EIO, True)
    with (
        pytest.raises(CurateError, match=r"run: cannot be written \(Input/output error\)"),
        one_writer(tmp_path / "run"),
    ):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def flock(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "no")
        FLOCK(descriptor, operation)
        (run / LOCK).unlink()  # as its last holder did before it let go
        (run / LOCK).touch()  # and as the next one made it anew

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(BusyError), one_writer(run):
        pass
    assert (run / LOCK).exists()  # the other's


def test_a_release_that_locks_the_folder_alone_and_this_one_keep_out_of_each_others_way(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    older = os.open(run, os.O_RDONLY)
    try:
        FLOCK(older, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BusyError), one_writer(run):
            pass
        FLOCK(older, fcntl.LOCK_UN)
        with one_writer(run), pytest.raises(BlockingIOError):
            FLOCK(older, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(older)


_HOLD = """
import sys, time
from pathlib import Path
from alphatoken_curate.runs.atomic import in_place, one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_are_held_apart_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(BusyError), one_writer(tmp_path / "run"):
        pass
    other.kill()
    other.communicate()
    with one_writer(tmp_path / "run"):
        pass
