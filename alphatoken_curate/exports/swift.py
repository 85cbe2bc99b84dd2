"""`ms-swift`: JSON lines whose one assistant message is `token_ids` with a `loss_scale` for each.

They need a template of their own, which is written beside them. Every template that ms-swift has, also where
`--use_chat_template false` empties it, ends a row with the tokenizer's end token at weight 1, puts a begin token before
it where the tokenizer has one, and gives weight 1 to an end token that is masked right behind a trained token.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alphatoken_curate.exports.form import (
    TOKEN_ALIGNED,
    Asked,
    Form,
    Kept,
    Seen,
    Told,
    jsonl_rows,
    same_rows,
    write_jsonl,
)
from alphatoken_curate.runs.atomic import atomic_file

NAME = "train.jsonl"
TEMPLATE, TEMPLATE_CODE = "tokens", "swift_template.py"
_CODE = f'''"""A template of ms-swift for rows that are tokens already: it adds none, and leaves their weights alone."""

from swift.template import TemplateMeta, register_template

register_template(TemplateMeta("{TEMPLATE}", prefix=[], prompt=["{{{{QUERY}}}}"], chat_sep=None, suffix=[]))
'''
_KEYS = ("messages", "rejected_messages")


def _record(kept: Kept) -> dict[str, Any]:
    return {
        key: [{"role": "assistant", "content": {"token_ids": branch.input_ids, "loss_scale": branch.loss_weight}}]
        for key, branch in zip(_KEYS, kept.row.branches, strict=False)
    }


def _seen(record: dict[str, Any]) -> Seen:
    contents = [message["content"] for key in _KEYS if key in record for message in record[key]]
    return tuple((np.array(one["token_ids"]), np.array(one["loss_scale"], np.float32)) for one in contents)


def _write(folder: Path, batches: Iterator[list[Kept]], asked: Asked) -> None:
    write_jsonl(folder / NAME, (_record(kept) for rows in batches for kept in rows))
    with atomic_file(folder / TEMPLATE_CODE) as sink:
        sink.write(_CODE.encode())


def _check(folder: Path, rows: Iterator[Kept], asked: Asked) -> None:
    same_rows(folder / NAME, map(_seen, jsonl_rows(folder / NAME)), rows)


def _columns(told: Told) -> Iterator[str]:
    yield "- `messages`: one assistant message, whose content is the whole row: `token_ids`, and `loss_scale` of each"
    if told.kind == "preference":
        yield "- `rejected_messages`: the same of the rejected answer, which holds the prompt too"


def _use(told: Told) -> Iterator[str]:
    pair = told.kind == "preference"
    command = "swift rlhf --rlhf_type dpo" if pair else "swift sft"
    if told.beta is not None:
        command += f" --beta {told.beta}"
    yield from ("```sh", f"{command} --model MODEL --dataset {shlex.quote(told.file(NAME))} \\")
    yield f"    --external_plugins {shlex.quote(told.file(TEMPLATE_CODE))} --template {TEMPLATE} \\"
    yield f"    --is_binary_loss_scale false --max_length {told.longest}"
    yield from ("```", "")
    yield "`--is_binary_loss_scale false`: without it every weight above 0 becomes 1, without a word."
    yield f"`--template {TEMPLATE}`: the rows hold all of the chat already. ms-swift's own templates, with"
    yield "`--use_chat_template false` too, add an end token that trains, and train one that the mask leaves out."
    yield "Answer with the model's own template, `swift infer --template ...`."


FORM = Form(
    name="ms-swift",
    reader="ms-swift",
    checked={"ms-swift": "4.6.0, run for SFT and for DPO"},
    data=NAME,
    alignment=TOKEN_ALIGNED,
    pairs=True,
    floats=lambda asked: asked.layout.kind == "sft",
    destroys="ms-swift's DPO masks where loss_scale is 0 and takes every other weight for 1",
    divides="the number of tokens with a weight above 0, not the sum of weights",
    columns=_columns,
    use=_use,
    write=_write,
    check=_check,
    beware=(
        "`token_ids` as content is not documented by ms-swift: keep to the release above, or run one step and compare.",
        "Fused and liger losses leave weights out; ms-swift says so and falls back.",
    ),
)
