"""All rows of a run as a sequence whose tokens are read where they lie, a shard at a time.

What is held is `COLUMNS` of each row, and the rows of the shard that was read last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.tokens.packed import Columns, columns_of_rows
from alphatoken_curate.tokens.plan import Cut, shard_ranges
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow

R = TypeVar("R", TokenRow, AnyRow)

_NONE = np.empty(0, np.int64)


class Rows(Sequence[AnyRow]):
    """Rows by row_id, dealt out to shards of `per_shard` of the `read` rows, bad ones counted.

    `columns`: of each. `load(shard)` gives the rows of a shard, among them those of the row_ids `without`, which
    ascend and are no rows of this.
    """

    def __init__(
        self,
        columns: Columns,
        load: Callable[[int], list[AnyRow]],
        *,
        read: int,
        per_shard: int,
        without: NDArray[np.int64] = _NONE,
    ) -> None:
        self.columns, self.read, self.per_shard, self.taken = columns, read, per_shard, without
        self._load = load
        firsts = [first for first, _ in shard_ranges(read, per_shard)]
        self._starts = [*np.searchsorted(columns["row_id"], firsts).tolist(), len(columns)]
        self._last: tuple[int, list[AnyRow]] = -1, []

    @classmethod
    def of(cls, rows: Sequence[AnyRow]) -> Rows:
        """Rows that are in memory, in one shard, in any order."""
        found = list(rows)
        read = max((row.row_id + 1 for row in found), default=1)
        made = cls(columns_of_rows(found), lambda _: found, read=read, per_shard=read)
        made._starts = [0, len(found)]
        return made

    def __len__(self) -> int:
        """How many there are, or turns of them."""
        return len(self.columns)

    def __iter__(self) -> Iterator[AnyRow]:
        """All of them, shard by shard."""
        for shard in self.shards:
            yield from shard

    @overload
    def __getitem__(self, index: int) -> AnyRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[AnyRow]: ...
    def __getitem__(self, index: int | slice) -> AnyRow | list[AnyRow]:
        """One of them, or some."""
        places = range(len(self))[index]
        return self.pick([places])[0] if isinstance(places, int) else self.pick(places)

    @property
    def shards(self) -> Shards:
        """The rows of each shard, read when they are asked for."""
        return Shards(self)

    def shard(self, index: int) -> list[AnyRow]:
        """The rows of one shard."""
        if self._last[0] != index:
            self._last = -1, []  # before another is read
            rows = self._load(index) if self._starts[index] < self._starts[index + 1] else []
            mine = np.searchsorted(self.taken, (self.per_shard * index, self.per_shard * (index + 1)))
            gone = set(self.taken[slice(*mine)].tolist())
            self._last = index, [row for row in rows if row.row_id not in gone]
        return self._last[1]

    def columns_of(self, shard: int) -> Columns:
        """What is held of the rows of one shard."""
        return self.columns[self._starts[shard] : self._starts[shard + 1]]

    def firsts(self) -> NDArray[np.int64]:
        """The places of rows, each by its first turn."""
        ids = self.columns["row_id"]
        return np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])[: len(ids)])

    def pick(self, places: Sequence[int]) -> list[AnyRow]:
        """Some rows by their places, in the order these are given in; each shard is read once."""
        return _picked(self.shards, self._starts, places)

    def without(self, row_ids: Sequence[int]) -> Rows:
        """All rows but these."""
        taken = np.union1d(self.taken, np.array(row_ids, np.int64))
        ids, left = self.columns["row_id"], np.ones(len(self), np.bool_)
        for start, end in zip(*(np.searchsorted(ids, taken, side) for side in ("left", "right")), strict=True):
            left[start:end] = False
        return Rows(self.columns[left], self._load, read=self.read, per_shard=self.per_shard, without=taken)

    def numbered(self, kind: str) -> str:
        """Digest of the numbers of these rows, of that kind: draws and shards go by them, and not by tokens alone."""
        numbers = (np.ascontiguousarray(self.columns[name], np.int64).tobytes() for name in ("row_id", "turn"))
        return f"sha256:{hashlib.sha256(b''.join((kind.encode(), *numbers))).hexdigest()}"

    def cut(self, shard: int | None = None) -> Cut:
        """What was cut off the rows of a shard, or of all."""
        columns = self.columns if shard is None else self.columns_of(shard)
        cut = columns[columns["truncated"] > 0]
        return Cut(rows=len(np.unique(cut["row_id"])), tokens=int(cut["truncated"].sum(dtype=np.int64)))


class Shards(Sequence[list[AnyRow]]):
    """The rows of some shards, each read when it is asked for. `numbers`: of all, by default."""

    def __init__(self, rows: Rows, numbers: Sequence[int] | None = None) -> None:
        self._rows = rows
        self._numbers = range(len(shard_ranges(rows.read, rows.per_shard))) if numbers is None else numbers

    def __len__(self) -> int:
        """How many there are."""
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> list[AnyRow]: ...
    @overload
    def __getitem__(self, index: slice) -> Shards: ...
    def __getitem__(self, index: int | slice) -> list[AnyRow] | Shards:
        """The rows of one, or some shards."""
        found = self._numbers[index]
        return self._rows.shard(found) if isinstance(found, int) else Shards(self._rows, found)

    def __iter__(self) -> Iterator[list[AnyRow]]:
        """The rows of each."""
        return (self._rows.shard(number) for number in self._numbers)

    def columns(self, index: int) -> Columns:
        """What is held of the rows of one."""
        return self._rows.columns_of(self._numbers[index])


def columns_in(shards: Sequence[Sequence[AnyRow]]) -> Iterator[Columns]:
    """What is known of the rows of each shard; those of `Shards` are not read for it."""
    for index in range(len(shards)):
        yield shards.columns(index) if isinstance(shards, Shards) else columns_of_rows(shards[index])


def tokens_in(shards: Sequence[Sequence[AnyRow]]) -> int:
    """Tokens of all sequences of the rows of shards."""
    return sum(int(columns["tokens"].sum(dtype=np.int64)) for columns in columns_in(shards))


def pick_in(shards: Sequence[Sequence[AnyRow]], places: Sequence[int]) -> list[AnyRow]:
    """Some rows of shards by their places among all of these, in the order these are given in."""
    starts = [0, *np.cumsum([len(columns) for columns in columns_in(shards)]).tolist()]
    return _picked(shards, starts, places)


def _picked(shards: Sequence[Sequence[AnyRow]], starts: Sequence[int], places: Sequence[int]) -> list[AnyRow]:
    of = np.searchsorted(starts[1:], places, side="right")
    found: dict[int, AnyRow] = {}
    for shard in np.unique(of).tolist():
        rows = shards[shard]
        mine = [places[i] for i in np.flatnonzero(of == shard).tolist()]
        found |= {place: alone(rows[place - starts[shard]]) for place in mine}
    return [found[place] for place in places]


def alone(row: AnyRow) -> AnyRow:
    """A row whose arrays are its own: those of a shard may be freed."""
    if isinstance(row, PairRow):
        return PairRow(chosen=_copied(row.chosen), rejected=_copied(row.rejected))
    return _copied(row)


def _copied(row: TokenRow) -> TokenRow:
    return replace(
        row, input_ids=row.input_ids.copy(), response=row.response.copy(), end_of_turn=row.end_of_turn.copy()
    )
