"""Settings that were given and play no part in a run, beside the other settings it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial

from alphatoken_curate.config import FISHER_MODES, OF_OPTIMISER, OF_REHEARSAL, ScoreConfig
from alphatoken_curate.masks import always
from alphatoken_curate.masks.criteria import depends_on_value
from alphatoken_curate.rows.files import has_splits, is_of_hub
from alphatoken_curate.together import REHEARSED_ONLY


def _has_drift(config: ScoreConfig) -> bool:
    return config.drift is not None or config.retention is None


def _steps_by(optimiser: str, config: ScoreConfig, _: str) -> bool:
    return config.rehearses and config.rehearse_optimizer == optimiser


_READ: dict[str, tuple[str, Callable[[ScoreConfig, str], bool]]] = {
    "trunk_device": ("beside another --device", lambda config, _: config.trunk_device != config.device),
    "subset": ("for datasets of the Hub", lambda config, _: any(map(is_of_hub, config.data))),
    "split": ("where DATA has splits", lambda config, _: any(map(has_splits, config.data))),
    "target_groups": ("from 2 on", lambda config, _: config.target_groups != 1),
    "target_rows": ("without --target", lambda config, _: config.target is None),
    "window": ("with --estimator published", lambda config, _: config.estimator == "published"),
    "fisher": ("without --retention, or with --drift", lambda config, _: _has_drift(config)),
    "fisher_rows": (
        "where a Fisher is estimated",
        lambda config, _: config.fisher in FISHER_MODES and _has_drift(config),
    ),
    "fisher_prompts": ("without --retention, or with --drift", lambda config, _: _has_drift(config)),
    "fisher_new_tokens": (
        "with --fisher generate",
        lambda config, _: config.fisher == "generate" and _has_drift(config),
    ),
    "lookahead_rows": ("with --drift lookahead", lambda config, _: config.drift == "lookahead"),
    "precondition_rows": ("with --precondition", lambda config, _: config.precondition != "none"),
    "precondition_eps": ("with --precondition adam", lambda config, _: config.precondition == "adam"),
    "precondition_damping": (
        "with --precondition kfac, ekfac or astra",
        lambda config, _: config.precondition in ("kfac", "ekfac", "astra"),
    ),
    "precondition_iterations": ("with --precondition astra", lambda config, _: config.precondition == "astra"),
    **{
        name: ("with --direction rehearsal", lambda config, _: config.rehearses)
        for name in OF_REHEARSAL
        if name not in ("rehearse_lr", *REHEARSED_ONLY)
    },
    **{
        name: (f"with --direction rehearsal and --rehearse-optimizer {kind}", partial(_steps_by, kind))
        for kind, names in OF_OPTIMISER.items()
        for name in names
    },
    "rehearse_lora_alpha": (
        "with --direction rehearsal and --rehearse-lora",
        lambda config, _: config.rehearses_lora,
    ),
    **dict.fromkeys(("beta", "rehearse_simpo"), ("for preference rows", lambda _, kind: kind == "preference")),
    "stability_scale": (
        "where --by depends on value",
        lambda config, _: depends_on_value(config.by) or always.depends_on_value(config.always_keep),
    ),
    "aggregate": (
        "with several of --generation",
        lambda config, _: config.generation == "all" or "," in config.generation,
    ),
}
"""When a setting is read, in words and by the config and the kind of rows; all others always are."""


def idle(config: ScoreConfig, kind: str) -> str | None:
    """A line that names the settings which are others than by default, and play no part in a run; None without any.

    `kind` of rows: sft or preference.
    """
    changed = {item.name for item in fields(config) if getattr(config, item.name) != item.default}
    found = [
        f"--{name.replace('_', '-')} (read only {when})"
        for name, (when, plays) in _READ.items()
        if name in changed and not plays(config, kind)
    ]
    return f"Without effect here: {', '.join(found)}." if found else None
