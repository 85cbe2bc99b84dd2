"""The system's clock set back while commands run and between them, and files of the future: nothing depends on it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from crashes import Bench, bench_of, temporaries
from daily import daily
from forks import Forks, Process
from tiny import tiny_model
from tiny_files import contents, perturbed, quiet

YEARS = {"1970": 0, "2100": 4_102_444_800}
EITHER = [pytest.param("1970", marks=pytest.mark.long), "2100"]
READING = (("stats",), ("show", "--row", 0), ("verify",))


@pytest.fixture(scope="module")
def bench(forks: Forks, folder: Path, models: dict[str, str]) -> Bench:
    return bench_of(forks, folder / "bench", models, fake=True)


def dated(place: Path, year: str) -> None:
    """Have all files, and folders, be of a year."""
    for path in (place, *place.rglob("*")):
        os.utime(path, (YEARS[year], YEARS[year]))


@pytest.mark.parametrize("kind", daily(["score", "refresh", "mask"], ["score"]))
def test_a_clock_that_goes_back_all_the_time_changes_nothing(kind: str, bench: Bench, tmp_path: Path) -> None:
    whole, run = contents(bench.whole(kind)), bench.begun(kind, tmp_path / "run")
    ended = bench.run(kind, run, clock_back=True)
    assert ended.code == 0 and "-" not in _times(ended), ended.err
    assert contents(run) == whole


@pytest.mark.long
@pytest.mark.parametrize("kind", ["score", "refresh", "mask"])
@pytest.mark.parametrize("year", EITHER)
def test_a_clock_set_back_between_two_runs_changes_nothing(kind: str, year: str, bench: Bench, tmp_path: Path) -> None:
    whole, run = contents(bench.whole(kind)), bench.begun(kind, tmp_path / "run")
    killed = bench.run(kind, run, kill_at="mid-write@part-00002.parquet")
    assert killed.code == -signal.SIGKILL
    dated(run, year)
    ended = bench.run(kind, run, clock_back=True)
    assert ended.code == 0, ended.err
    assert contents(run) == whole and temporaries(run) == []
    assert bench.run(kind, run, clock_back=True).code == 0  # nothing is left to do


@pytest.mark.long
@pytest.mark.parametrize("year", EITHER)
def test_what_is_read_does_not_depend_on_dates(year: str, bench: Bench, tmp_path: Path) -> None:
    run = Path(shutil.copytree(bench.whole("mask"), tmp_path / "run"))
    report = ("report", "-o", tmp_path / "page.html")
    told, pages = [], []
    for back in (False, True):
        for verb, *flags in (*READING, report):
            ended = bench.forks.run(verb, run, *flags, clock_back=back)
            assert ended.code == 0, ended.err
            told.append((back, ended.out))
        pages.append((tmp_path / "page.html").read_bytes())
        (tmp_path / "page.html").unlink()
        dated(run, year)
    assert [out for back, out in told if back] == [out for back, out in told if not back]
    assert pages[0] == pages[1]
    assert contents(run) == contents(bench.whole("mask"))


@pytest.mark.long
@pytest.mark.parametrize("year", EITHER)
def test_a_watch_scores_checkpoints_of_any_year(year: str, bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in (10, 20):
        with quiet():
            perturbed(tiny_model("llama", dtype=torch.float32), step / 1000).save_pretrained(out / f"checkpoint-{step}")
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    dated(out, year)
    found = []
    for name, back in (("plain", False), ("back", True)):
        run = Path(shutil.copytree(bench.whole("score"), tmp_path / name))
        watching = ("refresh", run, "--watch", out, "--interval", 0.1)
        ended = bench.forks.run(*watching, fake=True, clock_back=back, said="generation 2 of", signal=signal.SIGTERM)
        assert ended.code == 130, ended.err
        found.append(contents(run))
    assert found[0] == found[1]


def _times(ended: Process) -> str:
    """What is said of times: none is negative."""
    return " ".join(word for word in (ended.out + ended.err).split() if word.startswith("-") and word[1:2].isdigit())
