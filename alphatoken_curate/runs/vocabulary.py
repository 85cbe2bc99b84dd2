"""The vocabulary of a run: what each token id stands for. A run that was given as tokens has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.atomic import unread
from alphatoken_curate.runs.schema import VOCABULARY, VOCABULARY_COLUMNS, absent


def read_table(run: Path) -> pa.Table | None:
    """All of it, in the columns it has; None where there is none. Raises `StoredDataError` as `sound` does."""
    path = run / VOCABULARY
    if not path.is_file():
        return None
    with sound(run):
        table = pq.read_table(path)
        is_whole(table.schema)
    return table


@contextmanager
def sound(run: Path) -> Iterator[None]:
    """What is not the vocabulary that the run wrote, or cannot be read inside, is damaged."""
    do = "delete it and run the `score` command again to have it anew; without it tokens are shown by their ids"
    try:
        manifest.check_file(run, manifest.read(run), VOCABULARY)
        yield
    except (OSError, pa.ArrowException, ValueError) as error:
        lost = StoredDataError(f"{run / VOCABULARY}: damaged ({error}); {do}")
        raise unread(run / VOCABULARY, error) or lost from error


def is_whole(schema: pa.Schema) -> bool:
    """Whether a vocabulary has all columns, or those of schema version 1. Raises ValueError for others."""
    if schema.equals(VOCABULARY_COLUMNS):
        return True
    if schema.names != [name for name in VOCABULARY_COLUMNS.names if name not in absent(1)]:
        raise ValueError(f"its columns are not {', '.join(VOCABULARY_COLUMNS.names)}")
    return False
