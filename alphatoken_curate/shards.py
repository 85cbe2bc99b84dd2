"""Shards on disk: one commit point per file, footers that say what made them, and reads that check every page.

A file appears at its name by one rename and is never changed afterwards. What lies at a final name is therefore
whole, and its Parquet footer says with which settings it was made: to resume is to list the folder and check.

Footer keys, each prefixed `alphatoken_curate.` and JSON: schema_version, fingerprint (sha256 of the fields), fields
(everything that changes the values), facts (what the manifest repeats), counts, units, body (size and sha256 of all
that precedes the footer) and seal (sha256 of the keys above).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alphatoken_curate.atomic import Sink, atomic_file
from alphatoken_curate.errors import CurateError, FingerprintError, StoredDataError
from alphatoken_curate.fingerprint import Json, canonical, differing, fingerprint
from alphatoken_curate.schema import IGNORE_INDEX, SCHEMA_VERSION, SIGNALS, STATUSES, TRAIN, VALUES

SHARD_NAME = re.compile(r"part-(\d{5,})\.parquet")

T = TypeVar("T")

_PREFIX = "alphatoken_curate."
_CHUNK = 1 << 20
_READ_ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, UnicodeError)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValueRow:
    """One row read, with its values if it was scored.

    `input_ids` (T,) int32 and `response` (T,) bool; both empty for rejected rows. `signals`: name -> (T,) float32,
    NaN off the response; empty unless `status` is `scored`. A signal that is left out is null everywhere.
    """

    row_id: int
    source: str
    line: int
    id: str | None
    status: str
    input_ids: NDArray[np.int32]
    response: NDArray[np.bool_]
    signals: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainRows:
    """The scored rows of one shard, flat: R rows of N tokens in all.

    `row_id` (R,) int64, `lengths` (R,) int64, `input_ids` (N,) int32, `weight` (N,) float32 >= 0,
    `value` (N,) float32, NaN off the response.
    """

    row_id: NDArray[np.int64]
    lengths: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    weight: NDArray[np.float32]
    value: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """What a shard says of itself. `fields` decide its bytes; `facts` are told along; `counts` are set on writing."""

    fields: Mapping[str, Json]
    facts: Mapping[str, Json] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Sha256 of the fields, as `fingerprint.fingerprint` writes it."""
        return fingerprint(self.fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A committed file: its `path` in the run, what it holds and its bytes. `sha256` is 64 hex digits."""

    path: str
    rows: int
    tokens: int
    response_tokens: int
    bytes: int
    sha256: str


# ------------------------------------------------------------------------------------------------------------- names


def values_folder(run: Path, generation: int) -> Path:
    """Folder of a generation's shards."""
    return run / "values" / f"generation={generation}"


def train_folder(run: Path, mask: int) -> Path:
    """Folder of a mask's shards."""
    return run / "train" / f"mask={mask:04d}"


def shard_name(index: int) -> str:
    """File name of a shard in its folder."""
    return f"part-{index:05d}.parquet"


# ----------------------------------------------------------------------------------------------------------- writing


def write_values(path: Path, records: Sequence[ValueRow], metadata: Footer) -> Shard:
    """Commit one values shard. The same records and metadata give the same bytes.

    Raises `CurateError` for records that contradict themselves, or where the disk refuses.
    """
    table = values_table(records)
    counts = {status: sum(record.status == status for record in records) for status in STATUSES}
    counts |= {"rows": len(records), "tokens": sum(len(record.input_ids) for record in records)}
    counts |= {"response_tokens": sum(int(record.response.sum()) for record in records)}
    return _commit(path, table, metadata, counts)


def values_table(records: Sequence[ValueRow]) -> pa.Table:
    """Records as a table of schema VALUES. Raises `CurateError` for records that contradict themselves."""
    for record in records:
        _check_record(record)
    lengths = np.array([len(record.input_ids) for record in records], np.int64)
    response = _joined([record.response for record in records], np.bool_)
    scored = np.array([record.status == "scored" for record in records], np.bool_)
    columns: dict[str, pa.Array] = {
        "row_id": pa.array([record.row_id for record in records], pa.int64()),
        "source": pa.array([record.source for record in records], pa.string()),
        "line": pa.array([record.line for record in records], pa.int64()),
        "id": pa.array([record.id for record in records], pa.string()),
        "status": pa.array([record.status for record in records], pa.string()),
        "input_ids": _lists(_joined([record.input_ids for record in records], np.int32), lengths, VALUES, "input_ids"),
        "response": _lists(response, lengths, VALUES, "response"),
    }
    for name in SIGNALS:
        flat = _joined([_signal(record, name) for record in records if record.status == "scored"], np.float32)
        columns[name] = _lists(flat, np.where(scored, lengths, 0), VALUES, name, null=np.isnan(flat))
    return pa.table(columns, schema=VALUES)


def write_train(path: Path, rows: TrainRows, metadata: Footer) -> Shard:
    """Commit one train shard; labels, loss_mask and attention_mask follow from the weights.

    The same rows and metadata give the same bytes. Raises `CurateError` where the disk refuses.
    """
    trains = rows.weight > 0
    flat: dict[str, NDArray[Any]] = {
        "input_ids": rows.input_ids,
        "attention_mask": np.ones(len(trains), np.int8),
        "labels": np.where(trains, rows.input_ids, IGNORE_INDEX).astype(np.int64),
        "loss_mask": trains.astype(np.int8),
        "loss_weight": rows.weight,
    }
    columns: dict[str, pa.Array] = {"row_id": pa.array(rows.row_id, pa.int64())}
    columns |= {name: _lists(values, rows.lengths, TRAIN, name) for name, values in flat.items()}
    off = np.isnan(rows.value)
    columns["value"] = _lists(rows.value, rows.lengths, TRAIN, "value", null=off)
    counts = {"rows": len(rows.row_id), "tokens": len(trains), "response_tokens": int((~off).sum())}
    return _commit(path, pa.table(columns, schema=TRAIN), metadata, counts | {"kept_tokens": int(trains.sum())})


def _check_record(record: ValueRow) -> None:
    where = f"row {record.row_id} ({record.source}:{record.line})"
    length = len(record.input_ids)
    if record.status not in STATUSES:
        raise CurateError(f"{where}: status {record.status!r} is none of {', '.join(STATUSES)}")
    if len(record.response) != length or (length and bool(record.response[0])):
        raise CurateError(f"{where}: `response` must be as long as `input_ids` and false at index 0")
    if (record.status == "scored") != bool(record.signals):
        raise CurateError(
            f"{where}: status {record.status!r} with {len(record.signals)} signals; only scored rows have any"
        )
    for name, signal in record.signals.items():
        if name not in SIGNALS or signal.shape != (length,):
            raise CurateError(
                f"{where}: {name!r} {signal.shape} is no signal; they are {', '.join(SIGNALS)}, ({length},)"
            )
        if not np.isfinite(signal[record.response]).all() or not np.isnan(signal[~record.response]).all():
            raise CurateError(f"{where}: signal {name!r} must be finite on the response and NaN off it")


def _signal(record: ValueRow, name: str) -> NDArray[np.float32]:
    absent = np.full(len(record.input_ids), np.nan, np.float32)
    return record.signals.get(name, absent)


def _joined(parts: Sequence[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, kind), *parts]).astype(kind, copy=False)


