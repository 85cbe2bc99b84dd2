"""Shards on disk: rows to tables and back, one commit point per file, and reads that check every page.

A file appears at its name by one rename and is never changed afterwards. What lies at a final name is therefore
whole, and its Parquet footer (`sealed`) says with which settings it was made: to resume is to list the folder and
check. Which columns there are is the layout's: rows of one sequence, or pairs, whose branches are stored side by side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alphatoken_curate.errors import CurateError, FingerprintError, StoredDataError
from alphatoken_curate.runs import sealed
from alphatoken_curate.runs.atomic import atomic_file, digest
from alphatoken_curate.runs.fingerprint import Json, differing, fingerprint
from alphatoken_curate.runs.schema import PAIR_COLUMNS, SCHEMA_VERSION, SIGNALS, STATUSES, Layout, lacking
from alphatoken_curate.wording import count

SHARD_NAME = re.compile(r"part-(\d{5,})\.parquet")

OF_ROW = ("row_id", "turn", "source", "line", "id", "status")
"""Columns of values/ that say which row it is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branch:
    """One sequence of a row: `input_ids` (T,) int32, `response` and `end_of_turn` (T,) bool, empty for rejected rows.

    `signals`: name -> (T,) float32, NaN off the response; empty unless the row is scored. A signal that is left out
    is null everywhere.
    """

    input_ids: NDArray[np.int32]
    response: NDArray[np.bool_]
    end_of_turn: NDArray[np.bool_]
    signals: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValueRow:
    """One row read, or one turn of it, with its values if it was scored.

    `branches`: as many as the layout has, in its order. `omega` (ratio) and `margin` (nats), stored as float32, of
    scored preference rows; None for all others.
    """

    row_id: int
    turn: int = 0
    source: str
    line: int
    id: str | None
    status: str
    branches: tuple[Branch, ...]
    omega: float | None = None
    margin: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """What a shard says of itself. `fields` decide its bytes; `facts` are told along.

    `counts` and the schema `version` are set on writing.
    """

    fields: Mapping[str, Json]
    facts: Mapping[str, Json] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    version: int = SCHEMA_VERSION

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


def write_values(path: Path, records: Sequence[ValueRow], metadata: Footer, layout: Layout) -> Shard:
    """Commit one values shard. The same records and metadata give the same bytes.

    Raises `CurateError` for records that contradict themselves or the layout, or where the disk refuses.
    """
    table = values_table(records, layout)
    branches = [branch for record in records for branch in record.branches]
    counts = rows_by_status([record.row_id for record in records], [record.status for record in records])
    counts |= {"rows": len(records), "read": sum(counts.values())}
    counts |= {"sequences": sum(record.status == "scored" for record in records)}
    counts |= {"tokens": sum(len(branch.input_ids) for branch in branches)}
    counts |= {"response_tokens": sum(int(branch.response.sum()) for branch in branches)}
    return commit(path, table, metadata, counts)


def rows_by_status(row_ids: Iterable[int], statuses: Iterable[str]) -> dict[str, int]:
    """How many rows have each status; of a row of several sequences the first that any of them has."""
    best: dict[int, int] = {}
    for row_id, status in zip(row_ids, statuses, strict=True):
        place = STATUSES.index(status)
        best[row_id] = min(place, best.get(row_id, place))
    return {status: sum(place == found for found in best.values()) for place, status in enumerate(STATUSES)}


def values_table(records: Sequence[ValueRow], layout: Layout) -> pa.Table:
    """Records as a table of `layout.values`. Raises `CurateError` for records that contradict themselves or it."""
    for record in records:
        _check_record(record, layout)
    schema = layout.values
    columns = {
        name: pa.array([getattr(record, name) for record in records], schema.field(name).type)
        for name in (*OF_ROW, *PAIR_COLUMNS)
        if name in schema.names
    }
    scored = np.array([record.status == "scored" for record in records], np.bool_)
    for number, prefix in enumerate(layout.branches):
        branches = [record.branches[number] for record in records]
        lengths = np.array([len(branch.input_ids) for branch in branches], np.int64)
        for name, kind in (("input_ids", np.int32), ("response", np.bool_), ("end_of_turn", np.bool_)):
            flat = _joined([getattr(branch, name) for branch in branches], kind)
            columns[prefix + name] = lists_of(flat, lengths, schema, prefix + name)
        given = [branch for branch in branches if branch.signals]
        for name in SIGNALS:
            flat = _joined([_signal(branch, name) for branch in given], np.float32)
            ends = np.where(scored, lengths, 0)
            columns[prefix + name] = lists_of(flat, ends, schema, prefix + name, null=np.isnan(flat))
    return pa.table(columns, schema=schema)


