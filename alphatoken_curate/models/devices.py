"""Where a model computes and in which dtype, where that is left to us."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from alphatoken_curate.errors import UsageError

if TYPE_CHECKING:
    import torch


def free_memory() -> None:
    """Give a dropped model's memory back before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resolve_device(name: str) -> torch.device:
    """`auto` is the card where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: no such device. Use cpu, cuda, cuda:0 or auto.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA card here. Use --device cpu.")
    return device


def resolve_dtype(name: str, device_type: str, *, in_full: bool) -> str:
    """Name of the dtype the model runs in: `auto` is bfloat16 on a card, float32 on a CPU.

    Where it has to run `in_full` (`ScoreConfig.in_full`) `auto` is float32.
    """
    if name == "auto":
        return "bfloat16" if device_type == "cuda" and not in_full else "float32"
    return name
