"""Runs scored again at LoRA and DoRA adapters, against the same at their merged models."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import within
from safetensors.torch import load_file, save_file
from tiny_adapters import lora, save_adapter, train
from tiny_files import command, contents, pair_records, quiet, token_records, write_jsonl
from transformers import AutoModelForCausalLM

from alphatoken_curate import ScoreConfig, refresh, scan, score, verify, watch
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import LAYOUTS, NOT_COMPUTED, PAIR_COLUMNS, SIGNALS

pytest.importorskip("peft")

DORA = {"target_modules": "all-linear", "use_dora": True}
STEPS = ["checkpoint-8", "checkpoint-10"]


def values(run: Path, generation: int) -> Any:
    return scan(run, generation=generation).collect()


@pytest.fixture(scope="module")
def base(models: dict[str, str], folder: Path) -> str:
    """A base of our own, under a name of its own."""
    return str(shutil.copytree(models["base"], folder / "tiny-base"))


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, str]:
    """Rows by kind."""
    records = {"sft": token_records(9), "preference": pair_records(7)}
    return {kind: write_jsonl(folder / f"{kind}.jsonl", rows) for kind, rows in records.items()}


@pytest.fixture(scope="module")
def finished(folder: Path, base: str, data: dict[str, str]) -> dict[str, Path]:
    """Runs by kind, scored with the base, which is its own reference."""
    settings: dict[str, Any] = {"model": base, "rows_per_shard": 4, "layers": 2}
    return {kind: score(ScoreConfig(data=rows, **settings), folder / f"run-{kind}").run for kind, rows in data.items()}


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished["sft"], tmp_path / "run"))


@pytest.fixture(scope="module")
def adapters(folder: Path, base: str) -> dict[str, Path]:
    """Folders of adapters after a random step."""
    kinds: dict[str, dict[str, Any]] = {"lora": {}, "dora": DORA}
    for kind, settings in kinds.items():
        save_adapter(base, folder / kind, **settings)
    return {kind: folder / kind for kind in kinds}


@pytest.fixture(scope="module")
def trained(folder: Path, base: str) -> Path:
    """The output folder of a real training of a LoRA, of two checkpoints."""
    train(lora(base), folder / "out", 10, save_steps=8)
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == sorted(STEPS)
    return folder / "out"


def merged(base: str, adapter: Path, place: Path) -> Path:
    """The whole model that peft's own merge makes of a saved adapter, saved."""
    import peft

    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft.PeftModel.from_pretrained(whole, adapter).merge_and_unload().save_pretrained(place)
    return place


def signals(run: Path, generation: int) -> dict[str, torch.Tensor]:
    """All numbers of a generation by column, of those that have any."""
    layout = manifest.layout(manifest.read(run))
    frame = values(run, generation)
    found = {}
    for name in (prefix + signal for prefix in layout.branches for signal in SIGNALS):
        found[name] = torch.tensor([x for row in frame[name].to_list() for x in row or [] if x is not None])
    for name in PAIR_COLUMNS if layout is LAYOUTS["preference"] else ():
        found[name] = torch.tensor(frame[name].drop_nulls().to_list())
    return {name: numbers for name, numbers in found.items() if len(numbers)}


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in units of the largest number."""
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def assert_same_signals(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Each within 1e-5 of its own largest, so a small stability is compared by its own size."""
    assert found.keys() == wanted.keys()
    needed = set(SIGNALS) - (set(NOT_COMPUTED) - {"reference_nll"})
    assert needed <= {name.removeprefix("chosen_").removeprefix("rejected_") for name in wanted}
    far = {name: apart(found[name], wanted[name]) for name in wanted}
    assert all(distance <= 1e-5 for distance in far.values()), far


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize("which", ["lora", "dora"])
def test_an_adapter_is_scored_as_its_merged_model(
    which: str, kind: str, finished: dict[str, Path], adapters: dict[str, Path], base: str, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished[kind], tmp_path / "run"))
    (made,) = refresh(run, adapters[which])
    (also,) = refresh(run, merged(base, adapters[which], tmp_path / "whole"))
    assert (made.checkpoint, made.generation, also.generation) == (which, 1, 2)
    found, wanted, start = (signals(run, generation) for generation in (1, 2, 0))
    assert_same_signals(found, wanted)
    for name, numbers in start.items():  # and as no other model
        assert name == "omega" or apart(numbers, wanted[name]) > 1e-3, name
    assert all(numbers.any() for numbers in found.values())
    assert verify(run) == []


