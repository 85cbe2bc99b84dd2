"""A finished run folder of a few made-up rows, written by the same functions that a real run uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken_curate import card, composite, manifest
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.manifest import Facts, Input, Plan
from alphatoken_curate.remask import make_mask
from alphatoken_curate.schema import COMPONENTS
from alphatoken_curate.shards import Footer, ValueRow, shard_name, values_folder, write_values

VOCABULARY = 50
FIELDS = {"schema_version": 1, "seed": 3, "input": "sha256:" + "0" * 64}


def value_row(row_id: int, length: int, status: str = "scored", *, reference: bool = True, seed: int = 0) -> ValueRow:
    """A row of `length` tokens whose last half or so responds, in two turns where it is long enough."""
    rng = np.random.default_rng((seed, row_id))
    response = np.arange(length) >= max(1, length // 2)
    if length > 6:
        response[2] = True
    scored = status == "scored"
    signals = {}
    for name in ("nll", "entropy", *(["reference_nll"] if reference else []), *COMPONENTS) if scored else ():
        signals[name] = np.where(response, rng.normal(size=length), np.nan).astype(np.float32)
    if scored:
        signals["value"] = composite.value(*(signals[name] for name in COMPONENTS), stability_weight=1.5)
    empty = status == "rejected"
    return ValueRow(
        row_id=row_id,
        source="rows.jsonl",
        line=row_id + 1,
        id=None if row_id % 2 else f"n{row_id}",
        status=status,
        input_ids=np.empty(0, np.int32) if empty else rng.integers(0, VOCABULARY, length).astype(np.int32),
        response=np.empty(0, np.bool_) if empty else response,
        signals=signals,
    )


def value_rows(count: int = 12, *, reference: bool = True, seed: int = 0) -> list[ValueRow]:
    """Rows of every status: the fourth is rejected, the sixth failed, the eighth held out."""
    odd = {3: "rejected", 5: "failed", 7: "target"}
    return [value_row(i, 2 + (i * 5) % 11, odd.get(i, "scored"), reference=reference, seed=seed) for i in range(count)]


def facts(rows: int) -> Facts:
    """Facts of a run of one input file."""
    return Facts(
        inputs=(Input(source="rows.jsonl", digest="sha256:" + "0" * 64, bytes=100, rows=rows),),
        digests={"model": "sha256:" + "1" * 64, "reference": None},
        settings={"estimator": "published", "stability_weight": 1.5, "data": ["rows.jsonl"]},
        versions={"alphatoken-curate": "0", "numpy": np.__version__},
        checkpoint="base",
        plan=Plan(batch_tokens=4096, halvings=1),
        truncated_rows=1,
        truncated_tokens=7,
    )


def write_generation(
    run: Path, rows: list[ValueRow], per_shard: int = 5, number: int = 0, read: int | None = None
) -> None:
    """values/ of these rows, of `read` in the input (default: all of them)."""
    metadata = Footer(fields={**FIELDS, "generation": number}, facts=facts(read or len(rows)).as_json())
    for index, start in enumerate(range(0, len(rows), per_shard)):
        path = values_folder(run, number) / shard_name(index)
        write_values(path, rows[start : start + per_shard], metadata)


def write_vocabulary(run: Path) -> None:
    """artifacts/vocab.parquet."""
    (run / "artifacts").mkdir(parents=True)
    texts = pa.array([f"<{i}>" for i in range(VOCABULARY)])
    pq.write_table(
        pa.table({"token_id": pa.array(range(VOCABULARY), pa.int32()), "text": texts}),
        run / "artifacts" / "vocab.parquet",
    )


def small_run(
    run: Path, rows: list[ValueRow] | None = None, *, config: MaskConfig | None = None, per_shard: int = 5
) -> Path:
    """A whole run with one mask; returns its folder."""
    write_generation(run, value_rows() if rows is None else rows, per_shard)
    write_vocabulary(run)
    (run / "config.yaml").write_text("keep: 0.5\n")
    (run / "rejects.jsonl").write_text("{}\n")
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, config or MaskConfig())
    card.write(run, manifest.read(run))
    return run
