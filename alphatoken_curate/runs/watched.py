"""Files that values are computed from: nothing is committed once one of them is not the file that was fingerprinted.

A training, `rsync --inplace` or an editor may write them again while a scoring runs, which may take days.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from alphatoken_curate.errors import FingerprintError
from alphatoken_curate.runs.atomic import digest

Stamp: TypeAlias = tuple[int, int, int, int, int]
"""Size, times of the last change of content and of anything (ns), device and inode: what a copy or a write changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Files with one digest, and what they are: `model`, `reference`, `fisher`, `rows PATH`, ..."""

    what: str
    files: tuple[Path, ...]
    digest: Callable[[Sequence[Path]], str]


def digest_of_one(files: Sequence[Path]) -> str:
    """`sha256:` of the bytes of a single file."""
    return f"sha256:{digest(files[0])[1]}"


class Watched:
    """The files of some sources as they are now. Make it before any of them is read; picklable.

    A file that is gone is no other file: what was read of it is in memory.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = [source for source in sources if source.files]
        self._stamps = {path: found for one in self._sources for path in one.files if (found := _stamp(path))}
        self._digests: dict[str, str] = {}

    def settle(self, digests: Mapping[str, str]) -> None:
        """Digests by `what`, once all was read. Raises FingerprintError where a file changed during that.

        Sources without a digest are watched no more.
        """
        self._sources = [source for source in self._sources if source.what in digests]
        self._digests = {source.what: digests[source.what] for source in self._sources}
        for source in self._sources:
            if odd := self._odd(source):
                raise _changed(source, odd, "while it was read. Run the same command again once nothing writes it.")

    def include(self, other: Watched) -> None:
        """Watch what another one does too, as it was then."""
        self._sources += other._sources
        self._stamps |= other._stamps
        self._digests |= other._digests

    def check(self) -> None:
        """Raise FingerprintError where a file is another than was settled; its digest is taken where it may be."""
        for source in self._sources:
            if odd := self._odd(source):
                self._check_digest(source, odd)
                self._stamps |= {path: found for path in odd if (found := _stamp(path))}

    def check_digests(self) -> None:
        """The same, by the digests of all files."""
        for source in self._sources:
            self._check_digest(source, self._odd(source) or list(source.files))

    def _odd(self, source: Source) -> list[Path]:
        return [path for path in source.files if (found := _stamp(path)) and found != self._stamps.get(path)]

    def _check_digest(self, source: Source, odd: Sequence[Path]) -> None:
        if all(_stamp(path) for path in source.files) and source.digest(source.files) != self._digests[source.what]:
            raise _changed(
                source,
                odd,
                "while it was in use: it is not the file that the scoring began with. What was committed before stays."
                " Put that file back and run the same command again to go on, or score into another folder.",
            )


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino


def _changed(source: Source, odd: Sequence[Path], when: str) -> FingerprintError:
    others = f" (or another of {len(odd)} files beside it)" if len(odd) > 1 else ""
    return FingerprintError(f"{odd[0]}{others}: it changed {when}", (source.what.partition(" ")[0],))
