"""`refresh`, its `--watch` and `mask` of many generations: killed, interrupted, two at once, short of a checkpoint."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import POINTS, assert_readable, temporaries
from forks import Forks, within
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_files import Notes, contents, pair_records, perturbed, quiet, token_records, write_jsonl

from alphatoken_curate import ModelError, refresh, verify, watch
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.atomic import one_writer

ROWS = {"sft": token_records(11), "preference": pair_records(9)}
SETTINGS: dict[str, tuple[object, ...]] = {"sft": (), "preference": ("--drift", "lookahead", "--lookahead-lr", 0.1)}
MASK = ("--generation", "all", "--keep", 0.2, "--weights", "rank")
EVERY = ("--interval", 0.1)
LAST = "checkpoint-1000"
SAID_LAST = "generation 3 of"
"""What is told, of either command, once all three checkpoints are scored and masked."""

FILES = 1 + 3 + 3 * (1 + 1 + 3 + 1 + 3 + 1 + 1)
"""An unbroken SFT refresh commits the Fisher, the reference's losses, and of each checkpoint: plan, target, values,
manifest, train, manifest, card."""


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    """A training's output folder of three checkpoints, each saved to the end."""
    for step, scale in ((20, 0.005), (100, 0.01), (1000, 0.02)):
        place = folder / "out" / f"checkpoint-{step}"
        with quiet():
            perturbed(tiny_model("llama", dtype=torch.float32), scale).save_pretrained(place)
        (place / "trainer_state.json").write_text("{}")
    return folder / "out"


