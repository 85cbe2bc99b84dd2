from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from small_run import published
from tiny import tiny_model
from tiny_files import (
    NAN_TOKEN,
    Notes,
    command,
    contents,
    ended_records,
    moments,
    pair_records,
    perturbed,
    quiet,
    save_gguf,
    token_records,
    write_jsonl,
)

from alphatoken_curate import (
    FingerprintError,
    ModelError,
    ScoreConfig,
    StoredDataError,
    UsageError,
    mask,
    refresh,
    scan,
    score,
    verify,
    watch,
)
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.atomic import one_writer
from alphatoken_curate.runs.schema import COMPONENTS, SIGNALS
from alphatoken_curate.scoring.scorer import ShardScorer

ROWS = 13


@pytest.fixture(scope="module")
def data(folder: Path) -> str:
    return write_jsonl(folder / "rows.jsonl", token_records(ROWS))


@pytest.fixture(scope="module")
def finished(folder: Path, data: str, models: dict[str, str]) -> Path:
    """A run scored with the base model, which is its own reference."""
    settings: dict[str, Any] = {"data": data, "model": models["base"], "rows_per_shard": 4, "layers": 2, "keep": 0.4}
    return score(ScoreConfig(**settings), folder / "finished").run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def values(run: Path, generation: int) -> Any:
    return scan(run, generation=generation).collect()


@pytest.fixture(scope="module")
def steps(folder: Path) -> Path:
    """A training run's output folder: three checkpoints."""
    out = folder / "out"
    with quiet():
        for step, scale in ((100, 0.01), (20, 0.005), (1000, 0.02)):
            perturbed(tiny_model("llama", dtype=torch.float32), scale).save_pretrained(out / f"checkpoint-{step}")
            (out / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    return out


def test_an_unchanged_checkpoint_gives_the_same_bytes(run: Path, models: dict[str, str]) -> None:
    (made,) = refresh(run, models["base"])
    assert (made.generation, made.shards_scored, made.checkpoint) == (1, 4, "base")
    first, again = manifest.read(run).generations
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in first.shards]
    assert again.plan == first.plan
    assert verify(run) == []


def test_a_checkpoint_is_scored_as_if_by_itself(run: Path, data: str, models: dict[str, str], tmp_path: Path) -> None:
    (made,) = refresh(run, models["tuned"])
    alone = score(
        ScoreConfig(data=data, model=models["tuned"], reference=models["base"], rows_per_shard=4, layers=2),
        tmp_path / "b",
    )
    found, wanted = values(run, 1), values(alone.run, 0)
    assert found.equals(wanted)
    assert any(x for row in found["stab_direct"].to_list() for x in row or [])
    assert {x for row in values(run, 0)["stab_direct"].to_list() for x in row} == {0.0, None}
    assert made.mask.mask == 1 and made.mask.generations == (1,)
    settings = manifest.read(run).masks[1].settings
    assert settings["keep"] == 0.4 and manifest.read(run).masks[0].generations == (0,)


def test_what_was_written_is_never_changed(run: Path, models: dict[str, str]) -> None:
    before = {
        name: content for name, content in contents(run).items() if name.startswith(("values", "train", "artifacts"))
    }
    refresh(run, models["tuned"])
    refresh(run, models["base"])
    after = contents(run)
    assert {name: after[name] for name in before} == before
    assert [one.generation for one in manifest.read(run).generations] == [0, 1, 2]


def test_the_same_checkpoint_twice_is_left_alone(run: Path, models: dict[str, str]) -> None:
    refresh(run, models["tuned"])
    before = moments(run)
    (made,) = refresh(run, models["tuned"])
    assert (made.generation, made.shards_scored, made.mask.created) == (1, 0, False)
    assert moments(run) == before


