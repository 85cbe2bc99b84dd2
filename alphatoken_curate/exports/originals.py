"""The rows a run was made of, read once more where they lie: they must be what they were when they were scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.errors import InputError, UsageError
from alphatoken_curate.reading.scan import choose_generation
from alphatoken_curate.reading.trainset import TrainSet
from alphatoken_curate.rows.columns import mapped, named_columns
from alphatoken_curate.rows.containers import Meter, RowFault
from alphatoken_curate.rows.files import DataFile, find_files, visible
from alphatoken_curate.rows.read import normalise
from alphatoken_curate.rows.shapes import AnyRecord
from alphatoken_curate.rows.tables import raw_rows
from alphatoken_curate.runs import shards
from alphatoken_curate.runs.atomic import digest
from alphatoken_curate.runs.manifest import Input
from alphatoken_curate.runs.shards import entries
from alphatoken_curate.scoring.beside import CONFIG
from alphatoken_curate.settings import load_settings


class Original(NamedTuple):
    """A row of the input, or a turn of it, with its response mask and the tokens that end its answers, as stored.

    (T,) bool each.

    `record` is None where it was a bad row.
    """

    row_id: int
    turn: int
    place: str
    record: AnyRecord | None
    response: NDArray[np.bool_]
    end_of_turn: NDArray[np.bool_]


class _Place(NamedTuple):
    row_id: int
    turn: int
    source: str
    line: int
    response: NDArray[np.bool_]
    end_of_turn: NDArray[np.bool_]


def originals(opened: TrainSet) -> Iterator[Original]:
    """Every row that was read, in order. Raises `UsageError` where the files are gone or are others now."""
    stored = (list(turns) for _, turns in groupby(_stored(opened), key=lambda one: one.row_id))
    settings = load_settings(opened.run / CONFIG)
    limited = settings.get("limit") is not None
    columns = named_columns(settings.get("map"))
    for file, known in _files(opened, settings, limited=limited):
        meter = Meter(file)
        for raw in islice(raw_rows(file, meter, ()), known.rows if limited else None):
            places = next(stored, [])
            if not places or (places[0].source, places[0].line) != (known.source, raw.line):
                raise _changed(file, "its rows are others")
            where, record = f"{visible(known.source)}:{raw.line}", _record(raw.record, columns)
            for one in places:
                yield Original(one.row_id, one.turn, where, record, one.response, one.end_of_turn)
        if limited:
            meter.finish()
        if meter.digest != known.digest:
            raise _changed(file, f"its digest is {meter.digest}, the run has {known.digest}")
    if next(stored, None) is not None:
        raise UsageError(f"{opened.run}: its files hold fewer rows than were scored; restore them, or score again.")


def _record(raw: dict[str, Any] | RowFault, columns: Mapping[str, str]) -> AnyRecord | None:
    if isinstance(raw, RowFault):
        return None
    try:
        return normalise(mapped(raw, columns))[1]
    except RowFault:
        return None


def _stored(opened: TrainSet) -> Iterator[_Place]:
    """Where each row came from, of the newest generation that the mask was made of: all have the same rows."""
    columns = ["row_id", "turn", "source", "line", "response", "end_of_turn"]
    for shard in choose_generation(opened.run, opened.stored, opened.mask.generations[-1]).shards:
        table = shards.read_shard(opened.run, shard, opened.layout.values, columns)
        flat = [entries(table[name]) for name in columns[4:]]
        lists = (np.split(one.astype(np.bool_), np.cumsum(lengths)[:-1]) for one, lengths in flat)
        names = (table[name].to_pylist() for name in columns[:4])
        yield from (_Place(*row) for row in zip(*names, *lists, strict=True))


def _files(opened: TrainSet, settings: Mapping[str, Any], *, limited: bool) -> list[tuple[DataFile, Input]]:
    """The files that config.yaml names, each with what the manifest says of it; those on disk are checked first."""
    again = "Restore it, or score again; every other export reads the run alone."
    names = settings.get("data")
    if not isinstance(names, list) or not names:
        raise UsageError(f"{opened.run / CONFIG}: names no data, so the original rows cannot be found. {again}")
    try:
        found = find_files([str(name) for name in names], settings.get("subset"), settings.get("split"))
    except InputError as error:
        raise UsageError(f"the original rows cannot be found: {error} {again}") from error
    inputs = opened.stored.inputs
    if limited:
        found = found[: len(inputs)]  # no other was read
    if [file.source for file in found] != [known.source for known in inputs]:
        sources = ", ".join(visible(known.source) for known in inputs)
        raise UsageError(f"the original rows are not those that were scored: the run was made of {sources}. {again}")
    for file, known in zip(found, inputs, strict=True):
        if file.is_local and digest(Path(file.path)) != (known.bytes, known.digest.removeprefix("sha256:")):
            raise _changed(file, "its digest is not that in the manifest")
    return list(zip(found, inputs, strict=True))


def _changed(file: DataFile, found: str) -> UsageError:
    return UsageError(
        f"{visible(file.path)}: changed since it was scored ({found}). Restore it, or score again; every other export"
        " reads the run alone."
    )
