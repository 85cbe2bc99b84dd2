"""`hf`: Parquet for the Hugging Face family, in the row form that is right in every TRL release tried, packed or not.

`--strict` leaves the three columns that readers with a fixed list take: Together's upload, Axolotl's tokenised data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from glob import escape, has_magic
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alphatoken_curate.exports.form import (
    FLOATS,
    INT8S,
    INT32S,
    INT64S,
    TOKEN_ALIGNED,
    Asked,
    Form,
    Kept,
    Seen,
    Told,
    lists,
    parquet_rows,
    quoted,
    same_rows,
    trains,
    write_parquet,
)
from alphatoken_curate.reading.trainset import TrainBranch
from alphatoken_curate.runs.schema import IGNORE_INDEX, Layout

NAME = "train.parquet"


def schema(asked: Asked) -> pa.Schema:
    """The columns of the file."""
    kinds = {"input_ids": INT32S, "attention_mask": INT8S, "labels": INT64S}
    if not asked.strict:
        # Releases of TRL before 1.7 lose labels when they pack, and keep this.
        kinds |= {"assistant_masks": INT8S} if asked.layout.kind == "sft" else {}
        kinds |= {"loss_weight": FLOATS}
    return pa.schema([(prefix + name, kind) for prefix in asked.layout.branches for name, kind in kinds.items()])


def labels_of(branch: TrainBranch) -> NDArray[np.int64]:
    """The token where the weight is above 0, else -100."""
    return np.where(branch.loss_weight > 0, branch.input_ids, IGNORE_INDEX).astype(np.int64)


def columns_of(rows: Sequence[Kept], layout: Layout) -> dict[str, list[NDArray[Any]]]:
    """Every column that this family knows, by name."""
    columns: dict[str, list[NDArray[Any]]] = {}
    for number, prefix in enumerate(layout.branches):
        branches = [kept.row.branches[number] for kept in rows]
        columns |= {
            prefix + "input_ids": [branch.input_ids for branch in branches],
            prefix + "attention_mask": [np.ones(len(branch.input_ids), np.int8) for branch in branches],
            prefix + "labels": [labels_of(branch) for branch in branches],
            prefix + "assistant_masks": [(branch.loss_weight > 0).astype(np.int8) for branch in branches],
            prefix + "loss_weight": [branch.loss_weight for branch in branches],
        }
    return columns


def table(rows: Sequence[Kept], kinds: pa.Schema, layout: Layout) -> pa.Table:
    """Those of the columns that `kinds` names."""
    found = columns_of(rows, layout)
    return pa.table({field.name: lists(found[field.name], field.type) for field in kinds}, schema=kinds)


def seen(row: dict[str, NDArray[Any]], layout: Layout) -> Seen:
    """What a trainer of this family makes of a row: all it knows of a branch must say the same."""
    branches = []
    for prefix in layout.branches:
        ids = row[prefix + "input_ids"]
        mask = trains(row[prefix + "labels"], ids)
        agree = [row[prefix + "attention_mask"] == 1]
        if prefix + "assistant_masks" in row:
            agree.append(row[prefix + "assistant_masks"] == mask)
        weight = row.get(prefix + "loss_weight", mask)
        agree.append((weight > 0) == (mask > 0))
        branches.append((ids, weight if all(one.all() for one in agree) else np.full(len(ids), np.nan)))
    return tuple(branches)


def _write(folder: Path, batches: Iterator[list[Kept]], asked: Asked) -> None:
    kinds = schema(asked)
    write_parquet(folder / NAME, kinds, (table(rows, kinds, asked.layout) for rows in batches))


def _check(folder: Path, rows: Iterator[Kept], asked: Asked) -> None:
    found = (seen(row, asked.layout) for row in parquet_rows(folder / NAME, schema(asked)))
    same_rows(folder / NAME, found, rows)


def _columns(told: Told) -> Iterator[str]:
    pair = told.kind == "preference"
    before = "`chosen_` and `rejected_` before each name: " if pair else ""
    yield f"- {before}`input_ids` (int32), `attention_mask` (int8, all 1: rows are not padded)"
    yield "- `labels` (int64): the token where it trains, else -100"
    if not told.strict and not pair:
        yield "- `assistant_masks` (int8): 1 where it trains; TRL before 1.7 loses `labels` when it packs, not this"
    if not told.strict:
        yield "- `loss_weight` (float32): 0 where the label is -100"


def _use(told: Told) -> Iterator[str]:
    if told.kind == "preference":
        yield from _use_pairs(told)
        return
    if told.soft:
        yield from (_WEIGHTS, "", "TRL, with weights:", "", *_sft(told, "alphatoken_curate.trainers", "Weighted"), "")
    else:
        yield from (
            "TRL (1.16, 1.9 and 0.24 were run) and, with TRL's columns, Unsloth:",
            "",
            *_sft(told, "trl", ""),
            "",
        )
    if told.strict:
        yield "transformers' own `Trainer`: with `DataCollatorForSeq2Seq(tokenizer)`."
        yield from ("", "Axolotl (0.19 was run):", "", "```yaml", *_axolotl(told), "```")
        yield from ("", f"Together: upload `{NAME}`.")
    else:
        yield "transformers: `WeightedTrainer` of `alphatoken_curate.trainers`; or its own `Trainer` with"
        yield "`DataCollatorForSeq2Seq(tokenizer)`, by labels alone."
        yield from (
            "",
            "Axolotl, with weights (0.19; labels alone and Together: export with `--strict`):",
            "",
            "```yaml",
        )
        yield "plugins: [alphatoken_curate.trainers.axolotl.AlphaTokenPlugin]"
        if told.by_sum:
            yield "alphatoken_denominator: sum"
        yield from (*_axolotl(told), "```")


_WEIGHTS = (
    "**These weights are not all 0 or 1.** Trainers of this family read `labels` and leave `loss_weight` out, and so"
    " train every kept token alike. Those in `alphatoken_curate.trainers` weigh; they read run folders as well."
)


def _load(told: Told) -> str:
    """By the folder, whose README tells its bytes apart; `datasets` knows its copy of a file by path and time alone.

    In the path of a folder it reads *, ? and [ as a pattern, and there is no way to tell it otherwise.
    """
    place = str(Path(told.place).resolve())
    if has_magic(place):
        return f'rows = load_dataset("parquet", data_files={quoted(f"{escape(place)}/{NAME}")}, split="train")'
    return f'rows = load_dataset({quoted(os.path.join(".", told.place))}, split="train")'


def _sft(told: Told, module: str, prefix: str) -> Iterator[str]:
    name = f"{prefix}SFTTrainer"
    yield from ("```python", "from datasets import load_dataset")
    if prefix:
        yield from ("from trl import SFTConfig", "", f"from {module} import {name}", "", _load(told))
    else:
        yield from (f"from {module} import SFTConfig, {name}", "", _load(told))
    yield "# No cut by the trainer: it would cut ids and labels only. Packed: packing=True and"
    yield f"# max_length={told.longest} or more, the longest row. Leave assistant_only_loss off."
    if told.strict:
        yield "# TRL before 1.7 loses labels when it packs, and trains every token: export without --strict for that."
    divided = ', denominator="sum"' if prefix and told.by_sum else ""
    yield f"trainer = {name}(model, args=SFTConfig(max_length=None), train_dataset=rows{divided})"
    yield "```"


def _axolotl(told: Told) -> Iterator[str]:
    yield "datasets:"
    yield f"  - {{path: {quoted(told.file(NAME))}, ds_type: parquet, type: }}"
    yield f"sequence_len: {told.longest} # or more: longer rows are dropped"


def _use_pairs(told: Told) -> Iterator[str]:
    yield "TRL's `DPOTrainer` tokenises text and takes no tokens. Its subclass `WeightedDPOTrainer` reads these rows,"
    yield "as those of the run folder, and masks the reference's log-probabilities as it masks the policy's:"
    if told.strict:
        yield "export without `--strict`, since it needs the weights."
    else:
        yield from ("", "```python", "from datasets import load_dataset", "from trl import DPOConfig", "")
        yield from ("from alphatoken_curate.trainers import WeightedDPOTrainer", "", _load(told))
        beta = f", beta={told.beta}" if told.beta is not None else ""
        yield f"args = DPOConfig(max_length=None{beta})"
        yield "trainer = WeightedDPOTrainer(model, args=args, train_dataset=rows)"
        yield "```"
    yield ""
    yield "torchtune's DPO recipes know the columns `chosen_input_ids`, `chosen_labels` and the same of `rejected_`,"
    yield "without float weights (read in the source, not run)."


FORM = Form(
    name="hf",
    reader="Hugging Face transformers, TRL, Unsloth, Axolotl, Together",
    checked={
        "trl": "1.16.0, 1.9.0 and 0.24.0, run",
        "transformers": "5.23.0, run",
        "axolotl": "0.19.0, run",
        "together": "3.1.1, its own check of files",
        "unsloth": "2026.10.9, source",
    },
    data=NAME,
    alignment=TOKEN_ALIGNED,
    pairs=True,
    floats=lambda asked: not asked.strict,
    destroys="with --strict (axolotl, together) there are labels alone, which are on or off; without it Axolotl weighs"
    " by AlphaTokenPlugin, TRL by WeightedSFTTrainer",
    divides="the number of labels that are not -100, over the whole accumulation window; Axolotl (0.19) without the"
    " plugin over each micro-batch, and takes the mean of these, where few labels count as much as many",
    columns=_columns,
    use=_use,
    write=_write,
    check=_check,
    checked_pairs=("trl",),
    reader_of_pairs="TRL, by `WeightedDPOTrainer`",
)
