"""Checkpoints of other trainers: each is named, with a command that makes a model of it. None is ever read."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.commands import accelerate_cli
from tiny_adapters import logits
from tiny_files import Notes, command, token_records, write_jsonl
from transformers import AutoModelForCausalLM

from alphatoken_curate import ModelError
from alphatoken_curate.models.checkpoints import Watcher, find_checkpoints, is_complete
from alphatoken_curate.models.formats import sharded
from alphatoken_curate.models.load import find_model, load_model
from alphatoken_curate.scoring.watch import watch

PICKLE = b"\x80\x04cos\nsystem\n"


def fsdp(folder: Path, model: str) -> Path:
    """As accelerate's `save_fsdp_model` and the Trainer save a model in shards: torch writes the files."""
    state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group
        dcp.save({"model": state}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
        dcp.save({"optimizer": {"step": torch.ones(1)}}, checkpoint_id=folder / "optimizer_0", no_dist=True)
    for name in ("rng_state_0.pth", "scheduler.pt", "training_args.bin"):
        (folder / name).write_bytes(PICKLE)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def files(folder: Path, *names: str) -> Path:
    """A folder of files that must not be read."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICKLE)
    return folder


def deepspeed(folder: Path) -> Path:
    """As the Trainer saves ZeRO-3 that gathers nothing."""
    parts = [f"zero_pp_rank_{n}_mp_rank_00_{what}.pt" for n in (0, 1) for what in ("model_states", "optim_states")]
    files(folder, *(f"global_step500/{name}" for name in parts), "zero_to_fp32.py", "rng_state_0.pth")
    (folder / "latest").write_text("global_step500")
    (folder / "config.json").write_text("{}")
    (folder / "trainer_state.json").write_text("{}")
    return folder


MADE: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "DeepSpeed ZeRO-3": (
        deepspeed,
        [
            "sharded, as DeepSpeed saves them (global_step500)",
            "`python {0}/zero_to_fp32.py {0} OUT --safe_serialization`. Then put config.json and the tokenizer of this",
        ],
    ),
    "DeepSpeed ZeRO-2, the folder of a step": (
        lambda path: files(path, "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ["(checkpoint-7)", "`python -m deepspeed.utils.zero_to_fp32 {1} OUT --safe_serialization --tag checkpoint-7`"],
    ),
    "DeepSpeed in Lightning": (
        lambda path: files(path, "checkpoint/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"),
        ["(checkpoint)", "`python {0}/zero_to_fp32.py {0} OUT --safe_serialization`"],
    ),
    "FSDP, a part from each process": (
        lambda path: files(path, "pytorch_model_fsdp_0_rank0.bin", "optimizer_0_rank0.bin"),
        ["pickled (pytorch_model_fsdp_0_rank0.bin)", "save_pretrained"],
    ),
    "Megatron": (
        lambda path: files(path, "latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"),
        ["Megatron or NeMo (latest_checkpointed_iteration.txt)", "AutoBridge.export_ckpt"],
    ),
    "Megatron, the folder of a step": (
        lambda path: files(path, "mp_rank_00/model_optim_rng.pt"),
        ["Megatron or NeMo (mp_rank_00/model_optim_rng.pt)"],
    ),
    "Megatron, distributed": (
        lambda path: files(path, "common.pt", ".metadata", "__0_0.distcp", "metadata.json"),
        ["Megatron or NeMo (common.pt)"],
    ),
    "NeMo": (
        lambda path: files(
            path, "weights/common.pt", "weights/.metadata", "weights/__0_0.distcp", "context/model.yaml"
        ),
        ["(weights/common.pt)", "`nemo llm export path={0} target=hf output_path=OUT`"],
    ),
    "torchtune": (
        lambda path: files(path, "hf_model_0001_0.pt", "recipe_state.pt"),
        ["pickled (hf_model_0001_0.pt)", "torchtune: safe_serialization=True"],
    ),
    "Lightning": (lambda path: files(path, "last.ckpt"), ["pickled (last.ckpt)", "save_pretrained"]),
    "transformers before safetensors": (
        lambda path: files(path, "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "config.json"),
        ["pickled (pytorch_model-00001-of-00002.bin)", "save_pretrained"],
    ),
}


@pytest.mark.parametrize("kind", MADE)
def test_each_is_named_with_what_to_do(kind: str, tmp_path: Path) -> None:
    make, wanted = MADE[kind]
    path = make(tmp_path / "checkpoint-7")
    for find in (find_model, lambda name: find_checkpoints(name, base=None)):
        with pytest.raises(ModelError) as caught:
            find(str(path))
        told = str(caught.value)
        assert told.startswith(f"{path}: ") and "\n" not in told and "elete" not in told
        for part in wanted:
            assert part.format(path, path.parent) in told, told


@pytest.mark.parametrize("name", ["model.nemo", "last.ckpt", "model.safetensors"])
def test_a_file_is_no_model(name: str, tmp_path: Path) -> None:
    path = files(tmp_path, name) / name
    for find in (find_model, lambda name: find_checkpoints(name, base=None)):
        with pytest.raises(ModelError, match=rf"{name}: it is a file\. .* pickled \(.*\) are never read"):
            find(str(path))


def test_the_command_for_shards_of_fsdp_makes_a_model_of_them(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fsdp(tmp_path / "my out" / "checkpoint-3", models["tuned"])
    assert sorted(p.name for p in (path / "pytorch_model_fsdp_0").iterdir()) == [".metadata", "__0_0.distcp"]
    with pytest.raises(ModelError, match="sharded, as FSDP saves them") as caught:
        find_model(str(path))
    line = str(caught.value).split("`")[1]
    assert line == f"accelerate merge-weights '{path}/pytorch_model_fsdp_0' OUT"
    monkeypatch.setattr(
        sys, "argv", ["accelerate", "merge-weights", str(path / "pytorch_model_fsdp_0"), str(tmp_path / "OUT")]
    )
    accelerate_cli.main()
    assert "config.json and the tokenizer of the model that was trained into OUT, and name OUT." in str(caught.value)
    shutil.copy(Path(models["tuned"]) / "config.json", tmp_path / "OUT")
    merged, wanted = (
        load_model(find_model(name), dtype=torch.float32, device=torch.device("cpu"))
        for name in (str(tmp_path / "OUT"), models["tuned"])
    )
    assert torch.equal(logits(merged), logits(wanted))
    with pytest.raises(ModelError, match=r"merge-weights .*/pytorch_model_fsdp_0'"):
        find_model(str(path / "pytorch_model_fsdp_0"))


def test_all_sharded_checkpoints_of_a_training_are_told_in_one_line(models: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in (1, 2, 3):
        fsdp(out / f"checkpoint-{step}", models["tuned"])
    with pytest.raises(ModelError, match=r"checkpoint-1: its weights .*OUT\. 2 more checkpoints are like it\.$"):
        find_checkpoints(out, base=None)
    shutil.rmtree(out / "checkpoint-2")
    shutil.copytree(models["tuned"], out / "checkpoint-2")
    with pytest.raises(ModelError, match=r"1 more checkpoint is like it\. checkpoint-2 can be scored as it is\.$"):
        find_checkpoints(out, base=None)
    with pytest.raises(ModelError, match="sharded, as FSDP saves them"):  # as `save_state` writes, with no step
        find_checkpoints(fsdp(tmp_path / "state", models["tuned"]), base=None)


def test_shards_beside_a_whole_model_are_left_alone(models: dict[str, str], tmp_path: Path) -> None:
    """ZeRO-2, ZeRO-3 that gathers, and FSDP's full state dict save the model too."""
    path = deepspeed(fsdp(Path(shutil.copytree(models["tuned"], tmp_path / "checkpoint-1")), models["tuned"]))
    shutil.copy(Path(models["tuned"]) / "config.json", path)
    assert sharded(path) is not None and is_complete(path) is None
    assert find_model(str(path)).folder == path


def test_shards_that_are_still_written_are_waited_for(models: dict[str, str], tmp_path: Path) -> None:
    path = fsdp(tmp_path / "out" / "checkpoint-1", models["tuned"])
    meta = path / "pytorch_model_fsdp_0" / ".metadata"
    meta.rename(tmp_path / "later")
    assert is_complete(path) == "checkpoint-1/pytorch_model_fsdp_0 has no .metadata yet, which is written last"
    for find in (find_model, lambda name: find_checkpoints(name, base=None)):
        with pytest.raises(
            ModelError, match=r"not written to the end: .*has no \.metadata yet.* Wait until it is saved"
        ):
            find(str(path))
    watcher = Watcher(tmp_path / "out", None)
    assert watcher.ready() == [] and list(watcher.waiting) == ["checkpoint-1"] and not watcher.refused
    (tmp_path / "later").rename(meta)
    assert watcher.ready() == [] and list(watcher.refused) == ["checkpoint-1"] and not watcher.waiting


def test_a_watch_tells_of_shards_once_and_scores_the_rest(models: dict[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", token_records(6))
    assert command("score", data, "-o", tmp_path / "run", "--model", models["base"], "--layers", "1").code == 0
    deepspeed(tmp_path / "out" / "checkpoint-1")
    path = Path(shutil.copytree(models["tuned"], tmp_path / "out" / "checkpoint-2"))
    (path / "trainer_state.json").write_text("{}")
    notes = Notes()
    found = watch(tmp_path / "run", tmp_path / "out", interval=0.01, progress=notes)
    assert next(found).checkpoint == "checkpoint-2"
    shutil.copytree(path, tmp_path / "out" / "checkpoint-3")
    assert next(found).checkpoint == "checkpoint-3"
    (told,) = [one for one in notes.warnings if "checkpoint-1" in one]
    assert told.startswith("checkpoint-1 is not scored: its weights are sharded, as DeepSpeed saves them")
