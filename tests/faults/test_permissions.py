"""Another user than the one who made a run, and files that may not be read: told in a line that blames no file."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_files import Ended, command, contents, save_models, token_records, write_jsonl

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has other permissions")

NOBODY = 65534


@contextmanager
def another_user() -> Iterator[None]:
    """Nobody in place of root; others may not read what has no permissions either."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that every user may read, with models, rows and a run; pytest's own are for one user."""
    folder = Path(tempfile.mkdtemp(prefix="curate-"))
    folder.chmod(0o755)
    save_models(folder)
    data = write_jsonl(folder / "rows.jsonl", token_records(8))
    made = command("score", data, "--model", folder / "tuned", "--layers", 1, "-o", folder / "run", "--device", "cpu")
    assert made.code == 0, made.err
    for verb, *flags in (("stats",), ("show", "--row", 0), ("verify",), ("report", "-o", folder / "page.html")):
        assert command(verb, folder / "run", *flags).code == 0  # what they import is imported
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def closed(path: Path) -> Iterator[None]:
    """Without any permission."""
    before = path.stat().st_mode & 0o777
    path.chmod(0)
    try:
        yield
    finally:
        path.chmod(before)


def as_another(*arguments: object) -> Ended:
    with another_user():
        return command(*arguments)


def said(ended: Ended) -> str:
    return " ".join((ended.out + ended.err).split())


def _is_for_all() -> bool:
    """Whether other users may read what is installed."""
    prefix = Path(sys.prefix).resolve()
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in (prefix, *prefix.parents))


@pytest.mark.skipif(os.geteuid() != 0 or not _is_for_all(), reason="needs two users of one installation")
def test_a_run_of_another_user_is_read_and_not_written(place: Path) -> None:
    before = contents(place)
    for verb, *flags in (("stats",), ("show", "--row", 1), ("verify",)):
        assert as_another(verb, place / "run", *flags).code == 0
    for arguments in (
        ("mask", place / "run", "--keep", 0.5),
        ("refresh", place / "run", "--checkpoint", place / "base"),
        ("report", place / "run"),
        ("stats", place / "run", "--svg", place / "x.svg"),
        ("export", place / "run", "--for", "trl", "-o", place / "export"),
        ("score", place / "rows.jsonl", "--model", place / "tuned", "-o", place / "other", "--device", "cpu"),
    ):
        ended = as_another(*arguments)
        assert ended.code == 1 and "Permission denied" in said(ended) and "Traceback" not in ended.err, ended.err
    assert contents(place) == before
    assert command("mask", place / "run", "--keep", 0.5).code == 0


@pytest.mark.parametrize("name", ["values/generation=0/part-00000.parquet", "values", "manifest.json", "."])
@pytest.mark.parametrize("verb", ["stats", "show", "verify", "mask"])
def test_what_may_not_be_read_is_not_called_damaged(name: str, verb: str, place: Path) -> None:
    flags = {"show": ("--row", 0), "mask": ("--keep", 0.3)}.get(verb, ())
    with closed(place / "run" / name):
        ended = as_another(verb, place / "run", *flags)
    assert ended.code in (1, 2, 4) and "Traceback" not in ended.err, ended.err
    assert "damaged" not in said(ended) and "delete" not in said(ended), said(ended)
    assert "permi" in said(ended).casefold() or "not readable" in said(ended), said(ended)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
def test_a_model_that_may_not_be_read_is_a_line(name: str, place: Path) -> None:
    with closed(place / "tuned" / name):
        ended = as_another("check", place / "rows.jsonl", "--model", place / "tuned", "--estimate")
        other = as_another("score", place / "rows.jsonl", "--model", place / "tuned", "-o", place / "new")
    for one in (ended, other):
        assert one.code == 2 and str(place / "tuned") in said(one) and "permission" in said(one).casefold(), said(one)


def test_a_place_that_may_not_be_looked_at_is_a_line(place: Path) -> None:
    (place / "private").mkdir(exist_ok=True)
    with closed(place / "private"):
        out = place / "private" / "deep" / "run"
        ended = as_another("score", place / "rows.jsonl", "--model", place / "tuned", "-o", out)
    assert ended.code in (1, 2) and str(place / "private") in said(ended) and "Traceback" not in ended.err, ended.err


def test_too_many_open_files_are_no_damage(place: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        try:
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            os.close(opened.pop())
        ended = command("show", place / "run", "--row", 0)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "delete" not in said(ended) and (ended.code == 0 or "Too many open files" in said(ended)), said(ended)


PLACES = {
    "no home": {"HOME": "/nonexistent"},
    "a file for a home": {"HOME": "/etc/passwd"},
    "caches that cannot be": {"HF_HOME": "/proc/nope", "XDG_CACHE_HOME": "/proc/nope", "MPLCONFIGDIR": "/proc/nope"},
    "no temporary folder": {"TMPDIR": "/nonexistent"},
}


@pytest.mark.long
@pytest.mark.parametrize("name", PLACES)
def test_places_that_are_not_there_are_not_needed(name: str, place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    score = ("score", place / "rows.jsonl", "--model", place / "tuned", "--layers", 1, "-o", run, "--device", "cpu")
    for arguments in (score, ("mask", run, "--keep", 0.5), ("stats", run), ("report", run, "-o", tmp_path / "a.html")):
        ended = subprocess.run(
            [sys.executable, "-m", "alphatoken_curate", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **PLACES[name]},
        )
        assert ended.returncode == 0, ended.stderr
    assert command("verify", run).code == 0