def _lists(
    flat: NDArray[Any], lengths: NDArray[np.int64], schema: pa.Schema, name: str, null: NDArray[np.bool_] | None = None
) -> pa.Array:
    """Flat entries (N,) and row lengths (R,) -> list array (R,) of the schema's type, null where `null`."""
    kind = schema.field(name).type
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise CurateError(f"{offsets[-1]} tokens in one shard, more than a list column holds; lower --rows-per-shard")
    values = pa.array(flat, kind.value_type, mask=null)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=kind)


def _commit(path: Path, table: pa.Table, metadata: Footer, counts: Mapping[str, int]) -> Shard:
    with atomic_file(path) as sink:
        _write_parquet(sink, table, metadata, counts)
    return Shard(
        path=name_in_run(path),
        rows=counts["rows"],
        tokens=counts["tokens"],
        response_tokens=counts["response_tokens"],
        bytes=sink.bytes,
        sha256=sink.sha256,
    )


def _write_parquet(sink: Sink, table: pa.Table, metadata: Footer, counts: Mapping[str, int]) -> None:
    with pq.ParquetWriter(
        pa.PythonFile(sink, mode="w"),
        table.schema,
        compression="zstd",
        use_dictionary=["source", "status"],
        write_statistics=True,
        write_page_checksum=True,
    ) as writer:
        # One row group: shards are small, and readers that stream take them shard by shard.
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        about: dict[str, Json] = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": metadata.fingerprint,
            "fields": metadata.fields,
            "facts": metadata.facts,
            "counts": counts,
            "units": {column.name: column.metadata[b"units"].decode() for column in table.schema},
            "body": {"bytes": sink.bytes, "sha256": sink.sha256},
        }
        about["seal"] = fingerprint(about)
        writer.add_key_value_metadata({_PREFIX + key: canonical(item).decode() for key, item in about.items()})


# ----------------------------------------------------------------------------------------------------------- reading


