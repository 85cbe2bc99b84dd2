"""`llamafactory`: a folder of `Dataset.save_to_disk` for `tokenized_path`; for pairs a per-token mask without code.

The folder is written here, not by `datasets`: row by row in bounded memory, and with features that its releases
before and after 4.0 both read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from alphatoken_curate.exports import hf
from alphatoken_curate.exports.form import (
    INT8S,
    INT32S,
    INT64S,
    TOKEN_ALIGNED,
    Asked,
    Form,
    Kept,
    Seen,
    Told,
    list_rows,
    lists,
    quoted,
    same_rows,
    unlike,
)
from alphatoken_curate.runs.atomic import atomic_file

SPLIT = "train"
ARROW = "data-00000-of-00001.arrow"
MEDIA = ("images", "videos", "audios")
"""Columns whose keys the collators need; None says that a row has none."""

_LISTS = {"input_ids": INT32S, "attention_mask": INT8S, "labels": INT64S}


def _kinds(asked: Asked) -> dict[str, pa.DataType]:
    named = {prefix + name: kind for prefix in asked.layout.branches for name, kind in _LISTS.items()}
    return {**named, **dict.fromkeys(MEDIA, pa.null())}


def _features(kinds: dict[str, pa.DataType]) -> dict[str, Any]:
    """As `datasets` writes them in JSON. `Sequence` is what all its releases read; newer ones write `List`."""
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        inner = {"dtype": str(kind.value_type if pa.types.is_list(kind) else kind), "_type": "Value"}
        found[name] = {"feature": inner, "length": -1, "_type": "Sequence"} if pa.types.is_list(kind) else inner
    return found


def _table(rows: list[Kept], schema: pa.Schema, asked: Asked) -> pa.Table:
    found = hf.columns_of(rows, asked.layout)
    columns = {
        field.name: pa.nulls(len(rows)) if field.name in MEDIA else lists(found[field.name], field.type)
        for field in schema
    }
    return pa.table(columns, schema=schema)


def _write(folder: Path, batches: Iterator[list[Kept]], asked: Asked) -> None:
    kinds = _kinds(asked)
    features = _features(kinds)
    about = orjson.dumps({"info": {"features": features}})
    schema = pa.schema(list(kinds.items()), metadata={b"huggingface": about})
    with atomic_file(folder / SPLIT / ARROW) as sink:
        target = pa.PythonFile(sink, mode="w")
        with pa.ipc.new_stream(target, schema) as writer:
            for rows in batches:
                writer.write_table(_table(rows, schema, asked))
        # `datasets` names what it caches by the fingerprint: other rows must have another one.
        state = _STATE | {"_fingerprint": sink.sha256[:16]}
    described = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    _write_json(folder / SPLIT / "dataset_info.json", described)
    _write_json(folder / SPLIT / "state.json", state)
    _write_json(folder / "dataset_dict.json", {"splits": [SPLIT]})


_STATE: dict[str, Any] = {
    "_data_files": [{"filename": ARROW}],
    "_format_columns": None,
    "_format_kwargs": {},
    "_format_type": None,
    "_output_all_columns": False,
    "_split": SPLIT,
}


def _write_json(path: Path, value: object) -> None:
    with atomic_file(path) as sink:
        sink.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))


def _rows(path: Path, asked: Asked) -> Iterator[Seen]:
    with pa.memory_map(str(path)) as stored, pa.ipc.open_stream(stored) as reader:
        if reader.schema.names != list(_kinds(asked)):
            raise unlike(path, f"its columns are {', '.join(reader.schema.names)}")
        for batch in reader:
            yield from (hf.seen(row, asked.layout) for row in list_rows(pa.Table.from_batches([batch])))


def _check(folder: Path, rows: Iterator[Kept], asked: Asked) -> None:
    path = folder / SPLIT / ARROW
    same_rows(path, _rows(path, asked), rows)


def _columns(told: Told) -> Iterator[str]:
    before = "`chosen_` and `rejected_` before each name: " if told.kind == "preference" else ""
    yield f"- {before}`input_ids` (int32), `attention_mask` (int8, all 1), `labels` (int64, -100 where nothing trains)"
    yield "- `images`, `videos`, `audios`: None; the collator needs the keys"


def _use(told: Told) -> Iterator[str]:
    yield "In the training YAML:"
    yield from ("", "```yaml", f"stage: {'dpo' if told.kind == 'preference' else 'sft'}")
    yield f"tokenized_path: {quoted(told.place)}"
    yield "dataset: tokenized # anything, but not empty: it is not read"
    yield f"cutoff_len: {told.longest} # the longest row; it is not applied to rows from tokenized_path"
    if told.beta is not None:
        yield f"pref_beta: {told.beta}"
    yield from ("packing: false", "```")


FORM = Form(
    name="llamafactory",
    reader="LLaMA-Factory",
    checked={"llamafactory": "0.9.5, run for SFT and for DPO"},
    data=SPLIT,
    alignment=TOKEN_ALIGNED,
    pairs=True,
    floats=lambda asked: False,
    destroys="LLaMA-Factory has labels alone, which are on or off, and crashes on a column of weights",
    divides="the number of labels that are not -100",
    columns=_columns,
    use=_use,
    write=_write,
    check=_check,
    beware=(
        "What LLaMA-Factory does to data (template, `cutoff_len`, `packing`) is not done to rows from"
        " `tokenized_path`; truncation was settled here.",
    ),
)
