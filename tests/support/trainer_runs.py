"""Small runs, models and settings to train with, and one step of a trainer looked at from outside."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from small_run import published, small_run, value_row
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from alphatoken_curate.models.releases import before

WORDS = tuple(f"<{number}>" for number in range(VOCABULARY))
ROWS, PACKED = 8, 24
"""Rows of a run; of their packs, which hold two rows each, the length."""


def train_run(folder: Path, *, kind: str = "sft", weights: str = "binary") -> Path:
    """A run of eight rows of 9 to 12 tokens (in the first branch), every one of them scored."""
    rows = [value_row(i, 9 + i % 4, kind=kind) for i in range(ROWS)]
    return small_run(folder, rows, kind=kind, config=published(weights=weights, keep=0.6), per_shard=3)


def tiny() -> Any:
    """A tiny model in float32."""
    return tiny_model("qwen2", dtype=torch.float32)


def tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One of whole words, by default those of `small_run`; trainers want one, and never use it on rows of tokens."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=words[0], bos_token=words[1], eos_token=words[2])


def settings(folder: Path, accumulation: int, batch: int = ROWS, **more: Any) -> dict[str, Any]:
    """One step of plain gradient descent, which moves weights by minus their gradient."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }


NO_CHECKPOINTING = {("gradient" if before("5.23") else "activation") + "_checkpointing": False}
"""What turns recomputing off: transformers gave it another name."""


@dataclass(frozen=True)
class Step:
    """The loss of one step, and what it did to each weight: its gradient."""

    loss: float
    gradients: dict[str, Tensor]


def step(trainer: Any) -> Step:
    """Train one step."""
    losses, own = [], trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        losses.append(own(*args, **kwargs))
        return losses[-1]

    trainer.training_step = recorded
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    trainer.train()
    assert trainer.state.global_step == 1 and len(losses) == trainer.args.gradient_accumulation_steps
    after = dict(trainer.model.named_parameters())
    with torch.no_grad():
        return Step(loss=float(sum(losses)), gradients={name: before[name] - after[name] for name in before})


def assert_close(found: Step, loss: Tensor, gradients: dict[str, Tensor]) -> None:
    """Loss to 1e-6; gradients to what float32 weights can show of them."""
    assert abs(found.loss - loss.item()) < 1e-6, (found.loss, loss.item())
    for name, wanted in gradients.items():
        largest = wanted.abs().max().clamp(min=1e-3)
        assert (found.gradients[name] - wanted).abs().max() < 2e-6 + 1e-5 * largest, name
