"""A run, some steps of training on its mask, and the losses of that training: what chains of commands are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_files import Ended, command, quiet
from torch import Tensor

from alphatoken_curate import scan
from alphatoken_curate.models.load import find_model, load_model

STEPS, SAVED, BATCH = 20, (5, 10, 20), 2
LEARNING_RATE = 1e-5


def ran(*arguments: object) -> Ended:
    ended = command(*arguments)
    assert ended.code == 0, ended.err
    return ended


def log_probs(model: Any, row: dict[str, Any], branch: str) -> Tensor:
    """-log p of the tokens that train, weighed, (n,): what the mask leaves of the loss."""
    ids, weight = torch.tensor([row[f"{branch}input_ids"]]), torch.tensor(row[f"{branch}loss_weight"])
    kept = weight.nonzero().squeeze(1)
    logits = model(input_ids=ids).logits[0, kept - 1].float()
    return weight[kept] * torch.log_softmax(logits, -1).gather(1, ids[0, kept, None]).squeeze(1)


def sft_loss(model: Any, _: Any, rows: list[dict[str, Any]]) -> Tensor:
    found = torch.cat([log_probs(model, row, "") for row in rows])
    return -found.mean()


def dpo_loss(model: Any, reference: Any, rows: list[dict[str, Any]], beta: float = 0.1) -> Tensor:
    """Reference and policy are masked alike."""
    losses = []
    for row in rows:
        with torch.no_grad():
            before = [log_probs(reference, row, branch).sum() for branch in ("chosen_", "rejected_")]
        after = [log_probs(model, row, branch).sum() for branch in ("chosen_", "rejected_")]
        losses.append(-torch.nn.functional.logsigmoid(beta * (after[0] - before[0] - after[1] + before[1])))
    return torch.stack(losses).mean()


def train(run: Path, out: Path, loss_of: Callable[..., Tensor], steps: int = STEPS) -> None:
    """Train on train/ of a run by AdamW, as its masks say; save checkpoints under `out`."""
    source, options = find_model("smollm2-135m"), {"dtype": torch.float32, "device": torch.device("cpu")}
    reference = load_model(source, **options) if loss_of is dpo_loss else None  # type: ignore[arg-type]
    model = load_model(source, **options).requires_grad_(True)  # type: ignore[arg-type]
    # Its weights are plain tensors by now, but transformers saves nothing that was read from GGUF.
    model.hf_quantizer = None
    del model.config.quantization_config
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rows = scan(run, "train").collect().to_dicts()
    for step in range(1, steps + 1):
        first = BATCH * (step - 1) % len(rows)
        loss = loss_of(model, reference, [rows[(first + i) % len(rows)] for i in range(BATCH)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in SAVED:
            with quiet():
                model.save_pretrained(out / f"checkpoint-{step}")
