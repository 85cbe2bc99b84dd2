"""A token's value from its four components (paper arXiv 2606.01635, Eq. 12) and how large each part of it is.

All arrays are aligned; NaN stands for "no value here" (off the response, or a signal that was not computed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.schema import COMPONENTS

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """What each objective is divided by before they are added; 1 leaves it as it is."""

    adaptation: float = 1.0
    stability: float = 1.0


PUBLISHED = Scales()
"""No scaling, as in Eq. 12."""


def value(
    adapt_direct: Floats,
    adapt_causal: Floats,
    stab_direct: Floats,
    stab_causal: Floats,
    *,
    stability_weight: float,
    scales: Scales = PUBLISHED,
) -> Floats:
    """Eq. 12: adaptation / scale + stability_weight * stability / scale, each objective direct + causal.

    Four float32 arrays of one shape, in nats per unit step -> float32 of that shape, in nats per unit step (without a
    unit where scaled). Computed in float64 and rounded once. NaN wherever a component is NaN.
    """
    adaptation = np.add(adapt_direct, adapt_causal, dtype=np.float64)
    stability = np.add(stab_direct, stab_causal, dtype=np.float64)
    total = adaptation / scales.adaptation + stability_weight * (stability / scales.stability)
    return total.astype(np.float32)


def rms(*parts: NDArray[np.floating[Any]]) -> float:
    """Root of the mean square of all entries of all arrays that are not NaN, in float64; 0 where there are none."""
    present = [part[~np.isnan(part)].astype(np.float64) for part in parts]
    largest = max((float(np.abs(part).max(initial=0.0)) for part in present), default=0.0)
    if largest == 0.0:
        return 0.0
    squares = sum(float(np.square(part / largest).sum()) for part in present)
    return largest * math.sqrt(squares / sum(len(part) for part in present))


def objective_scales(*branches: Mapping[str, Floats]) -> Scales:
    """The divisors of `--stability-scale rms`: each objective's RMS over the response tokens of all branches together.

    Each branch: the four components by name, (N,) each. An objective that is 0 everywhere (stability, where model and
    reference are the same) keeps the divisor 1.
    """
    adapt_direct, adapt_causal, stab_direct, stab_causal = COMPONENTS
    adaptation = rms(*(np.add(one[adapt_direct], one[adapt_causal], dtype=np.float64) for one in branches))
    stability = rms(*(np.add(one[stab_direct], one[stab_causal], dtype=np.float64) for one in branches))
    return Scales(adaptation=adaptation or 1.0, stability=stability or 1.0)


def spreads(*branches: Mapping[str, Floats]) -> dict[str, float]:
    """RMS of each of the four components, in stored order: what each contributes before it is weighed."""
    return {name: rms(*(one[name] for one in branches)) for name in COMPONENTS}
