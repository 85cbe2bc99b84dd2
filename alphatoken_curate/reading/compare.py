"""Two scorings of the same rows side by side: of two runs, or of two generations of one.

Tokens are those that both scored, in rows whose responses are the same in both. What each keeps is decided by the
settings of its run's newest mask, from the values of its generation alone, so that masks compare as values do. Holds
the tokens of both in memory (about 100 bytes each).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks import criteria, remask, responses
from alphatoken_curate.masks.always import always_kept
from alphatoken_curate.reading.row import read_row
from alphatoken_curate.reading.scan import choose_generation
from alphatoken_curate.reading.stats import newest_settings
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.direction import direction
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.manifest import Generation, Manifest
from alphatoken_curate.runs.schema import rows_and_turns

Columns = Mapping[str, NDArray[Any]]
Bools = NDArray[np.bool_]

_AROUND = 4
"""Tokens told on either side of one that changed."""

_SETTINGS = tuple(item.name for item in fields(MaskConfig) if item.name not in ("generation", "aggregate"))
"""What decides a mask of one generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two: a generation of a run, and the settings that decide what it keeps."""

    run: str
    generation: int
    checkpoint: str
    estimator: str
    direction: str
    mask_settings: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How many `tokens` both keep, only the first, only the second, and neither.

    `jaccard`: of the tokens that either keeps, the share that both do. `by_chance`: about that of two masks that keep
    as many tokens each and know nothing of each other. None where no token is kept.
    """

    tokens: int
    both: int
    only_first: int
    only_second: int
    neither: int
    jaccard: float | None
    by_chance: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A token whose place among all changed: `values` in the unit of its run, `ranks` in (0, 1), `kept` in each.

    A rank is the share of tokens that are below it by value. `text` is what it adds to its sequence, `before` and
    `after` what its neighbours do; none of it is safe to show as it is.
    """

    row_id: int
    turn: int = 0
    branch: str
    position: int
    before: str
    text: str
    after: str
    values: tuple[float, float]
    ranks: tuple[float, float]
    kept: tuple[bool, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """From a generation to the next: Spearman's correlation of values (None where one side is constant), and masks."""

    first: int
    second: int
    correlation: float | None
    masks: Overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two scorings: `tokens` in `rows` that are in both; `rows_apart`: scored in either, and not alike in both.

    Where each answer is a sequence of its own, a row is among the first by one of them, and among the others too.
    `correlations`: Spearman's of each signal that both have, None where one side is constant; `rms` of the signal in
    each. `changed`: tokens, that first whose rank by value changed most. `steps`: between generations of one run, from
    each to the next.
    """

    first: Side
    second: Side
    kind: str
    rows: int
    tokens: int
    rows_apart: int
    correlations: Mapping[str, float | None]
    rms: Mapping[str, tuple[float, float]]
    masks: Overlap
    changed: tuple[Changed, ...]
    steps: tuple[Step, ...]


def compare(
    run: str | Path,
    other: str | Path | None = None,
    *,
    generations: tuple[int | None, int | None] = (None, None),
    changed: int = 10,
) -> Comparison:
    """A run beside another one, by default the newest generation of each; or, alone, its first beside its newest.

    `generations`: of the one and the other in place of these; `changed`: how many tokens to tell. Rows are the same
    where their numbers and the tokens of their responses are. Raises `UsageError` for a generation that is not there,
    one generation alone, rows of two kinds, or no row in common; `StoredDataError` for damage.
    """
    first, second = _sides(Path(run), None if other is None else Path(other), generations)
    names = tuple(name for name in first.signals if name in second.signals)
    both = _Both.of(first.load(names), second.load(names))
    if not both.rows:
        raise UsageError(f"{first.run} and {second.run}: no row is scored in both with the same tokens")
    known = [name for name in names if len(both.numbers(name)[0])]
    return Comparison(
        first=first.told(),
        second=second.told(),
        kind=first.layout.kind,
        rows=both.rows,
        tokens=both.tokens,
        rows_apart=both.rows_apart,
        correlations={name: spearman(*both.numbers(name)) for name in known},
        rms={name: _rms(*both.numbers(name)) for name in known},
        masks=both.overlap(),
        changed=tuple(_changed(both, first, changed)),
        steps=tuple(_steps(first, second)) if other is None else (),
    )


def spearman(one: NDArray[Any], other: NDArray[Any]) -> float | None:
    """Rank correlation of (N,) numbers, in [-1, 1]; equal numbers share their mean rank. None where one is constant."""
    ranks = [_ranks(numbers) for numbers in (one, other)]
    centred = [rank - rank.mean() for rank in ranks]
    sizes = [float(np.sqrt((rank * rank).sum())) for rank in centred]
    return float((centred[0] * centred[1]).sum() / (sizes[0] * sizes[1])) if all(sizes) else None


def _ranks(numbers: NDArray[Any]) -> NDArray[np.float64]:
    """(N,) from 1 to N; of equal numbers their mean."""
    _, where, count = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[where]


def _rms(*both: NDArray[Any]) -> tuple[float, float]:
    first, second = (float(np.sqrt(np.mean(np.square(one, dtype=np.float64)))) for one in both)
    return first, second


# ------------------------------------------------------------------------------------------------------- the two sides


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scoring:
    """A generation of a run."""

    run: Path
    stored: Manifest
    generation: Generation

    @property
    def layout(self) -> Any:
        return manifest.layout(self.stored)

    @property
    def signals(self) -> tuple[str, ...]:
        return manifest.components(self.stored).signals

    def told(self) -> Side:
        config = newest_settings(self.stored)
        return Side(
            run=str(self.run),
            generation=self.generation.generation,
            checkpoint=self.generation.checkpoint,
            estimator=str(self.stored.settings["estimator"]),
            direction=direction(self.stored),
            mask_settings={name: getattr(config, name) for name in _SETTINGS},
        )

    def load(self, names: Sequence[str]) -> list[Columns]:
        """Of each branch these signals, row_id, position, token_id, and which tokens are kept."""
        config, known = newest_settings(self.stored), manifest.components(self.stored)
        if not criteria.is_readable(config.by):
            raise UsageError(
                f"{self.run}: its newest mask selects by {config.by!r}, SQL that --by does not take, so what it keeps"
                " cannot be computed again; make a mask by another expression (`mask --by`), and compare then"
            )
        needed = criteria.columns_needed(config.by, known, self.layout)
        stays = always_kept(self.run, self.stored, config)
        wanted = tuple(dict.fromkeys((*names, "token_id", *needed, *(stays.columns if stays else ()))))
        scored = responses.load(self.run, [[shard] for shard in self.generation.shards], wanted, self.layout)
        kept = remask.keeps(scored.branches, self.layout, known, config, stays)
        return [
            {"kept": stays, **{name: one.columns[name] for name in (*names, "sequence", "position", "token_id")}}
            for one, stays in zip(scored.branches, kept, strict=True)
        ]


def _sides(run: Path, other: Path | None, numbers: tuple[int | None, int | None]) -> tuple[_Scoring, _Scoring]:
    stored = manifest.read(run)
    known = [one.generation for one in stored.generations]
    first, second = numbers
    if other is None:
        if len(known) < 2 and first == second:
            raise UsageError(f"{run}: has one generation; name another run to compare it with, or `refresh` it")
        first = min(known, default=None) if first is None else first
        return _scoring(run, stored, first), _scoring(run, stored, second)
    beside = manifest.read(other)
    if manifest.layout(stored).kind != manifest.layout(beside).kind:
        raise UsageError(f"{run} and {other}: one holds preference pairs, the other rows of one answer")
    return _scoring(run, stored, first), _scoring(other, beside, second)


def _scoring(run: Path, stored: Manifest, number: int | None) -> _Scoring:
    return _Scoring(run=run, stored=stored, generation=choose_generation(run, stored, number))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Both:
    """The same tokens in both scorings, all branches one after the other; `branch` (N,) the index of each."""

    columns: tuple[Columns, Columns]
    branch: NDArray[np.int64]
    rows: int
    rows_apart: int

    @classmethod
    def of(cls, one: Sequence[Columns], other: Sequence[Columns]) -> _Both:
        """Join them. Every scored row has a response token in each branch."""
        seen = [np.unique(side[0]["sequence"]) for side in (one, other)]
        alike = np.intersect1d(seen[0], seen[1])
        for mine, theirs in zip(one, other, strict=True):
            alike = alike[_same(mine, theirs, alike)]
        parts = [[_only(branch, alike) for branch in side] for side in (one, other)]
        first, second = ({name: np.concatenate([part[name] for part in side]) for name in side[0]} for side in parts)
        branch = np.repeat(np.arange(len(parts[0])), [len(part["sequence"]) for part in parts[0]])
        apart = np.setdiff1d(np.union1d(*seen), alike)
        return cls(columns=(first, second), branch=branch, rows=_rows(alike), rows_apart=_rows(apart))

    @property
    def tokens(self) -> int:
        return len(self.branch)

    def numbers(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """A signal where both have it."""
        first, second = (one[name] for one in self.columns)
        there = ~(np.isnan(first) | np.isnan(second))
        return first[there], second[there]

    def overlap(self) -> Overlap:
        """Of what each keeps."""
        first, second = (one["kept"] for one in self.columns)
        both, either = int((first & second).sum()), int((first | second).sum())
        together = int(first.sum()) * int(second.sum()) / self.tokens
        return Overlap(
            tokens=self.tokens,
            both=both,
            only_first=int(first.sum()) - both,
            only_second=int(second.sum()) - both,
            neither=self.tokens - either,
            jaccard=both / either if either else None,
            by_chance=together / (int(first.sum()) + int(second.sum()) - together) if either else None,
        )


def _rows(keys: NDArray[np.int64]) -> int:
    """How many rows these sequences are of."""
    return len(np.unique(rows_and_turns(keys)[0]))


def _same(one: Columns, other: Columns, keys: NDArray[np.int64]) -> Bools:
    """(R,) whether the response tokens of each row, which both hold, are the same and at the same places."""
    mine, theirs = _only(one, keys), _only(other, keys)
    rows = [np.searchsorted(keys, side["sequence"]) for side in (mine, theirs)]
    lengths = [np.bincount(row, minlength=len(keys)) for row in rows]
    same: Bools = lengths[0] == lengths[1]
    paired = [same[row] for row in rows]
    for name in ("position", "token_id"):
        differs = mine[name][paired[0]] != theirs[name][paired[1]]
        same[rows[0][paired[0]][differs]] = False
    return same


def _only(columns: Columns, keys: NDArray[np.int64]) -> Columns:
    there = np.isin(columns["sequence"], keys)
    return {name: column[there] for name, column in columns.items()}


# ------------------------------------------------------------------------------------------------------ what is told


def _steps(first: _Scoring, second: _Scoring) -> Iterator[Step]:
    """From each generation to the next, of those from one to the other."""
    low, high = sorted(one.generation.generation for one in (first, second))
    known = [one.generation for one in first.stored.generations if low <= one.generation <= high]
    for a, b in pairwise(known):
        both = _Both.of(*(_scoring(first.run, first.stored, number).load(["value"]) for number in (a, b)))
        correlation = spearman(*(one["value"] for one in both.columns))
        yield Step(first=a, second=b, correlation=correlation, masks=both.overlap())


def _changed(both: _Both, first: _Scoring, most: int) -> Iterator[Changed]:
    """The tokens whose rank changed most, if it did; of equal ones the first."""
    values = [one["value"] for one in both.columns]
    ranks = [(_ranks(one) - 0.5) / both.tokens for one in values]
    moved = np.abs(ranks[1] - ranks[0])
    for at in np.argsort(-moved, kind="stable")[: min(most, int((moved > 0).sum()))]:
        key, position = (int(both.columns[0][name][at]) for name in ("sequence", "position"))
        row, turn = (int(one) for one in rows_and_turns(np.array(key)))
        found = read_row(first.run, row=row, turn=turn, generation=first.generation.generation)
        branch = found.branches[both.branch[at]]
        yield Changed(
            row_id=row,
            turn=turn,
            branch=branch.name,
            position=position,
            before="".join(branch.texts[max(0, position - _AROUND) : position]),
            text=branch.texts[position],
            after="".join(branch.texts[position + 1 : position + 1 + _AROUND]),
            values=(float(values[0][at]), float(values[1][at])),
            ranks=(float(ranks[0][at]), float(ranks[1][at])),
            kept=(bool(both.columns[0]["kept"][at]), bool(both.columns[1]["kept"][at])),
        )
