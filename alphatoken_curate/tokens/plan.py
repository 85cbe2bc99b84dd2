"""Which rows run together: shards, batches and the padded arrays they become. A function of data and budget alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow, branches


class _Numbered(Protocol):
    @property
    def row_id(self) -> int: ...


R = TypeVar("R", bound=_Numbered)

LEAST_PREFIX = 8
"""A shared prefix shorter than this is not worth a pass of its own."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """Sequences padded on the right. N response tokens in all, sequence by sequence.

    The last position of a sequence predicts nothing that is asked for and is left out: T is the longest less one.
    """

    rows: tuple[int, ...]
    """Indices of its sequences in `sequences` of the rows that were planned, B of them."""
    pairs: bool
    """Whether sequences 2i and 2i + 1 are the chosen and the rejected branch of one row."""
    input_ids: NDArray[np.int64]
    """(B, T)."""
    start: int
    """Columns before it belong to the prompts of all sequences, and are the same in both of a pair: they need no
    gradient, and one pass does for a pair."""
    row: NDArray[np.int64]
    """(N,) which of the B sequences a response token is in."""
    position: NDArray[np.int64]
    """(N,) the column that predicts it."""
    target: NDArray[np.int64]
    """(N,) the token itself."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """(B,) response tokens of each sequence."""
        return np.bincount(self.row, minlength=len(self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Rows that were cut to --max-length, and the tokens cut off."""

    rows: int
    tokens: int


def shard_ranges(rows_read: int, rows_per_shard: int) -> list[tuple[int, int]]:
    """[first, last) row ids of each output shard."""
    return [(first, min(first + rows_per_shard, rows_read)) for first in range(0, rows_read, rows_per_shard)]


def by_shard(rows: Iterable[R], rows_read: int, rows_per_shard: int) -> list[list[R]]:
    """Rows, or whatever has a `row_id`, dealt out to the output shards; their order is kept."""
    dealt: list[list[R]] = [[] for _ in shard_ranges(rows_read, rows_per_shard)]
    for row in rows:
        dealt[row.row_id // rows_per_shard].append(row)
    return dealt


def response_tokens(rows: Iterable[AnyRow]) -> int:
    """Response tokens of all sequences of rows."""
    return sum(int(one.response.sum()) for row in rows for one in branches(row))


def sequences(rows: Sequence[AnyRow]) -> list[TokenRow]:
    """All sequences of rows: of pairs, chosen and rejected in turn."""
    return [sequence for row in rows for sequence in branches(row)]


def token_starts(rows: Sequence[AnyRow]) -> NDArray[np.int64]:
    """Where the response tokens of each of S sequences of rows start among those of all, (S + 1,); the last is N."""
    return np.cumsum([0, *(int(one.response.sum()) for one in sequences(rows))], dtype=np.int64)


def token_places(batch: Batch, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N of the batch,) where its tokens are among those of all rows, whose sequences start at `starts`."""
    return places_of(batch.rows, starts)


def places_of(indices: Iterable[int], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the tokens of some sequences, by index, are among those of all, which start at `starts`."""
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in indices])


def prompt_length(row: AnyRow) -> int:
    """Positions before the one that predicts the first response token, as far as both branches of a pair agree."""
    if isinstance(row, PairRow):
        return min(prompt_length(row.chosen), prompt_length(row.rejected), _shared_length(row))
    return int(row.response.argmax()) - 1


def _shared_length(pair: PairRow) -> int:
    one, other = pair.chosen.input_ids, pair.rejected.input_ids
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _width(row: AnyRow) -> int:
    return max(len(sequence.input_ids) for sequence in branches(row))


def plan_batches(rows: Sequence[AnyRow], batch_tokens: int) -> list[tuple[int, ...]]:
    """Indices of rows that run together, at most `batch_tokens` padded tokens a batch (a longer row runs alone).

    Rows are sorted by length, then by prompt length, so that little is padded and much of the prompt is shared. The
    two branches of a pair stay together.
    """
    order = sorted(range(len(rows)), key=lambda i: (_width(rows[i]), prompt_length(rows[i]), i))
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    for index in reversed(order):
        width = _width(rows[batch[0]] if batch else rows[index]) * len(branches(rows[index]))
        if batch and width * (len(batch) + 1) > batch_tokens:
            batches.append(tuple(batch))
            batch = []
        batch.append(index)
    if batch:
        batches.append(tuple(batch))
    return batches


def batches_of(rows: Sequence[AnyRow], batch_tokens: int) -> Iterator[Batch]:
    """The planned batches of rows."""
    return (collate(rows, indices) for indices in plan_batches(rows, batch_tokens))


def collate(rows: Sequence[AnyRow], indices: Sequence[int]) -> Batch:
    """Pad the chosen rows on the right with token 0; causal attention keeps padding out of every real position."""
    chosen = sequences([rows[i] for i in indices])
    each = len(chosen) // len(indices)
    width = max(len(r.input_ids) for r in chosen) - 1
    input_ids = np.zeros((len(chosen), width), dtype=np.int64)
    for i, row in enumerate(chosen):
        kept = min(len(row.input_ids), width)
        input_ids[i, :kept] = row.input_ids[:kept]
    places = [np.flatnonzero(r.response) for r in chosen]
    start = min(prompt_length(rows[i]) for i in indices)
    return Batch(
        rows=tuple(each * i + branch for i in indices for branch in range(each)),
        pairs=each > 1,
        input_ids=input_ids,
        start=start if start >= LEAST_PREFIX else 0,
        row=np.repeat(np.arange(len(chosen)), [len(p) for p in places]),
        position=np.concatenate(places) - 1,
        target=np.concatenate([r.input_ids[p] for r, p in zip(chosen, places, strict=True)]).astype(np.int64),
    )
