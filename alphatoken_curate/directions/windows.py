"""The windows a rehearsed training is parted into, the segments of each, and the tokens of the rows it takes.

What is left of a division comes first: the last window is whole, so values of its steps, which go by the outcome of the
whole training, are those that a rehearsal without windows gives; and the last segment of a window, which alone is not
replayed, is whole too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.tokens.plan import Batch, places_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """Steps in a row that are gone back through by themselves, and the N tokens of the rows they take."""

    name: str
    """Of its part of what is kept; empty where it is the whole training."""
    borders: Sequence[int]
    """Where its segments start, and its end: steps done before the state there."""
    rows: NDArray[np.int64]
    """Indices of the rows it takes, upwards, each once."""
    starts: NDArray[np.int64]
    """Where their tokens start among those of all of these rows; the last is N."""
    is_last: bool

    def places(self, batch: Batch) -> NDArray[np.int64]:
        """(N of the batch,) where the tokens of a batch are among its own."""
        return places_of(np.searchsorted(self.rows, np.asarray(batch.rows)), self.starts)

    def places_in_all(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) where its tokens are among those of all rows, which start at `starts`."""
        return places_of(self.rows, starts)


def windows(steps: Sequence[Sequence[int]], lengths: NDArray[np.int64], size: int | None) -> Iterator[Window]:
    """The windows of a training of these steps, of `size` steps but for the first; None is all of them.

    `steps` are indices of sequences, `lengths` the response tokens of each.
    """
    for number, borders in enumerate(every := borders_of(len(steps), size)):
        rows = np.unique(np.concatenate([np.asarray(steps[k]) for k in range(borders[0], borders[-1])])).astype(
            np.int64
        )
        yield Window(
            name=f"w{number}" if len(every) > 1 else "",
            borders=borders,
            rows=rows,
            starts=np.concatenate([[0], np.cumsum(lengths[rows])]).astype(np.int64),
            is_last=number + 1 == len(every),
        )


def borders_of(steps: int, size: int | None) -> list[list[int]]:
    """Of each window where its segments, of about the root of its steps, start, and its end."""
    found = []
    for first, last in pairwise(_cut(steps, size or steps)):
        count = last - first
        found.append([first + k for k in _cut(count, math.isqrt(max(1, count - 1)) + 1)])
    return found


def _cut(count: int, size: int) -> list[int]:
    """From 0 to `count` in pieces of a size; the first is what is left."""
    return [0, *range((count - 1) % size + 1, count + 1, size)]