def _check_record(record: ValueRow, layout: Layout) -> None:
    where = f"row {record.row_id} ({record.source}:{record.line})"
    if record.status not in STATUSES:
        raise CurateError(f"{where}: status {record.status!r} is none of {', '.join(STATUSES)}")
    if len(record.branches) != len(layout.branches):
        raise CurateError(f"{where}: {len(record.branches)} branches; {layout.kind} rows have {len(layout.branches)}")
    for prefix, branch in zip(layout.branches, record.branches, strict=True):
        _check_branch(branch, f"{where}: {prefix.rstrip('_')}".rstrip(": "), scored=record.status == "scored")
    wanted = record.status == "scored" and PAIR_COLUMNS[0] in layout.values.names
    for name in PAIR_COLUMNS:
        number = getattr(record, name)
        if (number is not None) != wanted or not math.isfinite(number or 0.0):
            raise CurateError(f"{where}: {name} is {number}; scored preference rows have a finite one, others none")


def _check_branch(branch: Branch, where: str, *, scored: bool) -> None:
    length = len(branch.input_ids)
    if len(branch.response) != length or (length and bool(branch.response[0])):
        raise CurateError(f"{where}: `response` must be as long as `input_ids` and false at index 0")
    if len(branch.end_of_turn) != length or (branch.end_of_turn & ~branch.response).any():
        raise CurateError(f"{where}: `end_of_turn` must be as long as `input_ids` and false off the response")
    if scored != bool(branch.signals):
        raise CurateError(f"{where}: {len(branch.signals)} signals; scored rows have some, others none")
    for name, signal in branch.signals.items():
        if name not in SIGNALS or signal.shape != (length,):
            raise CurateError(
                f"{where}: {name!r} {signal.shape} is no signal; they are {', '.join(SIGNALS)}, ({length},)"
            )
        if not np.isfinite(signal[branch.response]).all() or not np.isnan(signal[~branch.response]).all():
            raise CurateError(f"{where}: signal {name!r} must be finite on the response and NaN off it")


def _signal(branch: Branch, name: str) -> NDArray[np.float32]:
    absent = np.full(len(branch.input_ids), np.nan, np.float32)
    return branch.signals.get(name, absent)


def _joined(parts: Sequence[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, kind), *parts]).astype(kind, copy=False)


def lists_of(
    flat: NDArray[Any], lengths: NDArray[np.int64], schema: pa.Schema, name: str, null: NDArray[np.bool_] | None = None
) -> pa.Array:
    """Flat entries (N,) and row lengths (R,) -> list array (R,) of the schema's type, null where `null`."""
    kind = schema.field(name).type
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise CurateError(f"{offsets[-1]} tokens in one shard, more than a list column holds; lower --rows-per-shard")
    values = pa.array(flat, kind.value_type, mask=null)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=kind)


def commit(path: Path, table: pa.Table, metadata: Footer, counts: Mapping[str, int]) -> Shard:
    """Write a shard whole, with what it says of itself. Raises `CurateError` where the disk refuses."""
    with atomic_file(path) as sink:
        told: dict[str, Json] = {
            "fields": metadata.fields,
            "facts": metadata.facts,
            "fingerprint": metadata.fingerprint,
        }
        sealed.write(sink, table, {**told, "counts": counts})
    return _shard(path, counts, sink.bytes, sink.sha256)


def _shard(path: Path, counts: Mapping[str, int], size: int, sha256: str) -> Shard:
    return Shard(
        path=name_in_run(path),
        rows=counts["rows"],
        tokens=counts["tokens"],
        response_tokens=counts["response_tokens"],
        bytes=size,
        sha256=sha256,
    )


# ----------------------------------------------------------------------------------------------------------- reading


