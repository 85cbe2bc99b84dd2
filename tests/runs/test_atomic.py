"""One writer at a time, of a folder that stays where it is; how files appear whole is tested with the shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from alphatoken_curate.errors import CurateError
from alphatoken_curate.runs.atomic import atomic_file, one_writer


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
