"""Losses from train/ of a run by plain torch: what a trainer that reads an export must report for its first step.

Parquet is read by pyarrow; nothing of the package is used. Losses are -log p in float64, of a float32 model that reads
one row at a time, unpadded.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

BETA = 0.1


def rows(run: Path, mask: int) -> list[dict[str, Any]]:
    """The rows of one mask, in order."""
    files = sorted((run / "train" / f"mask={mask:04d}").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file, partitioning=None).to_pylist()]


@functools.cache
def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def of_targets(model: Path, inputs: list[int], targets: list[int]) -> Tensor:
    """-log p of the target at each position, (T,) float64."""
    logits = _model(model)(input_ids=torch.tensor([inputs])).logits[0].double()
    return -torch.log_softmax(logits, -1).gather(1, torch.tensor(targets)[:, None])[:, 0]


def losses(model: Path, ids: list[int]) -> Tensor:
    """-log p of each token, token-aligned, (T,) float64; 0 for the first, which nothing predicts."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), of_targets(model, ids[:-1], ids[1:])])


def trained(row: dict[str, Any], prefix: str = "") -> Tensor:
    """Which tokens train, (T,) bool."""
    return torch.tensor(row[f"{prefix}labels"]) != -100


def weights(row: dict[str, Any], prefix: str = "") -> Tensor:
    """(T,) float64."""
    return torch.tensor(row[f"{prefix}loss_weight"], dtype=torch.float64)


def sft(model: Path, run: Path, mask: int, *, soft: bool = False, micro_batch: int | None = None) -> float:
    """Sum of the losses of trainable tokens, weighted where `soft`, over their count, of all rows.

    `micro_batch`: of so many rows at a time, in order, and the mean over these.
    """
    found = rows(run, mask)
    size = micro_batch or len(found)
    parts = [_sft(model, found[start : start + size], soft=soft) for start in range(0, len(found), size)]
    return sum(parts) / len(parts)


def _sft(model: Path, found: list[dict[str, Any]], *, soft: bool) -> float:
    total, count = 0.0, 0
    for row in found:
        on = trained(row)
        weight = weights(row) if soft else on.double()
        total += float((losses(model, row["input_ids"]) * weight)[on].sum())
        count += int(on.sum())
    return total / count


def sft_sum(model: Path, run: Path, mask: int) -> float:
    """Sum of the weighted losses of all rows."""
    found = rows(run, mask)
    return float(sum((losses(model, row["input_ids"]) * weights(row)).sum() for row in found))


def dpo(model: Path, reference: Path, run: Path, mask: int, *, soft: bool = False) -> float:
    """Mean of -log sigmoid(beta * margin) over pairs; both models' log-probabilities are masked alike (or weighted)."""
    found = []
    for row in rows(run, mask):
        ratios = []
        for prefix in ("chosen_", "rejected_"):
            weight = weights(row, prefix) if soft else trained(row, prefix).double()
            ids = row[f"{prefix}input_ids"]
            ratios.append(((losses(reference, ids) - losses(model, ids)) * weight).sum())
        found.append(-torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])))
    return float(torch.stack(found).mean())
