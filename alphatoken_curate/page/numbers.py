"""The numbers that a report draws: histograms, densities, quantiles along a scale, correlations. Pure functions.

All arrays have one entry for each of N tokens; NaN stands for no value and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.reading.compare import spearman

Numbers = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Counts = NDArray[np.int64]

BINS = 40
"""Bins of a histogram from one end of its axis to the other; values beyond are counted in two open bins."""

CORE = 98
"""Percentile of |value| that an axis reaches."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Overlaid:
    """Bin i is edges[i-1] <= x < edges[i], open at both ends: (E + 1,) counts of kept and of other tokens."""

    edges: Numbers
    kept: Counts
    other: Counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Density:
    """(X, Y) counts between (X + 1,) and (Y + 1,) edges; what lies beyond is counted in the outermost bins."""

    x_edges: Numbers
    y_edges: Numbers
    count: Counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bands:
    """Quartiles of a number in bins of another, (B,) each: bin i is edges[i] <= x < edges[i + 1], the last closed.

    `count` tokens; `low`, `middle`, `high`: the 25th, 50th and 75th percentile; `kept`: the share kept, NaN without a
    mask.
    """

    edges: Numbers
    count: Counts
    low: Numbers
    middle: Numbers
    high: Numbers
    kept: Numbers


def reach(values: Numbers) -> float:
    """The magnitude that `CORE` percent of values stay below; 1 where all are 0 or there are none."""
    sizes = np.abs(values[~np.isnan(values)].astype(np.float64))
    if not len(sizes):
        return 1.0
    return float(np.percentile(sizes, CORE, method="higher")) or float(sizes.max()) or 1.0


def symmetric_edges(values: Numbers, bins: int = BINS) -> Numbers:
    """Edges, bins + 1, from -reach to reach; from 0 where no value is negative."""
    far = reach(values)
    negative = bool(np.any(values < 0))
    return np.linspace(-far if negative else 0.0, far, bins + 1)


def overlaid(values: Numbers, kept: Bools | None, edges: Numbers) -> Overlaid:
    """Counts of the tokens that are kept and of all others."""
    there = ~np.isnan(values)
    which = np.searchsorted(edges, values[there].astype(np.float64), side="right")
    chosen = np.zeros(len(which), np.bool_) if kept is None else kept[there]
    kept_count, other = (np.bincount(which[part], minlength=len(edges) + 1) for part in (chosen, ~chosen))
    return Overlaid(edges=edges, kept=kept_count, other=other)


def signed_log(values: Numbers, unit: float) -> NDArray[np.float64]:
    """asinh(x / unit): linear within a unit of 0, logarithmic beyond it, the sign kept."""
    return np.arcsinh(values.astype(np.float64) / unit)


def density(x: Numbers, y: Numbers, x_edges: Numbers, y_edges: Numbers) -> Density:
    """How many tokens have x and y in each pair of bins; those beyond the edges count in the outermost bins."""
    there = ~(np.isnan(x) | np.isnan(y))
    columns, rows = (
        np.clip(np.searchsorted(edges, numbers[there], side="right") - 1, 0, len(edges) - 2)
        for numbers, edges in ((x, x_edges), (y, y_edges))
    )
    shape = (len(x_edges) - 1, len(y_edges) - 1)
    flat = np.bincount(columns * shape[1] + rows, minlength=shape[0] * shape[1])
    return Density(x_edges=x_edges, y_edges=y_edges, count=flat.reshape(shape))


def quantile_edges(values: Numbers, bins: int) -> Numbers:
    """Edges of 1 to `bins` bins that hold about as many tokens each; fewer where many values are equal."""
    present = values[~np.isnan(values)].astype(np.float64)
    if not len(present):
        return np.empty(0)
    edges = np.unique(np.percentile(present, np.linspace(0, 100, bins + 1)))
    return edges if len(edges) > 1 else np.repeat(edges, 2)