def read_shard(run: Path, shard: Shard, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """`read` of a shard that the manifest names. Raises `StoredDataError` also where the file is another."""
    return read(run / shard.path, schema, columns, named=shard)


def read(
    path: Path, schema: pa.Schema, columns: Sequence[str] | None = None, *, named: Shard | None = None
) -> pa.Table:
    """The table (or some columns of it) of a shard, once all of its bytes have been checked.

    Columns that its schema version did not have are null. `named`: the file it must be. Raises `StoredDataError`, which
    names the file, for anything missing, damaged or of another schema.
    """

    def table(file: pq.ParquetFile) -> pa.Table:
        about = sealed.about(path, file.metadata)
        lacks = lacking(schema, about["schema_version"])
        if not file.schema_arrow.equals(pa.schema([column for column in schema if column.name not in lacks])):
            found = f"those that the run's kind of rows has in schema version {about['schema_version']}"
            raise StoredDataError(f"{path}: its columns are not {found}; move it out of the run folder")
        _check_named(path, named, sealed.check_body(path, about["body"]))
        wanted = [name for name in schema.names if columns is None or name in columns]
        absent = {name: lacks[name] for name in wanted if name in lacks}
        result = file.read(columns=list(dict.fromkeys(absent.get(name, name) for name in wanted)))
        if result.num_rows != about["counts"]["rows"]:
            raise sealed.damaged(path, f"{count(result.num_rows, 'row')} of {about['counts']['rows']}")
        result.validate(full=True)
        return _with_nulls(result, schema, absent).select(wanted) if absent else result

    return sealed.opened(path, table)


def check(run: Path, shard: Shard) -> None:
    """Raise `StoredDataError` where a file is not, byte by byte, the one that the manifest names."""
    _check_named(run / shard.path, shard, digest(run / shard.path))


def _check_named(path: Path, named: Shard | None, found: tuple[int, str]) -> None:
    if named is not None and found != (named.bytes, named.sha256):
        raise StoredDataError(f"{path}: not the file that the manifest names; `verify` says what is damaged")


def _with_nulls(table: pa.Table, schema: pa.Schema, absent: Mapping[str, str]) -> pa.Table:
    """With these columns, each aligned with the one beside it: null at every token. `turn` is 0."""
    for name, beside in absent.items():
        if name == "turn":
            zeros = pa.array(np.zeros(table.num_rows, np.int32))
            table = table.append_column(schema.field(name), zeros)
            continue
        flat, lengths = entries(table[beside])
        kind = schema.field(name).type.value_type.to_pandas_dtype()
        nulls = lists_of(np.zeros(len(flat), kind), lengths, schema, name, null=np.ones(len(flat), np.bool_))
        table = table.append_column(schema.field(name), nulls)
    return table


def check_rows(path: Path, row_ids: Sequence[int], fields: Mapping[str, Json] | None = None) -> Footer:
    """Raise `StoredDataError` where a shard found on disk begins or ends with other rows than these, which ascend.

    Returns what it says of itself; its pages are not read. `fields`: as `check_fields`, before that.
    """

    def looked_at(file: pq.ParquetFile) -> tuple[Footer, tuple[int, ...]]:
        about = sealed.about(path, file.metadata)
        sealed.check_size(path, file.metadata, about["body"])
        if not file.metadata.num_rows:
            return _footer(about), ()
        found = file.metadata.row_group(0).column(0).statistics
        return _footer(about), (found.min, found.max)

    (footer, found), wanted = sealed.opened(path, looked_at), (*row_ids[:1], *row_ids[-1:])
    if fields is not None:
        check_fields(path, footer, fields)
    if found != wanted:
        told = [" to ".join(map(str, one)) or "none" for one in (found, wanted)]
        raise sealed.damaged(path, f"it holds rows {told[0]}, not {told[1]}: it was swapped or copied")
    return footer


def read_footer(path: Path) -> Footer:
    """What the shard says of itself. Raises `StoredDataError` for damage or a file of another origin."""
    return _footer(sealed.opened(path, lambda file: sealed.about(path, file.metadata)))


def facts_of(path: Path, known: Mapping[str, Shard] = {}) -> tuple[Footer, Shard]:
    """Footer and facts of a file found on disk, all of its bytes checked unless it is `known`. Raises as `read_footer`.

    `known`: files by `name_in_run` that are as they were written.
    """
    if (shard := known.get(name_in_run(path))) is not None:
        return read_footer(path), shard

    def checked(file: pq.ParquetFile) -> tuple[Footer, Shard]:
        about = sealed.about(path, file.metadata)
        return _footer(about), _shard(path, about["counts"], *sealed.check_body(path, about["body"]))

    return sealed.opened(path, checked)


def _footer(about: Mapping[str, Any]) -> Footer:
    return Footer(fields=about["fields"], facts=about["facts"], counts=about["counts"], version=about["schema_version"])


def committed(folder: Path, fields: Mapping[str, Json]) -> dict[int, Shard]:
    """Shards of `folder` that are complete: index -> facts; empty where there is no folder.

    Raises `FingerprintError`, which names the fields that differ, where a shard was made from other fields;
    `StoredDataError` where one cannot be read.
    """
    found: dict[int, Shard] = {}
    for index, path in listed(folder).items():
        footer, found[index] = facts_of(path)
        check_fields(path, footer, fields)
    return found


def check_fields(path: Path, footer: Footer, fields: Mapping[str, Json]) -> None:
    """Raise `FingerprintError`, which names the fields that differ, where a shard was made from other fields."""
    if names := differing(footer.fields, fields):
        raise FingerprintError(
            f"{path}: made with other {', '.join(names)}; use the settings it was made with, or another run folder",
            names,
            footer.fields,
        )


def untouched(path: Path, shard: Shard, since: Path) -> bool:
    """Whether a file has the size of `shard`, and was neither written nor copied after `since` was written."""
    try:
        found, then = path.stat(), since.stat()
    except OSError:
        return False
    return found.st_size == shard.bytes and max(found.st_mtime_ns, found.st_ctime_ns) < then.st_mtime_ns


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
