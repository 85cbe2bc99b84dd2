"""What a run holds, in numbers: counts, a histogram of values, how large each component is, what masks keep.

Read shard by shard: sums and sizes first, of each generation, from which the histogram's edges follow, then its counts.
All add up exactly whatever the shards. Last comes `remask.spreads` for what stability decides; it alone holds the run's
tokens in memory (about 70 bytes each).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate import composite, manifest, masks, remask, responses, shards
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.fingerprint import Json
from alphatoken_curate.histogram import Histogram, edges_for, empty_histogram, histogram
from alphatoken_curate.manifest import Generation, Manifest, Mask
from alphatoken_curate.scan import choose_generation
from alphatoken_curate.schema import PAIR_COLUMNS, STATUSES, Components, Layout
from alphatoken_curate.shards import Shard

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

MEANS = ("nll", "entropy", "reference_nll")
"""Signals whose mean is told."""

SCALES = ("none", "rms")
"""Choices of `--stability-scale`."""

_CORE = 0.98
"""Share of the values that the closed bins are to cover, at least."""


def objectives(components: Components) -> dict[str, tuple[str, ...]]:
    """The signals whose sum is each objective; `drift` only where it was computed beside stability."""
    return {"adaptation": components.adaptation, "stability": components.stability, "drift": components.drift}


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchStats:
    """Scored response tokens of one branch, of which `kept_tokens` are kept (None without a mask)."""

    scored_tokens: int
    kept_tokens: int | None
    kept_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStats:
    """The `rows` scored preference rows: mean `omega` (ratio) and `margin` (nats), and the share of margins above 0.

    The last three are None where there is no row.
    """

    rows: int
    omega: float | None
    margin: float | None
    margin_above_zero: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStats:
    """One scoring of the rows; `rms` as in `Stats`, `pairs` None in SFT runs."""

    generation: int
    checkpoint: str
    shards: int
    rows: int
    bytes: int
    rms: Mapping[str, float]
    pairs: PairStats | None


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
    """A run in numbers: one `generation` and the newest mask. Of preference rows, tokens are those of both branches.

    `kind`: `sft` or `preference`. `rows`: read, and by status. `tokens`, `response_tokens`: of every status;
    `scored_tokens`: response tokens of scored rows, of which `kept_tokens` (None without a mask); `rows_left_out`:
    scored rows that are not in the mask, since another of its generations did not score them. `branches`: `chosen` and
    `rejected`, empty in SFT runs; `pairs` None there. `rms`: root mean square over the scored tokens of each signal
    that `estimator` gives along a direction, of `adaptation` and `stability` (the sums of their components) and of
    `value`; of the drift's signals and `drift`, their sum, where it was computed; in nats per unit step, 0 where there
    is no token. `mean`: of nll, entropy and reference_nll in nats, None where there is none.
    `decisions_changed`: by --stability-scale, tokens that the newest mask's settings (the default settings where there
    is no mask) keep or drop only due to stability, of `decided_tokens` in `decided_generations`: those the mask was
    made from, or the one that was asked for. `decided_by_value`: whether these settings use the value; where they do
    not, both numbers are 0.
    """

    kind: str
    estimator: str
    generation: int
    rows: Mapping[str, int]
    tokens: int
    response_tokens: int
    truncated_rows: int
    truncated_tokens: int
    scored_tokens: int
    kept_tokens: int | None
    kept_share: float | None
    rows_left_out: int
    branches: Mapping[str, BranchStats]
    pairs: PairStats | None
    values: Histogram
    rms: Mapping[str, float]
    mean: Mapping[str, float | None]
    stability_is_zero: bool
    decisions_changed: Mapping[str, int]
    decided_tokens: int
    decided_generations: tuple[int, ...]
    decided_by_value: bool
    generations: tuple[GenerationStats, ...]
    masks: tuple[MaskStats, ...]


def stats(run: str | Path, *, generation: int | None = None) -> Stats:
    """The numbers of a run, of its newest generation or the one given.

    Raises `UsageError` for a generation that is not there, `StoredDataError` where the run has no manifest or is
    damaged.
    """
    folder = Path(run)
    stored = manifest.read(folder)
    if not stored.generations:
        raise StoredDataError(f"{folder / manifest.NAME}: names no generation; run the `score` command that makes one")
    shown = choose_generation(folder, stored, generation)
    all_sums = {one.generation: _Sums.of(folder, stored, one) for one in stored.generations}
    sums = all_sums[shown.generation]
    counted = _counted(folder, stored, shown, edges_for(sums.core()))
    values = reduce(add, counted.branches)
    layout, counts, total = manifest.layout(stored), stored.counts, _branch(values)
    by_branch = zip(layout.branches, counted.branches, strict=True)
    return Stats(
        kind=layout.kind,
        estimator=str(stored.settings["estimator"]),
        generation=shown.generation,
        rows={"read": counts.read, **{status: sums.rows[status] for status in STATUSES}},
        tokens=counts.tokens,
        response_tokens=counts.response_tokens,
        truncated_rows=counts.truncated_rows,
        truncated_tokens=counts.truncated_tokens,
        scored_tokens=total.scored_tokens,
        kept_tokens=total.kept_tokens,
        kept_share=total.kept_share,
        rows_left_out=counted.rows_left_out,
        branches={prefix.rstrip("_"): _branch(one) for prefix, one in by_branch if prefix},
        pairs=sums.pairs(layout),
        values=values,
        rms=sums.rms(),
        mean=sums.mean(),
        stability_is_zero=not any(sums.rms()[name] for name in manifest.components(stored).stability),
        **_decisions(folder, stored, generation),
        generations=tuple(_generation(one, all_sums[one.generation], layout) for one in stored.generations),
        masks=tuple(_mask(one) for one in stored.masks),
    )


def _decisions(run: Path, stored: Manifest, generation: int | None) -> dict[str, Any]:
    """What stability decides in a mask of the newest one's settings."""
    config = _config(stored)
    if generation is not None:
        config = replace(config, generation=str(generation))
    elif stored.masks:
        # Not as the mask was told: its `latest` may be a newer one by now.
        config = replace(config, generation=",".join(map(str, stored.masks[-1].generations)), aggregate="mean")
    by_value = masks.depends_on_value(config.by)
    found = [remask.spreads(run, replace(config, stability_scale=scale)) for scale in SCALES] if by_value else []
    changed = [one.decisions_changed for one in found] or [0] * len(SCALES)
    return {
        "decisions_changed": dict(zip(SCALES, changed, strict=True)),
        "decided_tokens": found[0].response_tokens if found else 0,
        "decided_generations": tuple(one.generation for one in responses.chosen_generations(run, stored, config)),
        "decided_by_value": by_value,
    }


