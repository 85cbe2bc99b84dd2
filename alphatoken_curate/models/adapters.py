"""Adapters: what their record says, and the merge into their base.

Only LoRA (DoRA and its other variants too) is merged; peft does the arithmetic.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    json_object,
    last_name,
    refuse_empty,
    refuse_pickles,
)
from alphatoken_curate.models.tensors import quantised, shapes
from alphatoken_curate.models.whole import reason
from alphatoken_curate.wording import count

_REPEATABLE = ("True", "False", "None", "gaussian", "orthogonal", "eva", "pissa", "olora")
"""Ways to begin a LoRA that leave the base as it was, or change it as peft can do again from the base alone."""

_EMBEDDINGS = re.compile(
    r"\b(?:embed_tokens|embed_in|embed_out|wte|word_embeddings|lm_head)\.(weight|lora_B\.weight|lora_embedding_A)$"
)
"""Tensors of an adapter that know how many tokens its base had: `lora_embedding_A` by its columns, others by rows."""

_LARGEST_SCALE = 1e6

_REFUSALS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, re.error)
"""What peft raises where an adapter is not what it should be."""

_HARMLESS = (
    "Setting fan_in_fan_out to",  # peft sees for itself which way round a weight is kept
    "Unexpected keyword arguments",  # `_refuse_unknown` has looked at them
    "`runtime_config` key",
    "specified but will be ignored when `init_lora_weights`",  # how the training began
    "is not specified. Using default",
    "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern",  # about converting an adapter
    "no modules were excluded",
    "a tied layer is part of the adapter",  # a copy that was trained apart: it stays apart in memory
    "no longer tied after merging",
    "requested `ensure_weight_tying`",
    "ensure_weight_tying=True but",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRecord:
    """What adapter_config.json says the adapter was trained from: a folder or a Hub id, and its revision there."""

    base: str
    revision: str | None

    @property
    def last_name(self) -> str:
        """The last component of `base`, whichever system wrote it."""
        return last_name(self.base)


def read_record(folder: Path) -> AdapterRecord:
    """What an adapter was trained from. Raises ModelError where it cannot be merged, or does not say."""
    path = folder / ADAPTER_CONFIG
    config = json_object(path)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{path}: its peft_type is {config.get('peft_type')!r}. Only LoRA (and DoRA) adapters are merged here."
            " Where peft can merge it, save the merged model with save_pretrained and name that folder."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        refuse_pickles(folder)
        raise ModelError(f"{folder}: no {ADAPTER_WEIGHTS} in it. Save the adapter again with save_pretrained.")
    refuse_empty(folder, [folder / ADAPTER_WEIGHTS])
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{path}: it does not say which model the adapter was trained from."
            " Write that model's folder or Hub id into base_model_name_or_path."
        )
    return AdapterRecord(base=base, revision=revision if isinstance(revision, str) else None)


def refuse_resized(folder: Path, base: str, tokens: int) -> None:
    """Raise ModelError where an adapter was trained on more or fewer `tokens` than its base has embeddings for."""
    for name, shape in sorted(shapes([folder / ADAPTER_WEIGHTS]).items()):
        found = _EMBEDDINGS.search(name)
        if found is None or len(shape) != 2:
            continue
        known = shape[1 if found[1] == "lora_embedding_A" else 0]
        if known != tokens:
            raise ModelError(
                f"{folder}: it was trained on a model with {known} tokens, and its base {base} has {tokens}"
                f" ({name}): the base was resized before the training. Resize it alike (resize_token_embeddings), load"
                " the adapter on that with peft, merge_and_unload, save the result and the tokenizer with"
                " save_pretrained, and name that folder."
            )


def merge_adapter(model: Any, folder: Path, name: str) -> Any:
    """`model` with a LoRA adapter merged into its weights, in the dtype and on the device they have.

    No module, hook or attribute of peft is left. Raises ModelError where peft is not installed, the adapter does not
    fit the model in every tensor, asks for what the installed peft does not know, or gives weights that are not finite.
    """
    import torch
    from safetensors import SafetensorError

    # peft first makes an adapter at random, then reads it: no draw of ours may depend on that.
    devices = [model.device] if model.device.type == "cuda" else []
    with warnings.catch_warnings(record=True) as said, torch.random.fork_rng(devices=devices):
        warnings.simplefilter("always")
        torch.manual_seed(0)
        peft = _peft(name)
        try:
            merged = _merge(peft, model, folder, name)
        except (*_REFUSALS, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            told = " ".join(str(error).split("\n\t")[:2])  # of a list of tensors, the first
            raise ModelError(f"{name}: peft cannot merge it into its base: {reason(RuntimeError(told))}") from error
    _refuse_warnings(said, Path(peft.__file__).parent, name)
    if left := layers_of_peft(merged):
        raise ModelError(
            f"{name}: peft left {left[0]} unmerged ({count(len(left), 'module')}). Merge and save it yourself."
        )
    return merged


def layers_of_peft(model: Any) -> list[str]:
    """Names of the modules of a model that are peft's: those of an adapter that is not merged into it."""
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]


