"""The files of a run that lie beside its shards: config.yaml, rejects.jsonl, the vocabulary, rows of other files.

Rows of --target, --retention and --fisher-prompts are kept as tokens, so that a run can be scored again at a checkpoint
without the files it was made from.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from alphatoken_curate.config import FISHER_MODES, ScoreConfig
from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.models.load import DEMO_MODEL
from alphatoken_curate.rows.files import anywhere
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.atomic import atomic_file, unread
from alphatoken_curate.runs.manifest import Manifest
from alphatoken_curate.runs.schema import VOCABULARY
from alphatoken_curate.scoring.budget import Budget
from alphatoken_curate.scoring.prepare import Prepared
from alphatoken_curate.tokens.pieces import pieces, vocabulary_table
from alphatoken_curate.tokens.tokenise import TokenRow
from alphatoken_curate.urls import names_url

CONFIG = "config.yaml"
TARGET_ROWS = "artifacts/target_rows.parquet"
RETENTION_ROWS = "artifacts/retention_rows.parquet"
PROMPT_ROWS = "artifacts/prompt_rows.parquet"

_PLACES = ("model", "reference", "target", "fisher", "fisher_prompts", "retention", "chat_template")
"""Settings that may name a file or folder."""

_NAMES = {"model": (DEMO_MODEL,), "reference": (DEMO_MODEL,), "fisher": FISHER_MODES}
"""What they may name that is none, whatever lies in the working folder."""

_SIDE = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response", pa.list_(pa.bool_()), nullable=False),
    ]
)


def write_beside(run: Path, prepared: Prepared, dtype: str, budget: Budget) -> bool:
    """Write what lies beside the shards; returns whether the manifest must be written after it.

    `dtype` and `budget`: what the run was begun with, which config.yaml names in place of `auto`: another device
    would choose others. In a finished run they stay as they are, and only what was lost is written again.
    """
    makers: dict[str, Callable[[], bytes]] = {CONFIG: lambda: _config_yaml(prepared.config, dtype, budget)}
    if prepared.bad:
        makers["rejects.jsonl"] = lambda: _rejects(prepared)
    if prepared.tokenizer is not None:
        makers[VOCABULARY] = lambda: _parquet(vocabulary_table(pieces(prepared.tokenizer)))
    sides = {TARGET_ROWS: prepared.target, RETENTION_ROWS: prepared.retention, PROMPT_ROWS: prepared.prompts}
    for name, side in sides.items():
        if side.files:
            makers[name] = lambda rows=side.rows: _side_rows(rows)  # type: ignore[misc]
    unfinished = not (run / manifest.NAME).is_file()
    wanted = [name for name in makers if unfinished or not (run / name).is_file()]
    for name in wanted:
        content = makers[name]()
        with atomic_file(run / name) as sink:
            sink.write(content)
    return unfinished or bool(wanted)


def read_side_rows(run: Path, stored: Manifest, name: str) -> list[TokenRow]:
    """Rows kept under one of the names above. Raises StoredDataError where it is not the file the manifest names."""
    path = run / name
    manifest.check_file(run, stored, name)
    try:
        table = pq.read_table(path, schema=_SIDE)
    except (OSError, pa.ArrowException, ValueError) as error:
        lost = StoredDataError(f"{path}: missing or damaged ({error}); score the run again to have it")
        raise unread(path, error) or lost from error
    return [
        TokenRow(
            row_id=row["row_id"],
            source=name,
            line=row["row_id"] + 1,
            id=None,
            input_ids=np.array(row["input_ids"], np.int32),
            response=np.array(row["response"], np.bool_),
            end_of_turn=np.zeros(len(row["response"]), np.bool_),
            truncated=0,
        )
        for row in table.to_pylist()
    ]


def _side_rows(rows: Sequence[TokenRow]) -> bytes:
    columns = {
        "row_id": [row.row_id for row in rows],
        "input_ids": [row.input_ids for row in rows],
        "response": [row.response for row in rows],
    }
    return _parquet(pa.table(columns, schema=_SIDE))


def _config_yaml(config: ScoreConfig, dtype: str, budget: Budget) -> bytes:
    # What was taken over from another run is here now.
    settings: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(ScoreConfig) if f.name != "reuse"}
    settings["data"] = [_place(name) for name in config.data]
    for name in _PLACES:
        settings[name] = settings[name] if settings[name] in _NAMES.get(name, ()) else _place(settings[name])
    settings["dtype"] = dtype
    settings["batch_tokens"] = budget.first or config.batch_tokens
    settings["threads"] = budget.threads
    head = b"# Replay this run: alphatoken-curate score --config THIS FILE -o ANOTHER FOLDER\n"
    return head + yaml.safe_dump(settings, sort_keys=True).encode()


def _place(name: str | None) -> str | None:
    """What lies on this machine, by a path that holds in any working folder; anything else as it was named."""
    return name if name is None or names_url(name) else anywhere(name)


def _rejects(prepared: Prepared) -> bytes:
    lines = []
    for bad in prepared.bad:
        line = {"file": bad.source, "line": bad.line, "row_id": bad.row_id, "reason": bad.reason}
        lines.append(orjson.dumps(line | {"message": bad.message, "excerpt": bad.excerpt}) + b"\n")
    return b"".join(lines)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
