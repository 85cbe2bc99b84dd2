"""The README's story: score, train with TRL, refresh at each checkpoint, train on.

Once quickly with a tiny model, in the tests of `RefreshCallback`; here with SmolLM2: pytest -m slow -k story -s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hand import sft_loss, stored
from tiny_files import command, quiet
from transformers import AutoModelForCausalLM

from alphatoken_curate import manifest, verify
from alphatoken_curate.models import find_model, load_model
from alphatoken_curate.trainers import RefreshCallback, WeightedSFTTrainer, as_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),  # TRL's own call
]

SAMPLES = Path(__file__).parents[1] / "sample_data"
ROWS, STEPS, BATCH = 20, 20, 2


def smollm2(folder: Path) -> Any:
    """In float32, and read from safetensors: transformers trains nothing that was read from GGUF."""
    read = load_model(find_model("smollm2-135m"), dtype=torch.float32, device=torch.device("cpu"))
    read.hf_quantizer = None
    del read.config.quantization_config
    with quiet():
        read.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_story_of_smollm2_in_trl(tmp_path: Path, smollm2_tokenizer: object) -> None:
    from trl import SFTConfig

    run, out = tmp_path / "run", tmp_path / "out"
    data = tmp_path / "data.jsonl"
    lines = [line for line in (SAMPLES / "sft.jsonl").read_text().splitlines() if len(line) < 500]
    data.write_text("\n".join(lines[:ROWS]) + "\n")
    target_rows = tmp_path / "target.jsonl"
    target_rows.write_text("".join((SAMPLES / "target.jsonl").read_text().splitlines(keepends=True)[:8]))
    scored = command("score", data, "--target", target_rows, "--fisher-rows", 8, "-o", run)
    assert scored.code == 0, scored.err
    model = smollm2(tmp_path / "model")
    some = stored(run, 0)[:4]
    with torch.no_grad():
        before = sft_loss(model, some, "count").item()
    callback = RefreshCallback(run)
    trainer = WeightedSFTTrainer(
        model=model,
        args=SFTConfig(
            str(out),
            max_length=None,
            num_train_epochs=STEPS * BATCH // ROWS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-5,
            save_strategy="epoch",
            save_only_model=True,
            logging_steps=1,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=as_dataset(run),
        processing_class=smollm2_tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    print("\nlosses:", *(f"{loss:.3f}" for loss in losses), " masks by epoch:", callback.masks, end="")
    assert trainer.state.global_step == STEPS == len(losses)
    assert callback.masks == [(0, 0), (1, 1)]
    assert len(manifest.read(run).generations) == 3 and verify(run) == []
    with torch.no_grad():
        after = sft_loss(model, some, "count").item()
    assert after < before
    changed = [
        sum((a > 0) != (b > 0) for a, b in zip(first["loss_weight"], second["loss_weight"], strict=True))
        for first, second in zip(stored(run, 0), stored(run, 1), strict=True)
    ]
    print(f"; tokens whose decision changed after {STEPS // 2} steps: {sum(changed)}", end="")
    assert sum(changed) > 0
