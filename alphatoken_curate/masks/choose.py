"""Which response tokens train, and with what weight (paper arXiv 2606.01635, Eq. 13).

Everything here is a pure function of flat arrays with one entry per response token, in ascending (row, position):

    score     (n,) floating, finite     the number to select on; the highest are kept
    lengths   (r,) integer              response tokens of each *scored* row, in row_id order; n is their sum

Of preference rows each branch is masked by itself: its tokens alone are what a call is given.

Ties: of equal scores the one with the lower row goes first, then the one with the lower position. With the arrays in
that order this is "the lower index first", which is what every sort here does.

Beside its arguments and its result a call holds 5 bytes per token (`rank`: 20), and what a block of about a million
tokens takes: a scope that is larger, such as `batch:N` of all rows, is one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.errors import CurateError, UsageError
from alphatoken_curate.signals import composite

Scores = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
Formula = Callable[[slice], NDArray[np.float64]]
"""Weights of a block of tokens, chosen or not."""

_BLOCK = 1 << 20
"""Tokens that are looked at together, where one row or scope has not more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weighed:
    """`weight` (n,) float32, mean 1 where above 0; `given_back`: rows that got their best token back."""

    weight: NDArray[np.float32]
    given_back: int


# ---------------------------------------------------------------------------------------------------- settings, read


def parse_keep(keep: float | str) -> Fraction | None:
    """The exact share that the decimal text of `keep` names, or None for `positive`.

    0.1 is one tenth, not the double next to it, so that ceil(0.1 * 10) is 1.
    """
    if keep == "positive":
        return None
    try:
        share = Fraction(str(keep))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise UsageError(f"keep: found {keep!r}; give a share above 0 and up to 1, such as 0.5, or `positive`")
    return share


def parse_scope(scope: str) -> int:
    """Rows that share one quota: 0 for `global` (all of them), 1 for `row`, N for `batch:N`."""
    if scope in ("global", "row"):
        return int(scope == "row")
    kind, _, size = scope.partition(":")
    if kind == "batch" and size.isascii() and size.isdecimal() and len(size) <= 18 and int(size) > 0:
        return int(size)
    raise UsageError(f"scope: found {scope!r}; give `global`, `row` or `batch:N` with N rows, such as `batch:16`")


# ---------------------------------------------------------------------------------------------------------- the mask


def kept(score: Scores, lengths: Ints, *, keep: float | str, scope: str, allow_empty_rows: bool = False) -> Bools:
    """Eq. 13: exactly ceil(keep * n) tokens of each scope, the highest first, or those whose score is above 0.

    Then, unless `allow_empty_rows`, each row that lost every token gets its best one back. (n,) bool.
    Raises `UsageError` for a share or scope that cannot be used, `CurateError` for NaN, infinity or other lengths.
    """
    _check(score, lengths)
    chosen = _choose(score, lengths, parse_keep(keep), parse_scope(scope))
    for part, rows in _blocks(lengths) if not allow_empty_rows else ():
        chosen[part][_best_of_lost_rows(score[part], lengths[rows], chosen[part])] = True
    return chosen


def weighed(
    score: Scores,
    lengths: Ints,
    *,
    keep: float | str,
    scope: str,
    weights: str = "binary",
    allow_empty_rows: bool = False,
) -> Weighed:
    """Loss weights of the kept tokens, 0 elsewhere, with mean 1 over the weights above 0 of the whole data set.

    | weights | of a kept token |
    |---|---|
    | binary | 1 |
    | rank | its ascending rank among all n response tokens of its scope (1 .. n), divided by n |
    | sigmoid | 1 / (1 + exp(-score / RMS)), RMS of the score over all response tokens (0.5 where RMS is 0) |
    | relu | max(score, 0) |

    A row left without any weight above 0 gets its best token back (unless `allow_empty_rows`): with that token's weight
    by the formula, or where that is 0 the smallest weight above 0 of the run, or 1 if there is none. No weight above 0
    is stored as less than the smallest normal float32. Raises as `kept`.
    """
    _check(score, lengths)
    size = parse_scope(scope)
    if weights not in _FORMULAS:
        raise UsageError(f"weights: found {weights!r}; give one of {', '.join(_FORMULAS)}")
    raw = _Raw(_FORMULAS[weights](score, lengths, size), _choose(score, lengths, parse_keep(keep), size))
    for part, rows in _blocks(lengths) if not allow_empty_rows else ():
        raw.give_back(part, _best_of_lost_rows(score[part], lengths[rows], raw.of(part) > 0))
    return Weighed(weight=_mean_one(raw, [part for part, _ in _blocks(lengths)]), given_back=raw.given_back)


