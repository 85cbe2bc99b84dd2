"""Sums and sizes of a generation's signals, read shard by shard: they add up exactly whatever the shards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.masks import responses
from alphatoken_curate.reading.histogram import edges_for
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.manifest import Generation, Manifest
from alphatoken_curate.runs.schema import ERRORS, PAIR_COLUMNS, SIGNALS, Components, Layout
from alphatoken_curate.signals import composite

MEANS = ("nll", "entropy", "reference_nll")
"""Signals whose mean is told."""

_SPREADS = (*MEANS, *ERRORS)
"""Signals that are 0 or above."""

_CORE = 0.98
"""Share of the values that the closed bins of a histogram are to cover, at least."""


def objectives(components: Components) -> dict[str, tuple[str, ...]]:
    """The signals whose sum is each objective; `drift` only where it was computed beside stability."""
    return {"adaptation": components.adaptation, "stability": components.stability, "drift": components.drift}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStats:
    """The `rows` scored preference rows: mean `omega` (ratio) and `margin` (nats), and the share of margins above 0.

    The last three are None where there is no row.
    """

    rows: int
    omega: float | None
    margin: float | None
    margin_above_zero: float | None


class Sums:
    """Sums over tokens and rows, one number per shard and column, so that their total does not depend on the order."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self.objectives = objectives(components)
        self.signals = (*components.of_value, *components.upstream, *components.drift, "value")
        self.squares: dict[str, list[float]] = {name: [] for name in (*self.signals, *self.objectives)}
        self.totals: dict[str, list[float]] = {name: [] for name in (*_SPREADS, *PAIR_COLUMNS)}
        self.present: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.sizes = {name: np.zeros(1 << 12, np.int64) for name in (*self.signals, *_SPREADS)}

    @classmethod
    def of(cls, run: Path, stored: Manifest, generation: Generation) -> Sums:
        """The sums of a generation, read shard by shard."""
        layout, sums = manifest.layout(stored), cls(manifest.components(stored))
        names = [name for name in ("row_id", "status", *PAIR_COLUMNS) if name in layout.values.names]
        for shard in generation.shards:
            for tokens in responses.load(run, [[shard]], (*sums.signals, *_SPREADS), layout).branches:
                sums.add(tokens.columns)
            table = shards.read_shard(run, shard, layout.values, names)
            sums.rows.update(shards.rows_by_status(*(table[name].to_pylist() for name in names[:2])))
            for name in names[2:]:
                numbers = table[name].drop_null().to_numpy().astype(np.float64)
                sums._count(name, numbers, sums.totals)
                sums.present[f"{name} > 0"] += int((numbers > 0).sum())
        return sums

    def add(self, columns: Mapping[str, NDArray[np.float32]]) -> None:
        """Count the tokens of a branch of a shard."""
        wide = {name: columns[name].astype(np.float64) for name in (*self.signals, *_SPREADS)}
        wide |= {name: composite.objective(wide, parts) for name, parts in self.objectives.items()}
        for name in self.squares:
            self._count(name, np.square(wide[name]), self.squares)
        for name in _SPREADS:
            self._count(name, wide[name], self.totals)
        for name in self.sizes:
            # The upper 12 bits of a positive float32, sign left out: 16 sizes for each power of two.
            bits = np.abs(columns[name][~np.isnan(columns[name])]).view(np.uint32) >> 19
            self.sizes[name] += np.bincount(bits, minlength=1 << 12)

    def _count(self, name: str, numbers: NDArray[np.float64], sums: dict[str, list[float]]) -> None:
        present = numbers[~np.isnan(numbers)]
        sums[name].append(float(present.sum()))
        self.present[name] += len(present)

    def rms(self) -> dict[str, float]:
        """Of each spread; of the drift only where there is one."""
        known = {name: math.fsum(parts) / (self.present[name] or 1) for name, parts in self.squares.items()}
        return {name: math.sqrt(x) for name, x in known.items() if self.present[name] or "drift" not in name}

    def mean(self) -> dict[str, float | None]:
        """Of each of `MEANS`."""
        return {name: self._mean(name) for name in MEANS}

    def pairs(self, layout: Layout) -> PairStats | None:
        """Of preference rows."""
        if layout.kind != "preference":
            return None
        rows = self.present["margin"]
        above = self.present["margin > 0"] / rows if rows else None
        return PairStats(rows=rows, omega=self._mean("omega"), margin=self._mean("margin"), margin_above_zero=above)

    def _mean(self, name: str) -> float | None:
        return math.fsum(self.totals[name]) / self.present[name] if self.present[name] else None

    def core(self, name: str) -> float:
        """A size that at least `_CORE` of a signal's magnitudes are below, at most 1/16 larger than need be.

        1 where all are 0.
        """
        sizes = self.sizes[name]
        within = np.cumsum(sizes) >= _CORE * int(sizes.sum())
        sized = np.flatnonzero(sizes)
        first = int(np.argmax(within)) or int(sized[-1] if len(sized) else 0)
        upper = np.array([(first + 1) << 19], np.uint32).view(np.float32)[0]
        return min(float(upper), float(np.finfo(np.float32).max)) if first else 1.0

    def computed(self) -> tuple[str, ...]:
        """The signals that there are numbers of, in stored order; where there is no token, those there always are."""
        always = self.components.always
        return tuple(name for name in SIGNALS if name in self.sizes and (self.present[name] or name in always))

    def edges(self) -> dict[str, tuple[float, ...]]:
        """The edges of a histogram of each signal computed, from -reach to reach, or from 0 where none is below it."""
        return {name: edges_for(self.core(name), signed=name not in _SPREADS) for name in self.computed()}