def test_the_scoring_that_a_run_began_with_leaves_it_alone(run: Path, data: str, models: dict[str, str]) -> None:
    """Its mask is by its own values, not by those of a checkpoint."""
    refresh(run, models["tuned"])
    mask(run, MaskConfig(keep=0.2))
    before = contents(run)
    settings: dict[str, Any] = {"data": data, "model": models["base"], "rows_per_shard": 4, "layers": 2}
    again = score(ScoreConfig(**settings, keep=0.4), run)
    assert (again.shards_scored, again.mask.created, again.mask.mask, again.mask.newest) == (0, False, 0, False)
    assert contents(run) == before
    other = score(ScoreConfig(**settings, keep=0.9), run)
    assert (other.mask.created, other.mask.generations) == (True, (0,))
    asked = score(ScoreConfig(**settings, keep=0.9, generation="1"), run)
    assert (asked.mask.created, asked.mask.generations) == (True, (1,))


def test_a_folder_of_checkpoints_is_scored_in_step_order(run: Path, steps: Path) -> None:
    made = refresh(run, steps)
    assert [one.checkpoint for one in made] == ["checkpoint-20", "checkpoint-100", "checkpoint-1000"]
    assert [one.generation for one in made] == [1, 2, 3]
    assert [one.checkpoint for one in manifest.read(run).generations] == ["base", *(one.checkpoint for one in made)]
    spread = [sum(x * x for row in values(run, n)["stab_direct"] for x in row if x is not None) for n in range(4)]
    assert spread[0] == 0 and spread[1] < spread[2] < spread[3]
    assert verify(run) == []


def test_the_reference_is_read_once_and_its_artefacts_are_kept(run: Path, steps: Path) -> None:
    notes = Notes()
    refresh(run, steps / "checkpoint-20", progress=notes)
    assert [name for name, _ in notes.stages].count("Fisher of the reference") == 1
    made = {name: stamp for name, stamp in moments(run).items() if "fisher" in name or "reference_nll" in name}
    assert len(made) == 5
    notes = Notes()
    refresh(run, steps / "checkpoint-100", progress=notes)
    assert "Fisher of the reference" not in [name for name, _ in notes.stages]
    assert {name: moments(run)[name] for name in made} == made


def test_nothing_but_the_models_is_needed(data: str, models: dict[str, str], tmp_path: Path) -> None:
    """Rows, target and retention are in the run: the files they came from may be gone."""
    rows, target = tmp_path / "rows.jsonl", tmp_path / "target.jsonl"
    shutil.copy(data, rows)
    write_jsonl(target, token_records(3, seed=4))
    keep = write_jsonl(tmp_path / "keep.jsonl", token_records(3, seed=5))
    settings: dict[str, Any] = {"data": str(rows), "target": str(target), "retention": keep, "model": models["base"]}
    settings |= {"layers": 2, "reference": models["base"]}
    made = score(ScoreConfig(**settings), tmp_path / "run").run
    alone = score(ScoreConfig(**settings | {"model": models["tuned"]}), tmp_path / "alone").run
    for path in (rows, target, Path(keep)):
        path.unlink()
    refresh(made, models["tuned"])
    assert values(made, 1).equals(values(alone, 0))


def test_every_setting_of_the_run_holds_at_the_checkpoint(data: str, models: dict[str, str], tmp_path: Path) -> None:
    keep = write_jsonl(tmp_path / "keep.jsonl", token_records(3, seed=5))
    settings: dict[str, Any] = {"data": data, "model": models["base"], "reference": models["base"], "layers": 2}
    settings |= {"drift": "lookahead", "lookahead_lr": 0.1, "retention": keep, "precondition": "ekfac"}
    settings |= {"estimator": "exact", "fisher": "generate", "fisher_new_tokens": 5, "fisher_rows": 6}
    made = score(ScoreConfig(**settings), tmp_path / "run").run
    assert refresh(made, models["tuned"])[0].shards_scored == 1
    alone = score(ScoreConfig(**settings | {"model": models["tuned"]}), tmp_path / "alone").run
    found, wanted = values(made, 1), values(alone, 0)
    assert found.equals(wanted)
    for name in (*COMPONENTS, "drift_direct", "drift_causal"):
        assert any(x for row in found[name].to_list() for x in row or []), name
    assert verify(made) == []


