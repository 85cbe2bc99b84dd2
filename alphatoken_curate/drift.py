"""The stability direction V = F * (W - W_ref), and the reference's tensors it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from alphatoken_curate.capture import Direction, ScoringModel
from alphatoken_curate.errors import ModelError, UsageError


def drift_direction(
    scoring: ScoringModel, fisher: Direction, reference: Direction, step: Direction | None = None
) -> Direction:
    """V_m = F_m * (W_m - W_ref,m), each (d_out, d_in): the gradient of the retention loss expanded around W_ref.

    With `step` (lr * g, g the gradient of the training loss) it is taken where W - step would be, so that a model that
    has not moved yet has a stability signal too (`--drift lookahead`).
    """
    drift = [
        m.weight.to(f.dtype) - w.to(m.weight.device, f.dtype)
        for m, f, w in zip(scoring.maps, fisher, reference, strict=True)
    ]
    if step is not None:
        # After the difference of the weights, whose rounding would drown a small step.
        drift = [d - s.to(d) for d, s in zip(drift, step, strict=True)]
    return [f.to(d.device) * d for f, d in zip(fisher, drift, strict=True)]


def read_direction(path: Path, scoring: ScoringModel, *, flag: str) -> Direction:
    """A direction saved as safetensors: one (d_out, d_in) tensor per linear map of S, named as its weight.

    Raises UsageError where the file cannot be read, or a tensor is missing, of another shape or not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            missing = [m.parameter for m in scoring.maps if m.parameter not in stored]
            if missing:
                raise UsageError(
                    f"{flag} {path}: it has no tensor {missing[0]} ({len(missing)} of {len(scoring.maps)} are missing)."
                    f" It must hold every linear map of the last {scoring.layers} blocks."
                )
            tensors = [file.get_tensor(m.parameter) for m in scoring.maps]
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{flag} {path}: not a readable safetensors file ({error}).") from error
    for m, tensor in zip(scoring.maps, tensors, strict=True):
        if tensor.shape != m.weight.shape:
            raise UsageError(f"{flag} {path}: {m.parameter} is {_shape(tensor)}, the model's is {_shape(m.weight)}.")
        if not torch.isfinite(tensor).all():
            raise UsageError(f"{flag} {path}: {m.parameter} holds NaN or infinity.")
        if (tensor < 0).any():
            raise UsageError(f"{flag} {path}: {m.parameter} holds negative numbers; a Fisher diagonal has none.")
    return [t.to(m.weight.device) for m, t in zip(scoring.maps, tensors, strict=True)]


def read_weights(files: Sequence[Path], scoring: ScoringModel) -> Direction | None:
    """The reference's weights of S, straight from its safetensors: no second model in memory.

    None where a tensor is not found under the model's own name (renamed on loading): then the model must be loaded.
    """
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    wanted = {m.parameter for m in scoring.maps}
    for path in files:
        if path.suffix != ".safetensors":
            return None
        with safe_open(path, framework="pt") as file:
            for name in wanted.intersection(file.keys()):
                found[name] = file.get_tensor(name)
    if found.keys() != wanted:
        return None
    return checked_weights(scoring, [found[m.parameter].t() if m.conv1d else found[m.parameter] for m in scoring.maps])


def checked_weights(scoring: ScoringModel, weights: Direction) -> Direction:
    """The reference's weights, once their shapes are known to be the model's."""
    for m, tensor in zip(scoring.maps, weights, strict=True):
        if tensor.shape != m.weight.shape:
            raise ModelError(
                f"--reference: {m.parameter} is {_shape(tensor)}, the model's is {_shape(m.weight)}."
                " The reference must be the pre-trained model that --model was tuned from."
            )
    return weights


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
