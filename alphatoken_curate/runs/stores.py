"""Objects in stores, by fsspec: `s3://` (s3fs), `gs://` (gcsfs), `hf://` (huggingface_hub). They are read by ranges.

Credentials and endpoints are those of the environment, as each library finds them; none is taken from a URL. What a
store or the network refuses is told in one line.
"""

from __future__ import annotations

import contextlib
import glob
import io
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from alphatoken_curate.errors import CurateError, InputError, UsageError
from alphatoken_curate.urls import checked, names_url, scheme_of, shown

BLOCK_BYTES = 8 * 2**20
"""What is asked of a store at once, at least."""

_EXTRAS = {"s3": "s3", "gs": "gcs"}
_SCHEMES = ("s3", "gs", "hf", "memory")  # the last is fsspec's own, of this process
_STAMP = ("size", "ETag", "generation", "blob_id", "LastModified", "updated", "created")
_LIBRARIES = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "gcsfs.retry": ("HttpError",),
    "huggingface_hub.errors": ("HfHubHTTPError", "HFValidationError"),
    "httpx": ("HTTPError",),
    "httpx2": ("HTTPError",),
}
_CHANGED = "it changed while it was read. Run the same command again once nothing writes it."


def store_of(url: str) -> tuple[Any, str]:
    """The file system of a URL, and its name there. Raises `UsageError` for a scheme or extra that is not there."""
    import fsspec

    if (scheme := scheme_of(url)) not in _SCHEMES:
        local = "Name the path itself." if scheme in ("file", "local") else "Copy it to this machine, or there."
        raise UsageError(f"{shown(url)}: rows are read from s3://, gs:// and hf://, not from {scheme}://. {local}")
    _, rest = checked(url)
    try:
        store = fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        extra = f"pip install 'alphatoken-curate[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(error)
        raise UsageError(f"{shown(url)}: what reads {scheme}:// is not installed: {extra}") from error
    store.invalidate_cache()
    return store, rest.rstrip("/")


@contextlib.contextmanager
def told(url: str, kind: type[CurateError] = InputError) -> Iterator[None]:
    """What a store refuses, as an error of one line that names the URL."""
    try:
        yield
    except FileNotFoundError as error:
        advice = "Check the name, and whether your credentials may see it."
        raise kind(f"{shown(url)}: the store has no such bucket, prefix or object. {advice}") from error
    except PermissionError as error:
        advice = "Check the credentials in the environment, and what they allow."
        raise kind(f"{shown(url)}: the store does not allow it ({_first(error)}). {advice}") from error
    except _errors() as error:
        if type(error).__name__ == "FileExpired":
            raise kind(f"{shown(url)}: {_CHANGED}") from error
        advice = "Check the network, the endpoint and the credentials in the environment, then run the command again."
        raise kind(f"{shown(url)}: the store cannot be used ({_first(error)}). {advice}") from error


def _errors() -> tuple[type[Exception], ...]:
    """What the libraries of stores that are loaded raise."""
    named = ((sys.modules.get(module), name) for module, names in _LIBRARIES.items() for name in names)
    loaded = (getattr(module, name, None) for module, name in named if module is not None)
    return OSError, EOFError, ValueError, *(one for one in loaded if one is not None)


def _first(error: Exception) -> str:
    """The first line of what a library says, without the queries of URLs: they may be signed."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"\?[^\s\"']*|//[^/\s@]*@", "", lines[0])[:200]


def found(url: str) -> list[str]:
    """The URLs of the objects that one names: itself, what a glob matches, or all below a prefix; sorted.

    Raises `InputError` where there is none, or the store does not tell.
    """
    store, name = store_of(url)
    with told(url):
        if glob.has_magic(name) and not store.exists(name):
            names = [one for one, about in store.glob(name, detail=True).items() if about["type"] == "file"]
        elif not url.endswith("/") and store.info(name)["type"] == "file":
            names = [name]
        else:
            names = store.find(name)
        if not names:
            raise FileNotFoundError
    return sorted(f"{scheme_of(url)}://{one.lstrip('/')}" for one in names)


@contextlib.contextmanager
def unchanged(path: str) -> Iterator[None]:
    """Raise `InputError` where an object is another after the block than before, as far as its store tells.

    By size and what the store has of ETag, generation and time. Nothing is done for files of this machine.
    """
    before = _stamp(path) if names_url(path) else None
    yield
    if before is not None and _stamp(path) != before:
        raise InputError(f"{shown(path)}: {_CHANGED}")


def _stamp(url: str) -> tuple[object, ...]:
    store, name = store_of(url)
    with told(url):
        about = store.info(name)
    return tuple(about.get(key) for key in _STAMP)


def open_stored(path: str) -> BinaryIO:
    """A file of this machine or an object of a store, to read. Of an object `InputError` is raised for an `OSError`."""
    return cast(BinaryIO, _Object(path)) if names_url(path) else open(path, "rb", buffering=0)


class _Object(io.RawIOBase):
    """An object that is read by ranges; a read that ends before the object does is an error."""

    def __init__(self, url: str) -> None:
        self._url = url
        store, name = store_of(url)
        with told(url):
            self._file = store.open(name, "rb", block_size=BLOCK_BYTES)
            self._bytes = int(self._file.size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        with told(self._url):
            data = self._file.read(len(buffer))
        if len(buffer) and not data and self._file.tell() < self._bytes:
            read = f"{self._file.tell():,} of {self._bytes:,} bytes"
            raise InputError(f"{shown(self._url)}: the read broke off after {read}. Run the command again.")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()
