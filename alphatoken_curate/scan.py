"""Read a run lazily: a row per example (`scan`) or a row per response token (`scan_tokens`). No model is needed.

Only files that the manifest names are read. Both give polars LazyFrames: select and filter before collecting, or
`sink_parquet`, and only what is needed is read; `collect(engine="streaming")` keeps memory bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import polars as pl
import pyarrow as pa

from alphatoken_curate import manifest
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.manifest import Generation, Manifest, Mask
from alphatoken_curate.schema import SIGNALS, TRAIN, VALUES, VOCABULARY
from alphatoken_curate.shards import Shard

T = TypeVar("T")


def scan(
    run: str | Path,
    what: Literal["values", "train"] = "values",
    *,
    generation: int | None = None,
    mask: int | None = None,
) -> pl.LazyFrame:
    """The examples of a run, in row_id order, with the columns of `schema.VALUES` or `schema.TRAIN`.

    `values`: every row read, of the newest generation or the one given; `train`: the scored rows, of the newest mask or
    the one given. Raises `UsageError` for a number that is not there, `StoredDataError` for a run without a manifest
    or with a file missing.
    """
    folder = Path(run)
    stored = manifest.read(folder)
    if what == "values":
        return _frame(folder, _generation(folder, stored, generation).shards, VALUES)
    if what == "train":
        return _frame(folder, _mask(folder, stored, mask).shards, TRAIN)
    raise UsageError(f"what: found {what!r}; give `values` or `train`")


def scan_tokens(run: str | Path, *, generation: int | None = None, mask: int | None = None) -> pl.LazyFrame:
    """One row per response token of the scored rows, in (row_id, position) order.

    row_id int64; position int32, its index in `input_ids`; token_id int32; text string, null where the run has no
    vocabulary; every signal float32 (`schema.SIGNALS`); kept bool and loss_weight float32 of the newest mask or the one
    given, both null where there is none. Raises as `scan`.
    """
    folder = Path(run)
    stored = manifest.read(folder)
    values = _frame(folder, _generation(folder, stored, generation).shards, VALUES)
    rows = values.filter(pl.col("status") == "scored").select(
        "row_id",
        pl.int_ranges(0, pl.col("input_ids").list.len(), dtype=pl.Int32).alias("position"),
        pl.col("input_ids").alias("token_id"),
        "response",
        *SIGNALS,
    )
    lists = ["position", "token_id", "response", *SIGNALS]
    if mask is not None or stored.masks:
        train = _frame(folder, _mask(folder, stored, mask).shards, TRAIN).select("row_id", "loss_weight")
        rows = rows.join(train, on="row_id", how="left", maintain_order="left")
        lists.append("loss_weight")
    else:
        rows = rows.with_columns(pl.lit(None, pl.Float32).alias("loss_weight"))
    tokens = rows.explode(lists, empty_as_null=False).filter("response")
    return _with_text(folder, tokens).select(
        "row_id", "position", "token_id", "text", *SIGNALS, (pl.col("loss_weight") > 0).alias("kept"), "loss_weight"
    )


def _generation(run: Path, stored: Manifest, number: int | None) -> Generation:
    known = {one.generation: one for one in stored.generations}
    return _chosen(run, "generation", known, number)


def _mask(run: Path, stored: Manifest, number: int | None) -> Mask:
    known = {one.mask: one for one in stored.masks}
    return _chosen(run, "mask", known, number)


def _chosen(run: Path, word: str, known: dict[int, T], number: int | None) -> T:
    if number is None and known:
        return known[max(known)]
    if number is not None and number in known:
        return known[number]
    if not known:
        raise UsageError(f"{run}: has no {word}; run the `{'mask' if word == 'mask' else 'score'}` command to make one")
    raise UsageError(f"{run}: has no {word} {number}; it has {', '.join(map(str, known))}")


def _frame(run: Path, files: Sequence[Shard], schema: pa.Schema) -> pl.LazyFrame:
    for file in files:
        path = run / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise StoredDataError(f"{path}: missing or not {file.bytes} bytes, as the manifest has it; run `verify`")
    if not files:
        return pl.DataFrame(pl.from_arrow(schema.empty_table())).lazy()
    # No globbing and no hive columns: the manifest has said which files, and `mask=0000` is a name, not a column.
    return pl.scan_parquet([run / file.path for file in files], glob=False, hive_partitioning=False)


def _with_text(run: Path, tokens: pl.LazyFrame) -> pl.LazyFrame:
    path = run / VOCABULARY
    if not path.is_file():
        return tokens.with_columns(pl.lit(None, pl.String).alias("text"))
    vocabulary = pl.scan_parquet(path, glob=False, hive_partitioning=False).select(
        pl.col("token_id").cast(pl.Int32), pl.col("text").cast(pl.String)
    )
    return tokens.join(vocabulary, on="token_id", how="left", maintain_order="left")
