"""What a kept token weighs by the number that it is selected by: `--weights`, before weights are scaled to mean 1.

Arrays are those of `choose`: one entry per response token of one branch, in ascending (row, position). A formula gives
the weights of a block of tokens, chosen or not, so that no column of float64 is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.errors import UsageError
from alphatoken_curate.settings import parse_weights
from alphatoken_curate.signals import composite

Scores = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
Formula = Callable[[slice], NDArray[np.float64]]
"""Weights of a block of tokens, chosen or not."""

BLOCK = 1 << 20
"""Tokens that are looked at together, where one row or scope has not more."""

MOST_TILTED = 3.0
"""What no token weighs more than by `tilt`, before weights are scaled."""


def named(weights: str) -> Callable[[Scores, Ints, int], Formula]:
    """The formula of `--weights`, of scores, tokens of each row and rows of a scope (0: all). Raises `UsageError`."""
    found = parse_weights(weights)
    if found is None:
        raise UsageError(f"weights: found {weights!r}; give one of {', '.join(_FORMULAS)}, or tilt:C such as tilt:0.25")
    kind, strength = found
    return partial(_tilt, strength) if strength is not None else _FORMULAS[kind]


def drops(weights: str) -> bool:
    """Whether a token may weigh 0 though it is among the share that is kept."""
    kind, _ = parse_weights(weights) or ("", None)
    return kind in ("relu", "tilt")


def blocks_of(lengths: Ints, size: int = 1) -> Iterator[tuple[slice, slice]]:
    """Tokens and rows of one block after the other, each of whole scopes of `size` rows."""
    ends, row, start = np.cumsum(lengths), 0, 0
    while row < len(lengths):
        within = int(np.searchsorted(ends, start + BLOCK, side="right")) - row
        last = min(len(lengths), row + max(size, within - within % size))
        stop = int(ends[last - 1])
        yield slice(start, stop), slice(row, last)
        row, start = last, stop


def places_of(score: Scores, lengths: Ints, size: int) -> tuple[Ints, Ints, Ints]:
    """`order` (n,): tokens by scope, best first; in that order `place` in the scope, from 0, and its size `count`."""
    scope = np.repeat(np.arange(len(lengths)) // size, lengths)
    order = np.lexsort((-score, scope))
    starts = np.flatnonzero(np.diff(scope, prepend=-1))
    counts = np.diff(starts, append=len(scope))
    return order, np.arange(len(scope)) - np.repeat(starts, counts), np.repeat(counts, counts)


def _binary(score: Scores, _lengths: Ints, _size: int) -> Formula:
    return lambda part: np.ones(len(score[part]))


def _rank(score: Scores, lengths: Ints, size: int) -> Formula:
    place = np.empty(len(score), np.min_scalar_type(len(score)))
    if size == 0:
        place[np.argsort(-score, kind="stable")] = np.arange(len(score), dtype=place.dtype)
        return lambda part: (len(score) - place[part].astype(np.int64)) / len(score)
    count = np.empty_like(place)
    for part, rows in blocks_of(lengths, size):
        order, found, counts = places_of(score[part], lengths[rows], size)
        place[part][order], count[part][order] = found, counts
    return lambda part: (count[part] - place[part]) / count[part]


def _sigmoid(score: Scores, _lengths: Ints, _size: int) -> Formula:
    rms = composite.rms(*_parts(score)) or 1.0
    tiny = np.finfo(np.float64).tiny  # a sigmoid is never 0
    return lambda part: np.maximum(np.exp(-np.logaddexp(0.0, -(score[part].astype(np.float64) / rms))), tiny)


def _relu(score: Scores, _lengths: Ints, _size: int) -> Formula:
    return lambda part: np.maximum(score[part], 0).astype(np.float64)


def _tilt(strength: float, score: Scores, _lengths: Ints, _size: int) -> Formula:
    sd = _deviation(score)
    if not sd:
        return lambda part: np.ones(len(score[part]))
    return lambda part: np.clip(1 + strength * (score[part].astype(np.float64) / sd), 0.0, MOST_TILTED)


def _deviation(score: Scores) -> float:
    """Root of the mean square distance from the mean, in float64; exactly 0 where all are the same."""
    if not len(score):
        return 0.0
    # The first is taken away before sums are: the mean of equal numbers need not be that number.
    first = np.float64(score[0])
    mean = math.fsum(float((part.astype(np.float64) - first).sum()) for part in _parts(score)) / len(score)
    squares = (float(np.square(part.astype(np.float64) - first - mean).sum()) for part in _parts(score))
    return math.sqrt(math.fsum(squares) / len(score))


def _parts(score: Scores) -> Iterator[Scores]:
    for start in range(0, len(score), BLOCK):
        yield score[start : start + BLOCK]


_FORMULAS: dict[str, Callable[[Scores, Ints, int], Formula]] = {
    "binary": _binary,
    "rank": _rank,
    "sigmoid": _sigmoid,
    "relu": _relu,
}