def _check(score: Scores, lengths: Ints) -> None:
    ends = np.cumsum(lengths)
    if len(score) != (ends[-1] if len(ends) else 0) or np.any(lengths < 0):
        raise CurateError(f"{len(score)} scores of {len(lengths)} rows, whose lengths say otherwise")
    finite = np.isfinite(score)
    if not finite.all():
        at = int(np.argmin(finite))
        row = int(np.searchsorted(ends, at, side="right"))
        token = at - int(ends[row] - lengths[row])
        raise CurateError(f"scored row {row}, response token {token}: its score is {float(score[at])}")


def _blocks(lengths: Ints, size: int = 1) -> Iterator[tuple[slice, slice]]:
    """Tokens and rows of one block after the other, each of whole scopes of `size` rows."""
    ends, row, start = np.cumsum(lengths), 0, 0
    while row < len(lengths):
        within = int(np.searchsorted(ends, start + _BLOCK, side="right")) - row
        last = min(len(lengths), row + max(size, within - within % size))
        stop = int(ends[last - 1])
        yield slice(start, stop), slice(row, last)
        row, start = last, stop


def _choose(score: Scores, lengths: Ints, share: Fraction | None, size: int) -> Bools:
    if share is None:
        return np.greater(score, 0)
    if size == 0:
        return _top(score, _quota(len(score), share))
    chosen = np.empty(len(score), np.bool_)
    for part, rows in _blocks(lengths, size):
        order, place, count = _places(score[part], lengths[rows], size)
        sizes, which = np.unique(count, return_inverse=True)
        quota = np.array([_quota(int(n), share) for n in sizes], np.int64)[which]
        chosen[part][order] = place < quota
    return chosen


