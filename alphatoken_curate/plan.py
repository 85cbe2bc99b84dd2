"""Which rows run together: shards, batches and the padded arrays they become. A function of data and budget alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.rows import BadRow
from alphatoken_curate.tokens import TokenRow

R = TypeVar("R", TokenRow, BadRow)

LEAST_PREFIX = 8
"""A shared prefix shorter than this is not worth a pass of its own."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """Rows padded on the right. N response tokens in all, row by row.

    The last position of a row predicts nothing that is asked for and is left out: T is the longest row less one.
    """

    rows: tuple[int, ...]
    """Indices of its rows in the list that was planned, B of them."""
    input_ids: NDArray[np.int64]
    """(B, T)."""
    start: int
    """Columns before it belong to the prompts of all rows: they need no gradient."""
    row: NDArray[np.int64]
    """(N,) which of the B rows a response token is in."""
    position: NDArray[np.int64]
    """(N,) the column that predicts it."""
    target: NDArray[np.int64]
    """(N,) the token itself."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """(B,) response tokens of each row."""
        return np.bincount(self.row, minlength=len(self.rows))


def shard_ranges(rows_read: int, rows_per_shard: int) -> list[tuple[int, int]]:
    """[first, last) row ids of each output shard."""
    return [(first, min(first + rows_per_shard, rows_read)) for first in range(0, rows_read, rows_per_shard)]


def by_shard(rows: Iterable[R], rows_read: int, rows_per_shard: int) -> list[list[R]]:
    """Rows, or whatever has a `row_id`, dealt out to the output shards; their order is kept."""
    dealt: list[list[R]] = [[] for _ in shard_ranges(rows_read, rows_per_shard)]
    for row in rows:
        dealt[row.row_id // rows_per_shard].append(row)
    return dealt


def prompt_length(row: TokenRow) -> int:
    """Positions before the one that predicts the first response token."""
    return int(row.response.argmax()) - 1


def plan_batches(rows: Sequence[TokenRow], batch_tokens: int) -> list[tuple[int, ...]]:
    """Indices of rows that run together, at most `batch_tokens` padded tokens a batch (a longer row runs alone).

    Rows are sorted by length, then by prompt length, so that little is padded and much of the prompt is shared.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), prompt_length(rows[i]), i))
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    for index in reversed(order):
        width = len(rows[batch[0]].input_ids) if batch else len(rows[index].input_ids)
        if batch and width * (len(batch) + 1) > batch_tokens:
            batches.append(tuple(batch))
            batch = []
        batch.append(index)
    if batch:
        batches.append(tuple(batch))
    return batches


def collate(rows: Sequence[TokenRow], indices: Sequence[int]) -> Batch:
    """Pad the chosen rows on the right with token 0; causal attention keeps padding out of every real position."""
    chosen = [rows[i] for i in indices]
    width = max(len(r.input_ids) for r in chosen) - 1
    input_ids = np.zeros((len(chosen), width), dtype=np.int64)
    for i, row in enumerate(chosen):
        kept = min(len(row.input_ids), width)
        input_ids[i, :kept] = row.input_ids[:kept]
    places = [np.flatnonzero(r.response) for r in chosen]
    start = min(prompt_length(r) for r in chosen)
    return Batch(
        rows=tuple(indices),
        input_ids=input_ids,
        start=start if start >= LEAST_PREFIX else 0,
        row=np.repeat(np.arange(len(chosen)), [len(p) for p in places]),
        position=np.concatenate(places) - 1,
        target=np.concatenate([r.input_ids[p] for r, p in zip(chosen, places, strict=True)]).astype(np.int64),
    )
