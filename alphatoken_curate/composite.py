"""A token's value from its four components (paper arXiv 2606.01635, Eq. 12) and how large each part of it is.

All arrays are aligned; NaN stands for "no value here" (off the response, or a signal that was not computed).
"""

from __future__ import annotations

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
    adaptation, stability = _objectives(adapt_direct, adapt_causal, stab_direct, stab_causal)
    total = adaptation / scales.adaptation + stability_weight * (stability / scales.stability)
    return total.astype(np.float32)


def rms(x: NDArray[np.floating[Any]]) -> float:
    """Root of the mean square of the entries that are not NaN, in float64; 0 where there are none."""
    present = x[~np.isnan(x)].astype(np.float64)
    largest = float(np.abs(present).max(initial=0.0))
    if largest == 0.0:
        return 0.0
    return largest * float(np.sqrt(np.mean(np.square(present / largest))))


def objective_scales(adapt_direct: Floats, adapt_causal: Floats, stab_direct: Floats, stab_causal: Floats) -> Scales:
    """The divisors of `--stability-scale rms`: each objective's RMS over all response tokens of a generation.

    An objective that is 0 everywhere (stability, where model and reference are the same) keeps the divisor 1.
    """
    adaptation, stability = _objectives(adapt_direct, adapt_causal, stab_direct, stab_causal)
    return Scales(adaptation=rms(adaptation) or 1.0, stability=rms(stability) or 1.0)


def spreads(components: Mapping[str, Floats]) -> dict[str, float]:
    """RMS of each of the four components, in stored order: what each contributes before it is weighed."""
    return {name: rms(components[name]) for name in COMPONENTS}


def _objectives(a: Floats, b: Floats, c: Floats, d: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.add(a, b, dtype=np.float64), np.add(c, d, dtype=np.float64)