@pytest.fixture(scope="module")
def scored(forks: Forks, folder: Path, models: dict[str, str]) -> dict[str, Path]:
    """Runs of three shards, by kind: what is refreshed."""
    runs = {}
    for kind, records in ROWS.items():
        data, runs[kind] = write_jsonl(folder / f"{kind}.jsonl", records), folder / f"scored-{kind}"
        about = ("--model", models["base"], "--layers", 2, "--rows-per-shard", -(-len(records) // 3), "--device", "cpu")
        ended = forks.run("score", data, *about, *SETTINGS[kind], "-o", runs[kind])
        assert ended.code == 0, ended.err
    return runs


@pytest.fixture(scope="module")
def whole(forks: Forks, folder: Path, scored: dict[str, Path], out: Path) -> dict[str, Path]:
    """The same after a refresh that nothing broke."""
    runs = {kind: Path(shutil.copytree(run, folder / f"whole-{kind}")) for kind, run in scored.items()}
    for run in runs.values():
        ended = forks.run("refresh", run, "--checkpoint", out)
        assert ended.code == 0, ended.err
        assert [one.generation for one in manifest.read(run).generations] == [0, 1, 2, 3]
        assert verify(run) == []
    return runs


@pytest.fixture(scope="module")
def averaged(forks: Forks, folder: Path, whole: dict[str, Path]) -> dict[str, Path]:
    """The same after a mask of all generations."""
    runs = {kind: Path(shutil.copytree(run, folder / f"averaged-{kind}")) for kind, run in whole.items()}
    for run in runs.values():
        assert forks.run("mask", run, *MASK).code == 0
        assert manifest.read(run).masks[-1].generations == (0, 1, 2, 3)
    return runs


@pytest.fixture
def run(scored: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(scored["sft"], tmp_path / "run"))


def finished(run: Path) -> dict[str, bytes]:
    """What is never written twice: shards and tensors at their final names."""
    return {name: data for name, data in contents(run).items() if name.endswith((".parquet", ".safetensors"))}


def assert_kept(run: Path, before: dict[str, bytes]) -> None:
    """Every file is whole, what was finished before is unchanged, and the manifest names nothing that is not there."""
    assert_readable(run)
    now = finished(run)
    assert {name: now.get(name) for name in before} == before
    stored = manifest.read(run)
    assert {shard.path for group in (*stored.generations, *stored.masks) for shard in group.shards} <= now.keys()


def killed_then_whole(
    forks: Forks, kills: Iterable[dict[str, Any]], arguments: tuple[object, ...], run: Path, wanted: Path
) -> int:
    """Kill a command so and so, each time on what the last left, then let it end; returns how often it was killed.

    A watch, which does not end by itself, is interrupted when it has scored the last checkpoint.
    """
    watching = "--watch" in arguments
    stop = {"said": SAID_LAST, "signal": signal.SIGTERM} if watching else {}
    killed = 0
    for kill in kills:
        before = finished(run)
        ended = forks.run(*arguments, **stop | kill)
        assert_kept(run, before)
        if ended.code != -signal.SIGKILL:
            break
        killed += 1
    before = finished(run)
    ended = forks.run(*arguments, **stop)
    assert ended.code == (130 if watching else 0), ended.err
    assert contents(run) == contents(wanted)
    assert_kept(run, before)
    assert verify(run) == []
    return killed


def points(seed: int, count: int) -> list[dict[str, Any]]:
    """Kill points of every kind, in any order; most are passed within the next five files."""
    draw = random.Random(seed)
    named = [*POINTS, "before-manifest", "after-manifest"]
    longest = {"mid-write": 120, "before-manifest": 2, "after-manifest": 1}
    kinds = [kind for _ in range(-(-count // len(named))) for kind in draw.sample(named, len(named))][:count]
    return [{"kill_at": f"{kind}:{draw.randint(1, longest.get(kind, 5))}"} for kind in kinds]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "seed"), [("sft", 0), ("preference", 2)])
def test_refresh_killed_again_and_again_ends_the_same(
    kind: str, seed: int, forks: Forks, scored: dict[str, Path], whole: dict[str, Path], out: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(scored[kind], tmp_path / "run"))
    kills = points(seed, 12)
    assert killed_then_whole(forks, kills, ("refresh", run, "--checkpoint", out), run, whole[kind]) >= 7, kills


@pytest.mark.long
def test_watch_killed_again_and_again_ends_the_same(forks: Forks, run: Path, whole: dict[str, Path], out: Path) -> None:
    kills = points(3, 12)
    assert killed_then_whole(forks, kills, ("refresh", run, "--watch", out, *EVERY), run, whole["sft"]) >= 7, kills


@pytest.mark.parametrize(
    "count",
    [pytest.param(n, marks=pytest.mark.long if n in (4, 17) else pytest.mark.stress) for n in range(1, FILES + 1)],
)
def test_watch_killed_at_each_of_its_files_ends_the_same(
    count: int, forks: Forks, run: Path, whole: dict[str, Path], out: Path
) -> None:
    kind = POINTS[count % len(POINTS)]
    kills = [{"kill_at": f"{kind}:{count * 3 if kind == 'mid-write' else count}"}]
    assert killed_then_whole(forks, kills, ("refresh", run, "--watch", out, *EVERY), run, whole["sft"]) == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("place", [pytest.param(n, marks=() if n == 2 else pytest.mark.stress) for n in range(1, 7)])
@pytest.mark.parametrize("kind", ["before-manifest", "after-manifest"])
def test_watch_killed_at_each_manifest_ends_the_same(
    kind: str, place: int, forks: Forks, run: Path, whole: dict[str, Path], out: Path
) -> None:
    kills = [{"kill_at": f"{kind}:{place}"}]
    assert killed_then_whole(forks, kills, ("refresh", run, "--watch", out, *EVERY), run, whole["sft"]) == 1


@pytest.mark.long
@pytest.mark.parametrize("point", ["before-manifest:1", "mid-write:1"])
def test_refresh_killed_thrice_at_the_same_step_ends_the_same(
    point: str, forks: Forks, run: Path, whole: dict[str, Path], out: Path
) -> None:
    again = [{"kill_at": point}] * 3
    assert killed_then_whole(forks, again, ("refresh", run, "--checkpoint", out), run, whole["sft"]) == 3


@pytest.mark.long
def test_a_card_that_was_being_written_when_refresh_was_killed_is_gone_in_the_end(
    forks: Forks, run: Path, whole: dict[str, Path], out: Path
) -> None:
    kills = [{"kill_at": f"after-temp-open:{FILES}"}]
    assert killed_then_whole(forks, kills, ("refresh", run, "--checkpoint", out), run, whole["sft"]) == 1


@pytest.mark.long
def test_refresh_killed_at_random_moments_ends_the_same(
    forks: Forks, run: Path, whole: dict[str, Path], out: Path
) -> None:
    draw = random.Random(1)
    kills = ({"after": draw.uniform(0.05, 0.5)} for _ in range(4))
    assert killed_then_whole(forks, kills, ("refresh", run, "--checkpoint", out), run, whole["sft"]) >= 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "point"),
    [
        ("sft", "after-rename:1"),
        ("sft", "mid-write:20"),
        ("preference", "after-temp-open:5"),
        ("preference", "before-manifest:1"),
    ],
)
def test_mask_of_all_generations_killed_ends_the_same(
    kind: str, point: str, forks: Forks, whole: dict[str, Path], averaged: dict[str, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole[kind], tmp_path / "run"))
    assert killed_then_whole(forks, [{"kill_at": point}] * 2, ("mask", run, *MASK), run, averaged[kind]) >= 1


# --- interrupts


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "number", "once"),
    [
        ("--checkpoint", signal.SIGINT, "values/generation=1/part-00001.parquet"),
        ("--watch", signal.SIGTERM, "artifacts/target-00002.safetensors"),
        ("--watch", signal.SIGINT, "train/mask=0002/part-00001.parquet"),
    ],
)
def test_an_interrupt_says_how_to_go_on(
    how: str, number: int, once: str, forks: Forks, run: Path, whole: dict[str, Path], out: Path
) -> None:
    arguments = ("refresh", run, how, out, *(EVERY if how == "--watch" else ()))
    ended = forks.run(*arguments, once=run / once, signal=number)
    assert ended.code == 130, ended.err
    assert "run the same command again to go on" in ended.err and "Traceback" not in ended.err
    assert temporaries(run) == []
    assert len(manifest.read(run).generations) < 4
    killed_then_whole(forks, [], arguments, run, whole["sft"])


