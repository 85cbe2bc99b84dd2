"""What a run is known by: the fingerprint fields that follow from settings and files, and what computes it.

The digests of tokens are no part of it: they follow from these fields and the versions of libraries, and take a
tokenizer (`prepare.fingerprint_fields` adds them).
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace

from alphatoken_curate.config import FISHER_MODES, OF_OPTIMISER, OF_REHEARSAL, ScoreConfig
from alphatoken_curate.models.load import (
    TOKENIZER_FILES,
    ModelSource,
    generation_stops,
    model_digest,
    tokenizer_digest,
    tokenizer_source,
)
from alphatoken_curate.runs.atomic import digest
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.schema import SCHEMA_VERSION
from alphatoken_curate.urls import expanded

OF_TOKENS = ("template", "tokens", "target_tokens", "retention_tokens", "prompt_tokens", "groups")
"""The fingerprint fields that take a tokenizer, or the rows."""

_OTHER_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "model", "adapter_", "README", "LICENSE"),
    *("USE_POLICY", ".", "training_args", "trainer_state.json", "optimizer.", "scheduler.", "scaler.", "rng_state"),
    *("latest", "all_results.json", "eval_results.json", "train_results.json"),
)
"""How names of files begin that no tokens come from."""

_OTHER_FOLDERS = ("original", "onnx", "figures", "assets", "runs", "global_step")
"""Likewise of folders."""

_VERSIONED = ("alphatoken-curate", "torch", "transformers", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """The files and models of a run: `data` as (source, digest) of each file, the others as digests of theirs."""

    data: list[list[str]]
    model: ModelSource
    reference: ModelSource
    target: list[str] | None
    retention: list[str] | None
    prompts: list[str] | None


def fields_of(config: ScoreConfig, named: Named, *, kind: str, dtype: str) -> dict[str, Json]:
    """Fingerprint fields by the names users know them by; None where one plays no part.

    A setting that is newer than the first release is left out at its default, so that finished runs stay finished.
    """
    model = model_digest(named.model)
    template = config.chat_template and f"sha256:{digest(expanded(config.chat_template))[1]}"
    newer: dict[str, Json] = {
        "limit": config.limit,
        "map": config.map,
        "subset": config.subset,
        "split": config.split,
        "template_date": config.template_date,
        "chat_template": template,
        "chat_template_kwargs": config.chat_template_kwargs,
        "assistant_specials": config.assistant_specials if config.assistant_specials != "template" else None,
        "target_groups": config.target_groups,
        "precondition_iterations": config.precondition_iterations if config.precondition == "astra" else None,
        **(_rehearsal_fields(config, kind) if config.rehearses else {}),
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "data": named.data,
        "model": model,
        "reference": model if named.reference == named.model else model_digest(named.reference),
        "tokenizer": tokenizer_digest(named.model),
        "target": named.target,
        "target_rows": None if config.target else config.target_rows,
        "estimator": config.estimator,
        "layers": config.layers,
        "parameters": config.parameters,
        "window": config.window if config.estimator == "published" else None,
        "stability_weight": config.stability_weight,
        "beta": config.beta if kind == "preference" else None,
        "turns": config.turns,
        "max_length": config.max_length,
        "rows_per_shard": config.rows_per_shard,
        "dtype": dtype,
        "seed": config.seed,
        **_stability_fields(config, named),
        **_precondition_fields(config),
        **{name: value for name, value in newer.items() if value is not None},
    }


def _rehearsal_fields(config: ScoreConfig, kind: str) -> dict[str, Json]:
    unread = {one for other, names in OF_OPTIMISER.items() if other != config.rehearse_optimizer for one in names}
    unread |= {"rehearse_lora_alpha"} if config.rehearse_lora is None else set()
    unread |= {"rehearse_simpo"} if kind != "preference" else set()
    taken = {name: getattr(config, name) for name in OF_REHEARSAL} | {"rehearse_root": config.root}
    if config.rehearse_lora is not None and config.rehearse_lora_alpha == 2 * config.rehearse_lora:
        taken["rehearse_lora_alpha"] = None  # as by default: an adapter's own is held against what is given
    return {"direction": config.direction, **{name: None if name in unread else taken[name] for name in taken}}


def dated(config: ScoreConfig, stored: Mapping[str, Json] | None) -> ScoreConfig:
    """The config with the date that templates are told in a run of the `stored` fields, where it names none itself."""
    day = (stored or {}).get("template_date")
    return replace(config, template_date=day) if config.template_date is None and isinstance(day, str) else config


def _stability_fields(config: ScoreConfig, named: Named) -> dict[str, Json]:
    estimated, generates = config.fisher in FISHER_MODES, config.fisher == "generate"
    lookahead = config.drift == "lookahead"
    return {
        "fisher": config.fisher if estimated else f"sha256:{digest(expanded(config.fisher))[1]}",
        "fisher_rows": config.fisher_rows if estimated else None,
        "fisher_prompts": named.prompts,
        "fisher_new_tokens": config.fisher_new_tokens if generates else None,
        "fisher_stops": generation_stops(named.reference) if generates else None,
        "drift": config.drift or ("weights" if config.retention is None else None),
        "lookahead_lr": config.lookahead_lr,
        "lookahead_rows": config.lookahead_rows if lookahead else None,
        "retention": named.retention,
    }


def _precondition_fields(config: ScoreConfig) -> dict[str, Json]:
    kind = config.precondition
    return {
        "precondition": kind,
        "precondition_rows": config.precondition_rows if kind != "none" else None,
        "precondition_eps": config.precondition_eps if kind == "adam" else None,
        "precondition_damping": config.precondition_damping if kind not in ("none", "adam") else None,
        "precondition_stability": config.precondition_stability,
    }


def tokens_are_digested(source: ModelSource) -> bool:
    """Whether the digest of the tokenizer covers all that tokens come from: no code, templates or files beside it."""
    home = tokenizer_source(source)
    known = (*TOKENIZER_FILES, *_OTHER_FILES)
    there = [] if home.gguf else home.folder.iterdir()
    return all(path.name.startswith(known if path.is_file() else _OTHER_FOLDERS) for path in there)


def has_drift(fields: Mapping[str, Json]) -> bool:
    """Whether the drift from the reference is a direction of a run of these fields, and not zero.

    A rehearsal drifts by its own steps, whatever it begins with.
    """
    moves = fields["model"] != fields["reference"] or fields.get("direction") == "rehearsal"
    return fields["drift"] == "lookahead" or (fields["drift"] == "weights" and moves)


def has_stability(fields: Mapping[str, Json]) -> bool:
    """Whether a run of these fields has a stability: by the drift, or by rows of what must not be forgotten."""
    return has_drift(fields) or fields["retention"] is not None


def versions(device: str) -> dict[str, str]:
    """What computes, by name: equal bytes are promised for equal versions and types of device."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {"python": platform.python_version(), "device": device.split(":", maxsplit=1)[0], **found}
