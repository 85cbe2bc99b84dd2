"""What trainers must compute, by hand: from Parquet as pyarrow reads it, in plain torch, one sequence at a time.

Shares no code with `alphatoken_curate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

Row = dict[str, Any]


def stored(run: Path, mask: int) -> list[Row]:
    """The rows of a mask, as they lie in its shards."""
    paths = sorted((run / "train" / f"mask={mask:04}").glob("*.parquet"))
    return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


def log_probs(model: Any, ids: Sequence[int]) -> Tensor:
    """log p(token t | tokens before t) of a sequence, (T,), in float64; 0 for the first one."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0].double()
    found = [torch.zeros((), dtype=torch.float64)]
    for t in range(1, len(ids)):
        found.append(torch.log_softmax(logits[t - 1], -1)[ids[t]])
    return torch.stack(found)


def answer(model: Any, row: Row, branch: str = "") -> Tensor:
    """sum_t w_t log p_t, a scalar."""
    weight = torch.tensor(row[f"{branch}loss_weight"], dtype=torch.float64)
    return (weight * log_probs(model, row[f"{branch}input_ids"])).sum()


def sft_loss(model: Any, rows: Sequence[Row], denominator: str) -> Tensor:
    """- sum w log p, divided by the count of tokens with a weight above 0, or by the sum of weights."""
    weights = [weight for row in rows for weight in row["loss_weight"]]
    items = sum(weights) if denominator == "sum" else sum(weight > 0 for weight in weights)
    return -torch.stack([answer(model, row) for row in rows]).sum() / items


def dpo_loss(model: Any, reference: Any, rows: Sequence[Row], beta: float) -> Tensor:
    """The mean over pairs of -log sigmoid(beta (log ratio of chosen - log ratio of rejected))."""
    losses = []
    for row in rows:
        with torch.no_grad():
            before = [answer(reference, row, branch) for branch in ("chosen_", "rejected_")]
        after = [answer(model, row, branch) for branch in ("chosen_", "rejected_")]
        margin = (after[0] - before[0]) - (after[1] - before[1])
        losses.append(-torch.nn.functional.logsigmoid(beta * margin))
    return torch.stack(losses).mean()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of every weight of the model."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if one is None else one
        for (name, weight), one in zip(named.items(), found, strict=True)
    }
