"""Objects put under a prefix of S3 on conditions: made where there is none, replaced where it is still the one seen.

The conditions (`If-None-Match: *`, `If-Match`) are the store's own, so that of two writers one is told. Only S3 is
written to: gcsfs makes objects on a condition and replaces them without, huggingface_hub commits in its own way.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from alphatoken_curate.errors import BusyError, UsageError
from alphatoken_curate.runs.stores import BLOCK_BYTES, store_of, told
from alphatoken_curate.urls import names_url, scheme_of, shown

_MOST_AT_ONCE = 64 * 2**20
"""Larger files are sent in parts, from the disk."""

_OTHERS = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
_NOT_SO = '"00000000000000000000000000000000"'


class Uploads:
    """The objects below a URL. Raises `UsageError` for one that is not written to, and where the store refuses."""

    def __init__(self, url: str) -> None:
        if (scheme := scheme_of(url)) != "s3" or not names_url(url):
            why = {
                "s3": "give it as s3://bucket/prefix",
                "gs": "gcsfs has no replacement on a condition, so two publishers could not be told apart",
                "file": "that is a folder of this machine: copy the run there",
            }.get(scheme or "file", f"nothing is known of how {scheme}:// keeps two publishers apart")
            raise UsageError(f"{shown(url) if scheme else url}: a run is published to s3:// alone; {why}.")
        self._store, self._base = store_of(url)
        self.url = f"s3://{self._base}"

    def sizes(self) -> dict[str, int]:
        """What lies below the URL: bytes by name."""
        self._store.invalidate_cache()
        with told(self.url, UsageError):
            self._store.info(self._base.partition("/")[0])  # a bucket that is not there lists nothing
            found = self._store.find(self._base, detail=True)
        # Where nothing lies below when it looks, fsspec asks for the prefix itself, which another may begin just then.
        below = {name: about for name, about in found.items() if name != self._base}
        return {name.removeprefix(f"{self._base}/"): about["size"] for name, about in below.items()}

    def read(self, name: str) -> tuple[bytes, str] | None:
        """The bytes of an object and its ETag; None where there is none."""
        with told(self._place(name), UsageError):
            try:
                with self._store.open(self._name(name), "rb") as file:
                    return file.read(), str(file.details["ETag"])
            except FileNotFoundError:
                return None

    def create(self, name: str, path: Path) -> bool:
        """Put a file where no object is; False where there is one, also one that another writer has just put."""
        return self._is_created(name, path if path.stat().st_size > _MOST_AT_ONCE else path.read_bytes())

    def replace(self, name: str, data: bytes, seen: str) -> None:
        """Put bytes in the place of the object whose ETag was `seen`. Raises `BusyError` where it is another by now."""
        if not self._is_replaced(name, data, seen):
            raise BusyError(
                f"{self._place(name)}: another publisher was first. Run the same command again: it goes on from what is"
                " there, or says what differs."
            )

    def is_same(self, name: str, path: Path) -> bool:
        """Whether an object has the bytes of a file: by its ETag where that is their MD5, else by reading all."""
        with told(self._place(name), UsageError):
            about = self._store.info(self._name(name))
            if about["size"] != path.stat().st_size:
                return False
            if about["ETag"].strip('"') == _digest(path, "md5"):
                return True
            sha256 = hashlib.sha256()
            with self._store.open(self._name(name), "rb", block_size=BLOCK_BYTES) as file:
                while part := file.read(BLOCK_BYTES):
                    sha256.update(part)
        return sha256.hexdigest() == _digest(path, "sha256")

    def check_conditions(self, name: str) -> None:
        """Raise `UsageError` where the store takes what it should refuse. `name`: a small object, which stays."""
        seen = self.read(name)
        if seen and (self._is_created(name, seen[0]) or self._is_replaced(name, seen[0], _NOT_SO)):
            raise UsageError(
                f"{self.url}: this store takes no heed of If-None-Match or If-Match, so that two publishers would"
                " overwrite each other unseen. Copy the run there with the store's own tool."
            )

    def _is_created(self, name: str, data: bytes | Path) -> bool:
        with told(self._place(name), UsageError):
            try:
                if isinstance(data, Path):
                    self._store.put_file(str(data), self._name(name), mode="create")
                else:
                    self._store.pipe_file(self._name(name), data, mode="create")
            except OSError as error:
                if _code(error) in _OTHERS[:2]:
                    return False
                raise
        return True

    def _is_replaced(self, name: str, data: bytes, seen: str) -> bool:
        with told(self._place(name), UsageError):
            try:
                # In one piece: of an object in several s3fs drops the condition.
                self._store.pipe_file(self._name(name), data, chunksize=len(data) + 1, IfMatch=seen)
            except OSError as error:
                if _code(error) in _OTHERS:
                    return False
                raise
        return True

    def _name(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _place(self, name: str) -> str:
        return f"{self.url}/{name}"


def _code(error: BaseException) -> str:
    """What S3 calls its refusal."""
    response: Any = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
