"""One row of a finished run, with its values, its mask and the text of its tokens, for showing. No model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alphatoken_curate import manifest, shards
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.heat import COLUMNS
from alphatoken_curate.manifest import Generation, Manifest
from alphatoken_curate.schema import SIGNALS, TRAIN, VALUES, VOCABULARY
from alphatoken_curate.shards import Shard


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowView:
    """One row of a run: T tokens, T = 0 where it was rejected.

    `token_ids` (T,) int32; `texts`: what each token decodes to alone, `<ID>` where that is not known; `response` (T,)
    bool; `signals`: name -> (T,) float32, NaN off the response and where not computed, empty unless `status` is
    `scored`; `weight` (T,) float32 of mask number `mask`, both None where there is no mask or the row was not scored.
    """

    row_id: int
    source: str
    line: int
    id: str | None
    status: str
    token_ids: NDArray[np.int32]
    texts: tuple[str, ...]
    response: NDArray[np.bool_]
    signals: Mapping[str, NDArray[np.float32]]
    weight: NDArray[np.float32] | None
    mask: int | None
    reason: str | None = None
    """Why a rejected row was refused, where rejects.jsonl says so."""

    def column(self, name: str) -> NDArray[np.float32]:
        """Numbers to colour by, (T,) float32, NaN off the response. Raises `UsageError` where there are none."""
        if name not in COLUMNS:
            raise UsageError(f"column: found {name!r}; give one of {', '.join(COLUMNS)}")
        if name == "loss_weight":
            if self.weight is None:
                raise UsageError("column: the run has no mask yet, so no loss_weight; make one with `mask`")
            return np.where(self.response, self.weight, np.float32(np.nan))
        if name == "reference_nll" and not self.computed(name):
            raise UsageError(
                f"column: {name} was not computed: model and reference are the same;"
                " score with a --reference of its own"
            )
        return self.signals[name]

    def computed(self, name: str) -> bool:
        """Whether the row has numbers of this signal."""
        return name in self.signals and bool(np.isfinite(self.signals[name]).any())

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(T,) bool: tokens that the mask keeps; all response tokens where there is no mask."""
        return self.response if self.weight is None else self.weight > 0


def read_row(run: Path, *, row: int | None = None, id: str | None = None) -> RowView:
    """A row by its number or by its own `id`, with the newest values and mask. Only the shards that hold it are read.

    Raises `UsageError` for a row that is not there or an id that several rows have, `StoredDataError` for damage.
    """
    stored = manifest.read(run)
    if not stored.generations:
        raise StoredDataError(f"{run / manifest.NAME}: names no generation; run the `score` command that makes one")
    generation = stored.generations[-1]
    number = _number(run, generation, row, id)
    index = _shard_of(run, generation, number)
    path = run / generation.shards[index].path
    table = shards.read(path, VALUES)
    found = table.filter(pc.equal(table["row_id"], number)).to_pylist()
    if len(found) != 1:
        raise StoredDataError(f"{path}: holds row {number} {len(found)} times; run `verify`")
    return _view(run, stored, index, found[0])


def _number(run: Path, generation: Generation, row: int | None, id: str | None) -> int:
    if (row is None) == (id is None):
        raise UsageError("give either --row N or --id ID")
    if row is not None:
        return row
    numbers: list[int] = []
    for shard in generation.shards:
        table = shards.read(run / shard.path, VALUES, ["row_id", "id"])
        numbers += table.filter(pc.equal(table["id"], id))["row_id"].to_pylist()
    if len(numbers) != 1:
        have = f"rows {', '.join(map(str, numbers[:20]))} have" if numbers else "no row has"
        raise UsageError(f"{run}: {have} the id {id!r}; give --row N")
    return numbers[0]


def _shard_of(run: Path, generation: Generation, number: int) -> int:
    """Index of the shard that holds a row: shards hold consecutive row ids from 0."""
    ends = np.cumsum([shard.rows for shard in generation.shards])
    if not 0 <= number < ends[-1]:
        raise UsageError(f"{run}: has no row {number}; its rows are 0 to {ends[-1] - 1}")
    return int(np.searchsorted(ends, number, side="right"))


def _view(run: Path, stored: Manifest, index: int, record: Mapping[str, Any]) -> RowView:
    scored = record["status"] == "scored"
    mask = stored.masks[-1] if stored.masks and scored else None
    ids = np.array(record["input_ids"], np.int32)
    return RowView(
        **{name: record[name] for name in ("row_id", "source", "line", "id", "status")},
        token_ids=ids,
        texts=_texts(run, ids),
        response=np.array(record["response"], np.bool_),
        signals={name: np.array(record[name], np.float32) for name in SIGNALS} if scored else {},
        weight=_weight(run, mask.shards[index], record["row_id"], len(ids)) if mask else None,
        mask=mask.mask if mask else None,
        reason=_reason(run, record["row_id"]) if record["status"] == "rejected" else None,
    )


def _weight(run: Path, shard: Shard, number: int, length: int) -> NDArray[np.float32]:
    path = run / shard.path
    table = shards.read(path, TRAIN, ["row_id", "loss_weight"])
    found = table.filter(pc.equal(table["row_id"], number))["loss_weight"].to_pylist()
    if len(found) != 1 or len(found[0]) != length:
        raise StoredDataError(f"{path}: does not hold row {number} as values/ does; run `verify`")
    return np.array(found[0], np.float32)


def _texts(run: Path, ids: NDArray[np.int32]) -> tuple[str, ...]:
    path = run / VOCABULARY
    known: dict[int, str] = {}
    if path.is_file():
        try:
            table = pq.read_table(path, columns=["token_id", "text"])
            wanted = table.filter(pc.is_in(table["token_id"], pa.array(np.unique(ids))))
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            raise StoredDataError(f"{path}: damaged ({error}); delete it to see token ids in place of text") from error
        known = dict(zip(wanted["token_id"].to_pylist(), wanted["text"].to_pylist(), strict=True))
    # A token that decodes to nothing alone would be unseen.
    return tuple(known.get(number) or f"<{number}>" for number in ids.tolist())


def _reason(run: Path, number: int) -> str | None:
    path = run / "rejects.jsonl"
    if not path.is_file():
        return None
    try:
        for line in path.read_bytes().splitlines():
            found = orjson.loads(line)
            if isinstance(found, dict) and found.get("row_id") == number:
                return str(found.get("message"))
    except (OSError, orjson.JSONDecodeError) as error:
        raise StoredDataError(f"{path}: damaged ({error}); run `verify`") from error
    return None
