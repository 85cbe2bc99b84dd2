"""The README's stories: score, train with TRL, refresh, train on; by commands and exports, and by the callback alone.

Once quickly with a tiny model, in the tests of `RefreshCallback`; here with SmolLM2: pytest -m slow -k story -s.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hand import sft_loss, stored
from tiny_files import command, quiet
from trainer_runs import NO_CHECKPOINTING
from transformers import AutoModelForCausalLM

from alphatoken_curate import verify
from alphatoken_curate.models.load import find_model, load_model
from alphatoken_curate.runs import manifest
from alphatoken_curate.trainers import RefreshCallback, WeightedSFTTrainer, as_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),  # TRL's own call
]

ROOT = Path(__file__).parents[2]
SAMPLES, GSM8K = ROOT / "sample_data", ROOT.parent / "shared" / "data"
ROWS, STEPS, BATCH = 20, 20, 2


def data(kind: str) -> Path:
    """Real rows where they are at hand, else those of the README."""
    real = GSM8K / f"gsm8k_{kind}.jsonl"
    return real if real.exists() else SAMPLES / f"{kind}.jsonl"


def scored(folder: Path, sft: Path, target: Path) -> Path:
    """A run of some short rows, made by the command; half of the tokens train."""
    for name, source, count in (("data", sft, ROWS), ("target", target, 8)):
        lines = [line for line in source.read_text().splitlines() if len(line) < 500 or name == "target"]
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n")
    ran("score", folder / "data.jsonl", "--target", folder / "target.jsonl", "--fisher-rows", 8, "--keep", 0.5,
        "-o", folder / "run")  # fmt: skip
    return folder / "run"


def ran(*arguments: object) -> None:
    done = command(*arguments)
    assert done.code == 0, done.err


def smollm2(folder: Path) -> Any:
    """In float32, and read from safetensors: transformers trains nothing that was read from GGUF."""
    read = load_model(find_model("smollm2-135m"), dtype=torch.float32, device=torch.device("cpu"))
    read.hf_quantizer = None
    del read.config.quantization_config
    with quiet():
        read.save_pretrained(folder)
        return loaded(folder)


def loaded(folder: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def settings(out: Path, **more: Any) -> dict[str, Any]:
    """What the user chooses."""
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-5,
        "save_only_model": True,
        "logging_steps": 1,
        **NO_CHECKPOINTING,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }


@torch.no_grad()
def mean_loss(model: Any, run: Path, mask: int) -> float:
    """Of the tokens that a mask keeps in some rows, by hand."""
    return sft_loss(model, stored(run, mask)[:4], "count").item()


def changed(run: Path) -> int:
    """Tokens whose decision is another in mask 1 than in mask 0."""
    return sum(
        sum((a > 0) != (b > 0) for a, b in zip(first["loss_weight"], second["loss_weight"], strict=True))
        for first, second in zip(stored(run, 0), stored(run, 1), strict=True)
    )


def trained_by_the_readme(export: Path, model: Any, words: Any, chosen: dict[str, Any]) -> Any:
    """TRL's own trainer, by the code in the README of an export: nothing of this package, and what the user chooses."""
    text = (export / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert "alphatoken_curate" not in code and code.count("SFTConfig(max_length=None") == 1
    code = code.replace("SFTConfig(max_length=None", "SFTConfig(max_length=None, **chosen")
    code = code.replace("train_dataset=", "processing_class=words, train_dataset=")
    names = {"model": model, "words": words, "chosen": chosen}
    exec(compile(code, "README.md", "exec"), names)
    names["trainer"].train()
    return names["trainer"]


def losses_of(trainer: Any) -> list[float]:
    return [one["loss"] for one in trainer.state.log_history if "loss" in one]


def test_story_by_commands(tmp_path: Path, smollm2_tokenizer: object) -> None:
    """Score, export, train 20 steps with TRL, refresh at the checkpoint, export the new mask, train on."""
    run, out = scored(tmp_path, data("sft"), data("target")), tmp_path / "out"
    ran("export", run, "--for", "hf", "-o", tmp_path / "first")
    model = smollm2(tmp_path / "model")
    before = mean_loss(model, run, 0)
    first = trained_by_the_readme(
        tmp_path / "first", model, smollm2_tokenizer, settings(out, max_steps=STEPS, save_steps=STEPS)
    )
    after = mean_loss(model, run, 0)
    del model
    gc.collect()
    ran("refresh", run, "--checkpoint", out / f"checkpoint-{STEPS}")
    ran("export", run, "--for", "hf", "-o", tmp_path / "second")
    assert changed(run) > 0 and verify(run) == []
    later = loaded(out / f"checkpoint-{STEPS}")
    at_refresh = mean_loss(later, run, 1)
    second = trained_by_the_readme(
        tmp_path / "second", later, smollm2_tokenizer, settings(tmp_path / "on", max_steps=STEPS // 2)
    )
    at_end = mean_loss(later, run, 1)
    told("losses", losses_of(first))
    told("losses after the refresh", losses_of(second))
    told("kept tokens of four rows, mask 0 then mask 1", [before, after, at_refresh, at_end])
    print(f"; tokens whose decision changed: {changed(run)}", end="")
    assert len(losses_of(first)) == STEPS and len(losses_of(second)) == STEPS // 2
    assert after < before and at_end < at_refresh


def told(what: str, losses: list[float]) -> None:
    print(f"\n{what}:", *(f"{loss:.3f}" for loss in losses), end="")


def test_story_of_smollm2_in_trl(tmp_path: Path, smollm2_tokenizer: object) -> None:
    """The same inside one training, by the callback."""
    from trl import SFTConfig

    run = scored(tmp_path, SAMPLES / "sft.jsonl", SAMPLES / "target.jsonl")
    model = smollm2(tmp_path / "model")
    before = mean_loss(model, run, 0)
    callback = RefreshCallback(run)
    chosen = settings(tmp_path / "out", max_length=None, num_train_epochs=STEPS * BATCH // ROWS, save_strategy="epoch")
    trainer = WeightedSFTTrainer(
        model=model,
        args=SFTConfig(**chosen),
        train_dataset=as_dataset(run),
        processing_class=smollm2_tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    told("losses", losses_of(trainer))
    print(f"; masks by epoch: {callback.masks}; tokens whose decision changed: {changed(run)}", end="")
    assert trainer.state.global_step == STEPS == len(losses_of(trainer))
    assert callback.masks == [(0, 0), (1, 1)]
    assert len(manifest.read(run).generations) == 3 and verify(run) == []
    assert mean_loss(model, run, 0) < before
    assert changed(run) > 0