def read(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The shard's table (or some columns of it), its pages checked against their checksums and the digest of them all.

    Raises `StoredDataError`, which names the file, for anything missing, damaged or of another schema.
    """

    def table(file: pq.ParquetFile) -> pa.Table:
        if not file.schema_arrow.equals(schema):
            raise StoredDataError(f"{path}: its columns are not those of schema version {SCHEMA_VERSION}")
        about = _about(path, file.metadata)
        _check_body(path, about["body"])
        result = file.read(columns=None if columns is None else list(columns))
        if result.num_rows != about["counts"]["rows"]:
            raise _damaged(path, f"{result.num_rows} rows of {about['counts']['rows']}")
        result.validate(full=True)
        return result

    return _opened(path, table)


def read_footer(path: Path) -> Footer:
    """What the shard says of itself. Raises `StoredDataError` for damage or a file of another origin."""
    return _opened(path, lambda file: _footer(path, file.metadata))


def facts_of(path: Path) -> tuple[Footer, Shard]:
    """Footer and facts of a file found on disk, all of its bytes checked. Raises as `read_footer`."""
    footer, (size, sha256) = _opened(
        path, lambda file: (_footer(path, file.metadata), _check_body(path, _about(path, file.metadata)["body"]))
    )
    counts = footer.counts
    shard = Shard(
        path=name_in_run(path),
        rows=counts["rows"],
        tokens=counts["tokens"],
        response_tokens=counts["response_tokens"],
        bytes=size,
        sha256=sha256,
    )
    return footer, shard


def committed(folder: Path, fields: Mapping[str, Json]) -> dict[int, Shard]:
    """Shards of `folder` that are complete: index -> facts; empty where there is no folder.

    Raises `FingerprintError`, which names the fields that differ, where a shard was made from other fields;
    `StoredDataError` where one cannot be read.
    """
    found: dict[int, Shard] = {}
    for index, path in listed(folder).items():
        footer, shard = facts_of(path)
        names = differing(footer.fields, fields)
        if names:
            raise FingerprintError(
                f"{path}: made with other {', '.join(names)}; use the settings it was made with, or another run folder",
                names,
            )
        found[index] = shard
    return found


def listed(folder: Path) -> dict[int, Path]:
    """Files named like shards in `folder`: index -> path, ascending; empty where there is no folder."""
    if not folder.is_dir():
        return {}
    matches = ((SHARD_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def entries(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A list column as all its entries (N,), nulls as NaN, and the length of each list (R,)."""
    flat = pc.list_flatten(column).to_numpy()
    return flat, pc.list_value_length(column).to_numpy().astype(np.int64)


def name_in_run(path: Path) -> str:
    """`values/generation=0/part-00000.parquet` of an absolute path: a shard always lies two folders below its run."""
    return "/".join(path.parts[-3:])


def _opened(path: Path, use: Callable[[pq.ParquetFile], T]) -> T:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return use(file)
    except FileNotFoundError as error:
        raise StoredDataError(f"{path}: missing; restore it, or delete the run folder and score again") from error
    except _READ_ERRORS as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _damaged(path, first) from error


def _damaged(path: Path, found: str) -> StoredDataError:
    return StoredDataError(f"{path}: damaged ({found}); delete this file and run the same command again")


def _about(path: Path, metadata: pq.FileMetaData) -> dict[str, Any]:
    """Our part of the footer, its seal checked."""
    prefix = _PREFIX.encode()
    stored = {key: text for key, text in (metadata.metadata or {}).items() if key.startswith(prefix)}
    if not stored:
        raise StoredDataError(f"{path}: not written by alphatoken-curate; move it out of the run folder")
    about = {key.removeprefix(prefix).decode(): orjson.loads(text) for key, text in stored.items()}
    if about.pop("seal", None) != fingerprint(about):
        raise _damaged(path, "its footer is not as it was written")
    if about["schema_version"] != SCHEMA_VERSION:
        raise StoredDataError(f"{path}: schema version {about['schema_version']}; this release reads {SCHEMA_VERSION}")
    return about


def _footer(path: Path, metadata: pq.FileMetaData) -> Footer:
    about = _about(path, metadata)
    if about["counts"]["rows"] != metadata.num_rows:
        raise _damaged(path, "its number of rows is not as it was written")
    return Footer(fields=about["fields"], facts=about["facts"], counts=about["counts"])


def _check_body(path: Path, body: Mapping[str, Any]) -> tuple[int, str]:
    """Size and sha256 of the file, whose part before the footer must be as it was written.

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
        raise _damaged(path, "its pages are not as they were written")
    return size, sha256.hexdigest()