@pytest.mark.long
def test_a_watch_of_what_is_not_there_yet_ends_cleanly(
    forks: Forks, run: Path, scored: dict[str, Path], tmp_path: Path
) -> None:
    forks.begin("refresh", run, "--watch", tmp_path / "later", *EVERY, once=tmp_path / "now", signal=signal.SIGTERM)
    time.sleep(1)
    (tmp_path / "now").touch()
    ended = forks.end()
    assert ended.code == 130 and "go on" in ended.err and "Traceback" not in ended.err, ended.err
    assert contents(run) == contents(scored["sft"])


# --- two at once


@pytest.mark.long
@pytest.mark.parametrize("other", ["refresh", "mask"])
def test_the_second_of_two_processes_is_refused(
    other: str, forks: Forks, run: Path, whole: dict[str, Path], out: Path
) -> None:
    second = ("mask", run, *MASK) if other == "mask" else ("refresh", run, "--checkpoint", out)
    once = run / "artifacts" / "run-00002.json"
    ended = forks.run("refresh", run, "--checkpoint", out, once=once, meanwhile=second)
    assert ended.meanwhile is not None and ended.meanwhile.code == 2
    assert f"{run}: another process is writing to it" in ended.meanwhile.err
    assert ended.code == 0, ended.err
    assert contents(run) == contents(whole["sft"])


class Patience(Notes):
    """A listener that ends another's hold of the run when it hears that it is waited for."""

    def __init__(self, hold: contextlib.ExitStack) -> None:
        super().__init__()
        self._hold = hold

    def note(self, text: str) -> None:
        super().note(text)
        if "is tried again" in text:
            self._hold.close()


@pytest.mark.long
def test_a_watch_waits_for_another_process(run: Path, whole: dict[str, Path], out: Path) -> None:
    with contextlib.ExitStack() as hold, within(30):
        hold.enter_context(one_writer(run))
        notes = Patience(hold)
        watching = watch(run, out, interval=0.01, progress=notes)
        assert [next(watching).generation for _ in range(3)] == [1, 2, 3]
    assert [note for note in notes.notes if "another process is writing to it" in note]
    assert contents(run) == contents(whole["sft"])


# --- checkpoints that come and go


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.01)


