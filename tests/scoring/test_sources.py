"""Files that are written again while a scoring reads or uses them: nothing of them is committed."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from daily import daily
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter
from tiny_files import Notes, command, contents, plain_llama, save_gguf, token_records, write_jsonl
from two_tokenizers import TEXTS, byte_level

from alphatoken_curate import FingerprintError, ScoreConfig, refresh, score
from alphatoken_curate.models.load import find_model, load_model
from alphatoken_curate.scoring.watch import watch

WEIGHTS = "model.safetensors"


class Writes(Notes):
    """Something else writes a file after a stage has done so many tokens."""

    def __init__(self, path: Path, change: Callable[[Path], object], stage: str = "scoring", after: int = 60) -> None:
        super().__init__()
        self.path, self.change, self.place, self.after = path, change, stage, after

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        if self.stages[-1][0] == self.place and self.done[self.place] >= self.after and self.path is not None:
            self.change(self.path)
            self.after = 1 << 60


def in_place(path: Path) -> None:
    """As `dd conv=notrunc` and `rsync --inplace` write: the same file, the last half of it new."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\x11" * (size - size // 2))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes() + b" ")
    path.with_name("new").replace(path)


@pytest.fixture
def settings(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A run that reads a file of every kind."""
    for name in ("base", "tuned"):
        shutil.copytree(models[name], tmp_path / name)
    byte_level(TEXTS["english"], size=258).save_pretrained(tmp_path / "tuned")
    for name, seed in (("rows", 1), ("target", 2), ("retention", 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", token_records(12 if name == "rows" else 3, seed=seed))
    (tmp_path / "template").write_text("{{ messages }}")
    first = score(
        ScoreConfig(data=str(tmp_path / "rows.jsonl"), model=models["tuned"], reference=models["base"], layers=1),
        tmp_path / "first",
    )
    shutil.copy(first.run / "artifacts" / "fisher.safetensors", tmp_path)
    names = {"model": "tuned", "reference": "base", "fisher": "fisher.safetensors", "chat_template": "template"}
    sides = {name: str(tmp_path / f"{name}.jsonl") for name in ("target", "retention")}
    places = {name: str(tmp_path / place) for name, place in names.items()}
    numbers = {"layers": 1, "rows_per_shard": 3, "batch_tokens": 20, "drift": "weights"}
    return {"data": str(tmp_path / "rows.jsonl"), **places, **sides, **numbers}


FILES = {
    "model": f"tuned/{WEIGHTS}",
    "tokenizer": "tuned/tokenizer.json",
    "reference": f"base/{WEIGHTS}",
    "fisher": "fisher.safetensors",
    "template": "template",
    "rows": "rows.jsonl",
    "retention": "retention.jsonl",
    "target": "target.jsonl",
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("change", daily([in_place, cut, replaced], [in_place], [cut]))
@pytest.mark.parametrize("name", FILES)
def test_a_scoring_ends_where_a_file_is_written_again(
    name: str, change: Callable[[Path], object], settings: dict[str, Any], tmp_path: Path
) -> None:
    whole, run, path = tmp_path / "whole", tmp_path / "run", tmp_path / FILES[name]
    score(ScoreConfig(**settings), whole)
    content = path.read_bytes()
    with pytest.raises(FingerprintError, match=rf"{path}.*: it changed while it was in use") as caught:
        score(ScoreConfig(**settings), run, Writes(path, change))
    assert caught.value.exit_code == 4
    kept = {place: data for place, data in contents(run).items() if place.startswith("values/")}
    assert 0 < len(kept) < 4 and not (run / "manifest.json").exists()
    assert kept.items() <= contents(whole).items()
    path.write_bytes(content)
    score(ScoreConfig(**settings), run)
    assert contents(run) == contents(whole)


def test_the_rows_of_a_split_are_those_that_are_watched(settings: dict[str, Any], tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    parts = {"test": token_records(30), "validation": token_records(3)}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(saved)
    settings |= {"data": str(saved), "split": "test"}
    assert score(ScoreConfig(**settings), tmp_path / "run").manifest.counts.scored == 30
    (file,) = (saved / "test").glob("*.arrow")
    with pytest.raises(FingerprintError) as refused:
        score(ScoreConfig(**settings), tmp_path / "other", Writes(file, in_place))
    assert "test/data-00000" in str(refused.value) and refused.value.fields == ("rows",)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("stage", ["reference losses", "target gradient", "scoring"])
def test_nothing_is_kept_of_weights_that_changed_before(stage: str, settings: dict[str, Any], tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    score(ScoreConfig(**settings), whole)
    path = tmp_path / "tuned" / WEIGHTS
    content = path.read_bytes()
    with pytest.raises(FingerprintError, match="it changed while"):
        score(ScoreConfig(**settings), run, Writes(path, in_place, stage, after=1))
    made = {place: data for place, data in contents(run).items() if place.endswith((".safetensors", ".parquet"))}
    assert made.items() <= contents(whole).items()
    path.write_bytes(content)
    score(ScoreConfig(**settings), run)
    assert contents(run) == contents(whole)


def test_a_file_that_changes_behind_the_last_shard(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where its time and size are as they were: then its digest tells."""
    path = tmp_path / "tuned" / WEIGHTS
    monkeypatch.setattr(
        "alphatoken_curate.runs.watched._stamp", lambda path: (0, 0, 0, 0, 0) if path.exists() else None
    )
    with pytest.raises(FingerprintError, match=r"tuned/config\.json \(or another of 2 files beside it\): it changed"):
        score(ScoreConfig(**settings), tmp_path / "run", Writes(path, in_place))
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("change", [os.utime, os.unlink])
def test_what_is_no_change_ends_nothing(
    change: Callable[[Path], object], settings: dict[str, Any], tmp_path: Path
) -> None:
    score(ScoreConfig(**settings), tmp_path / "run", Writes(tmp_path / "tuned" / WEIGHTS, change))
    assert (tmp_path / "run" / "manifest.json").exists()


# --- loading


def test_weights_that_were_loaded_do_not_change_with_their_file(models: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = Path(shutil.copytree(models["base"], tmp_path / "base"))
    save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    gguf = Path(save_gguf(plain_llama(), tmp_path / "model.gguf"))
    for name, path in (
        (base, base / WEIGHTS),
        (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"),
        (gguf, gguf),
    ):
        model = load_model(find_model(str(name)), dtype=torch.float32, device=torch.device("cpu"))
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        content = path.read_bytes()
        for change in (in_place, cut):
            change(path)
            assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items()), name
        path.write_bytes(content)


def test_older_safetensors_map_their_files_and_weights_are_copied(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alphatoken_curate.models.releases.reads_without_maps", lambda: False)
    base = Path(shutil.copytree(models["base"], tmp_path / "base"))
    model = load_model(find_model(str(base)), dtype=torch.float32, device=torch.device("cpu"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    in_place(base / WEIGHTS)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


# --- refresh


@pytest.fixture
def begun(models: dict[str, str], tmp_path: Path) -> Path:
    data = write_jsonl(tmp_path / "rows.jsonl", token_records(12))
    base = Path(shutil.copytree(models["base"], tmp_path / "base"))
    shutil.copytree(models["tuned"], tmp_path / "out" / "checkpoint-1")
    config = ScoreConfig(data=data, model=str(base), layers=1, rows_per_shard=3, batch_tokens=20)
    return score(config, tmp_path / "run").run


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["out/checkpoint-1", "base"])
def test_a_refresh_ends_too(name: str, begun: Path, tmp_path: Path) -> None:
    path = tmp_path / name / WEIGHTS
    content = path.read_bytes()
    with pytest.raises(FingerprintError, match=rf"{path}.*: it changed while it was in use"):
        refresh(begun, tmp_path / "out" / "checkpoint-1", progress=Writes(path, in_place))
    path.write_bytes(content)
    ended = command("refresh", begun, "--checkpoint", tmp_path / "out")
    assert ended.code == 0 and "generation 1" in ended.out


def test_a_refresh_at_an_adapter_ends_with_its_file(begun: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    with pytest.raises(FingerprintError, match=rf"{path}: it changed while it was in use"):
        refresh(begun, tmp_path / "adapter", progress=Writes(path, in_place))


def test_another_fisher_than_the_runs_is_refused(begun: Path, models: dict[str, str], tmp_path: Path) -> None:
    refresh(begun, tmp_path / "out" / "checkpoint-1")
    fisher = Path(shutil.copy(begun / "artifacts" / "fisher.safetensors", tmp_path))
    config = ScoreConfig(data=str(tmp_path / "rows.jsonl"), model=models["base"], layers=1, fisher=str(fisher))
    run = score(config, tmp_path / "other").run
    save_file({name: tensor * 2 for name, tensor in load_file(fisher).items()}, fisher)
    with pytest.raises(FingerprintError, match=rf"{fisher}: not the Fisher that {run} was scored with"):
        refresh(run, tmp_path / "out" / "checkpoint-1")


def test_a_watch_tries_a_checkpoint_that_is_written_again(begun: Path, models: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out" / "checkpoint-1"
    (out / "trainer_state.json").write_text("{}")

    def begin_anew(path: Path) -> None:
        shutil.copy(Path(models["base"]) / WEIGHTS, path)
        (out / "trainer_state.json").write_text("{ }")

    notes = Writes(out / WEIGHTS, begin_anew)
    done = next(watch(begun, tmp_path / "out", interval=0.05, progress=notes))
    assert done.checkpoint == "checkpoint-1" and done.generation == 2
    (told,) = [one for one in notes.warnings if "again" in one]
    assert told.startswith("checkpoint-1 is tried again: ") and "it changed while it was in use" in told


def test_a_watch_ends_where_the_reference_is_another(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    notes = Writes(tmp_path / "base" / WEIGHTS, in_place)
    with pytest.raises(FingerprintError, match=r"base/.*: it changed while"):
        next(itertools.islice(watch(begun, tmp_path / "out", interval=0.01, progress=notes), 1))
