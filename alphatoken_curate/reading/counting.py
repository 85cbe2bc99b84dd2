"""Histograms of a run's tokens: of each signal, and of the value by branch and by source. Read shard by shard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.masks import responses
from alphatoken_curate.reading.histogram import Histogram, empty_histogram, histogram
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.manifest import Generation, Manifest
from alphatoken_curate.runs.schema import Layout
from alphatoken_curate.runs.shards import Shard

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Edges = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """The scored response tokens of some rows, of which `kept_tokens` are kept (None without a mask).

    `mean` and `rms` of their values, None where there is no token; `values`: the histogram of them.
    """

    scored_tokens: int
    kept_tokens: int | None
    kept_share: float | None
    mean: float | None
    rms: float | None
    values: Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """`histograms` of each signal over all branches; the value of `every` token, and by branch and by source.

    `rows_left_out`: scored rows that the newest mask does not hold.
    """

    histograms: Mapping[str, Histogram]
    every: GroupStats
    branches: Mapping[str, GroupStats]
    sources: Mapping[str, GroupStats]
    rows_left_out: int


def counted(run: Path, stored: Manifest, generation: Generation, edges: Mapping[str, Edges]) -> Counted:
    """The tokens of a generation between these edges of each signal, and which of them the newest mask keeps.

    `edges` name `value` at least. Raises `StoredDataError` for damage.
    """
    layout = manifest.layout(stored)
    mask = stored.masks[-1] if stored.masks else None
    found = {name: empty_histogram(edges[name], has_mask=mask is not None) for name in edges}
    every, branches, sources = (_Groups(edges["value"], has_mask=mask is not None) for _ in range(3))
    left_out = 0
    for index, shard in enumerate(generation.shards):
        scored = responses.load(run, [[shard]], tuple(edges), layout)
        names, of_row = _sources(run, shard, layout)
        kept: list[Bools] | list[None] = [None] * len(layout.branches)
        if mask:
            in_all = mask.generations == (generation.generation,)
            kept, lost = _kept(run, mask.shards[index], scored, layout, in_all=in_all)
            left_out += lost
        for prefix, tokens, chosen in zip(layout.branches, scored.branches, kept, strict=True):
            for name in edges:
                column = tokens.columns[name]
                there = ~np.isnan(column)
                found[name] += histogram(column[there], None if chosen is None else chosen[there], edges[name])
            values, nothing = tokens.columns["value"], np.zeros(len(tokens.row), np.int64)
            every.add([""], nothing, values, chosen)
            branches.add([prefix.rstrip("_")], nothing, values, chosen)
            sources.add(names, of_row[tokens.row], values, chosen)
    whole = every.stats().get("") or _group(empty_histogram(edges["value"], has_mask=mask is not None), [], [])
    of_branch = branches.stats() if layout.kind == "preference" else {}
    return Counted(histograms=found, every=whole, branches=of_branch, sources=sources.stats(), rows_left_out=left_out)


class _Groups:
    """Counts and sums of the values of groups of tokens, by name: one number per shard, so that order is nothing."""

    def __init__(self, edges: Edges, *, has_mask: bool) -> None:
        self.edges, self.has_mask = edges, has_mask
        self.found: dict[str, tuple[list[Histogram], list[float], list[float]]] = {}

    def add(self, names: Sequence[str], which: NDArray[np.int64], values: Floats, kept: Bools | None) -> None:
        """Tokens of some groups: `which` (N,) of the `names` each belongs to."""
        bins, wide = len(self.edges) + 1, values.astype(np.float64)
        places = which * bins + np.searchsorted(self.edges, wide, side="right")

        def table(chosen: Bools | slice) -> NDArray[np.int64]:
            return np.bincount(places[chosen], minlength=len(names) * bins).reshape(len(names), bins)

        count = table(slice(None))
        stays = None if kept is None else table(kept)
        totals, squares = (np.bincount(which, weights=x, minlength=len(names)) for x in (wide, wide * wide))
        for place, name in enumerate(names):
            part = Histogram(
                edges=self.edges,
                count=tuple(count[place].tolist()),
                kept=None if stays is None else tuple(stays[place].tolist()),
            )
            parts, sums, sums_of_squares = self.found.setdefault(name, ([], [], []))
            parts.append(part)
            sums.append(float(totals[place]))
            sums_of_squares.append(float(squares[place]))

    def stats(self) -> dict[str, GroupStats]:
        """Each group by its name, in the order they were met."""
        empty = empty_histogram(self.edges, has_mask=self.has_mask)
        return {name: _group(sum(parts, empty), *sums) for name, (parts, *sums) in self.found.items()}


def _group(values: Histogram, totals: Sequence[float], squares: Sequence[float]) -> GroupStats:
    tokens = sum(values.count)
    kept = None if values.kept is None else sum(values.kept)
    return GroupStats(
        scored_tokens=tokens,
        kept_tokens=kept,
        kept_share=None if kept is None or not tokens else kept / tokens,
        mean=math.fsum(totals) / tokens if tokens else None,
        rms=math.sqrt(math.fsum(squares) / tokens) if tokens else None,
        values=values,
    )


def _sources(run: Path, shard: Shard, layout: Layout) -> tuple[list[str], NDArray[np.int64]]:
    """The sources of a shard's scored rows, and which of them each row is from."""
    table = shards.read_shard(run, shard, layout.values, ["status", "source"])
    column = pc.dictionary_encode(table.filter(pc.equal(table["status"], "scored"))["source"]).combine_chunks()
    return column.dictionary.to_pylist(), column.indices.to_numpy().astype(np.int64)


def _kept(
    run: Path, shard: Shard, scored: responses.Scored, layout: Layout, *, in_all: bool
) -> tuple[list[Bools], int]:
    """Which tokens of each branch the mask keeps, and how many rows are not in it: none may be missing if `in_all`."""
    path = run / shard.path
    names = [f"{prefix}loss_mask" for prefix in layout.branches]
    table = shards.read_shard(run, shard, layout.train, ["row_id", "turn", *names])
    keys = responses.sequences_of(table)
    lost = int((~np.isin(scored.keys[0], keys)).sum())
    kept = []
    for name, tokens in zip(names, scored.branches, strict=True):
        loss_mask, lengths = shards.entries(table[name])
        wanted, position = tokens.columns["sequence"], tokens.columns["position"]
        there = np.isin(wanted, keys)
        row = np.searchsorted(keys, wanted[there])
        if (in_all and lost) or np.any(position[there] >= lengths[row]):
            raise StoredDataError(f"{path}: does not hold the rows that values/ does; run `verify`")
        chosen = np.zeros(len(wanted), np.bool_)
        chosen[there] = loss_mask[(np.cumsum(lengths) - lengths)[row] + position[there]] > 0
        kept.append(chosen)
    return kept, lost
