"""A token's value from its components (paper arXiv 2606.01635, Eq. 12) and how large each part of it is.

All arrays are aligned; NaN stands for "no value here" (off the response, or a signal that was not computed).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.runs.schema import Components

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

    `signals`: at least the components, float32 arrays of one shape, of one unit -> float32 of that shape, in that unit
    (without one where scaled). Computed in float64 and rounded once. NaN wherever a component is NaN.
    """
    adaptation = objective(signals, components.adaptation) / scales.adaptation
    stability = objective(signals, components.stability) / scales.stability
    return (adaptation + stability_weight * stability).astype(np.float32)


def value_error(
    signals: Mapping[str, NDArray[np.floating[Any]]], stability_weight: float, *, scales: Scales = PUBLISHED
) -> Floats:
    """Standard error of `value`: sqrt((adapt_error / scale)^2 + (stability_weight * stab_error / scale)^2).

    Adaptation and stability come of rows of their own, so that their errors add up as squares. `signals`: float arrays
    of one shape, without `stab_error` where nothing is known of it -> float32 of that shape. An objective that knows of
    no error (NaN: a single group, or the drift) adds none; NaN where neither does. Computed in float64, rounded once.
    """
    adaptation = signals["adapt_error"].astype(np.float64) / scales.adaptation
    stability = signals.get("stab_error", np.full_like(adaptation, np.nan)).astype(np.float64) / scales.stability
    parts = np.stack([adaptation, stability_weight * stability])
    error = np.sqrt(np.square(np.where(np.isnan(parts), 0.0, parts)).sum(axis=0))
    return np.where(np.isnan(parts).all(axis=0), np.nan, error).astype(np.float32)


def objective(signals: Mapping[str, NDArray[np.floating[Any]]], names: Sequence[str]) -> NDArray[np.float64]:
    """The sum of these signals, float64 of their shape."""
    total = signals[names[0]].astype(np.float64)
    for name in names[1:]:
        total += signals[name]
    return total


class Rms:
    """Root of the mean square of all that is added and is not NaN, in float64; 0 where there is nothing."""

    def __init__(self) -> None:
        self._largest, self._squares, self._count = 0.0, 0.0, 0

    def add(self, part: NDArray[np.floating[Any]]) -> None:
        """Numbers of any shape."""
        present = part[~np.isnan(part)].astype(np.float64)
        largest = float(np.abs(present).max(initial=0.0))
        if largest > self._largest:  # squares are of multiples of the largest, so that they neither vanish nor overflow
            self._squares *= (self._largest / largest) ** 2
            self._largest = largest
        if self._largest:
            self._squares += float(np.square(present / self._largest).sum())
        self._count += len(present)

    @property
    def value(self) -> float:
        """Of all that was added until now."""
        return self._largest * math.sqrt(self._squares / self._count) if self._largest else 0.0


def rms(*parts: NDArray[np.floating[Any]]) -> float:
    """Root of the mean square of all entries of all arrays that are not NaN, in float64; 0 where there are none."""
    found = Rms()
    for part in parts:
        found.add(part)
    return found.value


class Sizes:
    """How large the components of the value and its objectives are, over all tokens that are added."""

    def __init__(self, components: Components) -> None:
        self._components = components
        self._each = {name: Rms() for name in components.of_value}
        self._adaptation, self._stability = Rms(), Rms()

    def add(self, signals: Mapping[str, Floats]) -> None:
        """Tokens: at least the components by name, (N,) each."""
        for name, found in self._each.items():
            found.add(signals[name])
        self._adaptation.add(objective(signals, self._components.adaptation))
        self._stability.add(objective(signals, self._components.stability))

    @property
    def spreads(self) -> dict[str, float]:
        """RMS of each component of the value, in stored order: what each contributes before it is weighed."""
        return {name: found.value for name, found in self._each.items()}

    @property
    def scales(self) -> Scales:
        """The divisors of `--stability-scale rms`: each objective's RMS over the response tokens of all branches.

        An objective that is 0 everywhere (stability, where model and reference are the same) keeps the divisor 1.
        """
        return Scales(adaptation=self._adaptation.value or 1.0, stability=self._stability.value or 1.0)


def sizes(branches: Iterable[Mapping[str, Floats]], components: Components) -> Sizes:
    """Those of all branches together. Each branch: at least the components by name, (N,) each."""
    found = Sizes(components)
    for one in branches:
        found.add(one)
    return found
