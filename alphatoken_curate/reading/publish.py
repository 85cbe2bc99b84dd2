"""`publish`: a finished run to a prefix of S3, whole or not at all for who reads it by its manifest.

Nothing that a manifest names is ever replaced but by another manifest: shards and files are put where there is none,
and manifest.json comes last, on the condition that it is still the one that was seen. What may change under its name
(the card, report.html, artifacts/run.json) is replaced after it, by the same condition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alphatoken_curate.errors import BusyError, StoredDataError
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.runs import card, manifest
from alphatoken_curate.runs.atomic import kill_point, one_writer
from alphatoken_curate.runs.documents import Unreadable
from alphatoken_curate.runs.folder import check_is_run
from alphatoken_curate.runs.manifest import NAME, Generation, Manifest, Mask
from alphatoken_curate.runs.uploads import Uploads
from alphatoken_curate.wording import count

_FIRST = "config.yaml"
"""A small file of every run: with the first object the store is tried."""

BESIDE = (card.NAME, "report.html")
"""Files of a run that its manifest does not name, and that are published where they are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSummary:
    """What `publish` did: objects that it put, their bytes, and objects that were there, byte for byte the same."""

    url: str
    put: int
    bytes: int
    kept: int
    manifest: Literal["new", "replaced", "kept"]


def publish(run: str | Path, url: str, *, told: Callable[[str], object] = str) -> PublishSummary:
    """Put a finished run under `url`, `s3://bucket/prefix`; where it was published before, what is new of it.

    The run is verified first, and held while it is sent. The same call goes on after one that was stopped. `told` hears
    the name of each object as it is put. Raises `UsageError` for a URL that is not written to and where the store
    refuses, `BusyError` where another publisher was first, `StoredDataError` where the run has problems, or where
    there are other objects than those of this run.
    """
    folder = Path(run)
    check_is_run(folder)
    uploads = Uploads(str(url))
    with one_writer(folder):
        if problems := verify(folder):
            first = f"{problems[0].file}: {problems[0].found}"
            raise StoredDataError(
                f"{folder}: not published, as it has {count(len(problems), 'problem')}: {first}. `verify` names all."
            )
        return _Publishing(folder, uploads, told).publish()


class _Publishing:
    """One upload: what lies there is listed once; what others put meanwhile shows when it is put."""

    def __init__(self, run: Path, uploads: Uploads, told: Callable[[str], object]) -> None:
        self._run, self._uploads, self._told = run, uploads, told
        self._stored = manifest.read(run)
        self._sizes = uploads.sizes()
        self._there = uploads.read(NAME)
        self._put: list[str] = []
        self._kept = 0

    def publish(self) -> PublishSummary:
        groups: list[Generation | Mask] = [*self._stored.generations, *self._stored.masks]
        shards = [shard.path for group in groups for shard in group.shards]
        files = [file.path for file in self._stored.files]
        beside = [name for name in BESIDE if (self._run / name).is_file()]
        self._check_there({*shards, *files, *beside})
        changing = [name for name in (*files, *beside) if self._there and name in self._sizes]
        fixed = [name for name in (*files, *shards, *beside) if name not in changing]
        # By name, so that of two publishers the one that is second at the first object that differs puts none behind it
        fixed.sort(key=lambda name: (name != _FIRST, name in beside, name))
        for number, name in enumerate(fixed):
            self._fix(name)
            if not number:  # by the manifest that is there, else by what was just put: both are small
                self._uploads.check_conditions(NAME if self._there else name)
        what = self._commit()
        for name in changing:
            self._renew(name)
        total = sum(map(self._size, self._put))
        return PublishSummary(url=self._uploads.url, put=len(self._put), bytes=total, kept=self._kept, manifest=what)

    def _check_there(self, ours: set[str]) -> None:
        """Raise `StoredDataError` where what is published is no earlier state of this run."""
        if self._there is None:
            if others := sorted(self._sizes.keys() - ours):
                raise StoredDataError(
                    f"{self._uploads.url}: not empty, and no published run (it has {others[0]!r}). Name another prefix."
                )
            return
        if odd := _lost(self._there[0], self._stored):
            raise StoredDataError(f"{self._uploads.url}/{NAME}: {odd}. Name another prefix; nothing was put.")

    def _fix(self, name: str) -> None:
        """An object that never changes: put where there is none."""
        path = self._run / name
        if name not in self._sizes and self._uploads.create(name, path):
            self._tell(name)
        elif self._uploads.is_same(name, path):
            self._kept += 1
        else:
            raise StoredDataError(
                f"{self._uploads.url}/{name}: an object of other bytes than {path} is there, of another run or another"
                " publisher. Name another prefix, or delete it if nothing needs it. The manifest there is as it was."
            )

    def _commit(self) -> Literal["new", "replaced", "kept"]:
        kill_point("before-published")
        path = self._run / NAME
        if self._there is None and self._uploads.create(NAME, path):
            self._tell(NAME)
            return "new"
        if self._there is None:  # it is there now: another's, or our own whose answer was lost
            if self._uploads.is_same(NAME, path):
                return "new"
            raise BusyError(f"{self._uploads.url}/{NAME}: another publisher was first. Run the same command again.")
        if self._there[0] == path.read_bytes():
            self._kept += 1
            return "kept"
        self._uploads.replace(NAME, path.read_bytes(), self._there[1])
        self._tell(NAME)
        return "replaced"

    def _renew(self, name: str) -> None:
        """An object that may have changed is replaced, where nobody else has."""
        path = self._run / name
        if self._uploads.is_same(name, path):
            self._kept += 1
            return
        if (seen := self._uploads.read(name)) is not None:
            self._uploads.replace(name, path.read_bytes(), seen[1])
            self._tell(name)

    def _size(self, name: str) -> int:
        return (self._run / name).stat().st_size

    def _tell(self, name: str) -> None:
        self._put.append(name)
        self._told(name)
        kill_point("after-object", Path(name))


def _lost(published: bytes, ours: Manifest) -> str:
    """What a published manifest names that ours does not: then it is of another run, or of a later state."""
    try:
        there = manifest.decoded(published, NAME)
    except (Unreadable, StoredDataError) as error:
        return f"it cannot be read ({error})"
    numbers = [f"generation {one.generation}" for one in there.generations if one not in ours.generations]
    numbers += [f"mask {one.mask}" for one in there.masks if one not in ours.masks]
    return f"it names {numbers[0]}, which this run has not, or has otherwise" if numbers else ""
