"""Read files of JSON lines, packed or not, as a stream of raw rows.

What a file holds is told by its first bytes, not by its name: a `.jsonl` that is really gzip, Zstandard or Parquet
(see `tables`) is read as such. Everything is read in pieces, so that memory does not grow with the file, and the digest
of the bytes as stored is taken on the way. Two caps stand against hostile files: a row may hold `MAX_LINE_BYTES`, and
what comes out of a file may not exceed `MAX_RATIO` times its stored size (once past `MAX_RATIO_FLOOR_BYTES`) nor
`MAX_DATA_BYTES`.

JSON is read by the standard library's C scanner with a hook that sees each object's pairs, which costs 7 ns a byte and
finds repeated keys, which faster parsers drop in silence. One fault stays within its own line.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows.files import EXCERPT_CHARS, DataFile, visible
from alphatoken_curate.runs.stores import open_stored

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read; a longer one is a bad row."""

MAX_DATA_BYTES = 64 * 2**30
"""Most bytes one file may hold once decompressed."""

MAX_RATIO = 100
"""Most bytes that may come out of one stored byte."""

MAX_RATIO_FLOOR_BYTES = 2**28
"""Below this much decompressed data the ratio is not looked at."""

NULLS_LEFT_OUT = "keys that are null within tools or calls are left out"
"""The note of a row that had some, as `datasets` writes them into JSON."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

MAX_NESTING = 128
"""Deepest nesting of lists and objects within a row."""

CHUNK_BYTES = 2**20
"""What is read at once."""

_ZSTD_CHUNK_BYTES = 2**9  # a Zstandard block of 4 bytes may hold 128 KiB: small bites bound what one call returns
_ZSTD_WINDOW_BYTES = 2**27
_GZIP = b"\x1f\x8b"
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes((0x50 + n,)) + b"\x2a\x4d\x18" for n in range(16)))
"""How a Zstandard file begins: with a frame of data, or one of those that readers skip (RFC 8878, 3.1.2)."""
_STRINGS = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class RowFault(Exception):
    """Why one row cannot be used: a short code and a sentence. Never leaves the reading modules."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def within(self, name: str) -> RowFault:
        """The same fault, said of the part `name` of the row."""
        return RowFault(self.reason, f"{name}: {self.message}")


class RawRow(NamedTuple):
    """One row as read: its line from 1, the object or what is wrong with it, and what an excerpt is made of."""

    line: int
    record: dict[str, Any] | RowFault
    stored: bytes | Mapping[str, Any]
    notes: tuple[str, ...] = ()
    """How it was read, where a user would not expect it."""

    @property
    def excerpt(self) -> str:
        """The row's first characters, control characters made visible."""
        if isinstance(self.stored, bytes):
            return visible(self.stored[: 4 * EXCERPT_CHARS].decode(errors="replace"))
        return visible(as_json(self.stored))


class Meter:
    """Digest and size of a file's stored bytes, taken while they are read; refuses a file that swells without end."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.stored_bytes = 0
        self._data_bytes = 0

    def take(self, data: bytes | memoryview) -> None:
        """Count stored bytes."""
        self._sha256.update(data)
        self.stored_bytes += len(data)

    def give(self, size: int) -> None:
        """Count `size` bytes of decompressed data."""
        self._data_bytes += size
        self.allow(0)

    def allow(self, size: int) -> None:
        """Raise InputError where `size` bytes more would be too many."""
        allowed = max(MAX_RATIO_FLOOR_BYTES, MAX_RATIO * self.stored_bytes)
        if self._data_bytes + size > min(allowed, MAX_DATA_BYTES):
            raise InputError(
                f"{visible(self._file.path)}: {self.stored_bytes} stored bytes hold {self._data_bytes + size} or more,"
                " as a decompression bomb does. If it is what you mean to read, store it uncompressed or in parts."
            )

    def finish(self) -> None:
        """Take the stored bytes that were not read; of a dataset of the Hub there are none."""
        if self._file.is_hub:
            return
        with open_stored(self._file.path) as stored:
            stored.seek(self.stored_bytes)
            while data := stored.read(CHUNK_BYTES):
                self.take(data)

    @property
    def digest(self) -> str:
        """`sha256:` and the hexadecimal digest of the bytes taken so far."""
        return f"sha256:{self._sha256.hexdigest()}"


# --- reading ---


def json_rows(file: DataFile, meter: Meter, magic: bytes) -> Iterator[RawRow]:
    """The rows of a file of JSON lines, packed or not as its first bytes `magic` tell; see `tables.raw_rows`."""
    yield from line_rows(chunks(file, meter, magic))


def line_rows(pieces: Iterable[bytes]) -> Iterator[RawRow]:
    """The rows of a text of JSON lines that comes in pieces."""
    for number, line in _lines(pieces):
        data = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if data.strip():
            yield json_row(number, data)


def json_row(number: int, data: bytes) -> RawRow:
    """The row that a JSON object is; keys that are null within its values are left out, as of columns."""
    try:
        record = parse_line(data)
    except RowFault as fault:
        return RawRow(number, fault, data)
    if b"null" not in data:
        return RawRow(number, record, data)
    full = without_nulls(record)
    return RawRow(number, full, data, (NULLS_LEFT_OUT,) if _lost_more(record, full) else ())


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the null keys of nested objects left out: columns give every object the keys of all others."""
    return {key: pruned(value) for key, value in record.items()}


