"""What the values of a run are of, in words: a rehearsed training, where it is not the gradient of the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.manifest import Manifest
from alphatoken_curate.wording import count

_OPTIMISERS = {"adamw": "AdamW", "sgd": "SGD"}


def direction(stored: Manifest) -> str:
    """`gradient` or `rehearsal`: the setting, which runs of the published gradient do not have."""
    return str(stored.settings.get("direction") or "gradient")


def rehearsed(stored: Manifest) -> str | None:
    """`16 steps of AdamW at 3e-05, ...`: the training that was rehearsed; None where none was."""
    return ", ".join(_parts(stored)) if direction(stored) == "rehearsal" else None


def _parts(stored: Manifest) -> Iterator[str]:
    settings, counts = stored.settings, stored.counts
    epochs, of_step = (int(_number(settings, name, 1)) for name in ("rehearse_epochs", "rehearse_rows_per_step"))
    rows = counts.sequences if settings.get("turns") == "each" and counts.sequences else counts.scored
    steps, window = epochs * -(-rows // of_step), int(_number(settings, "rehearse_window", 0))
    optimiser = str(settings.get("rehearse_optimizer", "adamw"))
    named = _OPTIMISERS.get(optimiser, optimiser)
    yield f"{count(steps, 'step')} of {named} at {_number(settings, 'rehearse_lr', 0):g}"
    if rank := int(_number(settings, "rehearse_lora", 0)):
        alpha = _number(settings, "rehearse_lora_alpha", 0)
        yield f"a LoRA of rank {rank}" + (f" and alpha {alpha:g}" if alpha else "")
    unit = "pair" if settings.get("kind") == "preference" else "row"
    yield f"{count(of_step, unit)} each"
    yield from _simpo(settings)
    if epochs > 1:
        yield f"{epochs:,} epochs"
    if (schedule := settings.get("rehearse_schedule", "constant")) != "constant":
        yield f"{schedule} schedule"
    if warmup := int(_number(settings, "rehearse_warmup", 0)):
        yield f"{count(warmup, 'step')} of warm-up"
    if clip := _number(settings, "rehearse_clip", 0):
        yield f"gradients clipped at {clip:g}"
    if decay := _number(settings, "rehearse_weight_decay", 0):
        yield f"weight decay {decay:g}"
    if momentum := _number(settings, "rehearse_momentum", 0):
        yield f"momentum {momentum:g}"
    if (orders := int(_number(settings, "rehearse_seeds", 1))) > 1:
        yield f"the mean over {orders} orders of the {unit}s"
    if 0 < window < steps:
        yield f"each step by the outcome at the end of its window of {count(window, 'step')}"


def dpo_beta(settings: Mapping[str, Json]) -> float | None:
    """The beta of the DPO that the values of a run's pairs are of; None where it has none, or they are of SimPO."""
    by_dpo = settings.get("kind") == "preference" and settings.get("rehearse_simpo") is None
    return _number(settings, "beta", 0) or None if by_dpo else None


def _simpo(settings: Mapping[str, Json]) -> Iterator[str]:
    if settings.get("rehearse_simpo") is not None:
        beta, gamma = (_number(settings, name, 0) for name in ("beta", "rehearse_simpo"))
        yield f"by SimPO with beta {beta:g} and gamma {gamma:g}"


def _number(settings: Mapping[str, Json], name: str, default: float) -> float:
    found = settings.get(name)
    return float(found) if isinstance(found, int | float) else default
