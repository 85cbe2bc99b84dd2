"""What a run holds, in numbers: counts, a histogram of values, how large each component is, what masks keep.

Read shard by shard, twice: sums and sizes first, from which the histogram's edges follow, then its counts. Both add up
exactly whatever the shards. Last comes `remask.spreads` for what stability decides; it alone holds the run's tokens
in memory (about 70 bytes each).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate import manifest, masks, remask, shards
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import CurateError, StoredDataError
from alphatoken_curate.fingerprint import Json
from alphatoken_curate.manifest import Manifest, Mask
from alphatoken_curate.schema import COMPONENTS, STATUSES, TRAIN
from alphatoken_curate.shards import Shard

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

MEANS = ("nll", "entropy", "reference_nll")
"""Signals whose mean is told."""

BINS_EACH_SIDE = 10
"""Bins below and above 0; values beyond them are counted in two open bins."""

_CORE = 0.98
"""Share of the values that the closed bins are to cover, at least."""

SCALES = ("none", "rms")
"""Choices of `--stability-scale`."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStats:
    """One scoring of the rows."""

    generation: int
    checkpoint: str
    shards: int
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskStats:
    """One mask; `settings` as `mask` was given them, `kept_share` None where there is no response token."""

    mask: int
    generations: tuple[int, ...]
    settings: Mapping[str, Json]
    kept_tokens: int
    response_tokens: int
    kept_share: float | None
    rows_given_back: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A run in numbers: the newest generation and the newest mask.

    `rows`: read, and by status. `tokens`, `response_tokens`: of every status; `scored_tokens`: response tokens of
    scored rows, of which `kept_tokens` (None without a mask). `rms`: root mean square over the scored tokens of the
    four components, of `adaptation` and `stability` (direct + causal) and of `value`; in nats per unit step, 0 where
    there is no token. `mean`: of nll, entropy and reference_nll in nats, None where there is none.
    `decisions_changed`: by --stability-scale, scored tokens that the newest mask's settings (the default settings where
    there is no mask) keep or drop only due to stability. `decided_by_value`: whether these settings use the value.
    """

    rows: Mapping[str, int]
    tokens: int
    response_tokens: int
    truncated_rows: int
    truncated_tokens: int
    scored_tokens: int
    kept_tokens: int | None
    kept_share: float | None
    values: Histogram
    rms: Mapping[str, float]
    mean: Mapping[str, float | None]
    stability_is_zero: bool
    decisions_changed: Mapping[str, int]
    decided_by_value: bool
    generations: tuple[GenerationStats, ...]
    masks: tuple[MaskStats, ...]


def stats(run: str | Path) -> Stats:
    """The numbers of a run. Raises `StoredDataError` where it has no manifest or is damaged."""
    folder = Path(run)
    stored = manifest.read(folder)
    if not stored.generations:
        raise StoredDataError(f"{folder / manifest.NAME}: names no generation; run the `score` command that makes one")
    config = _config(stored)
    sums = _Sums()
    for part in _parts(folder, stored, (*COMPONENTS, "value", *MEANS)):
        sums.add(part)
    values = empty_histogram(edges_for(sums.core()), has_mask=bool(stored.masks))
    for part in _parts(folder, stored, ("value",)):
        values += histogram(part.columns["value"], part.kept, values.edges)
    rms = {name: _root_mean(parts, sums.tokens) for name, parts in sums.squares.items()}
    counts = stored.counts
    return Stats(
        rows={"read": counts.read, **{status: getattr(counts, status) for status in STATUSES}},
        tokens=counts.tokens,
        response_tokens=counts.response_tokens,
        truncated_rows=counts.truncated_rows,
        truncated_tokens=counts.truncated_tokens,
        scored_tokens=sums.tokens,
        kept_tokens=sum(values.kept) if values.kept else None,
        kept_share=_share(sum(values.kept), sums.tokens) if values.kept else None,
        values=values,
        rms=rms,
        mean={name: _mean(sums.totals[name], sums.present[name]) for name in MEANS},
        stability_is_zero=not (rms["stab_direct"] or rms["stab_causal"]),
        decisions_changed={
            scale: remask.spreads(folder, replace(config, stability_scale=scale)).decisions_changed for scale in SCALES
        },
        decided_by_value=masks.depends_on_value(config.by),
        generations=_generations(stored),
        masks=tuple(_mask(one) for one in stored.masks),
    )


# ------------------------------------------------------------------------------------------------------- histograms


def histogram(values: Floats, kept: Bools | None, edges: tuple[float, ...]) -> Histogram:
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


def edges_for(reach: float) -> tuple[float, ...]:
    """2 x BINS_EACH_SIDE + 1 edges round 0, in steps of 1, 2 or 5 times a power of ten, that go up to `reach` > 0."""
    power = 10.0 ** math.floor(math.log10(reach / BINS_EACH_SIDE))
    # 20 rather than 10 at the end: the power itself is rounded.
    times = next(m for m in (1, 2, 5, 10, 20) if m * power * BINS_EACH_SIDE >= reach)
    # Through text, so that an edge is the double nearest to the number that is shown.
    step = float(f"{times * power:.1e}")
    return tuple(float(f"{i * step:.3e}") for i in range(-BINS_EACH_SIDE, BINS_EACH_SIDE + 1))


# ------------------------------------------------------------------------------------------------- shard by shard


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """The scored response tokens of one shard: columns (N,) float32, and which are kept (N,)."""

    columns: Mapping[str, Floats]
    kept: Bools | None


def _parts(run: Path, stored: Manifest, names: tuple[str, ...]) -> Iterator[_Part]:
    """Shard by shard, each checked against the manifest; `kept` by the newest mask."""
    mask = stored.masks[-1] if stored.masks else None
    for index, shard in enumerate(stored.generations[-1].shards):
        tokens = remask.load(run, [shard], names)
        yield _Part(columns=tokens.columns, kept=_kept(run, mask.shards[index], tokens) if mask else None)


def _kept(run: Path, shard: Shard, tokens: remask.Tokens) -> Bools:
    path = run / shard.path
    table = shards.read(path, TRAIN, ["row_id", "loss_mask"])
    loss_mask, lengths = shards.entries(table["loss_mask"])
    row, position, row_ids = tokens.row, tokens.columns["position"], table["row_id"].to_numpy()
    fits = row.max(initial=-1) < len(row_ids) and np.array_equal(row_ids[row], tokens.columns["row_id"])
    if not fits or np.any(position >= lengths[row]):
        raise StoredDataError(f"{path}: does not hold the rows that values/ does; run `verify`")
    kept: Bools = loss_mask[(np.cumsum(lengths) - lengths)[row] + position] > 0
    return kept


class _Sums:
    """Sums over tokens, one number per shard and column, so that adding them does not depend on their order."""

    def __init__(self) -> None:
        self.tokens = 0
        self.squares: dict[str, list[float]] = {name: [] for name in (*COMPONENTS, "adaptation", "stability", "value")}
        self.totals: dict[str, list[float]] = {name: [] for name in MEANS}
        self.present = dict.fromkeys(MEANS, 0)
        self.sizes = np.zeros(1 << 12, np.int64)

    def add(self, part: _Part) -> None:
        wide = {name: part.columns[name].astype(np.float64) for name in (*COMPONENTS, "value", *MEANS)}
        wide["adaptation"] = wide["adapt_direct"] + wide["adapt_causal"]
        wide["stability"] = wide["stab_direct"] + wide["stab_causal"]
        for name, parts in self.squares.items():
            parts.append(float(np.square(wide[name]).sum()))
        for name, parts in self.totals.items():
            present = wide[name][~np.isnan(wide[name])]
            parts.append(float(present.sum()))
            self.present[name] += len(present)
        self.tokens += len(wide["value"])
        # The upper 12 bits of a positive float32, sign left out: 16 sizes for each power of two.
        bits = np.abs(part.columns["value"]).view(np.uint32) >> 19
        self.sizes += np.bincount(bits, minlength=1 << 12)

    def core(self) -> float:
        """A size that at least `_CORE` of |value| are below, at most 1/16 larger than need be; 1 where all are 0."""
        within = np.cumsum(self.sizes) >= _CORE * self.tokens
        sized = np.flatnonzero(self.sizes)
        first = int(np.argmax(within)) or int(sized[-1] if len(sized) else 0)
        upper = np.array([(first + 1) << 19], np.uint32).view(np.float32)[0]
        return min(float(upper), float(np.finfo(np.float32).max)) if first else 1.0


def _root_mean(squares: list[float], tokens: int) -> float:
    return math.sqrt(math.fsum(squares) / tokens) if tokens else 0.0


def _mean(totals: list[float], present: int) -> float | None:
    return math.fsum(totals) / present if present else None


# ------------------------------------------------------------------------------------------------- from the manifest


def _config(stored: Manifest) -> MaskConfig:
    """The settings of the newest mask; the defaults where there is none."""
    settings = stored.masks[-1].settings if stored.masks else {}
    known: dict[str, Any] = {item.name: settings[item.name] for item in fields(MaskConfig) if item.name in settings}
    return MaskConfig(**known)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _generations(stored: Manifest) -> tuple[GenerationStats, ...]:
    return tuple(
        GenerationStats(
            generation=one.generation,
            checkpoint=one.checkpoint,
            shards=len(one.shards),
            rows=sum(shard.rows for shard in one.shards),
            bytes=sum(shard.bytes for shard in one.shards),
        )
        for one in stored.generations
    )


def _mask(mask: Mask) -> MaskStats:
    return MaskStats(
        mask=mask.mask,
        generations=mask.generations,
        settings=mask.settings,
        kept_tokens=mask.kept_tokens,
        response_tokens=mask.response_tokens,
        kept_share=_share(mask.kept_tokens, mask.response_tokens),
        rows_given_back=mask.rows_given_back,
    )
