"""Read a run lazily: a row per example (`scan`) or a row per response token (`scan_tokens`). No model is needed.

Only files that the manifest names are read. Both give polars LazyFrames: select and filter before collecting, or
`sink_parquet`, and only what is needed is read; `collect(engine="streaming")` keeps memory bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import polars as pl
import pyarrow as pa

from alphatoken_curate import manifest
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.manifest import Generation, Manifest, Mask
from alphatoken_curate.schema import PAIR_COLUMNS, VOCABULARY, Layout
from alphatoken_curate.shards import Shard, read_footer

T = TypeVar("T")


def scan(
    run: str | Path,
    what: Literal["values", "train"] = "values",
    *,
    generation: int | None = None,
    mask: int | None = None,
) -> pl.LazyFrame:
    """The examples of a run, in row_id order, with the columns of its layout (`schema.Layout`): SFT or preference rows.

    They are those of the files: what the run's estimator does not compute is null there. `values`: every row read, of
    the newest generation or the one given; `train`: the rows of the newest mask or the one given. Raises `UsageError`
    for a number that is not there, `StoredDataError` for a run without a manifest, or with a file that is missing, of
    another size or without its footer. Damage before the footer is seen when rows are collected, as an error of
    polars, or not at all; `verify` sees all of it.
    """
    folder = Path(run)
    stored = manifest.read(folder)
    layout = manifest.layout(stored)
    if what == "values":
        return _frame(folder, choose_generation(folder, stored, generation).shards, layout.values)
    if what == "train":
        return _frame(folder, choose_mask(folder, stored, mask).shards, layout.train)
    raise UsageError(f"what: found {what!r}; give `values` or `train`")


def scan_tokens(run: str | Path, *, generation: int | None = None, mask: int | None = None) -> pl.LazyFrame:
    """One row per response token of the rows that were scored.

    row_id int64; in preference runs branch string, `chosen` or `rejected`; position int32, its index in the sequence;
    token_id int32; text string, null where the run has no vocabulary; every signal of the run's estimator float32
    (`schema.Components.signals`); in preference runs omega and margin float32 of the row; kept bool and loss_weight
    float32 of the newest mask or the one given, null where there is none, and in rows that another generation of the
    mask did not score. In order of row_id, chosen before rejected, then position. Raises as `scan`.
    """
    folder = Path(run)
    stored = manifest.read(folder)
    layout, signals = manifest.layout(stored), manifest.components(stored).signals
    values = _frame(folder, choose_generation(folder, stored, generation).shards, layout.values)
    pair = layout.kind == "preference"
    of_row = PAIR_COLUMNS if pair else ()
    rows = values.filter(pl.col("status") == "scored").select("row_id", *of_row, *_token_lists(layout, signals))
    lists = ["position", "token_id", "response", *signals, "loss_weight"]
    tokens = _with_weight(folder, stored, layout, rows, mask).explode(lists, empty_as_null=False).filter("response")
    # Both branches of a row went into one list, so that no sort is needed; the second begins where the first ends.
    second = pl.col("position") >= pl.col("first")
    branch = [pl.when(second).then(pl.lit("rejected")).otherwise(pl.lit("chosen")).alias("branch")] if pair else []
    position = pl.col("position") - pl.when(second).then("first").otherwise(0) if pair else pl.col("position")
    kept = (pl.col("loss_weight") > 0).alias("kept")
    return _with_text(folder, tokens).select(
        "row_id", *branch, position, "token_id", "text", *signals, *of_row, kept, "loss_weight"
    )


def choose_generation(run: Path, stored: Manifest, number: int | None) -> Generation:
    """The generation of this number, or the newest. Raises `UsageError` for one that is not there."""
    known = {one.generation: one for one in stored.generations}
    return _chosen(run, "generation", known, number)


def choose_mask(run: Path, stored: Manifest, number: int | None) -> Mask:
    """The mask of this number, or the newest. Raises `UsageError` for one that is not there."""
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


def _token_lists(layout: Layout, signals: Sequence[str]) -> Iterator[pl.Expr]:
    """`position` in what is a list of the tokens of all branches, its `length`, that of the `first`, and the lists."""
    lengths = [pl.col(f"{prefix}input_ids").list.len().cast(pl.Int32) for prefix in layout.branches]
    length = pl.sum_horizontal(lengths).cast(pl.Int32)
    yield lengths[0].alias("first")
    yield length.alias("length")
    yield pl.int_ranges(0, length, dtype=pl.Int32).alias("position")
    yield _joined(layout, "input_ids").alias("token_id")
    yield from (_joined(layout, name) for name in ("response", *signals))


def _joined(layout: Layout, column: str) -> pl.Expr:
    """The lists of a column: those of all branches, one after the other."""
    if len(layout.branches) == 1:
        return pl.col(column)
    return pl.concat_list([prefix + column for prefix in layout.branches]).alias(column)


def _with_weight(run: Path, stored: Manifest, layout: Layout, rows: pl.LazyFrame, mask: int | None) -> pl.LazyFrame:
    """`loss_weight`: a list as long as the row's others, of nulls where the row has no weights."""
    absent = pl.lit(None, pl.Float32).repeat_by("length")
    if mask is None and not stored.masks:
        return rows.with_columns(absent.alias("loss_weight"))
    train = _frame(run, choose_mask(run, stored, mask).shards, layout.train)
    train = train.select("row_id", _joined(layout, "loss_weight"))
    joined = rows.join(train, on="row_id", how="left", maintain_order="left")
    weight = pl.col("loss_weight")
    return joined.with_columns(pl.when(weight.is_null()).then(absent).otherwise(weight).alias("loss_weight"))


def _frame(run: Path, files: Sequence[Shard], schema: pa.Schema) -> pl.LazyFrame:
    for file in files:
        path = run / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise StoredDataError(f"{path}: missing or not {file.bytes} bytes, as the manifest has it; run `verify`")
        try:
            read_footer(path)
        except StoredDataError as error:
            raise StoredDataError(f"{error}; `verify` names all that is damaged") from error
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