# ------------------------------------------------------------------------------------------------- shard by shard


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """A histogram of values for each branch, and the scored rows that the newest mask leaves out."""

    branches: tuple[Histogram, ...]
    rows_left_out: int


def _counted(run: Path, stored: Manifest, generation: Generation, edges: tuple[float, ...]) -> _Counted:
    layout = manifest.layout(stored)
    mask = stored.masks[-1] if stored.masks else None
    found = [empty_histogram(edges, has_mask=mask is not None) for _ in layout.branches]
    left_out = 0
    for index, shard in enumerate(generation.shards):
        scored = responses.load(run, [[shard]], ("value",), layout)
        kept: list[Bools] | list[None] = [None] * len(found)
        if mask:
            in_all = mask.generations == (generation.generation,)
            kept, lost = _kept(run, mask.shards[index], scored, layout, in_all=in_all)
            left_out += lost
        for number, (tokens, chosen) in enumerate(zip(scored.branches, kept, strict=True)):
            found[number] += histogram(tokens.columns["value"], chosen, edges)
    return _Counted(branches=tuple(found), rows_left_out=left_out)


def _kept(
    run: Path, shard: Shard, scored: responses.Scored, layout: Layout, *, in_all: bool
) -> tuple[list[Bools], int]:
    """Which tokens of each branch the mask keeps, and how many rows are not in it: none may be missing if `in_all`."""
    path = run / shard.path
    names = [f"{prefix}loss_mask" for prefix in layout.branches]
    table = shards.read(path, layout.train, ["row_id", *names])
    row_ids = table["row_id"].to_numpy()
    lost = int((~np.isin(scored.row_ids[0], row_ids)).sum())
    kept = []
    for name, tokens in zip(names, scored.branches, strict=True):
        loss_mask, lengths = shards.entries(table[name])
        wanted, position = tokens.columns["row_id"], tokens.columns["position"]
        there = np.isin(wanted, row_ids)
        row = np.searchsorted(row_ids, wanted[there])
        if (in_all and lost) or np.any(position[there] >= lengths[row]):
            raise StoredDataError(f"{path}: does not hold the rows that values/ does; run `verify`")
        chosen = np.zeros(len(wanted), np.bool_)
        chosen[there] = loss_mask[(np.cumsum(lengths) - lengths)[row] + position[there]] > 0
        kept.append(chosen)
    return kept, lost


