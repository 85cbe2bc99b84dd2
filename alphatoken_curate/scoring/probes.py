"""Which batches of a stage are tried, and what all of them would take by those: arithmetic alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alphatoken_curate.tokens.plan import sequences
from alphatoken_curate.tokens.tokenise import AnyRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a batch: its tokens, padding included, and how long its rows are."""

    padded: int
    width: int


def choose(sizes: Sequence[Size]) -> tuple[list[int], list[int]]:
    """Batches to try, by number: what warms up, untimed, and what is timed.

    The largest comes first, for its memory; then those in the middle of the longer and of the shorter half of all
    tokens. One or two batches are timed as they are: they are the whole stage.
    """
    if len(sizes) <= 2:
        return [], list(range(len(sizes)))
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i].width)
    seen = np.cumsum([sizes[i].padded for i in order])
    middles = [order[int(np.searchsorted(seen, share * seen[-1]))] for share in (0.25, 0.75)]
    return [max(order, key=lambda i: sizes[i].padded)], middles


def predict(sizes: Sequence[Size], seconds: Mapping[int, float]) -> float:
    """Seconds of all batches, from those of one or two of them: tokens * (b + c * width).

    Where two batches are of one width, or all are known, there is no slope to find. No width is taken to be cheaper
    than half of the cheapest that was seen.
    """
    known = sorted((sizes[i].width, taken / sizes[i].padded) for i, taken in seconds.items())
    if len(sizes) == len(seconds):
        return sum(seconds.values())
    (short, low), (long, high) = known[0], known[-1]
    slope = (high - low) / (long - short) if long > short else 0.0
    rate = low if long > short else sum(each for _, each in known) / len(known)
    least = min(low, high) / 2
    return sum(size.padded * max(least, rate + slope * (size.width - short)) for size in sizes)


def size_of(rows: Sequence[AnyRow], indices: Sequence[int]) -> Size:
    """Of the batch of some rows, by index."""
    lengths = [len(one.input_ids) for one in sequences([rows[i] for i in indices])]
    return Size(padded=len(lengths) * max(lengths), width=max(lengths))
