"""Tokens of rows on disk: the same run as without, found again by the next command, and never believed unchecked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from daily import daily
from forks import Forks
from tiny_files import contents, pair_records, token_records, write_jsonl

from alphatoken_curate import FingerprintError, InputError, ScoreConfig, StoredDataError, UsageError, score, verify
from alphatoken_curate.runs.atomic import one_writer
from alphatoken_curate.runs.shards import listed, values_folder
from alphatoken_curate.scoring import reader, shelf
from alphatoken_curate.scoring.check import check
from alphatoken_curate.scoring.prepare import prepare
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.score import score_part
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.shelf import Place, known
from alphatoken_curate.tokens.dealt import Rows

BAD = ["{", {"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}]


@pytest.fixture
def settings(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A third shard of bad rows alone."""
    records = [*token_records(9), *BAD * 3, *token_records(8, seed=1), BAD[1]]
    return {
        "data": write_jsonl(tmp_path / "rows.jsonl", records),
        "model": models["tuned"],
        "layers": 1,
        "rows_per_shard": 4,
        "batch_tokens": 100,
        "bad_rows": "quarantine",
        "max_length": 15,
    }


@pytest.fixture
def spilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "IN_MEMORY", 0)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A scoring is interrupted at its third shard."""
    plain, seen = ShardScorer.score, list[int]()

    def scored(self: ShardScorer, *arguments: Any) -> Any:
        seen.append(arguments[0])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardScorer, "score", scored)
        yield patch


def begun(settings: dict[str, Any], run: Path, stopped: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted; returns the folder of its rows."""
    with pytest.raises(KeyboardInterrupt):
        score(ScoreConfig(**settings), run)
    stopped.undo()
    return run / "artifacts" / "rows"


def never(*_: object) -> None:
    raise AssertionError("DATA is read again")


