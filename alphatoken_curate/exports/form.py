"""What an exporter is: the columns a trainer reads, how its weights are aligned, and how a file of it is read back.

Rows come from the mask *token-aligned*: `weight[i]` is about predicting `ids[i]`, `weight[0]` is 0, and the trainer
shifts. Some trainers want them *position-aligned*: `weight[i]` is about position i predicting `ids[i + 1]`, shifted
already, and the last one is 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alphatoken_curate.errors import CurateError
from alphatoken_curate.reading.trainset import TrainRow, TrainSet
from alphatoken_curate.runs.atomic import atomic_file
from alphatoken_curate.runs.schema import Layout
from alphatoken_curate.runs.shards import entries

TOKEN_ALIGNED, POSITION_ALIGNED = "token-aligned", "position-aligned"

IN_WORDS = {
    TOKEN_ALIGNED: (
        "Token-aligned: entry i is about predicting token i from the tokens before it. Nothing is shifted here, the"
        " trainer shifts; entry 0 never trains."
    ),
    POSITION_ALIGNED: (
        "Position-aligned: entry i is about position i predicting token i + 1. The shift is done here, the trainer"
        " does none; the last entry of a full-length list is 0."
    ),
}

BATCH_ROWS = 500
"""Rows held at a time, and in a row group of Parquet: some loaders read a whole group to get one row."""

INT32S, INT8S = pa.list_(pa.int32()), pa.list_(pa.int8())
INT64S, FLOATS = pa.list_(pa.int64()), pa.list_(pa.float32())

Seen = tuple[tuple[NDArray[Any], NDArray[Any]], ...]
"""A row as a trainer sees it: of each branch its ids and its token-aligned weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A row of the mask that is left out, and a short code that says why: a key of `REASONS`."""

    row_id: int
    turn: int
    reason: str


REASONS = {
    "nothing_trains": "the mask leaves no token to train, of a pair in one of its branches",
    "cut_away": "no token to train is left within --max-length, of a pair in one of its branches",
    "same_branches": "chosen and rejected are the same tokens, at the latest within --max-length",
    "too_long": "longer than --max-length, and text cannot be cut at a token",
    "cut_when_scored": "cut at the run's own --max-length: its later answers have no values",
}
"""Why rows are dropped."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """A row to write, `cut` tokens shorter than in the mask.

    Where text is written: `text`, what it is, of `answers` messages, of which `answers_trained` are to train.
    """

    row: TrainRow
    cut: int = 0
    text: Any = None
    answers: int = 0
    answers_trained: int = 0


Items = Iterator[Kept | Dropped]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of an exporter: `strict` leaves only the columns that every reader accepts."""

    layout: Layout
    strict: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a README is written from; `place` is the folder as the user named it, `longest` in tokens."""

    place: str
    kind: str
    strict: bool
    soft: bool
    longest: int
    beta: float | None = None
    """Of DPO, of pairs whose values are of it."""
    by_sum: bool = False
    """Whether the loss that values are of is divided by the sum of weights."""

    def file(self, name: str) -> str:
        """A file of the export as the user would name it."""
        return f"{self.place.rstrip('/')}/{name}"


def quoted(text: str) -> str:
    """A text in quotes, as YAML, JSON and Python alike read it."""
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Form:
    """An exporter. Texts are English sentences for the README beside the files."""

    name: str
    reader: str
    """Who reads it."""
    checked: Mapping[str, str]
    """Trainer -> the version whose form this is, and whether it was run or read in its source."""
    data: str
    """Name of the file, or folder, that the trainer is given."""
    alignment: str
    pairs: bool
    """Whether there is a form for preference rows."""
    floats: Callable[[Asked], bool]
    """Whether weights other than 0 and 1 arrive at the loss, or at least in the file for one that takes them."""
    destroys: str
    """What becomes of other weights where they do not."""
    divides: str
    """What the trainer divides the loss of SFT rows by."""
    columns: Callable[[Told], Iterator[str]]
    use: Callable[[Told], Iterator[str]]
    """Config lines."""
    write: Callable[[Path, Iterator[list[Kept]], Asked], None]
    check: Callable[[Path, Iterator[Kept], Asked], None]
    """Reads the files back and raises `CurateError` where they do not hold these rows."""
    beware: tuple[str, ...] = ()
    checked_pairs: tuple[str, ...] | None = None
    """Those of `checked` that read pairs; None where all do, or none."""
    reader_of_pairs: str | None = None
    cuts: bool = True
    """Whether rows can be cut to a length."""
    refine: Callable[[Items, TrainSet], Items] | None = None
    """Puts to each row what is not in train/."""


def batched(rows: Iterable[Kept]) -> Iterator[list[Kept]]:
    """Lists of at most `BATCH_ROWS` rows."""
    waiting = iter(rows)
    while batch := list(islice(waiting, BATCH_ROWS)):
        yield batch


# ---------------------------------------------------------------------------------------------------------- alignment


def to_positions(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Token-aligned weights (T,) -> position-aligned ones (T,): entry 0 goes, a 0 comes at the end."""
    return np.append(weight[1:], np.float32(0))


