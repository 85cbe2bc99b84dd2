"""The `export` command: what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported import SOFT, read, truth
from small_run import published, small_run
from tiny_files import command, contents

from alphatoken_curate import mask


def test_it_says_what_was_written_and_what_comes_next(tmp_path: Path) -> None:
    run, place = small_run(tmp_path / "run"), tmp_path / "out"
    done = command("export", run, "--for", "hf", "-o", place, "--max-length", 4)
    assert done.code == 0, done.err
    rows, lost = len(truth(run, max_length=4)), len(truth(run)) - len(truth(run, max_length=4))
    assert done.out.splitlines()[0] == f"Wrote {place}/ for hf, of mask 0"
    for line in (
        f"rows     {rows}",
        "(all 0 or 1)",
        f"dropped  {lost} row{'s' if lost > 1 else ''}: cut_away {lost}; see {place}/dropped.jsonl",
        f"data     {place}/train.parquet",
        f"{place}/README.md",
    ):
        assert line in done.out, line
    assert lost and (place / "dropped.jsonl").read_text().count("\n") == lost


def test_flags_reach_the_export(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config=SOFT)
    mask(run, published(keep=0.2))
    plain = command("export", run, "--for", "hf", "-o", tmp_path / "plain", "--mask", 0)
    assert plain.code == 0 and "(all 0 or 1)" not in plain.out and "dropped  0 rows\n" in plain.out
    assert read("hf", tmp_path / "plain") == truth(run, mask=0)
    done = command("export", run, "--for", "hf", "-o", tmp_path / "out", "--mask", 0, "--strict", "--binarize")
    assert done.code == 0 and "of mask 0" in done.out
    assert read("hf", tmp_path / "out") == truth(run, mask=0, binarize=True)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--for", "skyrl"], "--binarize"),
        (["--for", "hf", "--strict"], "--binarize"),
        (["--for", "verl", "--strict"], "--strict is for --for hf"),
        (["--for", "hf", "--mask", "4"], "has no mask 4"),
        (["--for", "nope"], "'nope' is not one of 'trl'"),
        (["--for", "axolotls"], "Did you mean axolotl?"),
        (["--for", "hf", "--max-length", "1"], "--max-length"),
        ([], "Missing option '--for'"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, arguments: list[str], says: str) -> None:
    run = small_run(tmp_path / "run", config=SOFT)
    done = command("export", run, *arguments, "-o", tmp_path / "out")
    assert done.code == 2 and says in done.err and "Traceback" not in done.err and done.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    assert command("export", run, "--for", "tinker", "-o", tmp_path / "out").code == 0
    before = contents(tmp_path)
    again = command("export", run, "--for", "tinker", "-o", tmp_path / "out")
    assert again.code == 2 and "not empty" in again.err and contents(tmp_path) == before


def test_the_folder_is_named_after_the_run_and_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path / "runs" / "my.alphatoken")
    monkeypatch.chdir(tmp_path)
    done = command("export", run, "--for", "trl")
    assert done.code == 0 and done.out.splitlines()[0] == "Wrote my.trl/ for trl (hf), of mask 0"
    assert read("hf", tmp_path / "my.trl") == truth(run)
    assert command("export", run, "--for", "trl").code == 2, "nothing is overwritten"
    monkeypatch.chdir(tmp_path / "runs")
    (tmp_path / "runs" / "plain").symlink_to(run)
    assert command("export", "plain", "--for", "hf").out.startswith("Wrote my.hf/ for hf, of mask 0")


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    next((run / "train/mask=0000").iterdir()).unlink()
    done = command("export", run, "--for", "hf", "-o", tmp_path / "out")
    assert done.code == 4 and "part-0000" in done.err and not (tmp_path / "out").exists()


def test_a_path_that_others_take_for_a_pattern_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, note = small_run(tmp_path / "g[1]"), "load_dataset takes *, ? and [ in this path for a pattern"
    monkeypatch.chdir(run.parent)
    for arguments, times in (
        (("mask", "g[1]", "--keep", 0.2), 1),
        (("export", "g[1]", "--for", "trl", "-o", "out"), 0),
        (("export", "g[1]", "--for", "trl"), 1),
    ):
        done = command(*arguments)
        assert done.code == 0 and done.out.count(note) == times
    monkeypatch.chdir(run)
    assert command("mask", ".").out.count(note) == 1