def _peft(name: str) -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ModelError(
            f"{name}: merging an adapter needs the package peft ({error}). Run: pip install 'alphatoken-curate[peft]'."
        ) from error


def _merge(peft: Any, model: Any, folder: Path, name: str) -> Any:
    _refuse_unknown(peft, folder)
    _refuse_settings(folder / ADAPTER_CONFIG)
    _refuse_quantised(folder)
    config = peft.LoraConfig.from_pretrained(str(folder))
    if str(config.init_lora_weights) not in _REPEATABLE:
        raise ModelError(
            f"{name}: its training began by changing the base ({config.init_lora_weights}) as cannot be done again."
            " Save it with path_initial_model_for_weight_conversion (see peft), or merge it where it was trained."
        )
    config.inference_mode = True
    # Not PeftModel.from_pretrained: it hides which tensors of the file it had no use for.
    adapted = peft.PeftModel(model, config)
    report = adapted.load_adapter(str(folder), "default", torch_device=str(model.device))
    _refuse_keys(name, "match nothing in its base", report.unexpected_keys)
    _refuse_keys(name, f"are not in its {ADAPTER_WEIGHTS}", report.missing_keys)
    _refuse_keys(name, f"are not in its {ADAPTER_WEIGHTS}", _missing_biases(peft, adapted, folder))
    _refuse_shared(adapted, name)
    return adapted.merge_and_unload(safe_merge=True)


def _refuse_shared(adapted: Any, name: str) -> None:
    """A weight that two modules share (tied embeddings, replicated blocks) would carry one's adapter into the other."""
    lora = importlib.import_module("peft.tuners.lora")
    owners = Counter(weight.data_ptr() for _, weight in adapted.named_parameters(remove_duplicate=False))
    for where, module in adapted.named_modules():
        weight = getattr(module.get_base_layer(), "weight", None) if isinstance(module, lora.LoraLayer) else None
        if weight is not None and owners[weight.data_ptr()] > 1:
            raise ModelError(
                f"{name}: it adapts {where}, whose weight another module of the model shares, so it cannot be merged in"
                " place. Copy that weight, merge, save the result with save_pretrained and name that folder."
            )


def _refuse_unknown(peft: Any, folder: Path) -> None:
    """A setting the installed peft would leave out, when it is not empty, can change the weights."""
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)} | {"runtime_config"}
    path = folder / ADAPTER_CONFIG
    if unknown := sorted(key for key, value in json_object(path).items() if value and key not in known):
        raise ModelError(
            f"{path}: peft {peft.__version__} does not know {', '.join(unknown)}. Run: pip install -U peft."
        )


def _refuse_settings(path: Path) -> None:
    """What peft takes for a number or a switch whatever it is; and a scale by which the adapter does nothing."""
    config = json_object(path)
    for key, value in config.items():
        if key.startswith(("use_", "lora_bias", "fan_in_")) and not isinstance(value, bool | None):
            raise ModelError(f"{path}: {key} is {value!r}. Write true or false, as it was trained.")
    patterns = config.get("alpha_pattern") or {}
    scales = {"lora_alpha": config.get("lora_alpha", 8)}
    scales |= {f"alpha_pattern {key}": value for key, value in patterns.items()} if isinstance(patterns, dict) else {}
    for key, value in scales.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not value
            or not abs(value) < _LARGEST_SCALE
        ):
            raise ModelError(
                f"{path}: {key} is {value!r}, with which the adapter does nothing, or none knows what. Write the number"
                " with which it was trained."
            )


def _refuse_quantised(folder: Path) -> None:
    """Whole numbers would be taken for weights, without the scale that they belong to."""
    if found := quantised([folder / ADAPTER_WEIGHTS]):
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS}: {count(len(found), 'tensor')} in it quantised (the first: {found[0][0]},"
            f" {found[0][1]}), and nothing says of what scale. Save the adapter in float32, bfloat16 or float16."
        )


def _missing_biases(peft: Any, adapted: Any, folder: Path) -> set[str]:
    """Biases that were trained beside the adapter and are not in its file: those of the base would stand for them."""
    saved = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {key for key in saved if key.endswith(".bias")} - shapes([folder / ADAPTER_WEIGHTS]).keys()


def _refuse_keys(name: str, why: str, keys: Iterable[str]) -> None:
    if found := sorted(keys):
        raise ModelError(
            f"{name}: tensors of the adapter {why} ({len(found)}, the first {found[0]}):"
            " it was trained from another model."
        )


def _refuse_warnings(said: Iterable[warnings.WarningMessage], home: Path, name: str) -> None:
    """What peft warns of can make the merged model another one than was trained, unless known to be harmless."""
    for warning in said:
        text = str(warning.message).strip().partition("\n")[0]
        passing = issubclass(warning.category, DeprecationWarning | FutureWarning | PendingDeprecationWarning)
        if passing or home not in Path(warning.filename).parents or any(known in text for known in _HARMLESS):
            continue
        raise ModelError(
            f"{name}: peft warns that merging may go wrong: {text}"
            " Merge it yourself, save the result with save_pretrained and name that folder."
        )