def to_tokens(weight: NDArray[Any]) -> NDArray[Any]:
    """Position-aligned weights (T,) -> token-aligned ones (T,): the last entry goes, a 0 comes first."""
    return np.concatenate([np.zeros(1, weight.dtype), weight[:-1]])


# ------------------------------------------------------------------------------------------------------------- writing


def lists(parts: Sequence[NDArray[Any]], kind: pa.ListType) -> pa.ListArray:
    """Lists of numbers (R, each of its own length) as a column of the type `kind`."""
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    flat = np.concatenate(parts).astype(kind.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat, kind.value_type), type=kind)


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """A Parquet file with a row group for each table. Raises `CurateError` where the disk refuses."""
    with atomic_file(path) as sink:
        target = pa.PythonFile(sink, mode="w")
        with pq.ParquetWriter(target, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in tables:
                writer.write_table(table)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """A line of JSON for each record; float32 in as few digits as give it back."""
    with atomic_file(path) as sink:
        for record in records:
            sink.write(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


# ------------------------------------------------------------------------------------------------------------- reading


def parquet_rows(path: Path, schema: pa.Schema) -> Iterator[dict[str, NDArray[Any]]]:
    """The lists of each row by column. Raises `CurateError` where the columns are not those of `schema`."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if not file.schema_arrow.equals(schema):
            raise CurateError(f"{path}: its columns are not those that were written; report this")
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            yield from list_rows(pa.Table.from_batches([batch]))


def list_rows(table: pa.Table) -> Iterator[dict[str, NDArray[Any]]]:
    """The lists of each row by column; columns of nulls are left out."""
    names = [field.name for field in table.schema if pa.types.is_list(field.type)]
    columns = {}
    for name in names:
        flat, lengths = entries(table[name])
        columns[name] = np.split(flat, np.cumsum(lengths)[:-1])
    for i in range(table.num_rows):
        yield {name: column[i] for name, column in columns.items()}


def jsonl_rows(path: Path) -> Iterator[Any]:
    """The value on each line."""
    with path.open("rb") as lines:
        for line in lines:
            yield orjson.loads(line)


def same_rows(path: Path, found: Iterator[Seen], rows: Iterator[Kept]) -> None:
    """Raise `CurateError` unless the file gives the same ids and weights, row by row, and no row more or less."""
    for number, kept in enumerate(rows):
        seen = next(found, None)
        wanted = [(branch.input_ids, branch.loss_weight) for branch in kept.row.branches]
        if seen is None or not _same(seen, wanted):
            raise unlike(path, f"row {number} (row_id {kept.row.row_id}) is not as the mask has it")
    if next(found, None) is not None:
        raise unlike(path, "it holds more rows than were written")


def _same(seen: Seen, wanted: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> bool:
    return len(seen) == len(wanted) and all(
        np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
        for one, other in zip(seen, wanted, strict=True)
    )


def unlike(path: Path, found: str) -> CurateError:
    """The error for a file that does not read back as it was meant."""
    return CurateError(f"{path}: read back, {found}; nothing was kept. Check the disk, run it again, and report it.")


def trains(labels: NDArray[Any], ids: NDArray[Any]) -> NDArray[np.float32]:
    """The 0/1 weights that labels stand for; NaN where a label is neither -100 nor the token."""
    known = np.where(labels == -100, 0.0, np.nan)
    return np.where(labels == ids, 1.0, known).astype(np.float32)
