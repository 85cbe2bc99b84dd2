"""Real LoRA adapters of tiny models on disk, and real trainings that save checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_files import quiet
from torch import Tensor
from transformers import AutoModelForCausalLM

PROBE = torch.tensor([[5, 6, 7, 8, 9, 20, 30, 3]])


def logits(model: Any) -> Tensor:
    """What a model says of the probe tokens: (1, 8, V)."""
    with torch.no_grad():
        found: Tensor = model(input_ids=PROBE).logits
    return found


def lora(base: str | Path, *, seed: int = 3, gguf_file: str | None = None, **settings: Any) -> Any:
    """A model with a LoRA on its query and value projections (or as `settings` say), after a random step."""
    import peft

    with warnings.catch_warnings(), quiet(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, gguf_file=gguf_file)
        config = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
        adapted = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted


def save_adapter(base: str | Path, folder: Path, **settings: Any) -> Tensor:
    """Save a LoRA of a model; returns what peft's own forward says of the probe."""
    adapted = lora(base, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return logits(adapted)


def train(model: Any, folder: Path, steps: int, *, callbacks: Sequence[Any] = (), **settings: Any) -> Any:
    """Train with transformers' Trainer, a checkpoint a step; returns the Trainer."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": PROBE[0], "labels": PROBE[0]}] * steps
    given = {"max_steps": steps, "save_steps": 1, "save_strategy": "steps", "learning_rate": 0.1} | settings
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", **given
        )
        trainer = Trainer(model=model.train(), args=arguments, train_dataset=rows, callbacks=list(callbacks))
        trainer.train()
    return trainer
