"""The LoRA of a run that rehearses one: what its settings and the adapter it goes on from say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.lora import LoraTrainee
from alphatoken_curate.engine.precision import narrow, narrow_kind
from alphatoken_curate.models.load import ModelSource
from alphatoken_curate.models.tensors import kinds
from alphatoken_curate.scoring.named import lora_of
from alphatoken_curate.scoring.spec import ScorerSpec


def base_of(spec: ScorerSpec) -> ScorerSpec:
    """The same of the model alone, where that is an adapter on it."""
    return replace(spec, model=replace(spec.model, adapter=None))


def load_base(spec: ScorerSpec) -> Any:
    """The model beside which the LoRA of a run trains.

    What its files have in bfloat16 and a run in float32 is loaded in bfloat16, unless it holds more than its files: the
    numbers are the same, and what is not kept so is widened again.
    """
    files = spec.model.files_read() if spec.model.tensors_on_disk else []
    if spec.dtype_of_weights == "float32" and spec.config.trunk_device is None and {*kinds(files).values()} == {"BF16"}:
        model = spec.load(spec.model, "bfloat16")
        if not any(narrow(buffer.dtype) for buffer in model.buffers() if buffer.is_floating_point()):
            return model
        del model
    return spec.load(spec.model)


def lora_trainee(config: ScoreConfig, model: Any, source: ModelSource, dtype: str) -> LoraTrainee:
    """What trains beside `model`, which is that of `source` without its adapter, in a run of that dtype."""
    return LoraTrainee(model, config.layers, lora_of(config, source), seed=config.seed, dtype=narrow_kind(dtype))
