"""Open files by what they hold; read Parquet as a stream of raw rows.

The caps of `containers` hold here too: the footer of a Parquet file is looked at before a row group is unpacked, and
few rows are unpacked at once where one may be large.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Any

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows.arrays import json_rows
from alphatoken_curate.rows.batches import batch_records
from alphatoken_curate.rows.containers import CHUNK_BYTES, MAX_RATIO_FLOOR_BYTES, Meter, Metered, RawRow, RowFault
from alphatoken_curate.rows.files import ARROW, DataFile, visible
from alphatoken_curate.rows.hub import hub_rows
from alphatoken_curate.rows.saved import FILE, STREAM, arrow_rows
from alphatoken_curate.runs.stores import open_stored

_PARQUET = b"PAR1"
_FOREIGN = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"\x89HDF": "HDF5"}
_PARQUET_BATCH_ROWS, _PARQUET_FEWEST_ROWS = 64, 8


def raw_rows(file: DataFile, meter: Meter, keys: Collection[str]) -> Iterator[RawRow]:
    """The rows of a file in order, faulty ones as a `RowFault`; `meter` has seen the whole file at the end.

    Of a Parquet file only the columns named in `keys` are read (all, where it has none of them).

    Raises InputError, naming the file, where it is torn, damaged, too large or of a kind that is not read.
    """
    try:
        if file.is_hub:
            yield from hub_rows(file, meter)
            return
        with open_stored(file.path) as stored:
            magic = stored.read(8)
        foreign = next((kind for start, kind in _FOREIGN.items() if magic.startswith(start)), None)
        if foreign:
            raise InputError(f"{visible(file.path)}: this is a {foreign} file, which is not read. Unpack it first.")
        if magic.startswith(_PARQUET) or file.path.endswith(".parquet"):
            yield from _parquet_rows(file, meter, keys)
        elif magic.startswith((STREAM, FILE)) or file.path.endswith(ARROW):
            yield from arrow_rows(file, meter, magic)
        else:
            yield from json_rows(file, meter, magic)
    except OSError as error:
        raise InputError(f"{visible(file.path)}: cannot be read: {error.strerror or error}.") from error


def _parquet_rows(file: DataFile, meter: Meter, keys: Collection[str]) -> Iterator[RawRow]:
    import pyarrow as pa
    from pyarrow import parquet

    with Metered(file.path, meter) as stored:
        while stored.read(CHUNK_BYTES):
            pass
    line = 0
    try:
        with (
            nullcontext(file.path) if file.is_local else open_stored(file.path) as source,
            parquet.ParquetFile(source, page_checksum_verification=True) as table,
        ):
            names = table.schema_arrow.names
            if len(set(names)) != len(names):
                raise InputError(f"{visible(file.path)}: two columns have one name. Rename one of them.")
            columns = [name for name in names if name in keys] or None
            for batch in _batches(table, columns, meter):
                for record in batch_records(batch):
                    line += 1
                    # columns left unread count as keys without a value
                    whole = record if isinstance(record, RowFault) else dict.fromkeys(names) | record
                    yield RawRow(line, whole, {} if isinstance(record, RowFault) else record)
    except (pa.ArrowException, OSError, LookupError, ValueError, OverflowError) as error:
        message = f"{visible(file.path)}: not a whole Parquet file: {visible(str(error))}. Get the file again."
        raise InputError(message) from error


def _batches(table: Any, columns: list[str] | None, meter: Meter) -> Iterator[Any]:
    """Batches of all row groups. A value is no larger than its unpacked group, but may be repeated in each row."""
    for group in range(table.num_row_groups):
        # Not what the footer says of each column: where that is damaged, Arrow ends the process.
        size = max(1, table.metadata.row_group(group).total_byte_size)
        meter.allow(size)
        rows = min(_PARQUET_BATCH_ROWS, max(_PARQUET_FEWEST_ROWS, MAX_RATIO_FLOOR_BYTES // size))
        for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
            meter.give(batch.nbytes)
            yield batch
