"""Commands killed at named points and at random moments, over and over: what is finished is neither lost nor redone.

A scorer that costs nothing stands in for the model; `test_crash` and `test_crash_refresh` kill real ones, and so does
one test here.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import orjson
import pytest
from crashes import Bench, assert_readable, bench_of, resumed, stamps, temporaries
from daily import daily
from forks import Forks, Process
from small_run import sealed_manifest
from tiny_files import contents

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.runs import manifest, shards

SHARD = "part-00001.parquet"
POINTS = (
    *(f"{point}@{SHARD}" for point in ("after-temp-open", "mid-write", "after-close", "after-fsync", "after-rename")),
    *("before-manifest", "mid-write@manifest.json", "after-manifest"),
)
COMMANDS = ("score", "refresh", "mask")


@pytest.fixture(scope="module")
def bench(forks: Forks, folder: Path, models: dict[str, str]) -> Bench:
    return bench_of(forks, folder / "fake", models, fake=True)


@pytest.fixture(scope="module")
def real(forks: Forks, folder: Path, models: dict[str, str]) -> Bench:
    return bench_of(forks, folder / "real", models, fake=False)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("point", daily(POINTS, POINTS[1:2]))
def test_killed_at_a_named_point(point: str, kind: str, bench: Bench, tmp_path: Path) -> None:
    bench.whole(kind)
    run = bench.begun(kind, tmp_path / "run")
    kept = stamps(run)
    ended = bench.run(kind, run, kill_at=point, log=tmp_path / "log")
    assert ended.code == -signal.SIGKILL, (point, ended)
    assert_readable(run)
    assert kept.items() <= stamps(run).items()
    if point.endswith(SHARD) and kind != "mask":
        assert bench.scored(kind, run) == ({0, 1} if point.startswith("after-rename") else {0})
    resumed(bench, kind, run, tmp_path / "log")


def kills(bench: Bench, draw: random.Random, folder: Path, wanted: int, in_a_row: int = 1) -> dict[str, int]:
    """So many SIGKILLs at random moments of `score`, `refresh` and `mask`, each run then resumed to its end.

    Up to `in_a_row` of them hit the same run. Returns how many hit each command before it had ended.
    """
    hit, tries, longest = dict.fromkeys(COMMANDS, 0), 0, {}
    for kind in COMMANDS:
        bench.whole(kind)
        longest[kind] = bench.run(kind, bench.begun(kind, folder / f"timed-{kind}")).seconds
    while sum(hit.values()) < wanted:
        tries += 1
        assert tries <= 5 * wanted + 20, hit
        kind = COMMANDS[0] if tries % 4 < 2 else COMMANDS[tries % 4 - 1]
        run, log = bench.begun(kind, folder / f"run{tries}"), folder / "log"
        for _ in range(in_a_row):
            kept, there = stamps(run), bench.scored(kind, run)
            log.unlink(missing_ok=True)
            ended = bench.run(kind, run, after=draw.uniform(0, longest[kind]), log=log)
            assert ended.code in (0, -signal.SIGKILL), ended.err
            hit[kind] += ended.code == -signal.SIGKILL
            if run.exists():
                assert_readable(run)
            assert kept.items() <= stamps(run).items()
            done = {int(line.split()[1]) for line in log.read_text().splitlines()} if log.exists() else set()
            # What was scored is there, but for the shard in flight.
            assert not done & there and len(done - bench.scored(kind, run)) <= 1
        resumed(bench, kind, run, log)
        assert temporaries(run) == []
        shutil.rmtree(run)
    return hit


@pytest.mark.long
def test_kills_at_random_moments(bench: Bench, tmp_path: Path) -> None:
    assert min(kills(bench, random.Random(1), tmp_path, 25).values()) >= 2


@pytest.mark.long
def test_five_kills_in_a_row(bench: Bench, tmp_path: Path) -> None:
    assert sum(kills(bench, random.Random(2), tmp_path, 15, in_a_row=5).values()) >= 15


@pytest.mark.stress
def test_200_kills_at_random_moments(bench: Bench, tmp_path: Path) -> None:
    assert min(kills(bench, random.Random(3), tmp_path, 200).values()) >= 20


@pytest.mark.stress
def test_ten_kills_of_real_scorers(real: Bench, tmp_path: Path) -> None:
    assert sum(kills(real, random.Random(4), tmp_path, 10).values()) >= 10


@pytest.mark.stress
def test_five_kills_in_a_row_ten_times(bench: Bench, tmp_path: Path) -> None:
    assert sum(kills(bench, random.Random(5), tmp_path, 50, in_a_row=5).values()) >= 50


@pytest.mark.long
@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_unfinished(number: int, kind: str, bench: Bench, tmp_path: Path) -> None:
    bench.whole(kind)
    run = bench.begun(kind, tmp_path / "run")
    folder = shards.train_folder(run, 1) if kind == "mask" else shards.values_folder(run, int(kind == "refresh"))
    ended = bench.run(kind, run, once=folder / "part-00000.parquet", signal=number)
    assert ended.code == 130, (ended.code, ended.err)
    assert "run the same command again to go on" in ended.err and "Traceback" not in ended.err
    assert temporaries(run) == []
    assert_readable(run)
    resumed(bench, kind, run, tmp_path / "log")


# ----------------------------------------------------------------------------------------------------- two at once


def at_once(bench: Bench, other: Forks, run: Path) -> list[Process]:
    """Two processes that score into the same folder, begun together."""
    for server in (bench.forks, other):
        server.begin(*bench.arguments("score", run), fake=True)
    return [bench.forks.end(), other.end()]


def trials(bench: Bench, folder: Path, count: int) -> int:
    """How many of so many pairs of processes met."""
    whole, met = contents(bench.whole("score")), 0
    (folder / "other").mkdir()
    with Forks(folder / "other") as other:
        for number in range(count):
            run = folder / f"run{number}"
            ended = at_once(bench, other, run)
            assert {one.code for one in ended} in ({0}, {0, 2}), ended
            for one in ended:
                assert one.code == 0 or "another process is writing to it" in one.err, one.err
            met += any(one.code == 2 for one in ended)
            assert contents(run) == whole
    return met


@pytest.mark.long
def test_two_processes_on_one_run(bench: Bench, tmp_path: Path) -> None:
    trials(bench, tmp_path, 3)


@pytest.mark.stress
def test_two_processes_on_one_run_20_times(bench: Bench, tmp_path: Path) -> None:
    assert trials(bench, tmp_path, 20) >= 10


@pytest.mark.long
def test_a_second_process_is_refused_while_the_first_writes(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    second = bench.arguments("score", run)
    once = shards.values_folder(run, 0) / "part-00000.parquet"
    ended = bench.run("score", run, once=once, meanwhile=second)
    assert ended.meanwhile is not None and ended.meanwhile.code == 2
    assert f"{run}: another process is writing to it" in ended.meanwhile.err
    assert ended.code == 0 and contents(run) == contents(bench.whole("score"))
    assert manifest.read(run).counts.scored > 0


# ------------------------------------------------------------------------------------------- what is met on resuming


@pytest.mark.long
@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("copied", [False, True])
def test_shards_that_were_swapped_or_copied_before_the_end_are_refused(
    kind: str, copied: bool, bench: Bench, tmp_path: Path
) -> None:
    bench.whole(kind)
    run = bench.begun(kind, tmp_path / "run")
    # Before the first manifest of each command, and of `mask` after its shards.
    assert bench.run(kind, run, kill_at="before-manifest").code == -signal.SIGKILL
    folder = shards.train_folder(run, 1) if kind == "mask" else shards.values_folder(run, int(kind == "refresh"))
    first, second = folder / "part-00000.parquet", folder / SHARD
    contents_of = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents_of[0])
    if not copied:
        first.write_bytes(contents_of[1])
    ended = bench.run(kind, run)
    assert ended.code == 4, ended.err
    assert "it was swapped or copied" in ended.err and "run the command that wrote it again" in ended.err
    for path in (first, second):
        path.unlink(missing_ok=True)
    assert bench.run(kind, run).code == 0
    assert contents(run) == contents(bench.whole(kind))


@pytest.mark.long
@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_torn_manifest_is_made_anew_from_the_shards(kind: str, share: float, bench: Bench, tmp_path: Path) -> None:
    bench.whole(kind)
    run = Path(shutil.copytree(bench.whole("score"), tmp_path / "run"))
    content = (run / "manifest.json").read_bytes()
    (run / "manifest.json").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StoredDataError, match=r"manifest\.json: damaged .* made anew from the shards"):
        manifest.read(run)
    ended = bench.run(kind, run)
    assert ended.code == 0, ended.err
    assert "manifest.json was damaged" in ended.err
    assert contents(run) == contents(bench.whole(kind))


@pytest.mark.long
def test_a_manifest_of_a_later_release_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    run = Path(shutil.copytree(bench.whole("score"), tmp_path / "run"))
    later = sealed_manifest(orjson.loads((run / "manifest.json").read_bytes()) | {"schema_version": 99})
    (run / "manifest.json").write_bytes(later)
    for kind in COMMANDS:
        ended = bench.run(kind, run)
        assert ended.code == 4 and "schema version 99" in ended.err, ended.err
    assert (run / "manifest.json").read_bytes() == later