@pytest.mark.long
def test_a_checkpoint_is_scored_once_it_is_whole(
    forks: Forks, run: Path, scored: dict[str, Path], out: Path, tmp_path: Path
) -> None:
    coming = tmp_path / "coming"
    shutil.copytree(out / "checkpoint-20", coming / "checkpoint-20")
    half = coming / "checkpoint-100"
    half.mkdir()
    weights = (out / half.name / "model.safetensors").read_bytes()
    watching = ("refresh", run, "--watch", coming, *EVERY)
    forks.begin(*watching, said="generation 2 of", signal=signal.SIGINT)
    wait_for(run / "train" / "mask=0001" / "part-00002.parquet")
    shutil.copy(out / half.name / "config.json", half)
    for share in (0.0, 0.3, 0.6, 0.999):
        (half / "model.safetensors").write_bytes(weights[: int(share * len(weights))])
        time.sleep(0.25)
        assert not (run / "artifacts" / "run-00002.json").exists()
    (half / "model.safetensors").write_bytes(weights)
    ended = forks.end()
    assert ended.code == 130 and "Wrote generation 2" in ended.out, ended.err
    wanted = Path(shutil.copytree(scored["sft"], tmp_path / "wanted"))
    for name in ("checkpoint-20", "checkpoint-100"):
        assert forks.run("refresh", wanted, "--checkpoint", out / name).code == 0
    assert contents(run) == contents(wanted)


class Thief(Notes):
    """A listener that does away with files of a checkpoint when it hears some words."""

    def __init__(self, word: str, files: list[Path]) -> None:
        super().__init__()
        self._word, self._files = word, files

    def stage(self, name: str, tokens: int) -> None:
        super().stage(name, tokens)
        self._hear(name)

    def note(self, text: str) -> None:
        super().note(text)
        self._hear(text)

    def _hear(self, text: str) -> None:
        if text.startswith(self._word):
            for path in self._files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._files = []


def unscored(notes: Notes) -> list[str]:
    """The checkpoints of which a watch said so."""
    return [note.partition(" is not scored: ")[0] for note in notes.warnings if " is not scored: " in note]


@pytest.fixture
def going(out: Path, tmp_path: Path) -> Path:
    """An output folder that a test may change; each checkpoint is ready at the first look."""
    for place in sorted(out.iterdir()):
        shutil.copytree(place, tmp_path / "going" / place.name)
        (tmp_path / "going" / place.name / "trainer_state.json").write_text("{}")
    return tmp_path / "going"


@pytest.mark.long
@pytest.mark.parametrize(
    ("word", "gone"),
    [
        ("checkpoint-20 becomes", "."),
        ("checkpoint-20 becomes", "config.json"),
        ("reference losses", "."),
        ("loading model", "model.safetensors"),
    ],
)
def test_a_checkpoint_deleted_before_it_is_read_is_left_out(word: str, gone: str, run: Path, going: Path) -> None:
    """A training deletes old checkpoints file by file, so one may be met half-deleted."""
    notes = Thief(word, [going / "checkpoint-20" / gone])
    watching = watch(run, going, interval=0.01, progress=notes)
    with within(30):
        found = [next(watching), next(watching)]
    assert [(one.checkpoint, one.generation) for one in found] == [("checkpoint-100", 1), (LAST, 2)]
    assert unscored(notes) == ["checkpoint-20"]
    assert temporaries(run) == [] and verify(run) == []
    shutil.rmtree(going / "checkpoint-20", ignore_errors=True)
    assert [one.shards_scored for one in refresh(run, going)] == [0, 0]


@pytest.mark.long
def test_a_checkpoint_deleted_once_it_is_read_is_scored(run: Path, whole: dict[str, Path], going: Path) -> None:
    watching = watch(run, going, interval=0.01, progress=Thief("scoring", [going / "checkpoint-20"]))
    with within(30):
        assert [next(watching).generation for _ in range(3)] == [1, 2, 3]
    assert not (going / "checkpoint-20").exists()
    assert contents(run) == contents(whole["sft"])


@pytest.mark.long
def test_a_checkpoint_deleted_right_after_it_was_found_is_left_out(run: Path, going: Path, tmp_path: Path) -> None:
    """And scored after all once it is back."""
    notes = Notes()
    watching = watch(run, going, interval=0.01, progress=notes)
    assert next(watching).checkpoint == "checkpoint-20"
    (going / "checkpoint-100").rename(tmp_path / "checkpoint-100")
    assert next(watching).checkpoint == LAST
    assert unscored(notes) == ["checkpoint-100"]
    (tmp_path / "checkpoint-100").rename(going / "checkpoint-100")
    with within(30):
        back = next(watching)
    assert (back.checkpoint, back.generation) == ("checkpoint-100", 3)
    assert verify(run) == []


@pytest.mark.long
def test_a_checkpoint_that_was_to_come_next_is_missed(run: Path, going: Path) -> None:
    with pytest.raises(ModelError, match=r"checkpoint-100: .* was deleted after .* Run the same command again"):
        refresh(run, going, progress=Thief("scoring", [going / "checkpoint-100"]))
    assert [one.checkpoint for one in refresh(run, going)] == ["checkpoint-20", LAST]
    assert verify(run) == []


