"""A run that was published to S3, checked as far as can be without reading all of it: see `scan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.runs import manifest, sealed
from alphatoken_curate.runs.documents import Unreadable
from alphatoken_curate.runs.manifest import NAME, Generation, Manifest, Mask
from alphatoken_curate.runs.shards import Shard
from alphatoken_curate.runs.stores import store_of, told
from alphatoken_curate.urls import names_url, scheme_of, shown

_TAIL_BYTES = 1 << 16
"""What is asked of the end of each shard; footers are a tenth of it."""

_MOST_BYTES = 64 << 20
_AGAIN = "Publish the run again, to another prefix."


class Published:
    """A published run: its manifest, read as strictly as one on disk. Raises `UsageError` and `StoredDataError`."""

    def __init__(self, url: str | Path) -> None:
        if not names_url(str(url)) or scheme_of(str(url)) != "s3":
            told_ = "a published run is read from s3://bucket/prefix, given as text. Copy others to this machine."
            raise UsageError(f"{shown(url)}: {told_}")
        self._store, self._base = store_of(str(url))
        self.url = f"s3://{self._base}"
        self.stored = self._manifest()

    def _manifest(self) -> Manifest:
        place = f"{self.url}/{NAME}"
        with told(place, StoredDataError):
            if (size := self._store.info(f"{self._base}/{NAME}")["size"]) > _MOST_BYTES:
                raise StoredDataError(f"{shown(place)}: {size} bytes, so no manifest. {_AGAIN}")
            data = self._store.cat_file(f"{self._base}/{NAME}")
        try:
            return manifest.decoded(data, place)
        except Unreadable as error:
            raise StoredDataError(f"{shown(place)}: damaged ({error}). {_AGAIN}") from error

    def sources(self, group: Generation | Mask) -> tuple[list[str], int]:
        """The URLs of a group's shards, and their schema version.

        Raises `StoredDataError` where one is not there, has another size than the manifest says, or a footer that is
        not sealed, of other settings or of other rows.
        """
        names = [f"{self._base}/{shard.path}" for shard in group.shards]
        with told(self.url, StoredDataError):
            below = self._store.find(f"{self._base}/{group.shards[0].path.rpartition('/')[0]}", detail=True)
        for name, shard in zip(names, group.shards, strict=True):
            if name not in below or below[name]["size"] != shard.bytes:
                found = f"{below[name]['size']} bytes" if name in below else "missing"
                raise StoredDataError(f"s3://{name}: {found}; the manifest has {shard.bytes} bytes. {_AGAIN}")
        tails = self._tails(names, group.shards)
        each = zip(names, group.shards, tails, strict=True)
        versions = [self._check(name, shard, tail, group.fingerprint) for name, shard, tail in each]
        return [f"s3://{name}" for name in names], versions[0]

    def _tails(self, names: Sequence[str], shards: Sequence[Shard]) -> list[bytes]:
        """The footer of each shard, with the eight bytes behind it."""
        with told(self.url, StoredDataError):
            ends = [shard.bytes for shard in shards]
            starts = [max(0, end - _TAIL_BYTES) for end in ends]
            tails: list[bytes] = self._store.cat_ranges(list(names), starts, ends, on_error="raise")
            lengths = [int.from_bytes(tail[-8:-4], "little") + 8 for tail in tails]
            for n, (name, length) in enumerate(zip(names, lengths, strict=True)):
                if len(tails[n]) < length <= ends[n]:
                    tails[n] = self._store.cat_file(name, start=ends[n] - length, end=ends[n])
        return [tail[-length:] for tail, length in zip(tails, lengths, strict=True)]

    def _check(self, name: str, shard: Shard, tail: bytes, fingerprint: str) -> int:
        """The schema version that a shard's footer tells, all of which is as the manifest says."""
        try:
            about: dict[str, Any] = sealed.about(Path(name), pq.read_metadata(pa.BufferReader(b"PAR1" + tail)))
        except (StoredDataError, pa.ArrowException, OSError, ValueError, LookupError) as error:
            found = str(error).splitlines()[0]
            raise StoredDataError(f"s3://{name}: its footer is not as it was written ({found}). {_AGAIN}") from error
        body = about["body"]["bytes"] + len(tail)
        if (about["fingerprint"], about["counts"]["rows"], body) != (fingerprint, shard.rows, shard.bytes):
            raise StoredDataError(f"s3://{name}: not the shard that the manifest names: it was swapped. {_AGAIN}")
        return int(about["schema_version"])