def several(models: dict[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    pairs = write_jsonl(folder / "pairs.jsonl", pair_records(9))
    files = [write_jsonl(folder / f"{name}.jsonl", token_records(5, seed=seed)) for seed, name in enumerate("ab")]
    return {
        "as it is": {},
        "pairs": {"data": pairs, "reference": models["base"], "drift": "lookahead", "lookahead_lr": 0.1},
        "of several files": {
            "data": tuple(files),
            "limit": 8,
            "target": files[1],
            "precondition": "adam",
            "rows_per_shard": 3,
        },
    }


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("kind", "resumed"),
    [
        ("as it is", True),
        pytest.param("as it is", False, marks=pytest.mark.long),
        ("pairs", True),
        pytest.param("pairs", False, marks=pytest.mark.long),
        ("of several files", True),
        pytest.param("of several files", False, marks=pytest.mark.long),
    ],
)
def test_a_run_is_the_same_whether_its_rows_lie_on_disk(
    kind: str,
    resumed: bool,
    settings: dict[str, Any],
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: pytest.MonkeyPatch,
) -> None:
    settings |= several(models, tmp_path)[kind]
    run = tmp_path / "run"
    monkeypatch.setattr(shelf, "IN_MEMORY", 0)
    if resumed:
        rows = begun(settings, run, stopped)
        assert (rows / "rows.json").is_file() and len(list(rows.glob("part-*.arrow"))) >= 2
        monkeypatch.setattr(reader, "tokenised", never)
    else:
        stopped.undo()
    score(ScoreConfig(**settings), run)
    assert not (run / "artifacts" / "rows").exists() and verify(run) == []
    monkeypatch.undo()
    score(ScoreConfig(**settings), tmp_path / "whole")
    assert contents(run) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("spilled")
def test_what_was_found_comes_back_whole(settings: dict[str, Any], tmp_path: Path) -> None:
    place, config = Place(tmp_path / "run"), ScoreConfig(**settings)
    first, again = (prepare(config, place) for _ in range(2))
    alone = prepare(config)
    for one in (first, again):
        names = ("kind", "files", "rows_read", "good", "tokens", "bad", "told", "read_as", "config")
        for name in names:
            assert getattr(one, name) == getattr(alone, name), name
        for mine, other in ((one.rows, alone.rows), (one.held_out, alone.held_out)):
            assert [bytes(row.input_ids) for row in mine] == [bytes(row.input_ids) for row in other]  # type: ignore[union-attr]
        assert one.rows.columns.tolist() == alone.rows.columns.tolist()
    before = known(place)
    assert before is not None and before.tokens == alone.tokens
    other = prepare(replace(config, seed=3), place)  # other rows are held out of the same
    assert other.tokens == prepare(replace(config, seed=3)).tokens != alone.tokens


@pytest.mark.parametrize("change", ["rows", "limit", "max_length", "rows_per_shard", "library", "day"])
@pytest.mark.usefixtures("spilled")
def test_rows_of_other_data_or_settings_are_made_anew(
    change: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "run")
    prepare(ScoreConfig(**settings), place)
    if change == "rows":
        write_jsonl(Path(settings["data"]), token_records(9))
    elif change == "library":
        monkeypatch.setattr(reader.importlib.metadata, "version", lambda name: "0.0")
    elif change == "day":
        before = known(place)
        assert before is not None
        monkeypatch.setattr(reader, "known", lambda _: replace(before, found=replace(before.found, day="1999-12-31")))
    else:
        settings[change] = 5
    found = prepare(ScoreConfig(**settings), place)
    monkeypatch.undo()
    assert found.tokens == prepare(ScoreConfig(**settings)).tokens
    if change not in ("library", "day"):
        now = known(place)
        assert now is not None and now.tokens == found.tokens


LESS = [pytest.param(name, marks=pytest.mark.long) for name in ("gone", "columns")]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("damage", ["record", "cut", *LESS])
@pytest.mark.usefixtures("spilled")
def test_rows_that_are_not_whole_are_made_anew(
    damage: str, settings: dict[str, Any], tmp_path: Path, stopped: pytest.MonkeyPatch
) -> None:
    rows = begun(settings, tmp_path / "run", stopped)
    file = rows / {"record": "rows.json", "columns": "columns.arrow"}.get(damage, "part-00004.arrow")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2])
    score(ScoreConfig(**settings), tmp_path / "run")
    score(ScoreConfig(**settings), tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("spilled")
def test_a_flipped_bit_is_seen_when_its_shard_is_read(
    settings: dict[str, Any], tmp_path: Path, stopped: pytest.MonkeyPatch
) -> None:
    rows = begun(settings, tmp_path / "run", stopped)
    file = rows / "part-00005.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoredDataError, match=r"part-00005\.arrow: missing or damaged .*same command again"):
        score(ScoreConfig(**settings), tmp_path / "run")
    score(ScoreConfig(**settings), tmp_path / "run")
    score(ScoreConfig(**settings), tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("spilled")
def test_parts_take_the_rows_that_were_prepared(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = ScoreConfig(**settings), tmp_path / "run"
    score_part(config, "prepare", run)
    kept = contents(run / "artifacts" / "rows")
    assert "rows.json" in kept
    with monkeypatch.context() as patch:
        patch.setattr(reader, "tokenised", never)
        score_part(config, "0/2", run)
    (run / "artifacts" / "rows" / "rows.json").unlink()
    with one_writer(run, shared=True):
        score_part(config, "1/2", run)  # makes them anew, for itself alone
    assert contents(run / "artifacts" / "rows") == {k: v for k, v in kept.items() if k != "rows.json"}
    score(config, run)
    score(config, tmp_path / "whole")
    assert contents(run) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("spilled")
def test_what_is_refused_leaves_no_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match="cannot be used"):
        score(ScoreConfig(**settings | {"bad_rows": "refuse"}), run)
    assert not contents(run)
    score(ScoreConfig(**settings), run)
    with pytest.raises(FingerprintError, match="max_length"):
        score(ScoreConfig(**settings | {"max_length": 12}), run)
    assert verify(run) == []
    with one_writer(run), pytest.raises(Exception, match="another process"):
        score(ScoreConfig(**settings | {"max_length": 12}), run)


@pytest.mark.usefixtures("spilled")
def test_losses_of_the_reference_are_made_of_a_shard_at_a_time(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is read when its turn comes, and those before it are let go of."""
    order: list[str] = []
    read, losses = Rows.shard, ReferencePass.losses

    def reads(self: Rows, index: int) -> Any:
        order.append(f"read {index}")
        return read(self, index)

    def made(self: ReferencePass, rows: Any, *more: Any) -> Any:
        order.append(f"losses of {rows[0].row_id // 4}" if rows else "losses of none")
        return losses(self, rows, *more)

    monkeypatch.setattr(Rows, "shard", reads)
    monkeypatch.setattr(ReferencePass, "losses", made)
    score(ScoreConfig(**settings, reference=models["base"]), tmp_path / "run")
    turns = [n for n, what in enumerate(order) if what.startswith("losses")]
    assert len(turns) > 3
    for before, turn in pairwise(turns):
        assert [what.startswith("read") for what in order[before + 1 : turn]] == [True]
        assert order[turn] in (order[turn - 1].replace("read", "losses of"), "losses of none")


@pytest.mark.usefixtures("spilled")
def test_a_generation_that_is_not_there_leaves_no_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such generation"):
        score(ScoreConfig(**settings, generation="3"), tmp_path / "run")
    with pytest.raises(UsageError, match="--reuse"):
        score(ScoreConfig(**settings, reuse=str(tmp_path / "none")), tmp_path / "run")
    assert not contents(tmp_path / "run")


@pytest.mark.usefixtures("spilled")
def test_a_command_that_is_refused_leaves_the_rows_of_a_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = ScoreConfig(**settings), tmp_path / "run"
    score_part(config, "prepare", run)
    kept = contents(run)
    with pytest.raises(FingerprintError, match="max_length"):
        score(replace(config, max_length=12), run)
    assert contents(run) == kept
    monkeypatch.setattr(reader, "tokenised", never)
    score_part(config, "0/2", run)


@pytest.mark.usefixtures("spilled")
def test_rows_stay_until_all_shards_are_found_whole(
    settings: dict[str, Any], tmp_path: Path, stopped: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    rows = begun(settings, run, stopped)
    shard = next(iter(listed(values_folder(run, 0)).values()))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoredDataError, match="damaged"):
        score(ScoreConfig(**settings), run)
    shard.unlink()
    with stopped.context() as patch:
        patch.setattr(reader, "tokenised", never)
        score(ScoreConfig(**settings), run)
    assert not rows.exists() and verify(run) == []


@pytest.mark.usefixtures("spilled")
def test_rows_are_kept_beside_what_trainers_write_and_not_beside_what_may_make_tokens(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(settings["model"], tmp_path / "checkpoint-10"))
    for name in ("trainer_state.json", "optimizer.pt", "original/params.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    config, place = ScoreConfig(**settings | {"model": str(model)}), Place(tmp_path / "run")
    found = prepare(config, place)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "tokenised", never)
        assert prepare(config, place).tokens == found.tokens
    (model / "tekken.json").write_text("{}")
    other = Place(tmp_path / "other")
    assert prepare(config, other).tokens == found.tokens and not contents(tmp_path / "other")
    other.close()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there")
@pytest.mark.usefixtures("spilled")
def test_names_that_are_no_text(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    Path(settings["data"]).rename(os.fsdecode(os.fsencode(tmp_path / "d") + b"/r\xff.jsonl"))
    config, place = ScoreConfig(**settings | {"data": str(tmp_path / "d")}), Place(tmp_path / "run")
    found = prepare(config, place)
    monkeypatch.setattr(reader, "tokenised", never)
    again = prepare(config, place)
    assert again.tokens == found.tokens and again.files == found.files


def test_check_counts_the_same_and_leaves_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = check(ScoreConfig(**settings))
    monkeypatch.setattr(shelf, "IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = contents(tmp_path)
    assert check(ScoreConfig(**settings)) == alone and alone.rows == 16 and alone.longest == 15
    assert contents(tmp_path) == before


POINTS = ("after-temp-open", "mid-write", "after-fsync", "after-rename")
FILES = ("part-00001.arrow", "columns.arrow", "rows.json")


KILLS = [f"{point}@{FILES[n % 3]}" for n, point in enumerate(POINTS * 3)]


@pytest.mark.parametrize("point", daily(KILLS, [], KILLS[5:]))
def test_killed_while_rows_are_written_it_ends_the_same(
    point: str, settings: dict[str, Any], forks: Forks, tmp_path: Path
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "data"]
    command = ("score", settings["data"], *flags, "--device", "cpu", "-o")
    ended = forks.run(*command, tmp_path / "run", kill_at=point, spill=True, fake=True)
    assert ended.code == -signal.SIGKILL, ended.err
    assert not listed(values_folder(tmp_path / "run", 0))
    for name, spill in (("run", True), ("whole", False)):
        done = forks.run(*command, tmp_path / name, spill=spill, fake=True)
        assert done.code == 0, done.err
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


_MEASURED = """
import sys
from alphatoken_curate import ScoreConfig
from alphatoken_curate.scoring.job import job_of
from alphatoken_curate.scoring.meter import peak_of_process
from alphatoken_curate.scoring.prepare import prepare
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.shelf import Place
from alphatoken_curate.scoring.spec import spec_of
from pathlib import Path

def read(rows):
    data = Path(sys.argv[1]) / f"{rows}.jsonl"
    with data.open("w") as sink:
        for i in range(rows):
            ids = [3 + (i + n) % 40 for n in range(24)]
            sink.write(f'{{"input_ids": {ids}, "labels": {[-100] * 12 + ids[12:]}}}\\n')
    prepared = prepare(ScoreConfig(data=str(data), model=sys.argv[2]), Place(Path(sys.argv[1]) / f"run{rows}"))
    job = job_of(prepared, spec_of(prepared, Path(sys.argv[1]), "cpu"))
    assert sum(map(len, job.shards)) == len(prepared.rows) == rows - 32 > 0

read(5000)
before = peak_of_process()
read(int(sys.argv[3]))
print(peak_of_process() - before)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_rows(models: dict[str, str], tmp_path: Path) -> None:
    """From 20 to 200 thousand: 24 bytes of each are held, four times that for moments; as objects 1,000."""
    found = []
    for rows in (20_000, 200_000):
        command = [sys.executable, "-c", _MEASURED, str(tmp_path), models["base"], str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(int(done.stdout))
    assert found[1] - found[0] < 180_000 * 4 * 24 + (16 << 20), found