@pytest.mark.long
def test_a_checkpoint_deleted_while_it_is_read_is_scored_once_it_is_back(
    run: Path, going: Path, tmp_path: Path
) -> None:
    shutil.copytree(going / "checkpoint-20", tmp_path / "back")
    notes = Thief("checkpoint-20 becomes", [going / "checkpoint-20" / "model.safetensors"])
    watching = watch(run, going, interval=0.01, progress=notes)
    assert next(watching).checkpoint == "checkpoint-100"
    # All as it was, the times of its files too.
    shutil.copy2(tmp_path / "back" / "model.safetensors", going / "checkpoint-20" / "model.safetensors")
    with within(30):
        assert [next(watching).checkpoint for _ in range(2)] == [LAST, "checkpoint-20"]
    assert unscored(notes) == ["checkpoint-20"] and verify(run) == []


@pytest.mark.long
def test_a_checkpoint_that_cannot_be_loaded_is_told_of_once_and_passed_over(run: Path, going: Path) -> None:
    file = going / "checkpoint-20" / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    (file.parent / "trainer_state.json").write_text("{}")
    notes = Notes()
    watching = watch(run, going, interval=0.01, progress=notes)
    with within(30):
        assert [next(watching).checkpoint for _ in range(2)] == ["checkpoint-100", LAST]
        shutil.copytree(going / "checkpoint-100", going / "checkpoint-2000")
        next(watching)
    assert [note for note in notes.warnings if "its files lack lm_head.weight" in note and "checkpoint-20 " in note]
    assert unscored(notes) == ["checkpoint-20"] and verify(run) == []


@pytest.mark.long
def test_checkpoints_deleted_while_they_are_watched(forks: Forks, run: Path, going: Path) -> None:
    forks.begin("refresh", run, "--watch", going, *EVERY, said=f"at {LAST}", signal=signal.SIGTERM)
    wait_for(run / "artifacts" / "run-00001.json")
    shutil.rmtree(going / "checkpoint-20")
    shutil.rmtree(going / "checkpoint-100")
    ended = forks.end()
    assert ended.code == 130 and "Traceback" not in ended.err, ended.err
    assert temporaries(run) == [] and verify(run) == []


# --- everything


@pytest.mark.stress
def test_an_unbroken_refresh_commits_as_many_files_as_these_tests_take(
    forks: Forks, run: Path, scored: dict[str, Path], out: Path, tmp_path: Path
) -> None:
    last = Path(shutil.copytree(scored["sft"], tmp_path / "last"))
    assert forks.run("refresh", last, "--checkpoint", out, kill_at=f"after-rename:{FILES}").code == -signal.SIGKILL
    assert forks.run("refresh", run, "--checkpoint", out, kill_at=f"after-rename:{FILES + 1}").code == 0


@pytest.mark.stress
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("point", [f"{point}:{n}" for point in POINTS for n in range(1, FILES + 1)])
def test_refresh_killed_at_every_point_ends_the_same(
    kind: str, point: str, forks: Forks, scored: dict[str, Path], whole: dict[str, Path], out: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(scored[kind], tmp_path / "run"))
    assert killed_then_whole(forks, [{"kill_at": point}], ("refresh", run, "--checkpoint", out), run, whole[kind]) == 1


@pytest.mark.stress
@pytest.mark.parametrize("how", ["--checkpoint", "--watch"])
@pytest.mark.parametrize("seed", range(30))
def test_many_kills_and_interrupts_at_random_moments(
    how: str, seed: int, forks: Forks, run: Path, whole: dict[str, Path], out: Path
) -> None:
    draw = random.Random(seed)
    arguments = ("refresh", run, how, out, *(EVERY if how == "--watch" else ()))
    for _ in range(draw.randint(1, 5)):
        number = draw.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        before = finished(run)
        ended = forks.run(*arguments, after=draw.uniform(0.1, 1), signal=number)
        assert "Traceback" not in ended.err
        assert_kept(run, before)
        if number != signal.SIGKILL:
            assert ended.code in ((130,) if how == "--watch" else (0, 130)), ended.err
            assert temporaries(run) == []
    killed_then_whole(forks, [], arguments, run, whole["sft"])
