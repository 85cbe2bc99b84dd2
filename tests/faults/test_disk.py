"""A disk that is full, breaks or becomes read-only: told in words, nothing half written, and gone on with later."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashes import MASK, Bench, assert_readable, bench_of, resumed, stamps, temporaries
from faults import REFUSALS
from forks import Forks
from tiny_files import contents

SHARD = "part-00002.parquet"


@pytest.fixture(scope="module")
def bench(forks: Forks, folder: Path, models: dict[str, str]) -> Bench:
    return bench_of(forks, folder / "bench", models, fake=True)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "call", "name"),
    [
        *(("score", call, name) for call in ("open", "write", "fsync") for name in (SHARD, "manifest.json")),
        *(("mask", call, name) for call in ("write", "fsync") for name in (SHARD, "manifest.json")),
        ("refresh", "write", SHARD),
        ("refresh", "fsync", "manifest.json"),
        ("score", "write", "run.json"),
        ("score", "fsync", "README.md"),
        ("score", "replace", SHARD),
        ("score", "fsync", "generation=0"),  # the folder, once a shard was renamed into it
        ("mask", "fsync", "mask=0001"),
    ],
)
def test_what_the_disk_refuses_is_told_and_gone_on_with(
    kind: str, call: str, name: str, bench: Bench, tmp_path: Path
) -> None:
    bench.whole(kind)
    run = bench.begun(kind, tmp_path / "run")
    kept = stamps(run)
    ended = bench.run(kind, run, refuse=(call, name))
    assert ended.code == 1 and "Traceback" not in ended.err, ended.err
    assert name in ended.err and os.strerror(REFUSALS[call]) in ended.err, ended.err
    assert "run the same command again: files that are finished are kept" in " ".join(ended.err.split())
    assert temporaries(run) == []
    assert_readable(run)
    assert kept.items() <= stamps(run).items()
    resumed(bench, kind, run, tmp_path / "log")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this machine lets us have one."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or _mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", place):
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _mount(*arguments: object) -> int:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_is_really_full(bench: Bench, small_disk: Path) -> None:
    whole, run = contents(bench.whole("score")), small_disk / "run"
    for room in range(32, 400, 64):
        free = os.statvfs(small_disk)
        (small_disk / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room * 1024)))
        ended = bench.run("score", run)
        assert ended.code in (0, 1) and "Traceback" not in ended.err, ended.err
        if ended.code:
            assert os.strerror(REFUSALS["write"]) in ended.err
        if run.exists():
            assert temporaries(run) == []
            assert_readable(run)
        (small_disk / "ballast").unlink()
    assert bench.run("score", run).code == 0
    assert contents(run) == whole


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize(
    "arguments",
    [
        ("mask", "RUN", "--keep", "0.2"),
        ("report", "RUN"),
        ("refresh", "RUN", "--checkpoint", "base"),
        ("report", "RUN", "-o", "DISK/page.html"),
        ("stats", "RUN", "--svg", "DISK/x.svg"),
        ("export", "RUN", "--for", "trl", "-o", "DISK/export"),
        ("export", "RUN", "--for", "llamafactory", "-o", "DISK/export"),
    ],
    ids="-".join,
)
def test_nothing_is_lost_on_a_full_disk_and_all_is_well_when_there_is_room(
    arguments: tuple[str, ...], bench: Bench, small_disk: Path
) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    shutil.copytree(bench.whole("score"), run)
    before = contents(run)
    meant = {"RUN": str(run), "base": bench.models["base"]}
    command = [meant.get(one, one.replace("DISK", str(small_disk))) for one in arguments]
    for left in (0, 8192):
        free = os.statvfs(small_disk)
        ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - left))
        ended = bench.forks.run(*command, fake=True)
        assert ended.code == 1 and "Traceback" not in ended.err, ended.err
        assert os.strerror(REFUSALS["write"]) in ended.err and temporaries(small_disk) == []
        assert before.items() <= contents(run).items() or left, "nothing of what was there may change"
        assert_readable(run)
        ballast.unlink()
    ended = bench.forks.run(*command, fake=True)
    assert ended.code == 0, ended.err
    assert bench.forks.run("verify", run).code == 0


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_really_is_read_only(bench: Bench, small_disk: Path) -> None:
    run = small_disk / "run"
    shutil.copytree(bench.whole("score"), run)
    assert _mount("-o", "remount,ro", small_disk) == 0
    assert bench.run("score", run).code == 0  # there is nothing to write
    for kind, place in (("mask", run), ("score", small_disk / "new")):
        ended = bench.run(kind, place)
        assert ended.code == 1 and "cannot be written" in ended.err and "Traceback" not in ended.err, ended.err
    assert _mount("-o", "remount,rw", small_disk) == 0
    assert bench.forks.run("mask", run, *MASK).code == 0
    assert contents(run) == contents(bench.whole("mask"))
