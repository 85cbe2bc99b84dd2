"""Read a run lazily: a row per example (`scan`) or a row per response token (`scan_tokens`). No model is needed.

Only files that the manifest names are read. Both give polars LazyFrames: select and filter before collecting, or
`sink_parquet`, and only what is needed is read; `collect(engine="streaming")` keeps memory bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import polars as pl
import pyarrow as pa

from alphatoken_curate.errors import UsageError
from alphatoken_curate.reading.published import Published
from alphatoken_curate.reading.words import scan_vocabulary
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.manifest import Generation, Manifest, Mask
from alphatoken_curate.runs.schema import MOST_TURNS, PAIR_COLUMNS, Layout, lacking
from alphatoken_curate.runs.shards import Shard, check, read_footer
from alphatoken_curate.urls import is_url

T = TypeVar("T")

_KEY = (pl.col("row_id") * MOST_TURNS + pl.col("turn")).alias("sequence")
"""`schema.sequence_keys` of a frame."""


def scan(
    run: str | Path,
    what: Literal["values", "train"] = "values",
    *,
    generation: int | None = None,
    mask: int | None = None,
) -> pl.LazyFrame:
    """The examples of a run, in order of row_id and turn, with the columns of its layout (`schema.Layout`).

    SFT or preference rows. The columns are those of the files: what the run's estimator does not compute is null there,
    and so is what the run's schema version did not have. `values`: every row read, of the newest generation or the one
    given; `train`: the rows of the newest mask or the one given. Raises `UsageError` for a number that is not there,
    `StoredDataError` for a run without a manifest, or where a file is missing or damaged: every byte of the files that
    the frame needs is checked before it is returned, at the speed of SHA-256 and the disk.

    `run` may be the URL of a published run, `s3://bucket/prefix` (extra s3). Then polars reads the shards where they
    lie, by ranges, with the credentials and endpoint of the environment (AWS_...). Checked are the manifest and its
    seal, that each shard is there in its size, and its footer: seal, settings, rows. Not checked are the pages, which
    would take reading all of them: neither their digests nor whether an object changes while polars reads it.
    """
    if what not in ("values", "train"):
        raise UsageError(f"what: found {what!r}; give `values` or `train`")
    there = Published(run) if is_url(run) else None
    folder = Path(run)
    stored = manifest.read(folder) if there is None else there.stored
    layout, place = manifest.layout(stored), folder if there is None else there.url
    group: Generation | Mask
    if what == "values":
        group, schema = choose_generation(place, stored, generation), layout.values
    else:
        group, schema = choose_mask(place, stored, mask), layout.train
    if there is None or not group.shards:
        return _frame(folder, group.shards, schema)
    return _lazy(*there.sources(group), schema)


def scan_tokens(run: str | Path, *, generation: int | None = None, mask: int | None = None) -> pl.LazyFrame:
    """One row per response token of the rows that were scored, and these columns, in this order.

    row_id int64; turn int32; in preference runs branch string, `chosen` or `rejected`; generation int32; position
    int32, its index in the sequence; token_id int32; text string, of the token alone (U+FFFD where it cuts a
    character), and class string, one of `words.CLASSES`, both null where the run has no vocabulary; every signal of the
    run's estimator float32 (`schema.Components.signals`); in preference runs omega and margin float32 of the row; kept
    bool and loss_weight float32 of the newest mask or the one given, null where there is none, and in rows that another
    generation of the mask did not score. In order of row_id, turn, chosen before rejected, then position. Raises as
    `scan`.
    """
    folder = Path(run)
    stored = manifest.read(folder)
    layout, signals = manifest.layout(stored), manifest.components(stored).signals
    shown = choose_generation(folder, stored, generation)
    values = _frame(folder, shown.shards, layout.values)
    number = pl.lit(shown.generation, pl.Int32).alias("generation")
    rows = values.filter(pl.col("status") == "scored").with_columns(_KEY).set_sorted("sequence")
    tokens = _with_weight(folder, stored, layout, rows, mask).select(_entries(layout, signals)).filter("response")
    branch, of_row = (["branch"], PAIR_COLUMNS) if layout.kind == "preference" else ([], ())
    kept = (pl.col("loss_weight") > 0).alias("kept")
    return _with_text(folder, tokens).select(
        "row_id",
        "turn",
        *branch,
        number,
        "position",
        "token_id",
        "text",
        "class",
        *signals,
        *of_row,
        kept,
        "loss_weight",
    )


def choose_generation(run: Path | str, stored: Manifest, number: int | None) -> Generation:
    """The generation of this number, or the newest. Raises `UsageError` for one that is not there."""
    known = {one.generation: one for one in stored.generations}
    return _chosen(run, "generation", known, number)


def choose_mask(run: Path | str, stored: Manifest, number: int | None) -> Mask:
    """The mask of this number, or the newest. Raises `UsageError` for one that is not there."""
    known = {one.mask: one for one in stored.masks}
    return _chosen(run, "mask", known, number)


def _chosen(run: Path | str, word: str, known: dict[int, T], number: int | None) -> T:
    if number is None and known:
        return known[max(known)]
    if number is not None and number in known:
        return known[number]
    if not known:
        raise UsageError(f"{run}: has no {word}; run the `{'mask' if word == 'mask' else 'score'}` command to make one")
    raise UsageError(f"{run}: has no {word} {number}; it has {', '.join(map(str, known))}")


def _entries(layout: Layout, signals: Sequence[str]) -> Iterator[pl.Expr]:
    """Columns of the tokens of all rows: a row's branches one after the other, so that nothing has to be sorted.

    Each is exploded by itself, not all of them at once: what is not asked for is then neither read nor exploded.
    """
    lengths = [pl.col(f"{prefix}input_ids").list.len().cast(pl.Int32) for prefix in layout.branches]
    lists = {name: [pl.col(prefix + name) for prefix in layout.branches] for name in ("response", *signals)}
    lists["loss_weight"] = [pl.col(f"{prefix}loss_weight") for prefix in layout.branches]
    lists["token_id"] = [pl.col(f"{prefix}input_ids") for prefix in layout.branches]
    lists["position"] = [pl.int_ranges(0, length, dtype=pl.Int32) for length in lengths]
    of_row = ["row_id", "turn"]
    if layout.kind == "preference":
        named = zip(layout.branches, lengths, strict=True)
        lists["branch"] = [pl.lit(prefix.rstrip("_")).repeat_by(length) for prefix, length in named]
        of_row += PAIR_COLUMNS
    lists |= {name: [pl.col(name).repeat_by(pl.sum_horizontal(lengths))] for name in of_row}
    for name, parts in lists.items():
        joined = parts[0] if len(parts) == 1 else pl.concat_list(parts)
        yield joined.explode(empty_as_null=False).alias(name)


def _with_weight(run: Path, stored: Manifest, layout: Layout, rows: pl.LazyFrame, mask: int | None) -> pl.LazyFrame:
    """The loss weights of each branch: a list as long as the branch, of nulls where the row has no weights."""
    names = {f"{prefix}loss_weight": f"{prefix}input_ids" for prefix in layout.branches}
    absent = {name: pl.lit(None, pl.Float32).repeat_by(pl.col(ids).list.len()) for name, ids in names.items()}
    if mask is None and not stored.masks:
        return rows.with_columns(**absent)
    train = _frame(run, choose_mask(run, stored, mask).shards, layout.train).select(_KEY, *names)
    # Both are in order of their keys: then they are merged, and neither is held in memory.
    joined = rows.join(train.set_sorted("sequence"), on="sequence", how="left", maintain_order="left")
    return joined.with_columns(
        pl.when(pl.col(name).is_null()).then(none).otherwise(pl.col(name)).alias(name) for name, none in absent.items()
    )


def _frame(run: Path, files: Sequence[Shard], schema: pa.Schema) -> pl.LazyFrame:
    for file in files:
        check(run, file)
    if not files:
        return pl.DataFrame(pl.from_arrow(schema.empty_table())).lazy()
    return _lazy([run / file.path for file in files], read_footer(run / files[0].path).version, schema)


def _lazy(sources: list[Path] | list[str], version: int, schema: pa.Schema) -> pl.LazyFrame:
    """Shards of a schema version as a frame that has all columns of the schema."""
    # No globbing and no hive columns: the manifest has said which files, and `mask=0000` is a name, not a column.
    found = pl.scan_parquet(sources, glob=False, hive_partitioning=False)
    lacks = lacking(schema, version)
    kinds: Any = pl.DataFrame(pl.from_arrow(schema.empty_table())).schema
    nulls = [
        pl.lit(0, pl.Int32).alias(name)
        if name == "turn"
        else pl.lit(None, kinds[name].inner).repeat_by(pl.col(of).list.len()).alias(name)
        for name, of in lacks.items()
    ]
    return found.with_columns(*nulls).select(schema.names) if lacks else found


def _with_text(run: Path, tokens: pl.LazyFrame) -> pl.LazyFrame:
    vocabulary = scan_vocabulary(run)
    if vocabulary is None:
        return tokens.with_columns(pl.lit(None, pl.String).alias(name) for name in ("text", "class"))
    return tokens.join(vocabulary, on="token_id", how="left", maintain_order="left")
