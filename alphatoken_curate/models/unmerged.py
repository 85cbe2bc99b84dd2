"""A LoRA that is not merged: its matrices as peft saves them, read without peft.

Only what stands beside linear maps is read: y = W x + s B A x, s = alpha / R, or alpha / sqrt(R) of a rank-stabilised
one. Whatever else an adapter may change is refused by its name in adapter_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, json_object
from alphatoken_curate.models.tensors import opened, shapes

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

_WITHOUT_EFFECT = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "runtime_config", "ensure_weight_tying", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # its tensors say so
    *("r", "lora_alpha", "use_rslora", "init_lora_weights", "bias"),  # which are looked at
    *("lora_dropout", "loftq_config", "eva_config", "qalora_group_size", "megatron_core"),
)
"""Settings of an adapter that do not change what it is once it was begun, or that stand in its tensors too."""

_BEGINNINGS = ("True", "False", "gaussian", "orthogonal", "eva")
"""Ways to begin a LoRA that leave the base as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA to train: R, s, and by the names of modules A (R, d_in) and B (d_out, R), where it began before.

    Without `start` it is one of all linear maps, A drawn and B 0.
    """

    rank: int
    scale: float
    start: Mapping[str, tuple[Tensor, Tensor]] | None = None


def check_unmerged(folder: Path, rank: int, alpha: float | None) -> float:
    """The scale s of an adapter in a folder. Raises ModelError where it is no plain LoRA of that rank, and alpha."""
    path = folder / ADAPTER_CONFIG
    config = json_object(path)
    if odd := sorted(key for key, value in config.items() if value and key not in _WITHOUT_EFFECT):
        raise ModelError(f"{path}: {odd[0]} is {config[odd[0]]!r}, and {_ONLY_PLAIN}")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{path}: bias is {config['bias']!r}, and {_ONLY_PLAIN}")
    if str(config.get("init_lora_weights", True)) not in _BEGINNINGS:
        raise ModelError(
            f"{path}: its training began by changing the base (init_lora_weights {config['init_lora_weights']!r}), and"
            f" {_ONLY_PLAIN}"
        )
    if config.get("r") != rank:
        raise ModelError(
            f"{path}: its rank is {config.get('r')!r}, and that of --rehearse-lora is {rank}: a training goes on with"
            " the rank it has. Score the rows at this adapter into a run of its own, with --rehearse-lora"
            f" {config.get('r')}."
        )
    return _scale(path, config, rank, alpha)


_ONLY_PLAIN = (
    "only a plain LoRA beside linear maps is rehearsed on. Merge it, save the result with save_pretrained and name that"
    " folder: a new LoRA is begun on it."
)


def _scale(path: Path, config: Mapping[str, Any], rank: int, alpha: float | None) -> float:
    found, stabilised = config.get("lora_alpha", 8), config.get("use_rslora") or False
    if isinstance(found, bool) or not isinstance(found, int | float) or not found or not math.isfinite(found):
        raise ModelError(f"{path}: lora_alpha is {found!r}. Write the number with which it was trained.")
    if not isinstance(stabilised, bool):
        raise ModelError(f"{path}: use_rslora is {stabilised!r}. Write true or false, as it was trained.")
    if alpha is not None and alpha != found:
        raise ModelError(
            f"{path}: its lora_alpha is {found:g}, and --rehearse-lora-alpha is {alpha:g}. Leave that out: what the"
            " adapter has is taken."
        )
    return float(found) / (math.sqrt(rank) if stabilised else rank)


def read_unmerged(folder: Path, rank: int, alpha: float | None = None) -> Lora:
    """The LoRA in an adapter's folder. Raises ModelError where it is not one that can be trained on as it is."""
    scale, path = check_unmerged(folder, rank, alpha), folder / ADAPTER_WEIGHTS
    found = shapes([path])
    modules = {name.removeprefix(_PREFIX).removesuffix(_A) for name in found if name.endswith(_A)}
    known = {f"{_PREFIX}{module}{end}" for module in modules for end in (_A, _B)}
    if odd := sorted(known ^ found.keys()):
        what = "is no matrix of a LoRA beside a linear map" if odd[0] in found else "is missing"
        raise ModelError(f"{path}: {odd[0]} {what}, and {_ONLY_PLAIN}")
    with opened(path) as file:
        start = {
            module: (file.get_tensor(f"{_PREFIX}{module}{_A}"), file.get_tensor(f"{_PREFIX}{module}{_B}"))
            for module in sorted(modules)
        }
    for module, (a, b) in start.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ModelError(f"{path}: {module} is not of rank {rank}, which its {ADAPTER_CONFIG} says.")
    return Lora(rank=rank, scale=scale, start=start)
