"""Processes killed at named points and at random moments: what is finished is kept, and the end is the same."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from crashes import POINTS, assert_readable, temporaries
from daily import daily
from forks import Forks
from tiny_files import contents, token_records, write_jsonl

from alphatoken_curate import verify
from alphatoken_curate.runs import manifest

MASK = ("--keep", 0.2, "--weights", "rank")


@pytest.fixture(scope="module")
def score_command(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A run of four shards with a bad row, all but its -o."""
    data = write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", [*token_records(11), "{"])
    return (
        *("score", data, "--bad-rows", "quarantine", "--rows-per-shard", 3, "--layers", 2, "--device", "cpu"),
        *("--model", models["tuned"], "--reference", models["base"], "-o"),
    )


@pytest.fixture(scope="module")
def whole(forks: Forks, score_command: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing broke."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ended = forks.run(*score_command, run)
    assert ended.code == 0, ended.err
    assert verify(run) == []
    return run


@pytest.fixture(scope="module")
def remasked(forks: Forks, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a second mask, which nothing broke either."""
    run = Path(shutil.copytree(whole, tmp_path_factory.mktemp("remasked") / "run"))
    assert forks.run("mask", run, *MASK).code == 0
    assert manifest.read(run).masks[-1].mask == 1
    return run


# An unbroken run commits this many files; the n-th time a point is passed belongs to the n-th of them.
FILES = 4 + 1 + 1 + 1 + 1 + 4 + 1 + 1 + 1 + 4 + 1 + 1


def _points(every: int) -> list[str]:
    """Kill points of `score`, each of the five kinds at every so many files, at different ones for each kind."""
    named = [f"{point}:{n}" for k, point in enumerate(POINTS) for n in range(1 + k, FILES + 1, every)]
    return [*named, "before-manifest:1", "after-manifest:1", "before-manifest:2", "after-manifest:2"]


def _killed_then_whole(forks: Forks, point: str, command: tuple[object, ...], run: Path, wanted: Path) -> None:
    ended = forks.run(*command, kill_at=point)
    assert ended.code == -signal.SIGKILL, (point, ended)
    assert_readable(run)
    before = {name: content for name, content in contents(run).items() if name.endswith(".parquet")}
    again = forks.run(*command)
    assert again.code == 0, again.err
    assert contents(run) == contents(wanted), point
    assert all(contents(run)[name] == content for name, content in before.items())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("point", daily(_points(every=7), _points(every=28)))
def test_score_killed_at_a_point_ends_the_same(
    point: str, forks: Forks, score_command: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _killed_then_whole(forks, point, (*score_command, run), run, whole)


@pytest.mark.stress
@pytest.mark.parametrize("point", _points(every=1))
def test_score_killed_at_every_point_ends_the_same(
    point: str, forks: Forks, score_command: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _killed_then_whole(forks, point, (*score_command, run), run, whole)


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    "point",
    [
        *(f"{point}:{1 + k % 4}" for k, point in enumerate(POINTS)),
        *(pytest.param(f"{point}:{5 + k % 2}", marks=pytest.mark.long) for k, point in enumerate(POINTS)),
        "before-manifest",
        "after-manifest",
    ],
)
def test_mask_killed_at_a_point_ends_the_same(
    point: str, forks: Forks, whole: Path, remasked: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    _killed_then_whole(forks, point, ("mask", run, *MASK), run, remasked)


@pytest.mark.long
def test_an_unbroken_run_commits_as_many_files_as_these_tests_take(
    forks: Forks, score_command: tuple[object, ...], tmp_path: Path
) -> None:
    assert forks.run(*score_command, tmp_path / "a", kill_at=f"after-rename:{FILES}").code == -signal.SIGKILL
    assert forks.run(*score_command, tmp_path / "b", kill_at=f"after-rename:{FILES + 1}").code == 0


def _killed_at_random(
    forks: Forks, draw: random.Random, command: tuple[object, ...], whole: Path, run: Path, kills: int
) -> int:
    """Kill the same command some times, then let it end; returns how often it was killed before it ended."""
    seconds = forks.run(*command[:-1], run.with_name("timed")).seconds
    killed = 0
    for _ in range(kills):
        ended = forks.run(*command, after=draw.uniform(0, seconds))
        killed += ended.code == -signal.SIGKILL
        if run.exists():
            assert_readable(run)
    assert forks.run(*command).code == 0
    assert contents(run) == contents(whole)
    return killed


@pytest.mark.long
def test_kills_at_random_moments(forks: Forks, score_command: tuple[object, ...], whole: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    killed = 0
    for kills in (1, 1, 1, 5):
        run = tmp_path / f"run{killed}{kills}"
        killed += _killed_at_random(forks, draw, (*score_command, run), whole, run, kills)
        shutil.rmtree(tmp_path / "timed")
    assert killed >= 4


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(40))
def test_many_kills_at_random_moments(
    seed: int, forks: Forks, score_command: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _killed_at_random(forks, random.Random(seed), (*score_command, run), whole, run, 1 + seed % 3)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("number", daily([signal.SIGINT, signal.SIGTERM], [signal.SIGINT]))
@pytest.mark.parametrize(
    "once", ["artifacts/run.json", "artifacts/fisher.safetensors", "values/generation=0/part-00001.parquet"]
)
def test_an_interrupt_says_how_to_go_on(
    number: int, once: str, forks: Forks, score_command: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = forks.run(*score_command, run, once=run / once, signal=number)
    assert ended.code == 130, ended.err
    assert "run the same command again to go on" in ended.err and "Traceback" not in ended.err
    assert temporaries(run) == []
    assert not (run / "manifest.json").exists()
    assert forks.run(*score_command, run).code == 0
    assert contents(run) == contents(whole)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(30))
def test_an_interrupt_at_any_moment(
    seed: int, forks: Forks, score_command: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    run, draw = tmp_path / "run", random.Random(seed)
    seconds = forks.run(*score_command, tmp_path / "timed").seconds
    ended = forks.run(
        *score_command, run, after=draw.uniform(0.05, seconds), signal=draw.choice([signal.SIGINT, signal.SIGTERM])
    )
    assert ended.code in (0, 130), ended.err
    assert "Traceback" not in ended.err and (not run.exists() or temporaries(run) == [])
    assert forks.run(*score_command, run).code == 0
    assert contents(run) == contents(whole)


@pytest.mark.long
def test_a_killed_writer_leaves_no_hold_behind(forks: Forks, score_command: tuple[object, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert forks.run(*score_command, run, kill_at="mid-write:3").code == -signal.SIGKILL
    assert temporaries(run)
    assert forks.run(*score_command, run).code == 0
    assert temporaries(run) == []
