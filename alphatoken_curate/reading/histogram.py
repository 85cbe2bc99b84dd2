"""Histograms whose counts add up exactly: fixed edges round 0, and which of the counted tokens a mask keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.errors import CurateError

BINS_EACH_SIDE = 10
"""Bins below and above 0, and twice as many where no number is below 0; two open bins count what lies beyond them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts of a column: bin i is edges[i-1] <= x < edges[i], open below the first and above the last edge.

    `edges` (E,) in the column's unit: multiples of a step of 1, 2 or 5 times a power of ten. `count` (E + 1,): response
    tokens; `kept` (E + 1,): those that the newest mask keeps, None where there is no mask.
    """

    edges: tuple[float, ...]
    count: tuple[int, ...]
    kept: tuple[int, ...] | None

    def __add__(self, other: Histogram) -> Histogram:
        if (self.edges, self.kept is None) != (other.edges, other.kept is None):
            raise CurateError("histograms of other edges, or with and without a mask, cannot be added")
        kept = None if self.kept is None or other.kept is None else _added(self.kept, other.kept)
        return Histogram(edges=self.edges, count=_added(self.count, other.count), kept=kept)


def _added(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def histogram(values: NDArray[np.float32], kept: NDArray[np.bool_] | None, edges: tuple[float, ...]) -> Histogram:
    """Counts of values (N,) between edges; `kept` (N,) bool. Of the same edges, histograms add up exactly."""
    which = np.searchsorted(edges, values.astype(np.float64), side="right")
    count, chosen = (
        tuple(np.bincount(part, minlength=len(edges) + 1).tolist())
        for part in (which, which[slice(None) if kept is None else kept])
    )
    return Histogram(edges=edges, count=count, kept=None if kept is None else chosen)


def empty_histogram(edges: tuple[float, ...], *, has_mask: bool) -> Histogram:
    """A histogram of nothing, to add to."""
    none = (0,) * (len(edges) + 1)
    return Histogram(edges=edges, count=none, kept=none if has_mask else None)


def edges_for(reach: float, *, signed: bool = True) -> tuple[float, ...]:
    """2 x BINS_EACH_SIDE + 1 edges round 0, in steps of 1, 2 or 5 times a power of ten, that go up to `reach` > 0.

    `signed` False: all of them from 0 up, in finer steps.
    """
    first, last = (-BINS_EACH_SIDE, BINS_EACH_SIDE) if signed else (0, 2 * BINS_EACH_SIDE)
    power = 10.0 ** math.floor(math.log10(reach / last))
    # 20 rather than 10 at the end: the power itself is rounded.
    times = next(m for m in (1, 2, 5, 10, 20) if m * power * last >= reach)
    # Through text, so that an edge is the double nearest to the number that is shown.
    step = float(f"{times * power:.1e}")
    return tuple(float(f"{i * step:.3e}") for i in range(first, last + 1))
