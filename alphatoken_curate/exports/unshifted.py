"""Token-aligned forms of trainers that read `input_ids` and a `loss_mask`: `verl` as floats, `skyrl` as integers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa

from alphatoken_curate.exports.form import (
    FLOATS,
    INT8S,
    INT32S,
    TOKEN_ALIGNED,
    Asked,
    Form,
    Kept,
    Told,
    lists,
    parquet_rows,
    quoted,
    same_rows,
    write_parquet,
)
from alphatoken_curate.runs.atomic import atomic_file

NAME = "train.parquet"
VERL_CODE = "verl_dataset.py"
VERL_COLUMNS = pa.schema([("input_ids", INT32S), ("loss_mask", FLOATS)])
SKYRL_COLUMNS = pa.schema([("input_ids", INT32S), ("loss_mask", INT8S)])


def _table(rows: list[Kept], schema: pa.Schema) -> pa.Table:
    branches = [kept.row.branches[0] for kept in rows]
    ids = lists([one.input_ids for one in branches], INT32S)
    return pa.table([ids, lists([one.loss_weight for one in branches], schema.field("loss_mask").type)], schema=schema)


def _written(path: Path, schema: pa.Schema, batches: Iterator[list[Kept]]) -> None:
    write_parquet(path, schema, (_table(rows, schema) for rows in batches))


def _compared(path: Path, schema: pa.Schema, rows: Iterator[Kept]) -> None:
    stored = parquet_rows(path, schema)
    # A mask of integers that were floats would have lost them: compared as they are stored.
    same_rows(path, (((row["input_ids"], row["loss_mask"].astype(np.float32)),) for row in stored), rows)


# --------------------------------------------------------------------------------------------------------------- verl


def _verl_write(folder: Path, batches: Iterator[list[Kept]], asked: Asked) -> None:
    _written(folder / NAME, VERL_COLUMNS, batches)
    code = resources.files("alphatoken_curate.exports").joinpath(VERL_CODE).read_bytes()
    with atomic_file(folder / VERL_CODE) as sink:
        sink.write(code)


def _verl_use(told: Told) -> Iterator[str]:
    yield from ("```sh", "torchrun --nproc_per_node N -m verl.trainer.sft_trainer \\")
    yield f"    data.train_files={shlex.quote(told.file(NAME))} \\"
    yield f"    data.custom_cls.path={shlex.quote(told.file(VERL_CODE))} data.custom_cls.name=TokenRows \\"
    yield f"    data.pad_mode=no_padding data.max_length={told.longest}"
    yield from ("```", "")
    yield f"verl has no reader of tokenised rows: `{VERL_CODE}` here is one, for its `data.custom_cls`."


VERL = Form(
    name="verl",
    reader="verl (SFT)",
    checked={"verl": "0.9.1, source"},
    data=NAME,
    alignment=TOKEN_ALIGNED,
    pairs=False,
    floats=lambda asked: True,
    destroys="",
    divides="the sum of `loss_mask` over the global batch, so scaling all weights changes nothing",
    columns=lambda told: iter(["- `input_ids` (int32), `loss_mask` (float32): the weights, 0 at index 0"]),
    use=_verl_use,
    write=_verl_write,
    check=lambda folder, rows, asked: _compared(folder / NAME, VERL_COLUMNS, rows),
    beware=("verl rolls the mask over the joined batch: entry 0 of every row must be 0, as it is here.",),
)

# -------------------------------------------------------------------------------------------------------------- skyrl


def _skyrl_use(told: Told) -> Iterator[str]:
    given = shlex.quote(f"pretokenized_dataset_paths=[{quoted(told.file(NAME))}]")
    yield from ("```sh", "python -m skyrl.train.main_sft \\", f"    {given} \\")
    yield from (f"    max_length={told.longest}", "```")


SKYRL = Form(
    name="skyrl",
    reader="SkyRL (SFT)",
    checked={"skyrl": "main at a9564572e, source"},
    data=NAME,
    alignment=TOKEN_ALIGNED,
    pairs=False,
    floats=lambda asked: False,
    destroys="SkyRL makes integers of the mask, where 0.5 becomes 0",
    divides="the sum of the 0/1 mask",
    columns=lambda told: iter(["- `input_ids` (int32), `loss_mask` (int8), of equal length, not padded"]),
    use=_skyrl_use,
    write=lambda folder, batches, asked: _written(folder / NAME, SKYRL_COLUMNS, batches),
    check=lambda folder, rows, asked: _compared(folder / NAME, SKYRL_COLUMNS, rows),
)

FORMS = (VERL, SKYRL)