def place_edges(longest: int) -> NDArray[np.float64]:
    """Edges of places in a response: 1, 2, 3, 4, then in steps that grow by about 1.4, up to beyond `longest`."""
    edges = [1, 2, 3, 4]
    while edges[-1] <= longest:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 1.4)))
    return np.array([edge for edge in edges if edge <= longest] + [longest + 1], np.float64)


def bands(x: Numbers, values: Numbers, kept: Bools | None, edges: Numbers) -> Bands:
    """Quartiles of `values` by bins of `x`; bins without a token are NaN."""
    there = ~(np.isnan(x) | np.isnan(values))
    number = max(0, len(edges) - 1)
    which = np.clip(np.searchsorted(edges, x[there].astype(np.float64), side="right") - 1, 0, max(0, number - 1))
    order = np.lexsort((values[there], which))
    sorted_values = values[there][order].astype(np.float64)
    count = np.bincount(which, minlength=number)[:number] if number else np.zeros(0, np.int64)
    ends = np.cumsum(count)
    quartiles = np.full((3, number), np.nan)
    for i in np.flatnonzero(count):
        quartiles[:, i] = np.percentile(sorted_values[ends[i] - count[i] : ends[i]], (25, 50, 75))
    share = np.full(number, np.nan)
    if kept is not None and number:
        chosen = np.bincount(which, weights=kept[there], minlength=number)
        share = np.divide(chosen, count, out=share, where=count > 0)
    low, middle, high = quartiles
    return Bands(edges=edges, count=count, low=low, middle=middle, high=high, kept=share)


def correlation(x: Numbers, y: Numbers) -> float | None:
    """Pearson's; None where fewer than two tokens have both, or one of the two is constant."""
    there = ~(np.isnan(x) | np.isnan(y))
    a, b = x[there].astype(np.float64), y[there].astype(np.float64)
    # Not by deviations: the mean of equal numbers may be rounded.
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip((a @ b) / size, -1, 1)) if size else None


def rank_correlation(x: Numbers, y: Numbers) -> float | None:
    """Spearman's; None as above."""
    there = ~(np.isnan(x) | np.isnan(y))
    return spearman(x[there], y[there]) if there.sum() > 1 else None


def same_sign(x: Numbers, y: Numbers) -> float | None:
    """The share of tokens at which both have one sign, of those at which neither is 0; None where there is none."""
    product = np.sign(x) * np.sign(y)
    both = int(np.count_nonzero(product[~np.isnan(product)]))
    return float((product > 0).sum() / both) if both else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tokens of one sort: how many, how many of them kept (None without a mask) and their mean value in nats."""

    name: int
    count: int
    kept: int | None
    value: float

    @property
    def share(self) -> float:
        """The share kept."""
        return (self.kept or 0) / self.count


def groups(names: NDArray[np.integer[Any]], values: Numbers, kept: Bools | None) -> list[Group]:
    """One for each number that `names` (N,) holds, ascending."""
    found, where, count = np.unique(names, return_inverse=True, return_counts=True)
    sums = np.bincount(where, weights=values.astype(np.float64), minlength=len(found))
    chosen = None if kept is None else np.bincount(where[kept], minlength=len(found))
    return [
        Group(
            name=int(found[i]),
            count=int(count[i]),
            kept=None if chosen is None else int(chosen[i]),
            value=float(sums[i] / count[i]),
        )
        for i in range(len(found))
    ]


def unusual(found: Sequence[Group], share: float, most: int) -> tuple[list[Group], list[Group]]:
    """Groups kept more, and less, than the `share` of all would have it: those most tokens beyond it first."""
    excess = {one.name: (one.kept or 0) - share * one.count for one in found}
    ordered = sorted(found, key=lambda one: (-excess[one.name], one.name))
    more = [one for one in ordered if excess[one.name] > 0][:most]
    less = [one for one in reversed(ordered) if excess[one.name] < 0][:most]
    return more, less