def _quota(n: int, share: Fraction) -> int:
    return -(-n * share.numerator // share.denominator)


def _top(score: Scores, k: int) -> Bools:
    """The k highest of all, without a full sort."""
    if k == 0:
        return np.zeros(len(score), np.bool_)
    threshold = np.partition(score, len(score) - k)[len(score) - k]
    chosen: Bools = np.greater(score, threshold)
    left = k - int(np.count_nonzero(chosen))
    for start in range(0, len(score), _BLOCK):
        ties = np.flatnonzero(score[start : start + _BLOCK] == threshold)[:left]
        chosen[start + ties] = True
        left -= len(ties)
    return chosen


def _places(score: Scores, lengths: Ints, size: int) -> tuple[Ints, Ints, Ints]:
    """`order` (n,): tokens by scope, best first; in that order `place` in the scope, from 0, and its size `count`."""
    scope = np.repeat(np.arange(len(lengths)) // size, lengths)
    order = np.lexsort((-score, scope))
    starts = np.flatnonzero(np.diff(scope, prepend=-1))
    counts = np.diff(starts, append=len(scope))
    return order, np.arange(len(scope)) - np.repeat(starts, counts), np.repeat(counts, counts)


def _best_of_lost_rows(score: Scores, lengths: Ints, alive: Bools) -> NDArray[np.int64]:
    """Index of the best token of each row that has tokens, none of them alive."""
    counts = lengths[lengths > 0]
    if not len(counts):
        return np.empty(0, np.int64)
    starts = np.cumsum(counts) - counts
    lost = ~np.logical_or.reduceat(alive, starts)
    best = np.maximum.reduceat(score, starts)
    number = np.repeat(np.arange(len(counts)), counts)
    candidates = np.flatnonzero(lost[number] & (best[number] == score))
    return candidates[np.flatnonzero(np.diff(number[candidates], prepend=-1))]


class _Raw:
    """Weights before they are scaled, float64, made anew for each block that is asked for."""

    def __init__(self, formula: Formula, chosen: Bools) -> None:
        self._formula, self._chosen = formula, chosen
        self._weightless: list[NDArray[np.int64]] = []
        self.given_back = 0

    def of(self, part: slice, least: float = 0.0) -> NDArray[np.float64]:
        """Of the tokens of a block; `least`: of those that were given back and that the formula gives none."""
        raw = np.where(self._chosen[part], self._formula(part), 0.0)
        for places in self._weightless if least else ():
            raw[places[(places >= part.start) & (places < part.stop)] - part.start] = least
        return raw

    def give_back(self, part: slice, places: NDArray[np.int64]) -> None:
        """Choose these tokens of a block too."""
        self._chosen[part][places] = True
        self._weightless.append(part.start + places[self._formula(part)[places] == 0])
        self.given_back += len(places)


def _mean_one(raw: _Raw, parts: Sequence[slice]) -> NDArray[np.float32]:
    weight = np.zeros(parts[-1].stop if parts else 0, np.float32)
    least, largest, total, count = np.inf, 0.0, 0.0, 0
    for part in parts:
        found = raw.of(part)
        least = min(least, float(np.min(found, where=found > 0, initial=np.inf)))
        largest = max(largest, float(found.max(initial=0.0)))
    if not largest:
        least = largest = 1.0
    for part in parts:
        found = raw.of(part, least)
        total += float((found / largest).sum())  # divided first, so that the sum of the mean cannot overflow
        count += int(np.count_nonzero(found))
    for part in parts:
        found = raw.of(part, least)
        normal = (found / largest / (total / max(1, count) or 1.0)).astype(np.float32)
        # A weight must not round to 0: a kept token would stop being trained without a word.
        weight[part] = np.where(found > 0, np.maximum(normal, np.finfo(np.float32).tiny), np.float32(0))
    return weight


def _binary(score: Scores, _lengths: Ints, _size: int) -> Formula:
    return lambda part: np.ones(len(score[part]))


def _rank(score: Scores, lengths: Ints, size: int) -> Formula:
    place = np.empty(len(score), np.min_scalar_type(len(score)))
    if size == 0:
        place[np.argsort(-score, kind="stable")] = np.arange(len(score), dtype=place.dtype)
        return lambda part: (len(score) - place[part].astype(np.int64)) / len(score)
    count = np.empty_like(place)
    for part, rows in _blocks(lengths, size):
        order, found, counts = _places(score[part], lengths[rows], size)
        place[part][order], count[part][order] = found, counts
    return lambda part: (count[part] - place[part]) / count[part]


def _sigmoid(score: Scores, _lengths: Ints, _size: int) -> Formula:
    rms = composite.rms(*(score[start : start + _BLOCK] for start in range(0, len(score), _BLOCK))) or 1.0
    tiny = np.finfo(np.float64).tiny  # a sigmoid is never 0
    return lambda part: np.maximum(np.exp(-np.logaddexp(0.0, -(score[part].astype(np.float64) / rms))), tiny)


def _relu(score: Scores, _lengths: Ints, _size: int) -> Formula:
    return lambda part: np.maximum(score[part], 0).astype(np.float64)


_FORMULAS: dict[str, Callable[[Scores, Ints, int], Formula]] = {
    "binary": _binary,
    "rank": _rank,
    "sigmoid": _sigmoid,
    "relu": _relu,
}