def test_preference_rows_too(models: dict[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_records(9))
    settings: dict[str, Any] = {"data": data, "model": models["base"], "rows_per_shard": 4, "layers": 2}
    made = score(ScoreConfig(**settings), tmp_path / "run").run
    start = values(made, 0)
    assert set(start.drop_nulls("omega")["omega"].to_list()) == {np.float32(0.05)}
    assert [one.generation for one in refresh(made, models["base"])] == [1]
    assert [s.sha256 for s in manifest.read(made).generations[1].shards] == [
        s.sha256 for s in manifest.read(made).generations[0].shards
    ]
    refresh(made, models["tuned"])
    alone = score(ScoreConfig(**settings | {"model": models["tuned"], "reference": models["base"]}), tmp_path / "alone")
    assert values(made, 2).equals(values(alone.run, 0))
    assert len(set(values(made, 2)["margin"].to_list())) > 4
    assert verify(made) == []


def test_masks_follow_and_can_be_averaged(run: Path, steps: Path) -> None:
    refresh(run, steps)
    every = mask(run, MaskConfig(generation="all", keep=0.4))
    some = mask(run, MaskConfig(generation="1,3", keep=0.4))
    assert every.generations == (0, 1, 2, 3) and some.generations == (1, 3)
    assert not mask(run, MaskConfig(generation="3", keep=0.4)).created  # the newest, by its number
    assert verify(run) == []


def test_the_mask_of_a_refresh_follows_the_newest_settings(run: Path, models: dict[str, str]) -> None:
    refresh(run, models["base"])
    mask(run, published(keep=0.25, weights="rank", generation="all"))
    (made,) = refresh(run, models["tuned"])
    stored = manifest.read(run).masks[-1]
    assert (stored.settings["keep"], stored.settings["weights"]) == (0.25, "rank")
    assert made.mask.generations == (0, 1, 2)
    mask(run, published(generation="0", keep=0.3))
    perturbed_again = refresh(run, models["tuned"])[0]
    assert perturbed_again.mask.generations == (2,)


def test_a_refresh_keeps_what_the_newest_mask_always_keeps(tmp_path: Path, models: dict[str, str]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ended_records(ROWS))
    run = score(ScoreConfig(data=(data,), model=models["base"], rows_per_shard=4, layers=2), tmp_path / "run").run
    for stays in ("end-of-turn", "none"):
        mask(run, MaskConfig(keep=0.3, by="-nll", always_keep=stays))
        (made,) = refresh(run, models["tuned"])
        newest = manifest.read(run).masks[-1]
        assert newest.settings.get("always_keep", "none") == stays and newest.generations == (1,)
        assert made.mask.end_of_turn_tokens == ROWS - 1, "one row is the target"
        assert (made.mask.end_of_turn_kept == made.mask.end_of_turn_tokens) == (stays == "end-of-turn")
    first, second = (scan(run, generation=number).collect()["end_of_turn"].to_list() for number in (0, 1))
    assert first == second


def test_another_reference_is_refused(run: Path, models: dict[str, str]) -> None:
    with pytest.raises(FingerprintError, match="--reference") as caught:
        refresh(run, models["tuned"], reference=models["tuned"])
    assert caught.value.fields == ("reference",)
    assert len(manifest.read(run).generations) == 1


def test_models_that_were_moved_are_named(folder: Path, data: str, models: dict[str, str], tmp_path: Path) -> None:
    old = Path(shutil.copytree(models["base"], tmp_path / "old"))
    made = score(ScoreConfig(data=data, model=str(old), layers=2), tmp_path / "run").run
    new = old.rename(tmp_path / "new")
    with pytest.raises(ModelError, match="no model here"):
        refresh(made, models["tuned"])
    assert refresh(made, models["tuned"], reference=str(new))[0].generation == 1


def test_an_unfinished_run_cannot_be_refreshed(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    (run / "manifest.json").unlink()
    with pytest.raises(StoredDataError, match="no finished run"):
        refresh(run, models["tuned"])
    with pytest.raises(UsageError, match="no such run folder"):
        refresh(tmp_path / "nowhere", models["tuned"])


def test_a_generation_begun_at_another_checkpoint_keeps_its_number(run: Path, models: dict[str, str]) -> None:
    refresh(run, models["tuned"])
    # As if the process had been killed after two shards, and that checkpoint is gone.
    for index in (2, 3):
        (run / f"values/generation=1/part-0000{index}.parquet").unlink()
    shutil.rmtree(run / "train" / "mask=0001")
    manifest.write(run, manifest.rebuild(run))
    assert [one.generation for one in manifest.read(run).generations] == [0]
    (other,) = refresh(run, models["base"])
    assert other.generation == 2
    (made,) = refresh(run, models["tuned"])
    assert made.generation == 1 and made.shards_scored == 2
    assert [one.generation for one in manifest.read(run).generations] == [0, 1, 2]
    assert verify(run) == []


def test_a_generation_takes_its_own_threads_behind_one_that_was_begun_with_others(
    run: Path, steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain, seen = torch.get_num_threads(), ShardScorer.score, list[tuple[int, int]]()

    def scored(self: ShardScorer, *arguments: Any) -> Any:
        seen.append((self.spec.store.generation, torch.get_num_threads()))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(ShardScorer, "score", scored)
    try:
        torch.set_num_threads(3)  # as torch takes them on another machine
        with pytest.raises(KeyboardInterrupt):
            refresh(run, steps)
        torch.set_num_threads(1)
        refresh(run, steps)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {(1, 3), (2, 1), (3, 1)}
    taken = [orjson.loads((run / f"artifacts/run-0000{n}.json").read_bytes())["taken"] for n in (1, 2, 3)]
    assert taken == [3, 1, 1]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["base", "broken"])
def test_a_failed_row_is_scored_again(name: str, models: dict[str, str], tmp_path: Path) -> None:
    """It fails again where the reference is what fails on it."""
    records = token_records(6)
    records[2]["input_ids"][1] = 47  # NaN in the broken model
    records[2]["labels"] = [-100] * (len(records[2]["labels"]) - 1) + records[2]["input_ids"][-1:]
    data = write_jsonl(tmp_path / "d.jsonl", records)
    target = write_jsonl(tmp_path / "t.jsonl", token_records(2, seed=3))
    config = ScoreConfig(data=data, target=target, model=models["broken"], reference=models[name], layers=2)
    made = score(config, tmp_path / "run").run
    assert values(made, 0)["status"].to_list().count("failed") == 1
    with quiet():
        tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "whole")
    refresh(made, tmp_path / "whole")
    assert values(made, 1)["status"].to_list().count("failed") == (name == "broken")


def test_an_edited_config_is_refused(run: Path, models: dict[str, str]) -> None:
    """Its settings decide values, and the new shards would claim the old ones."""
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("layers: 2", "layers: 1"))
    with pytest.raises(StoredDataError, match=r"config\.yaml: not as the run wrote it"):
        refresh(run, models["tuned"])
    path.unlink()
    with pytest.raises(StoredDataError, match=r"config\.yaml"):
        refresh(run, models["tuned"])


