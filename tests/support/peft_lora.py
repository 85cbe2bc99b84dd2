"""A LoRA as peft itself puts it beside a model, with the numbers of ours."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from alphatoken_curate.directions.lora import LoraTrainee


def with_lora(model: Any, trainee: LoraTrainee) -> Any:
    """`model` with peft's layers beside the maps that a trainee trains, A and B as they are there."""
    import peft

    own = dict(zip(trainee.names, trainee.weights, strict=True))
    modules = sorted({name.rpartition(".")[0] for name in own})
    rank = trainee.lora.rank
    config = peft.LoraConfig(r=rank, lora_alpha=trainee.lora.scale * rank, target_modules=modules)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = peft.inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(own.pop(as_ours(name)))
    assert not own
    return found.eval()


def as_ours(name: str) -> str:
    """The name of peft's A or B, as a trainee has it."""
    return name.removesuffix(".default.weight")


def names_of(model: Any) -> list[str]:
    """Of A and B beside a model, in its order."""
    return [name for name, _ in model.named_parameters() if "lora_" in name]
