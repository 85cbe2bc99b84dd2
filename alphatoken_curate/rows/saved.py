"""Read the Arrow files of a folder that `datasets` wrote with `save_to_disk`, batch by batch.

Which files a folder has is told by its `state.json`, and by `dataset_dict.json` where it has several splits (`files`
asks for them). Each file is a source of its own, with its own digest, as every other file is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows.batches import batch_records
from alphatoken_curate.rows.containers import CHUNK_BYTES, Meter, Metered, RawRow, RowFault
from alphatoken_curate.rows.files import DataFile, visible
from alphatoken_curate.runs.stores import open_stored

STREAM, FILE = b"\xff\xff\xff\xff", b"ARROW1"
"""How Arrow files begin: a stream, which `datasets` writes, or a file with a footer."""

_BATCH_ROWS = 64


def arrow_rows(file: DataFile, meter: Meter, magic: bytes) -> Iterator[RawRow]:
    """The rows of an Arrow file. Raises InputError where it is torn or damaged."""
    import pyarrow as pa

    with Metered(file.path, meter) as stored:
        while stored.read(CHUNK_BYTES):
            pass
    line = 0
    try:
        for batch in _batches(file, magic):
            batch.validate(full=True)  # what is damaged there would end the process where it is read
            meter.give(batch.nbytes)
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for record in batch_records(batch.slice(start, _BATCH_ROWS)):
                    line += 1
                    yield RawRow(line, record, {} if isinstance(record, RowFault) else record)
    except (pa.ArrowException, OSError, LookupError, ValueError, OverflowError) as error:
        message = f"{visible(file.path)}: not a whole Arrow file: {visible(str(error))}. Get the file again."
        raise InputError(message) from error


def _batches(file: DataFile, magic: bytes) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(file.path) if file.is_local else pa.PythonFile(open_stored(file.path), mode="r") as stored:
        if magic.startswith(FILE):
            with pa.ipc.open_file(stored) as reader:
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            with pa.ipc.open_stream(stored) as reader:
                yield from reader
