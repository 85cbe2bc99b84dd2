"""The stability direction V = F * (W - W_ref), and the reference's tensors it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.precision import wide
from alphatoken_curate.errors import ModelError, UsageError
from alphatoken_curate.models.tensors import FLOATS, opened


def drift_direction(
    scoring: ScoringModel, fisher: Direction, reference: Direction, step: Direction | None = None
) -> Direction:
    """V_m = F_m * (W_m - W_ref,m), each (d_out, d_in): the gradient of the retention loss expanded around W_ref.

    With `step` (lr * g, g the gradient of the training loss) it is taken where W - step would be, so that a model that
    has not moved yet has a stability signal too (`--drift lookahead`).
    """
    drift = [
        own.detach().to(f.dtype) - w.to(own.device, f.dtype)
        for own, f, w in zip(scoring.weights, fisher, reference, strict=True)
    ]
    if step is not None:
        # After the difference of the weights, whose rounding would drown a small step.
        drift = [d - s.to(d) for d, s in zip(drift, step, strict=True)]
    return [f.to(d.device) * d for f, d in zip(fisher, drift, strict=True)]


def read_direction(path: Path, scoring: ScoringModel, *, flag: str) -> Direction:
    """A direction saved as safetensors: one (d_out, d_in) tensor per linear map of S, named as its weight.

    Raises UsageError where the file cannot be read, or a tensor is missing, of another shape or not finite.
    """
    from safetensors import SafetensorError

    try:
        with opened(path) as file:
            stored = set(file.keys())
            missing = [name for name in scoring.names if name not in stored]
            if missing:
                whole = "every parameter that --parameters all scores" if scoring.rest else "every linear map"
                raise UsageError(
                    f"{flag} {path}: it has no tensor {missing[0]} ({len(missing)} of {len(scoring.names)} are"
                    f" missing). It must hold {whole} of the last {scoring.layers} blocks."
                )
            tensors = [file.get_tensor(name) for name in scoring.names]
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{flag} {path}: not a readable safetensors file ({error}).") from error
    for name, own, tensor in zip(scoring.names, scoring.weights, tensors, strict=True):
        if tensor.shape != own.shape:
            raise UsageError(f"{flag} {path}: {name} is {_shape(tensor)}, the model's is {_shape(own)}.")
        if not torch.isfinite(tensor).all():
            raise UsageError(f"{flag} {path}: {name} holds NaN or infinity.")
        if (tensor < 0).any():
            raise UsageError(f"{flag} {path}: {name} holds negative numbers; a Fisher diagonal has none.")
    # Wide: in its dtype the drift is taken, which a narrow one would round away.
    return [wide(t).to(own.device) for own, t in zip(scoring.weights, tensors, strict=True)]


def read_weights(files: Sequence[Path], scoring: ScoringModel) -> Direction | None:
    """The reference's weights of S, straight from its safetensors: no second model in memory.

    None where a tensor is not found under the model's own name and in its shape (renamed, merged or turned round on
    loading, as experts mostly are), or its numbers need a scale (FP8): then the model must be loaded.
    """
    if not on_disk(files, scoring):
        return None
    found: dict[str, Tensor] = {}
    wanted = _stored_names(scoring)
    for path in files:
        with opened(path) as file:
            found |= {name: file.get_tensor(name) for name in wanted.intersection(file.keys())}
    matrices = [m.matrix(found[m.stored]) for m in scoring.maps]
    return checked_weights(scoring, [*matrices, *(found[name] for name in scoring.rest)])


def on_disk(files: Sequence[Path], scoring: ScoringModel) -> bool:
    """Whether safetensors hold every weight of S under the model's own name, as numbers that need no scale.

    Of experts, in the model's own shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    wanted = _stored_names(scoring)
    for path in files:
        if path.suffix != ".safetensors":
            return False
        with opened(path) as file:
            mine = {name: file.get_slice(name) for name in wanted.intersection(file.keys())}
            shapes |= {name: tuple(one.get_shape()) for name, one in mine.items() if one.get_dtype() in FLOATS}
    experts = [m for m in scoring.maps if m.expert is not None]
    return shapes.keys() == wanted and all(shapes[m.stored] == tuple(m.bare.shape) for m in experts)


def _stored_names(scoring: ScoringModel) -> set[str]:
    return {m.stored for m in scoring.maps}.union(scoring.rest)


def checked_weights(scoring: ScoringModel, weights: Direction) -> Direction:
    """The reference's weights, once their shapes are known to be the model's."""
    for name, own, tensor in zip(scoring.names, scoring.weights, weights, strict=True):
        if tensor.shape != own.shape:
            raise ModelError(
                f"--reference: {name} is {_shape(tensor)}, the model's is {_shape(own)}."
                " The reference must be the pre-trained model that --model was tuned from."
            )
    return weights


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
