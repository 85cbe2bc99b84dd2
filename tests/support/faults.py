"""What a test may do to a command from inside its process: a scorer that costs nothing, a disk that refuses."""

from __future__ import annotations

import datetime
import errno
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from light import fake_sums

from alphatoken_curate.runs.schema import components
from alphatoken_curate.scoring import reader, reference, scorer, shelf
from alphatoken_curate.signals.stored import RowResult
from alphatoken_curate.tokens.plan import response_tokens
from alphatoken_curate.tokens.tokenise import AnyRow, branches

REFUSALS = {"open": errno.EROFS, "write": errno.ENOSPC, "fsync": errno.EIO, "replace": errno.EIO}
"""What each call can be made to fail with: a file system that became read-only, a full disk, a broken one."""


def log_scoring(path: Path) -> None:
    """Have each shard that is scored written down, a line with its generation and number, before it is."""
    score = scorer.ShardScorer.__call__

    def logged(self: Any, shard: int, *arguments: Any) -> Any:
        with path.open("a") as file:
            file.write(f"{self.spec.store.generation} {shard}\n")
        return score(self, shard, *arguments)

    scorer.ShardScorer.__call__ = logged  # type: ignore[method-assign]


def fake_scorer() -> None:
    """Score without a model: values drawn by row and checkpoint, and small arrays in place of directions."""

    def score(self: Any, shard: int, rows: Sequence[AnyRow], *_: Any) -> list[RowResult | None]:
        return [_drawn(row, self.spec.config.estimator, self.spec.store.generation) for row in rows]

    scorer.ShardScorer.__call__ = score  # type: ignore[assignment]
    scorer.ShardScorer.ready = lambda self, _: None  # type: ignore[assignment, return-value]
    scorer.ShardScorer.gradient = lambda *_: fake_sums("tokens")  # type: ignore[method-assign]
    reference.ReferencePass.ready = lambda self, _: None  # type: ignore[assignment, return-value]
    reference.ReferencePass.weights = lambda *_: None  # type: ignore[method-assign]
    reference.ReferencePass.fisher = lambda *_: fake_sums("rows")  # type: ignore[method-assign]
    reference.ReferencePass.losses = lambda self, rows, *_: np.zeros(  # type: ignore[method-assign]
        response_tokens(rows), np.float32
    )


def _drawn(row: AnyRow, estimator: str, generation: int) -> RowResult:
    found = []
    for number, one in enumerate(branches(row)):
        draws = np.random.default_rng((generation, one.row_id, number))
        signals = {}
        for name in components(estimator).always:
            drawn = draws.normal(size=len(one.input_ids)).astype(np.float32)
            signals[name] = np.where(one.response, drawn, np.float32(np.nan))
        found.append(signals)
    return RowResult(branches=tuple(found))


def spill() -> None:
    """Have the tokens of rows put on disk, however few they are."""
    shelf.IN_MEMORY = 0


def clock_back() -> None:
    """Have the system's clock go back by an hour at each look, from New Year 1990 on."""
    hours = iter(range(631_152_000, -(10**12), -3600))
    time.time = lambda: float(next(hours))
    time.time_ns = lambda: next(hours) * 10**9

    class Date(datetime.date):
        @classmethod
        def today(cls) -> Self:
            return cls.fromtimestamp(next(hours))

    reader.date = Date  # type: ignore[attr-defined]


class _Refusing(io.FileIO):
    """A file on a disk that is full after half of what is written to it."""

    def write(self, data: Any, /) -> int:
        if len(data) > 1:
            return super().write(memoryview(data)[: len(data) // 2])
        raise OSError(REFUSALS["write"], os.strerror(REFUSALS["write"]))


def refuse(call: str, name: str) -> None:
    """Have a call (see `REFUSALS`) fail for the file that is to have this name, or with `fsync` for that folder."""
    disk = _Disk(call, name)
    for one in ("open", "fdopen", "fsync", "replace"):
        setattr(os, one, getattr(disk, one))


class _Disk:
    """Calls of `os`, one of which is refused for one file; `marked`: descriptors of that file."""

    def __init__(self, call: str, name: str) -> None:
        self.call, self.name = call, name
        self.marked: set[int] = set()
        self.plain: dict[str, Any] = {one: getattr(os, one) for one in ("open", "fdopen", "fsync", "replace")}

    def is_meant(self, path: Any) -> bool:
        found = os.path.basename(path)
        return found == self.name or found.startswith(f".{self.name}.")

    def check(self, call: str, meant: bool) -> None:
        if call == self.call and meant:
            raise OSError(REFUSALS[call], os.strerror(REFUSALS[call]))

    def open(self, path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        self.check("open", bool(flags & os.O_CREAT) and self.is_meant(path))
        descriptor: int = self.plain["open"](path, flags, *arguments, **more)
        self.marked.discard(descriptor)
        if self.is_meant(path):
            self.marked.add(descriptor)
        return descriptor

    def fdopen(self, descriptor: int, *arguments: Any, **more: Any) -> Any:
        if self.call == "write" and descriptor in self.marked:
            return _Refusing(descriptor, "wb")
        return self.plain["fdopen"](descriptor, *arguments, **more)

    def fsync(self, descriptor: int) -> None:
        self.check("fsync", descriptor in self.marked)
        self.plain["fsync"](descriptor)

    def replace(self, source: Any, target: Any) -> None:
        self.check("replace", self.is_meant(target))
        self.plain["replace"](source, target)