class _Sums:
    """Sums over tokens and rows, one number per shard and column, so that their total does not depend on the order."""

    def __init__(self, components: Components) -> None:
        self.objectives = objectives(components)
        self.signals = (*components.of_value, *components.upstream, *components.drift, "value")
        self.tokens = 0
        self.squares: dict[str, list[float]] = {name: [] for name in (*self.signals, *self.objectives)}
        self.totals: dict[str, list[float]] = {name: [] for name in (*MEANS, *PAIR_COLUMNS)}
        self.present: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.sizes = np.zeros(1 << 12, np.int64)

    @classmethod
    def of(cls, run: Path, stored: Manifest, generation: Generation) -> _Sums:
        """The sums of a generation, read shard by shard."""
        layout, sums = manifest.layout(stored), cls(manifest.components(stored))
        names = [name for name in ("status", *PAIR_COLUMNS) if name in layout.values.names]
        for shard in generation.shards:
            for tokens in responses.load(run, [[shard]], (*sums.signals, *MEANS), layout).branches:
                sums.add(tokens.columns)
            table = shards.read(run / shard.path, layout.values, names)
            sums.rows.update(table["status"].to_pylist())
            for name in names[1:]:
                numbers = table[name].drop_null().to_numpy().astype(np.float64)
                sums._count(name, numbers, sums.totals)
                sums.present[f"{name} > 0"] += int((numbers > 0).sum())
        return sums

    def add(self, columns: Mapping[str, Floats]) -> None:
        """Count the tokens of a branch of a shard."""
        wide = {name: columns[name].astype(np.float64) for name in (*self.signals, *MEANS)}
        wide |= {name: composite.objective(wide, parts) for name, parts in self.objectives.items()}
        for name in self.squares:
            self._count(name, np.square(wide[name]), self.squares)
        for name in MEANS:
            self._count(name, wide[name], self.totals)
        self.tokens += len(wide["value"])
        # The upper 12 bits of a positive float32, sign left out: 16 sizes for each power of two.
        bits = np.abs(columns["value"]).view(np.uint32) >> 19
        self.sizes += np.bincount(bits, minlength=1 << 12)

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
        above = _share(self.present["margin > 0"], rows)
        return PairStats(rows=rows, omega=self._mean("omega"), margin=self._mean("margin"), margin_above_zero=above)

    def _mean(self, name: str) -> float | None:
        return math.fsum(self.totals[name]) / self.present[name] if self.present[name] else None

    def core(self) -> float:
        """A size that at least `_CORE` of |value| are below, at most 1/16 larger than need be; 1 where all are 0."""
        within = np.cumsum(self.sizes) >= _CORE * self.tokens
        sized = np.flatnonzero(self.sizes)
        first = int(np.argmax(within)) or int(sized[-1] if len(sized) else 0)
        upper = np.array([(first + 1) << 19], np.uint32).view(np.float32)[0]
        return min(float(upper), float(np.finfo(np.float32).max)) if first else 1.0


# ------------------------------------------------------------------------------------------------- from the manifest


def _config(stored: Manifest) -> MaskConfig:
    """The settings of the newest mask; the defaults where there is none."""
    settings = stored.masks[-1].settings if stored.masks else {}
    known: dict[str, Any] = {item.name: settings[item.name] for item in fields(MaskConfig) if item.name in settings}
    return MaskConfig(**known)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _branch(values: Histogram) -> BranchStats:
    scored = sum(values.count)
    kept = None if values.kept is None else sum(values.kept)
    return BranchStats(
        scored_tokens=scored, kept_tokens=kept, kept_share=None if kept is None else _share(kept, scored)
    )


def _generation(one: Generation, sums: _Sums, layout: Layout) -> GenerationStats:
    return GenerationStats(
        generation=one.generation,
        checkpoint=one.checkpoint,
        shards=len(one.shards),
        rows=sum(shard.rows for shard in one.shards),
        bytes=sum(shard.bytes for shard in one.shards),
        rms=sums.rms(),
        pairs=sums.pairs(layout),
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
