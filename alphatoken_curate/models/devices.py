"""Where a model computes and in which dtype, where that is left to us."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alphatoken_curate.errors import UsageError
from alphatoken_curate.wording import count

if TYPE_CHECKING:
    import torch


def free_memory() -> None:
    """Give a dropped model's memory back before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def taking_threads(count: int | None) -> Iterator[None]:
    """Have torch take so many threads in this block, where they are named."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_device(name: str) -> torch.device:
    """The one device of a name, of which `auto` is the card where there is one; of several the last (`devices_of`)."""
    return devices_of(name)[-1]


def devices_of(name: str) -> tuple[torch.device, ...]:
    """The devices of `--device`: one, or `cuda:0,cuda:1`. Raises UsageError where one is not there, or named twice."""
    import torch

    if name == "auto":
        return (torch.device("cuda" if torch.cuda.is_available() else "cpu"),)
    try:
        found = tuple(map(torch.device, name.split(",")))
    except RuntimeError as error:
        raise UsageError(
            f"--device {name}: no such device. Use cpu, cuda, cuda:0, auto, or several: cuda:0,cuda:1."
        ) from error
    if any(device.type == "cuda" for device in found) and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA card here. Use --device cpu.")
    numbers = [device.index for device in found if device.type == "cuda" and device.index is not None]
    if numbers and max(numbers) >= (there := torch.cuda.device_count()):
        raise UsageError(f"--device {name}: torch sees {count(there, 'CUDA card')} here, from cuda:0.")
    kinds = {device.type for device in found}
    apart = len(set(found)) == len(found) and all(device.index is not None for device in found)
    if len(found) > 1 and (not apart or len(kinds) > 1 or kinds == {"cpu"}):
        raise UsageError(f"--device {name}: several devices are cards of one kind, each by its number: cuda:0,cuda:1.")
    return found


def kind_of(name: str) -> str:
    """The type of device that names of one or several are of, whether it is here or not: `cuda`."""
    return name.partition(":")[0]


def names_of(devices: tuple[torch.device, ...]) -> str:
    """As `--device` has them."""
    return ",".join(map(str, devices))


def resolve_dtype(name: str, device_type: str, *, in_full: bool) -> str:
    """Name of the dtype the model runs in: `auto` is bfloat16 on a card, float32 on a CPU.

    Where it has to run `in_full` (`ScoreConfig.in_full`) `auto` is float32.
    """
    if name == "auto":
        return "bfloat16" if device_type == "cuda" and not in_full else "float32"
    return name


def keep_full_experts(model: Any) -> None:
    """Have the experts of a float64 model multiply one by one: grouped products have no float64."""
    if str(model.dtype) == "torch.float64" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