def pruned(value: Any) -> Any:
    """A value with the null keys of its objects left out."""
    if isinstance(value, dict):
        return {key: pruned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [pruned(item) for item in value]
    return value


def _lost_more(record: dict[str, Any], full: dict[str, Any]) -> bool:
    """Whether more is gone than keys of messages, of which a null one never says anything."""
    if record.get("tools") != full.get("tools"):
        return True
    lists = [(value, full[key]) for key, value in record.items() if key != "tools" and isinstance(value, list)]
    entries = [pair for one, other in lists for pair in zip(one, other, strict=True) if isinstance(pair[0], dict)]
    return any(value is not None and value != after[key] for before, after in entries for key, value in before.items())


def _lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, without their ends; of one that is too long only the first bytes, one too many."""
    number, held = 0, bytearray()
    for chunk in chunks:
        if not held and not chunk.strip(b"\n"):
            number += len(chunk)  # nothing but empty lines, of which a few packed bytes may hold millions
            continue
        first, *others = chunk.split(b"\n")
        held += first[: MAX_LINE_BYTES + 1 - len(held)]
        for other in others:
            number += 1
            yield number, bytes(held)
            held = bytearray(other[: MAX_LINE_BYTES + 1])
    if held:
        yield number + 1, bytes(held)


class Metered(io.RawIOBase):
    """A stored file whose every byte passes the meter."""

    def __init__(self, path: str, meter: Meter) -> None:
        self._stored = open_stored(path)
        self._meter = meter

    def readable(self) -> bool:
        """It is read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; the number of bytes read."""
        count = self._stored.readinto(buffer) or 0  # type: ignore[attr-defined]
        self._meter.take(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        """Close the file."""
        self._stored.close()
        super().close()


def chunks(file: DataFile, meter: Meter, magic: bytes) -> Iterator[bytes]:
    """The file's text in pieces, decompressed."""
    with Metered(file.path, meter) as stored:
        if magic.startswith(_GZIP):
            pieces = _gzip_chunks(stored)
        elif magic.startswith(_ZSTD):
            pieces = _zstd_chunks(stored)
        else:
            pieces = iter(lambda: stored.read(CHUNK_BYTES) or b"", b"")
        try:
            for piece in pieces:
                meter.give(len(piece))
                yield piece
        except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdError) as error:
            raise InputError(f"{visible(file.path)}: torn or damaged: {error}. Get the file again.") from error


class _ZstdError(Exception):
    """A Zstandard file is torn or damaged."""


def _gzip_chunks(stored: io.RawIOBase) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stored) as unpacked:
        while chunk := unpacked.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(stored: io.RawIOBase) -> Iterator[bytes]:
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    frame = unpacker.decompressobj()
    try:
        while chunk := stored.read(_ZSTD_CHUNK_BYTES):
            while chunk:
                if frame.eof:
                    frame = unpacker.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise _ZstdError(str(error)) from error
    if not frame.eof:
        raise _ZstdError("the file ends within a frame")


# --- one line of JSON ---


def parse_line(data: bytes) -> dict[str, Any]:
    """The object on one line. Raises RowFault: not_an_object, or as `parse_json`."""
    value = parse_json(data)
    if not isinstance(value, dict):
        message = f"a row is a JSON object on a line of its own; this line holds a {type(value).__name__}"
        message += ". A file that is one JSON array is named .json" if isinstance(value, list) else ""
        raise RowFault("not_an_object", message)
    return value


def parse_json(data: bytes) -> Any:
    """One value, strictly: UTF-8 text, standard JSON, no key twice, integers of an object fit 64 bits.

    Raises RowFault with one of the reasons line_too_long, invalid_utf8, too_deep, invalid_json, two_values,
    not_a_number, duplicate_key, integer_too_large, lone_surrogate.
    """
    if len(data) > MAX_LINE_BYTES:
        raise too_long()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RowFault("invalid_utf8", f"byte {error.start + 1} of the line is not UTF-8") from None
    _check_nesting(text)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        two = error.msg == "Extra data"
        message = f"{'a second value starts' if two else error.msg} at column {error.colno}"
        raise RowFault("two_values" if two else "invalid_json", message) from None
    except ValueError:
        raise _too_large() from None  # more digits than Python turns into an integer
    if "\\ud" in text or "\\uD" in text:
        check_surrogates(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowFault("duplicate_key", f"the key {visible(twice, 40)!r} is given twice")
    for value in record.values():
        if value.__class__ is int and not -(2**63) <= value < 2**64:
            raise _too_large()
    return record


def too_long() -> RowFault:
    """The fault of a row that is larger than any that is read."""
    return RowFault("line_too_long", f"the row holds more than {MAX_LINE_BYTES} bytes")


def _too_large() -> RowFault:
    return RowFault("integer_too_large", "an integer does not fit 64 bits; write it as a string")


def _no_constant(name: str) -> Any:
    raise RowFault("not_a_number", f"{name} is not JSON; write null or leave the key out")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _check_nesting(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", _STRINGS.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_NESTING:
            raise RowFault("too_deep", f"lists and objects are nested more than {MAX_NESTING} deep")


def check_surrogates(value: Any) -> None:
    """Raise RowFault for text with half a character, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowFault("lone_surrogate", "a \\ud800-\\udfff escape stands alone: it is half a character") from None


def as_json(record: Mapping[str, Any]) -> str:
    """A record as one line with sorted keys."""
    return json.dumps(record, ensure_ascii=False, sort_keys=True, default=str)
