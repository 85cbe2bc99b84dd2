"""The portions that a rehearsal is dealt out in: an order of its rows, and outcomes that go back from its training.

Each outcome goes back by itself, and no value of it depends on which others do so beside it. So a portion is done
wherever there is room for it, and whichever they are gives the same values. The training is done again for each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from alphatoken_curate.runs.artifacts import REHEARSAL, Store

DONE = "done"
"""What came of a portion, among the names of what it keeps."""

_PART = re.compile(r"(\d+)(?:\.(\d+)-(\d+))?-(.+)")

Piece = tuple[int, int]
"""An order and an outcome, each by its number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """Of one `order` the outcomes from `first` to before `end`, `of` so many in all."""

    order: int
    first: int
    end: int
    of: int

    @property
    def name(self) -> str:
        """With it begins the name of all that it keeps."""
        return f"{self.order}" if len(self) == self.of else f"{self.order}.{self.first}-{self.end - 1}"

    def __len__(self) -> int:
        """How many outcomes."""
        return self.end - self.first

    @property
    def pieces(self) -> set[Piece]:
        """What it is made of."""
        return {(self.order, outcome) for outcome in range(self.first, self.end)}

    def told(self, orders: int) -> str:
        """Which it is among those of so many orders, in words; empty of all there is."""
        order = f", order {self.order + 1} of {orders}" if orders > 1 else ""
        if len(self) == self.of:
            return order
        last = f" to {self.end}" if len(self) > 1 else ""
        return f"{order}, outcome{'s' * bool(last)} {self.first + 1}{last} of {self.of}"

    def kept(self, store: Store, what: str = "") -> list[Path]:
        """The files of what it keeps, or of that whose name begins so. What says that others are there comes first."""
        start = f"{store.path(REHEARSAL).stem}-{self.name}-{what}"
        return [path for path in reversed(store.parts(REHEARSAL)) if path.name.startswith(start)]


def known(store: Store, of: int) -> Iterator[tuple[Path, Portion, str]]:
    """The files that portions of `of` outcomes keep, each with its portion and its name there, as `Portion.kept`."""
    for path in reversed(store.parts(REHEARSAL)):
        found = _PART.fullmatch(path.stem.removeprefix(f"{store.path(REHEARSAL).stem}-"))
        if found is not None:
            order, first, last, what = found.groups()
            yield path, Portion(order=int(order), first=int(first or 0), end=int(last or of - 1) + 1, of=of), what


def deal(
    missing: Collection[Piece], of: int, orders: int, workers: int, begun: Iterable[Portion] = ()
) -> list[Portion]:
    """Portions of all that is missing, for so many workers: about as much for each, the largest first.

    Those that were begun stay, unless they are more than the share of a worker of all there is.
    """
    left, found = set(missing), list[Portion]()
    for portion in begun:
        if len(portion) <= math.ceil(of * orders / workers) and portion.pieces <= left:
            found.append(portion)
            left -= portion.pieces
    if left:
        found += _cut(sorted(left), of, math.ceil(len(left) * workers / len(missing)))
    return sorted(found, key=len, reverse=True)


def _cut(pieces: Sequence[Piece], of: int, shares: int) -> Iterator[Portion]:
    """So many equal shares of them, cut where an order ends or an outcome is not missing, too."""
    cuts = {len(pieces) * n // shares for n in range(shares)} | {len(pieces)}
    cuts |= {n for n in range(1, len(pieces)) if pieces[n] != (pieces[n - 1][0], pieces[n - 1][1] + 1)}
    for first, end in pairwise(sorted(cuts)):
        order, outcome = pieces[first]
        yield Portion(order=order, first=outcome, end=outcome + end - first, of=of)
