"""Open files by what they hold; read Parquet and Hugging Face datasets as a stream of raw rows.

The caps of `containers` hold here too: the footer of a Parquet file is looked at before a row group is unpacked, and
few rows are unpacked at once where one may be large.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from alphatoken_curate.errors import InputError
from alphatoken_curate.models.releases import network_errors
from alphatoken_curate.rows.containers import (
    CHUNK_BYTES,
    MAX_LINE_BYTES,
    MAX_RATIO_FLOOR_BYTES,
    Meter,
    Metered,
    RawRow,
    RowFault,
    as_json,
    json_rows,
    too_long,
)
from alphatoken_curate.rows.files import DataFile, visible

_PARQUET = b"PAR1"
_FOREIGN = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"\x89HDF": "HDF5"}
_PARQUET_BATCH_ROWS, _PARQUET_FEWEST_ROWS = 64, 8
_HUB_SECONDS = 5.0


def raw_rows(file: DataFile, meter: Meter, keys: Collection[str]) -> Iterator[RawRow]:
    """The rows of a file in order, faulty ones as a `RowFault`; `meter` has seen the whole file at the end.

    Of a Parquet file only the columns named in `keys` are read (all, where it has none of them).

    Raises InputError, naming the file, where it is torn, damaged, too large or of a kind that is not read.
    """
    try:
        if file.is_hub:
            yield from _hub_rows(file, meter)
            return
        with open(file.path, "rb") as stored:
            magic = stored.read(8)
        foreign = next((kind for start, kind in _FOREIGN.items() if magic.startswith(start)), None)
        if foreign:
            raise InputError(f"{visible(file.path)}: this is a {foreign} file, which is not read. Unpack it first.")
        if magic.startswith(_PARQUET) or file.path.endswith(".parquet"):
            yield from _parquet_rows(file, meter, keys)
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
        with parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
            names = table.schema_arrow.names
            if len(set(names)) != len(names):
                raise InputError(f"{visible(file.path)}: two columns have one name. Rename one of them.")
            columns = [name for name in names if name in keys] or None
            for batch in _batches(table, columns, meter):
                for record in _batch_records(batch):
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


def _batch_records(batch: Any) -> Iterator[dict[str, Any] | RowFault]:
    if batch.nbytes > MAX_LINE_BYTES:
        if batch.num_rows == 1:
            yield too_long()
            return
        for row in range(batch.num_rows):
            yield from _batch_records(batch.slice(row, 1))
        return
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            is_text = isinstance(error, UnicodeDecodeError)
            reason = "invalid_utf8" if is_text else "unreadable_value"
            yield RowFault(reason, "a text column holds bytes that are not UTF-8" if is_text else visible(str(error)))
            return
        for row in range(batch.num_rows):
            yield from _batch_records(batch.slice(row, 1))
        return
    yield from (without_nulls(record) for record in records)


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the null keys of nested objects left out: columns give every object the keys of all others."""
    return {key: _pruned(value) for key, value in record.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_pruned(item) for item in value]
    return value


@contextmanager
def _hub_or_cache(name: str) -> Iterator[None]:
    """Ask the Hub once whether it answers; where it does not, only what was downloaded before is looked at.

    Left to itself, `datasets` asks again and again for half a minute, and says so on our own output.
    """
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    offline = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        pass  # it answers, and will say what is wrong
    except network_errors():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = offline


def _hub_rows(file: DataFile, meter: Meter) -> Iterator[RawRow]:
    """Rows of a Hugging Face dataset; the digest is of the rows as JSON lines with sorted keys."""
    try:
        import datasets
    except ImportError as error:
        message = f"{file.path}: no such file; reading it from the Hub needs `pip install datasets`."
        raise InputError(message) from error
    name, _, split = file.path.partition(":")
    try:
        with _hub_or_cache(name):
            table = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{file.path}: no such file or folder, and the Hugging Face dataset {name!r} (split {split or 'train'!r})"
            f" cannot be read: {visible(str(error))}"
        ) from error
    for number, row in enumerate(table):
        record = without_nulls(row)
        meter.take(as_json(record).encode(errors="surrogatepass") + b"\n")
        yield RawRow(number + 1, record, record)