def test_a_model_tuned_before_may_be_the_base(
    models: dict[str, str], data: dict[str, str], base: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"model": models["tuned"], "reference": base, "layers": 2}
    run = score(ScoreConfig(data=data["sft"], **settings), tmp_path / "run").run
    save_adapter(models["tuned"], tmp_path / "adapter")
    refresh(run, tmp_path / "adapter")
    refresh(run, merged(models["tuned"], tmp_path / "adapter", tmp_path / "whole"))
    assert_same_signals(signals(run, 1), signals(run, 2))
    assert apart(signals(run, 0)["stab_direct"], signals(run, 1)["stab_direct"]) > 1e-3


def test_an_adapter_that_learned_nothing_changes_nothing(run: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    fresh = Path(shutil.copytree(adapters["lora"], tmp_path / "fresh"))
    file = fresh / "adapter_model.safetensors"
    weights = {name: w * ("lora_B" not in name) for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    refresh(run, fresh)
    found, start = signals(run, 1), signals(run, 0)
    assert torch.equal(found.pop("reference_nll"), start["nll"])
    # Two directions are multiplied at once, one of them zero, where the base alone had one: sums may round otherwise.
    for name in found:
        torch.testing.assert_close(found[name], start[name], rtol=0, atol=1e-6 * float(start[name].abs().max()))
    assert not found["stab_direct"].any() and not found["stab_causal"].any()


# --- a training's output folder


@pytest.mark.long
def test_the_adapters_of_a_training_are_scored_in_step_order(
    run: Path, trained: Path, base: str, tmp_path: Path
) -> None:
    made = refresh(run, trained)
    assert [(one.checkpoint, one.generation) for one in made] == [(name, n) for n, name in enumerate(STEPS, 1)]
    for generation, name in enumerate(STEPS, 1):
        alone = Path(shutil.copytree(run, tmp_path / name))
        refresh(alone, merged(base, trained / name, tmp_path / f"whole-{name}"))
        assert_same_signals(signals(run, generation), signals(alone, 3))
    assert apart(signals(run, 1)["stab_direct"], signals(run, 2)["stab_direct"]) > 1e-3
    assert [one.shards_scored for one in refresh(run, trained)] == [0, 0]


@pytest.mark.long
def test_the_adapters_of_a_training_are_watched(run: Path, trained: Path, tmp_path: Path) -> None:
    wanted = Path(shutil.copytree(run, tmp_path / "wanted"))
    refresh(wanted, trained)
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    for name in STEPS:  # a copy does not keep the order of the files: the Trainer writes this one last
        (out / name / "trainer_state.json").write_text((trained / name / "trainer_state.json").read_text())
    watching = watch(run, out, interval=0.01)
    with within(30):
        found = [next(watching), next(watching)]
    assert [(one.checkpoint, one.generation) for one in found] == [(name, n) for n, name in enumerate(STEPS, 1)]
    assert contents(run) == contents(wanted)


# --- the base


def test_an_adapter_of_another_base_is_refused(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    save_adapter(models["tuned"], tmp_path / "adapter")
    before = contents(run)
    ended = command("refresh", run, "--checkpoint", tmp_path / "adapter")
    assert ended.code == 2 and "Traceback" not in ended.err
    assert f"{tmp_path / 'adapter'}: it is an adapter of {models['tuned']}, not of" in ended.err
    assert "Use the model it was trained from" in ended.err
    also = command("refresh", run, "--checkpoint", tmp_path / "adapter", "--base", models["tuned"])
    assert also.code == 4 and "--reference" in also.err  # --base alone says where both lie
    assert contents(run) == before


def test_a_base_that_was_moved_is_named(
    adapters: dict[str, Path], base: str, data: dict[str, str], tmp_path: Path
) -> None:
    old = Path(shutil.copytree(base, tmp_path / "old" / "tiny-base"))
    run = score(ScoreConfig(data=data["sft"], model=str(old), rows_per_shard=4, layers=2), tmp_path / "run").run
    save_adapter(old, tmp_path / "adapter")
    unmoved = Path(shutil.copytree(run, tmp_path / "unmoved"))
    refresh(unmoved, tmp_path / "adapter")
    (tmp_path / "new").mkdir()
    new = old.rename(tmp_path / "new" / "tiny-base")
    before = contents(run)
    ended = command("refresh", run, "--checkpoint", tmp_path / "adapter")
    assert ended.code == 2 and f"{old}, cannot be had" in ended.err
    assert contents(run) == before
    ended = command("refresh", run, "--checkpoint", tmp_path / "adapter", "--base", new)
    assert ended.code == 0, ended.err
    assert contents(run) == contents(unmoved)


def test_peft_that_is_not_installed(run: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Path(shutil.copytree(run, run.with_name("wanted")))
    refresh(wanted, adapters["lora"])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        ended = command("refresh", run, "--checkpoint", adapters["lora"])
    assert ended.code == 2 and "pip install 'alphatoken-curate[peft]'" in ended.err
    assert len(manifest.read(run).generations) == 1
    assert command("refresh", run, "--checkpoint", adapters["lora"]).code == 0
    assert contents(run) == contents(wanted)
