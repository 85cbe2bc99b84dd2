"""Position-aligned forms, shifted here: `levanter` and `tinker` take float weights, `megatron` 0 and 1 alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alphatoken_curate.exports.form import (
    FLOATS,
    INT8S,
    INT32S,
    POSITION_ALIGNED,
    Asked,
    Form,
    Kept,
    Seen,
    Told,
    jsonl_rows,
    lists,
    parquet_rows,
    quoted,
    same_rows,
    to_positions,
    to_tokens,
    unlike,
    write_jsonl,
    write_parquet,
)
from alphatoken_curate.reading.trainset import TrainBranch

_BRANCHES = ("chosen", "rejected")

# ----------------------------------------------------------------------------------------------------------- levanter

LEVANTER_NAME = "train.parquet"
LEVANTER_COLUMNS = pa.schema([("input_ids", INT32S), ("loss_weights", FLOATS)])


def _only(kept: Kept) -> TrainBranch:
    (branch,) = kept.row.branches
    return branch


def _table(rows: list[Kept], schema: pa.Schema, **columns: Callable[[TrainBranch], NDArray[Any]]) -> pa.Table:
    found = {name: [make(_only(kept)) for kept in rows] for name, make in columns.items()}
    return pa.table({field.name: lists(found[field.name], field.type) for field in schema}, schema=schema)


def _levanter_write(folder: Path, batches: Iterator[list[Kept]], asked: Asked) -> None:
    tables = (
        _table(
            rows,
            LEVANTER_COLUMNS,
            input_ids=lambda branch: branch.input_ids,
            loss_weights=lambda branch: to_positions(branch.loss_weight),
        )
        for rows in batches
    )
    write_parquet(folder / LEVANTER_NAME, LEVANTER_COLUMNS, tables)


def _levanter_check(folder: Path, rows: Iterator[Kept], asked: Asked) -> None:
    stored = parquet_rows(folder / LEVANTER_NAME, LEVANTER_COLUMNS)
    found = (((row["input_ids"], to_tokens(row["loss_weights"])),) for row in stored)
    same_rows(folder / LEVANTER_NAME, found, rows)


def _levanter_use(told: Told) -> Iterator[str]:
    yield from ("```yaml", "data:", f"  train_urls: [{quoted(told.file(LEVANTER_NAME))}]")
    yield "  format: {type: prebuilt, input_ids_key: input_ids, loss_weights_key: loss_weights}"
    yield "  tokenizer: MODEL # the one the run was scored with"
    yield "  cache_dir: CACHE # a folder for Levanter's own copy"
    yield "```"


LEVANTER = Form(
    name="levanter",
    reader="Levanter (marin)",
    checked={"marin-levanter": "0.2.20.dev, source"},
    data=LEVANTER_NAME,
    alignment=POSITION_ALIGNED,
    pairs=False,
    floats=lambda asked: True,
    destroys="",
    divides="the sum of `loss_weights`, as its source reads (not run)",
    columns=lambda told: iter(["- `input_ids` (int32), `loss_weights` (float32), of equal length"]),
    use=_levanter_use,
    write=_levanter_write,
    check=_levanter_check,
    beware=(
        "A `loss_weight_transform` that shifts left is for token-aligned weights: leave it out.",
        "`levanter` on PyPI (1.1, 2023) is older than this format; use marin's.",
    ),
)

# ----------------------------------------------------------------------------------------------------------- megatron

MEGATRON_NAME = "train.idx.parquet"
MEGATRON_COLUMNS = pa.schema([("input_ids", INT32S), ("seq_start_id", INT32S), ("loss_mask", INT8S)])


def _megatron_write(folder: Path, batches: Iterator[list[Kept]], asked: Asked) -> None:
    tables = (
        _table(
            rows,
            MEGATRON_COLUMNS,
            input_ids=lambda branch: branch.input_ids,
            seq_start_id=lambda branch: np.zeros(1, np.int32),
            loss_mask=lambda branch: to_positions(branch.loss_weight),
        )
        for rows in batches
    )
    write_parquet(folder / MEGATRON_NAME, MEGATRON_COLUMNS, tables)


def _megatron_seen(row: dict[str, NDArray[Any]]) -> Seen:
    start = row["seq_start_id"]
    mask = to_tokens(row["loss_mask"])
    # Anything but one sequence from 0 is no row of ours.
    return ((row["input_ids"], mask if start.tolist() == [0] else mask + np.nan),)


def _megatron_check(folder: Path, rows: Iterator[Kept], asked: Asked) -> None:
    stored = parquet_rows(folder / MEGATRON_NAME, MEGATRON_COLUMNS)
    same_rows(folder / MEGATRON_NAME, map(_megatron_seen, stored), rows)


def _megatron_columns(told: Told) -> Iterator[str]:
    yield "- `input_ids` (int32); `seq_start_id` (int32): where the sequences of a pack begin, [0]: each row is a pack"
    yield "- `loss_mask` (int8)"


def _megatron_use(told: Told) -> Iterator[str]:
    path = quoted(told.file(MEGATRON_NAME))
    yield from ("```python", "cfg.dataset = FinetuningDatasetConfig(")
    yield "    dataset_root=ROOT,"
    yield f"    seq_length={told.longest},"
    yield '    dataset_kwargs={"answer_only_loss": True},  # without it the mask is not read'
    yield "    packed_sequence_specs=PackedSequenceSpecs("
    yield f"        packed_sequence_size={told.longest}, packed_train_data_path={path}"
    yield from ("    ),", ")", "```")


MEGATRON = Form(
    name="megatron",
    reader="Megatron-Bridge",
    checked={"megatron-bridge": "main at 067f987df, source"},
    data=MEGATRON_NAME,
    alignment=POSITION_ALIGNED,
    pairs=False,
    floats=lambda asked: False,
    destroys="Megatron-Bridge stores the mask as int8 and reads it as integers, where 0.5 becomes 0",
    divides="the sum of the 0/1 mask",
    columns=_megatron_columns,
    use=_megatron_use,
    write=_megatron_write,
    check=_megatron_check,
    beware=(
        "Each row is a pack of its own: exact, and slower than packs of many.",
        "Megatron-Bridge takes the loss off every position whose own token is the end of sequence, whatever the mask.",
    ),
)

# ------------------------------------------------------------------------------------------------------------- tinker

TINKER_NAME = "train.jsonl"


def _datum(branch: TrainBranch) -> dict[str, Any]:
    ids = branch.input_ids
    return {"model_input": ids[:-1], "target_tokens": ids[1:], "weights": branch.loss_weight[1:]}


def _tinker_record(kept: Kept) -> dict[str, Any]:
    data = [_datum(branch) for branch in kept.row.branches]
    return data[0] if len(data) == 1 else dict(zip(_BRANCHES, data, strict=True))


def _tinker_seen(record: dict[str, Any]) -> Seen:
    branches = []
    for one in [record[name] for name in _BRANCHES] if _BRANCHES[0] in record else [record]:
        inputs, targets = one["model_input"], one["target_tokens"]
        weight = np.array([0, *one["weights"]], np.float32)
        overlap = inputs[1:] == targets[:-1] and len(inputs) == len(targets)
        branches.append((np.array([inputs[0], *targets]), weight if overlap else weight + np.nan))
    return tuple(branches)


def _tinker_write(folder: Path, batches: Iterator[list[Kept]], asked: Asked) -> None:
    write_jsonl(folder / TINKER_NAME, (_tinker_record(kept) for rows in batches for kept in rows))


def _tinker_check(folder: Path, rows: Iterator[Kept], asked: Asked) -> None:
    path = folder / TINKER_NAME
    for record in jsonl_rows(path):
        if (_BRANCHES[0] in record) != (asked.layout.kind == "preference"):
            raise unlike(path, "it holds rows of another kind")
        break
    same_rows(path, map(_tinker_seen, jsonl_rows(path)), rows)


def _tinker_columns(told: Told) -> Iterator[str]:
    inside = ", in `chosen` and in `rejected`" if told.kind == "preference" else ""
    yield f"- `model_input`: ids without the last; `target_tokens`: ids without the first; `weights` (float32){inside}"


def _tinker_use(told: Told) -> Iterator[str]:
    yield from ("```python", "import json", "", "from tinker import types", "", "", "def datum(row):")
    yield "    return types.Datum("
    yield '        model_input=types.ModelInput.from_ints(row["model_input"]),'
    yield '        loss_fn_inputs={"target_tokens": row["target_tokens"], "weights": row["weights"]},'
    yield from ("    )", "", "")
    yield f"rows = map(json.loads, open({quoted(told.file(TINKER_NAME))}))"
    if told.kind == "preference":
        yield 'data = [datum(row[branch]) for row in rows for branch in ("chosen", "rejected")]'
    else:
        yield "data = [datum(row) for row in rows]"
    yield "```"
    if told.kind == "preference":
        yield ""
        yield "In this order, chosen and rejected in turn, the cookbook's DPO loss takes them: it multiplies each"
        yield "log-probability by its weight, in the reference as in the policy."
        if told.beta is not None:
            yield f"The values are of DPO with a beta of {told.beta}: give it the same."


TINKER = Form(
    name="tinker",
    reader="Tinker, and the training SDKs of Together and Fireworks, whose Datum is the same",
    checked={"tinker": "0.38.0, its Datum built", "tinker-cookbook": "0.6.1, source"},
    data=TINKER_NAME,
    alignment=POSITION_ALIGNED,
    pairs=True,
    floats=lambda asked: True,
    destroys="",
    divides="nothing (`cross_entropy` sums, so a learning rate goes with the size of the batch); the cookbook's SFT"
    ' default, `reduction="mean"`, scales each row to a sum of weights of 1',
    columns=_tinker_columns,
    use=_tinker_use,
    write=_tinker_write,
    check=_tinker_check,
)

FORMS = (LEVANTER, TINKER, MEGATRON)
