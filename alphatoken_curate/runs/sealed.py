"""Parquet files that say what made them: a sealed footer, page checksums, and a digest of all that precedes the footer.

Footer keys, each prefixed `alphatoken_curate.` and JSON: schema_version, fingerprint (sha256 of the fields), fields
(everything that changes the values), facts (what the manifest repeats), counts, units, body (size and sha256 of all
that precedes the footer) and seal (sha256 of the keys above).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.runs.atomic import Sink, unread
from alphatoken_curate.runs.fingerprint import Json, canonical, fingerprint
from alphatoken_curate.runs.schema import SCHEMA_VERSION, VERSIONS

T = TypeVar("T")

_PREFIX = "alphatoken_curate."
_CHUNK = 1 << 20
_FRAME = 8
"""Bytes behind a Parquet footer: its length, and the mark of the format."""
_READ_ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, UnicodeError)


def write(sink: Sink, table: pa.Table, told: Mapping[str, Json]) -> None:
    """The table as Parquet: one row group, if it has rows, zstd, page checksums; the footer holds `told` and more.

    The same table and `told` give the same bytes. The schema's columns have metadata `units`.
    """
    with pq.ParquetWriter(
        pa.PythonFile(sink, mode="w"),
        table.schema,
        compression="zstd",
        use_dictionary=["source", "status"],
        write_statistics=True,
        write_page_checksum=True,
    ) as writer:
        # One row group: shards are small, and readers that stream take them shard by shard. None of no rows: datasets
        # fails at one.
        if table.num_rows:
            writer.write_table(table, row_group_size=table.num_rows)
        about: dict[str, Json] = {
            "schema_version": SCHEMA_VERSION,
            **told,
            "units": {column.name: column.metadata[b"units"].decode() for column in table.schema},
            "body": {"bytes": sink.bytes, "sha256": sink.sha256},
        }
        about["seal"] = fingerprint(about)
        writer.add_key_value_metadata({_PREFIX + key: canonical(item).decode() for key, item in about.items()})


def opened(path: Path, use: Callable[[pq.ParquetFile], T]) -> T:
    """What `use` makes of the file. Raises `StoredDataError`, which names it, where it is missing or damaged."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return use(file)
    except FileNotFoundError as error:
        raise StoredDataError(f"{path}: missing; restore it, or run the command that wrote it again") from error
    except _READ_ERRORS as error:
        if (refused := unread(path, error)) is not None:
            raise refused from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise damaged(path, first) from error


def damaged(path: Path, found: str) -> StoredDataError:
    """The error that says so and what to do."""
    return StoredDataError(f"{path}: damaged ({found}); delete this file, and run the command that wrote it again")


def about(path: Path, metadata: pq.FileMetaData) -> dict[str, Any]:
    """Our part of the footer, its seal and its number of rows checked. Raises `StoredDataError`."""
    prefix = _PREFIX.encode()
    stored = {key: text for key, text in (metadata.metadata or {}).items() if key.startswith(prefix)}
    if not stored:
        raise StoredDataError(f"{path}: not written by alphatoken-curate; move it out of the run folder")
    told = {key.removeprefix(prefix).decode(): orjson.loads(text) for key, text in stored.items()}
    if told.pop("seal", None) != fingerprint(told):
        raise damaged(path, "its footer is not as it was written")
    if told["schema_version"] not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise StoredDataError(f"{path}: schema version {told['schema_version']}; this release reads {known}")
    if told["counts"]["rows"] != metadata.num_rows:
        raise damaged(path, "its number of rows is not as it was written")
    return told


def check_size(path: Path, metadata: pq.FileMetaData, body: Mapping[str, Any]) -> None:
    """Raise `StoredDataError` where there is more or less before the footer than was written."""
    if path.stat().st_size != body["bytes"] + metadata.serialized_size + _FRAME:
        raise damaged(path, "its size is not as it was written")


def check_body(path: Path, body: Mapping[str, Any]) -> tuple[int, str]:
    """Size and sha256 of the file, whose part before the footer must be as it was written, or `StoredDataError`.

    Page checksums alone leave out page headers, where a flipped bit can change what is read.
    """
    before, sha256, left, size = "", hashlib.sha256(), body["bytes"], 0
    with path.open("rb") as file:
        while part := file.read(min(left, _CHUNK) if left else _CHUNK):
            sha256.update(part)
            size += len(part)
            left -= min(left, len(part))
            before = before or ("" if left else sha256.hexdigest())
    if before != body["sha256"]:
        raise damaged(path, "its pages are not as they were written")
    return size, sha256.hexdigest()
