"""What a user named: whether it is there, looked at before anything heavy is imported, and what it comes to."""

from __future__ import annotations

import json

from alphatoken_curate.config import FISHER_MODES, ScoreConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks import always, criteria
from alphatoken_curate.masks.remask import check_settings
from alphatoken_curate.models.devices import kind_of, resolve_dtype
from alphatoken_curate.models.folders import names_a_path
from alphatoken_curate.models.load import DEMO_MODEL, ModelSource, find_model, skeleton, text_config
from alphatoken_curate.models.unmerged import Lora, read_unmerged
from alphatoken_curate.models.whole import blocks_that_score, depth_of
from alphatoken_curate.rows.columns import named_columns
from alphatoken_curate.rows.fields import TEMPLATE_RESERVED
from alphatoken_curate.rows.files import find_files
from alphatoken_curate.runs.schema import ERRORS, LAYOUTS, NOT_COMPUTED, SIGNALS, components
from alphatoken_curate.scoring.folder import artifacts_of
from alphatoken_curate.urls import expanded


def check_named(config: ScoreConfig) -> None:
    """Raise UsageError, InputError or ModelError where a file, folder, model or column that was named is not there.

    What a Hub id names is not asked for here.
    """
    named_columns(config.map)
    find_files(config.data, config.subset, config.split)
    for name in (config.target, config.retention, config.fisher_prompts):
        if name is not None:
            find_files([name])
    for name in (config.model, config.reference):
        if name not in (None, DEMO_MODEL) and names_a_path(str(name)):
            find_model(str(name))
    if config.fisher not in FISHER_MODES and not expanded(config.fisher).is_file():
        told = f"none of {', '.join(FISHER_MODES)} nor a file. Name a safetensors file."
        raise UsageError(f"--fisher {config.fisher}: {told}")
    if config.chat_template is not None and not expanded(config.chat_template).is_file():
        raise UsageError(f"--chat-template {config.chat_template}: no such file. Name a file of jinja text.")
    if taken := sorted(TEMPLATE_RESERVED & set(json.loads(config.chat_template_kwargs or "{}"))):
        raise UsageError(f"--chat-template-kwargs names {taken[0]}, which is no setting of a template.")
    artifacts_of(config.reuse)
    _check_mask(config)


def _check_mask(config: ScoreConfig) -> None:
    """Settings of the mask must be right for one kind of rows at least; which these are is not known yet."""
    problems = []
    for layout in LAYOUTS.values():
        try:
            check_settings(config, components(config.estimator), layout)
        except UsageError as error:
            problems.append(error)
    if len(problems) == len(LAYOUTS):
        raise problems[0]
    named = {"by": criteria.columns_named(config.by), "always_keep": always.columns_named(config.always_keep)}
    lacking = _not_computed(config)
    for setting, columns in named.items():
        for name in sorted(columns & lacking):
            raise UsageError(f"{setting}: {name} will not be computed: {NOT_COMPUTED[name]}")


def _not_computed(config: ScoreConfig) -> set[str]:
    """Signals that this scoring lacks for want of a setting, whatever its estimator."""
    lacking = {"reference_nll"} if config.reference in (None, config.model) else set()
    if not config.rehearses and config.target_groups in (None, 1):
        lacking |= set(ERRORS)
    if config.retention is None:
        lacking.add("stab_error")
    if config.retention is None or config.drift is None:
        lacking |= {name for name in SIGNALS if name.startswith("drift_")}
    return lacking


def check_shared(device: str) -> None:
    """Raise UsageError where --device names a single card, or what several workers cannot share."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and kind != "cpu"):
        raise UsageError(f"--device {device}: workers take cards by themselves. Give --device cuda, or cpu.")


def told_of_models(config: ScoreConfig, device: str) -> str:
    """What will compute, and where: `model smollm2-135m (default), cpu, float32`."""
    dtype = resolve_dtype(config.dtype, kind_of(device), in_full=config.in_full)
    default = " (default)" if config.model == DEMO_MODEL else ""
    reference = f", reference {config.reference}" if config.reference not in (None, config.model) else ""
    trunk = f", trunk on {config.trunk_device}" if config.trunk_device else ""
    return f"model {config.model}{default}{reference}, {device}{trunk}, {dtype}"


def check_blocks(config: ScoreConfig, model: ModelSource) -> None:
    """Raise ModelError for blocks that a model has not, and where no LoRA of these settings can train beside it.

    No weight is read but an adapter's. Of a GGUF file it is seen once the model is loaded.
    """
    if model.gguf is None and (depth := depth_of(text_config(model))) is not None:
        blocks_that_score(config.layers, depth)
    if not config.rehearses_lora:
        return
    lora = lora_of(config, model)
    if model.gguf is None:
        from alphatoken_curate.directions.lora import check_beside

        check_beside(skeleton(model, trust_remote_code=config.trust_remote_code), config.layers, lora)


def lora_of(config: ScoreConfig, model: ModelSource) -> Lora:
    """The LoRA that trains: a new one, or the adapter that the model is."""
    rank, alpha = config.rehearse_lora, config.rehearse_lora_alpha
    assert rank is not None
    if model.adapter is not None:
        return read_unmerged(model.adapter, rank, alpha)
    return Lora(rank=rank, scale=(2 * rank if alpha is None else alpha) / rank)