UNLIKE: dict[str, tuple[str, dict[str, Any], str]] = {
    "deeper": ("llama", {"num_hidden_layers": 6}, "has 6 decoder blocks.*has 4 decoder blocks"),
    "shallower": ("llama", {"num_hidden_layers": 3}, "has 3 decoder blocks"),
    "wider": ("llama", {"hidden_size": 32}, "hidden size of 32"),
    "other heads": ("llama", {"num_key_value_heads": 4}, "4 key-value heads"),
    "one head": ("llama", {"num_key_value_heads": 1}, "has 1 key-value head,.*has 2 key-value heads"),
    "fewer tokens": ("llama", {"vocab_size": 60}, "knows 60 tokens.*knows 61"),
    "other architecture": ("qwen2", {}, "is a qwen2 model.*is a llama model"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(
    name: str, run: Path, models: dict[str, str], tmp_path: Path
) -> None:
    family, changes, says = UNLIKE[name]
    with quiet():
        tiny_model(family, dtype=torch.float32, **changes).save_pretrained(tmp_path / "other")
    before = contents(run)
    with pytest.raises(ModelError, match=says):
        refresh(run, tmp_path / "other")
    assert contents(run) == before
    data = str(run.parent / "d.jsonl")
    write_jsonl(Path(data), token_records(3))
    with pytest.raises(ModelError, match="was not tuned from"):
        score(ScoreConfig(data=data, model=str(tmp_path / "other"), reference=models["base"]), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_tokens_may_have_been_added(run: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with quiet():
        model.resize_token_embeddings(70)
        model.save_pretrained(tmp_path / "more")
    assert refresh(run, tmp_path / "more")[0].generation == 1


def test_blocks_that_are_not_those_of_the_run_are_refused_once_loaded(run: Path, tmp_path: Path) -> None:
    """GGUF has no config.json that could tell before."""
    deep = tiny_model("llama", dtype=torch.float32, attention_bias=False, mlp_bias=False, num_hidden_layers=6)
    with pytest.raises(ModelError, match="not those the run was scored with"):
        refresh(run, save_gguf(deep, tmp_path / "deep.gguf"))
    assert verify(run) == []


def test_a_checkpoint_that_cannot_be_scored_leaves_nothing_behind(run: Path, models: dict[str, str]) -> None:
    refresh(run, models["tuned"])
    before = contents(run)
    broken = Path(models["broken"]).parent / "all-nan"
    with quiet():
        model = tiny_model("llama", dtype=torch.float32)
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        model.save_pretrained(broken)
    with pytest.raises(ModelError, match="not finite"):
        refresh(run, broken)
    assert contents(run) == before and verify(run) == []


def test_a_lost_generation_is_not_forgotten(run: Path, models: dict[str, str]) -> None:
    refresh(run, models["tuned"])
    shutil.rmtree(run / "values" / "generation=1")
    with pytest.raises(StoredDataError, match=r"generation=1: the manifest names this generation"):
        refresh(run, models["base"])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("lost", [(1,), (0, 1, 2, 3)])
def test_what_is_lost_of_a_generation_is_scored_again(run: Path, models: dict[str, str], lost: tuple[int, ...]) -> None:
    refresh(run, models["tuned"])
    refresh(run, models["base"])
    before = contents(run)
    paths = [run / f"values/generation=1/part-{index:05d}.parquet" for index in lost]
    flipped = bytearray(paths[0].read_bytes())
    flipped[100] ^= 1
    paths[0].write_bytes(flipped)
    with pytest.raises(StoredDataError, match=r"generation=1/.*: damaged .* delete this file, and run the command"):
        refresh(run, models["tuned"])
    for path in paths:
        path.unlink()
    (made,) = refresh(run, models["tuned"])
    assert (made.generation, made.shards_scored, made.mask.created, made.counts.scored) == (1, len(lost), False, 12)
    assert contents(run) == before and verify(run) == []


def test_rows_that_a_checkpoint_fails_on_are_told_of(models: dict[str, str], tmp_path: Path) -> None:
    records = token_records(6)
    records[2]["input_ids"][0] = NAN_TOKEN
    data = write_jsonl(tmp_path / "d.jsonl", records)
    target = write_jsonl(tmp_path / "t.jsonl", token_records(2, seed=3))
    words = ("score", data, "--target", target, "--model", models["base"], "--layers", 2, "-o", tmp_path / "run")
    assert "  rows    6 scored of 6\n" in command(*words).out
    other = shutil.copytree(tmp_path / "run", tmp_path / "other")
    ended = command("refresh", tmp_path / "run", "--checkpoint", models["broken"])
    assert "  rows    5 scored of 6 (1 failed)\n" in ended.out and "! 1 of 6 rows failed in generation 1" in ended.err
    for _ in range(2):  # where it is finished, and where something beside the values is lost
        assert "  rows    6 scored of 6\n" in command(*words).out, "they are counted in what score scored"
        (tmp_path / "run" / "config.yaml").unlink()
    assert "but config.yaml, manifest.json.\n" in command(*words).out
    assert "failed" not in command("refresh", tmp_path / "run", "--checkpoint", models["tuned"]).out
    (tmp_path / "run/values/generation=1/part-00000.parquet").unlink()
    assert "5 scored of 6 (1 failed)" in command("refresh", tmp_path / "run", "--checkpoint", models["broken"]).out
    shutil.copytree(models["broken"], tmp_path / "out" / "checkpoint-5")
    notes = Notes()
    made = next(iter(watch(other, tmp_path / "out", interval=0.01, progress=notes)))
    assert (made.counts.scored, made.counts.failed) == (5, 1)
    assert [told for told in notes.warnings if "1 of 6 rows failed in generation 1: that is in no mask" in told]


def test_the_same_weights_in_other_files_are_told_of(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "parts", max_shard_size="5KB")
    notes = Notes()
    refresh(run, tmp_path / "parts", progress=notes)
    assert sum("Stability is 0" in told for told in notes.warnings) == 1
    assert {x for row in values(run, 1)["stab_direct"].to_list() for x in row} == {0.0, None}


# --- watch


def test_watching_passes_over_what_cannot_be_scored_and_waits_for_the_run(
    run: Path, steps: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with quiet():
        tiny_model("llama", dtype=torch.float32, hidden_size=32).save_pretrained(out / "checkpoint-5")
    shutil.copytree(steps / "checkpoint-20", out / "checkpoint-20")
    (out / "checkpoint-30").mkdir()
    holder = one_writer(run)

    class Freeing(Notes):
        def note(self, text: str) -> None:
            super().note(text)
            if "is tried again" in text:
                holder.__exit__(None, None, None)

    notes = Freeing()
    holder.__enter__()
    found = watch(run, out, interval=0.01, progress=notes)
    assert next(found).checkpoint == "checkpoint-20"
    shutil.copytree(steps / "checkpoint-100", out / "checkpoint-100")
    assert next(found).checkpoint == "checkpoint-100"
    found.close()  # type: ignore[attr-defined]
    said = "\n".join([*notes.notes, *notes.warnings])
    assert "another process" in said and re.search(
        r"checkpoint-5 is not scored: .*checkpoint-5 has a hidden size of 32", said
    )
    assert said.count("checkpoint-30 is waited for") == 1
    assert said.startswith(f"watching {out}")


def test_what_is_no_output_folder_is_not_watched(run: Path, steps: Path, data: str) -> None:
    for folder in (data, steps / "checkpoint-20"):
        with pytest.raises(UsageError, match="output folder"):
            next(watch(run, folder))


def test_watching_scores_each_checkpoint_once(run: Path, steps: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = watch(run, out, interval=0.01)
    out.mkdir()
    shutil.copytree(steps / "checkpoint-20", out / "checkpoint-20")
    assert next(found).checkpoint == "checkpoint-20"
    shutil.copytree(steps / "checkpoint-100", out / "checkpoint-100")
    assert next(found).checkpoint == "checkpoint-100"
    found.close()  # type: ignore[attr-defined]
    shutil.copytree(steps / "checkpoint-1000", out / "checkpoint-1000")
    again = watch(run, out, interval=0.01)
    seen = [next(again) for _ in range(3)]
    again.close()  # type: ignore[attr-defined]
    assert [(one.checkpoint, one.generation, one.shards_scored) for one in seen] == [
        ("checkpoint-20", 1, 0),
        ("checkpoint-100", 2, 0),
        ("checkpoint-1000", 3, 4),
    ]


# --- the command


def test_the_command_says_what_it_did(run: Path, steps: Path, models: dict[str, str]) -> None:
    ended = command("refresh", run, "--checkpoint", steps)
    assert ended.code == 0, ended.err
    assert "Wrote generation 3" in ended.out and "checkpoint-1000" in ended.out
    again = command("refresh", run, "--checkpoint", steps / "checkpoint-100")
    assert again.code == 0 and "is generation 2 of" in again.out and "Nothing was written" in again.out
    same = command("refresh", run, "--checkpoint", models["base"])
    assert same.code == 0 and same.out.count("stability is 0") == 1


def test_the_command_says_which_mask_readers_take(run: Path, steps: Path, tmp_path: Path) -> None:
    run = run.rename(tmp_path / "my run")
    words = ("refresh", run, "--checkpoint", steps / "checkpoint-20")
    first = command(*words).out
    assert "Readers" not in first and f"alphatoken-curate stats '{run}'\n" in first
    mask(run, published(generation="0", keep=0.3))
    again = command(*words).out
    assert again.startswith(f"checkpoint-20 is generation 1 of {run} already; wrote mask 3.\n")
    assert "Readers" not in again and "values/generation=1" not in again and "rows " not in again
    assert "Readers" not in command("refresh", run, "--checkpoint", steps / "checkpoint-100").out
    passed = command(*words).out
    assert "Nothing was written.\nReaders take the newest mask; name mask 3, of generation 1, by its number:" in passed
    assert f"alphatoken-curate export '{run}' --mask 3 --for trl" in passed
    mask(run, published(generation="0,2", by="-nll", allow_empty_rows=True, scope="batch:3"))
    (line,) = [one for one in command(*words).out.splitlines() if one.startswith("  alphatoken-curate mask ")]
    assert command(*shlex.split(line)[1:]).code == 0
    newest, before = manifest.read(run).masks[-1], manifest.read(run).masks[-2]
    assert newest.generations == (1,) and newest.settings == {**before.settings, "generation": "1"}
    assert "Readers" not in command(*words).out
    (run / "README.md").unlink()
    assert "Nothing was written but README.md.\n" in command(*words).out


def test_the_command_refuses_what_it_cannot_do(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    assert command("refresh", run).code == 2
    assert command("refresh", run, "--checkpoint", models["base"], "--watch", tmp_path).code == 2
    ended = command("refresh", run, "--checkpoint", tmp_path / "nowhere")
    assert ended.code == 2 and "nowhere" in ended.err
    assert command("refresh", run, "--checkpoint", models["tuned"], "--reference", models["tuned"]).code == 4


def test_the_config_names_places_that_hold_anywhere(
    data: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models["base"], tmp_path / "m" / "base")
    shutil.copy(data, tmp_path / "rows.jsonl")
    made = score(ScoreConfig(data="rows.jsonl", model="m/base", layers=1), "run").run.resolve()
    again = score(ScoreConfig(data=("*.jsonl",), model="m/base", layers=1, reuse="run"), "again").run.resolve()
    monkeypatch.chdir("/")
    assert refresh(made, models["tuned"])[0].generation == 1
    stored = (again / "config.yaml").read_text()
    assert "reuse" not in stored and f"- {tmp_path}{os.sep}*.jsonl" in stored
    assert command("score", "--config", again / "config.yaml", "-o", tmp_path / "b").code == 0
    assert manifest.read(tmp_path / "b").generations[0].shards == manifest.read(again).generations[0].shards


def test_signals_of_all_generations_are_finite(run: Path, steps: Path) -> None:
    refresh(run, steps)
    for generation in range(4):
        frame = values(run, generation)
        for name in SIGNALS:
            assert np.isfinite([x for row in frame[name].to_list() for x in row if x is not None]).all()
