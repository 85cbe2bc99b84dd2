"""A token's value from its components (paper arXiv 2606.01635, Eq. 12) and how large each part of it is.

All arrays are aligned; NaN stands for "no value here" (off the response, or a signal that was not computed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.schema import Components

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """What each objective is divided by before they are added; 1 leaves it as it is."""

    adaptation: float = 1.0
    stability: float = 1.0


PUBLISHED = Scales()
"""No scaling, as in Eq. 12."""


def value(
    signals: Mapping[str, Floats], components: Components, *, stability_weight: float, scales: Scales = PUBLISHED
) -> Floats:
    """Eq. 12: adaptation / scale + stability_weight * stability / scale, each objective the sum of its components.

    `signals`: at least the components, float32 arrays of one shape, in nats per unit step -> float32 of that shape, in
    nats per unit step (without a unit where scaled). Computed in float64 and rounded once. NaN wherever a component is
    NaN.
    """
    adaptation = objective(signals, components.adaptation) / scales.adaptation
    stability = objective(signals, components.stability) / scales.stability
    return (adaptation + stability_weight * stability).astype(np.float32)


def objective(signals: Mapping[str, NDArray[np.floating[Any]]], names: Sequence[str]) -> NDArray[np.float64]:
    """The sum of these signals, float64 of their shape."""
    total = signals[names[0]].astype(np.float64)
    for name in names[1:]:
        total += signals[name]
    return total


def rms(*parts: NDArray[np.floating[Any]]) -> float:
    """Root of the mean square of all entries of all arrays that are not NaN, in float64; 0 where there are none."""
    present = [part[~np.isnan(part)].astype(np.float64) for part in parts]
    largest = max((float(np.abs(part).max(initial=0.0)) for part in present), default=0.0)
    if largest == 0.0:
        return 0.0
    squares = sum(float(np.square(part / largest).sum()) for part in present)
    return largest * math.sqrt(squares / sum(len(part) for part in present))


def objective_scales(branches: Sequence[Mapping[str, Floats]], components: Components) -> Scales:
    """The divisors of `--stability-scale rms`: each objective's RMS over the response tokens of all branches together.

    Each branch: at least the components by name, (N,) each. An objective that is 0 everywhere (stability, where model
    and reference are the same) keeps the divisor 1.
    """
    adaptation = rms(*(objective(one, components.adaptation) for one in branches))
    stability = rms(*(objective(one, components.stability) for one in branches))
    return Scales(adaptation=adaptation or 1.0, stability=stability or 1.0)


def spreads(branches: Sequence[Mapping[str, Floats]], components: Components) -> dict[str, float]:
    """RMS of each component of the value, in stored order: what each contributes before it is weighed."""
    return {name: rms(*(one[name] for one in branches)) for name in components.of_value}
