"""Rows in, run folder out: the only loop. Everything is resumed from what is on disk, nothing is written twice."""

from __future__ import annotations

import importlib.metadata
import io
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from alphatoken_curate import card, manifest, shards
from alphatoken_curate.artifacts import Store
from alphatoken_curate.atomic import atomic_file, one_writer, sweep
from alphatoken_curate.budget import NAME as BUDGET
from alphatoken_curate.budget import Budget
from alphatoken_curate.config import MaskConfig, ScoreConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.manifest import Facts, Input, Manifest, Plan
from alphatoken_curate.models import ModelSource, find_model, resolve_device, resolve_dtype
from alphatoken_curate.plan import by_shard
from alphatoken_curate.prepare import Prepared, fingerprint_fields, fisher_rows, prepare
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.remask import MaskSummary, make_mask
from alphatoken_curate.rows import BadRow
from alphatoken_curate.schema import VOCABULARY
from alphatoken_curate.scorer import ReferencePass, RowSignals, ScorerSpec, ShardScorer
from alphatoken_curate.shards import Footer, Shard, ValueRow
from alphatoken_curate.tokens import TokenRow

SUFFIX = ".alphatoken"
"""A run folder's default name is the stem of its data and this."""

_FOLDERS = ("artifacts", "train", "values")
"""Folders of a run; what a killed writer leaves before its first file lies in one of them."""

_VERSIONED = ("alphatoken-curate", "torch", "transformers", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """What `score` did. `shards_scored` is 0 where the values were there already."""

    run: Path
    manifest: Manifest
    mask: MaskSummary
    shards_scored: int


def default_run(data: Sequence[str]) -> Path:
    """`data.jsonl` -> `data.alphatoken`, in the current folder."""
    name = Path(data[0].rstrip("/")).name
    while Path(name).suffix in (".gz", ".zst", ".jsonl", ".json", ".ndjson", ".parquet"):
        name = Path(name).stem
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip("._")
    return Path((kept or "run") + SUFFIX)


def score(config: ScoreConfig, run: Path | str | None = None, progress: Progress | None = None) -> ScoreSummary:
    """Score every row, write values/, then a mask and train/.

    The same call resumes an unfinished run and leaves a finished one alone. Raises UsageError, InputError (bad rows),
    ModelError, FingerprintError (the folder was made with other settings), StoredDataError (damage).
    """
    listener = progress or Silent()
    folder = Path(run) if run is not None else default_run(config.data)
    prepared = prepare(config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device.type)
    reference = prepared.source if config.reference in (None, config.model) else find_model(str(config.reference))
    about = fingerprint_fields(prepared, reference, dtype)
    _check_ours(folder)
    with one_writer(folder):
        budget = Budget(folder, about, config.batch_tokens, device.type, listener)
        spec = _spec(prepared, reference, dtype, str(device), Store(folder=folder / "artifacts", fields=about))
        _tell(prepared, spec, listener)
        scored = _score_shards(folder, prepared, spec, budget, listener)
        if _write_beside(folder, prepared) or scored:
            manifest.write(folder, manifest.rebuild(folder))
        mask, stored = _mask_and_card(folder, config, stale=bool(scored))
    return ScoreSummary(run=folder, manifest=stored, mask=mask, shards_scored=scored)


def _check_ours(run: Path) -> None:
    """Refuse a folder that holds other things: a README.md there is not ours to replace."""
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run}: a file. Name a folder for the run with -o.")
    if not run.exists() or (run / "artifacts" / BUDGET).is_file() or (run / manifest.NAME).is_file():
        return
    foreign = sorted(path.name for path in run.iterdir() if path.name not in _FOLDERS)
    if foreign:
        raise UsageError(f"{run}: not a run folder, and not empty (it has {foreign[0]!r}). Name another one with -o.")


def _spec(prepared: Prepared, reference: ModelSource, dtype: str, device: str, store: Store) -> ScorerSpec:
    config = prepared.config
    return ScorerSpec(
        model=prepared.source,
        reference=reference,
        estimator=config.estimator,  # type: ignore[arg-type]
        layers=config.layers,
        window=config.window,
        stability_weight=config.stability_weight,
        fisher=config.fisher,
        seed=config.seed,
        dtype=dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
        store=store,
    )


def _tell(prepared: Prepared, spec: ScorerSpec, progress: Progress) -> None:
    if prepared.held_out:
        progress.note(
            f"{len(prepared.held_out)} rows are held out as the target: they are not scored and not in train/."
            " Name rows of the task you want to learn with --target."
        )
    cut = sum(row.truncated > 0 for row in prepared.rows)
    if cut:
        tokens = sum(row.truncated for row in prepared.rows)
        progress.note(
            f"{cut} rows are longer than --max-length {prepared.config.max_length}: {tokens} tokens were cut."
        )
    if not spec.has_drift:
        progress.note(
            "STABILITY IS ZERO: the reference has the same weights as the model, so there is no drift to score."
            " Values hold adaptation alone. Once you have tuned a checkpoint, score it with --model CHECKPOINT and"
            " --reference the model it started from."
        )


def _score_shards(run: Path, prepared: Prepared, spec: ScorerSpec, budget: Budget, progress: Progress) -> int:
    """Score the shards that are missing; returns how many those were."""
    folder = shards.values_folder(run, 0)
    for touched in (run, folder, run / "artifacts"):
        sweep(touched)
    config = prepared.config
    rows = by_shard(prepared.rows, prepared.rows_read, config.rows_per_shard)
    held_out = by_shard(prepared.held_out, prepared.rows_read, config.rows_per_shard)
    bad = by_shard(prepared.bad, prepared.rows_read, config.rows_per_shard)
    done = shards.committed(folder, spec.store.fields)
    foreign = sorted(set(done) - set(range(len(rows))))
    if foreign:
        raise StoredDataError(f"{folder / shards.shard_name(foreign[0])}: no shard of this run. Move it away.")
    _check_stored(run, done)
    missing = [index for index in range(len(rows)) if index not in done]
    if not missing:
        return 0
    if spec.has_drift:
        _reference_stage(prepared, spec, rows, missing, budget, progress)
    scorer = ShardScorer(spec)
    budget.spend(lambda tokens: scorer.prepare(prepared.target, tokens, progress))
    facts = _facts(prepared, spec)
    progress.stage("scoring", sum(len(row.input_ids) for index in missing for row in rows[index]))
    for index in missing:
        found = budget.spend(partial(scorer, index, rows[index], progress), index)
        records = _records(rows[index], found, held_out[index], bad[index])
        told = replace(
            facts,
            plan=budget.plan(index),
            truncated_rows=sum(row.truncated > 0 for row in rows[index]),
            truncated_tokens=sum(row.truncated for row in rows[index]),
        )
        footer = Footer(fields=spec.store.fields, facts=told.as_json())
        shards.write_values(folder / shards.shard_name(index), records, footer)
    return len(missing)


def _check_stored(run: Path, done: Mapping[int, Shard]) -> None:
    """Shards must be those of the manifest, where there is one: its digests see what a footer does not."""
    if not (run / manifest.NAME).is_file():
        return
    for index, shard in enumerate(manifest.read(run).generations[0].shards):
        if index in done and done[index] != shard:
            raise StoredDataError(
                f"{run / shard.path}: not the file that the manifest names. Delete it and run the same command again."
            )


def _reference_stage(
    prepared: Prepared,
    spec: ScorerSpec,
    rows: list[list[TokenRow]],
    missing: list[int],
    budget: Budget,
    progress: Progress,
) -> None:
    config = prepared.config
    reference = ReferencePass(spec)
    budget.spend(
        lambda tokens: reference.fisher(
            lambda: fisher_rows(prepared.rows, config.fisher_rows, config.seed), tokens, progress
        )
    )
    reference.weights()
    progress.stage("reference losses", sum(len(row.input_ids) for index in missing for row in rows[index]))
    for index in missing:
        budget.spend(partial(reference.losses, index, rows[index], progress))
    reference.close()


def _records(
    rows: Sequence[TokenRow],
    found: Sequence[RowSignals | None],
    held_out: Sequence[TokenRow],
    bad: Sequence[BadRow],
) -> list[ValueRow]:
    """One record per row read in the shard, in order of row_id, whatever became of it."""
    records = [
        record(row, "failed" if signals is None else "scored", signals or {})
        for row, signals in zip(rows, found, strict=True)
    ]
    records += [record(row, "target", {}) for row in held_out]
    records += [_rejected(row) for row in bad]
    return sorted(records, key=lambda record: record.row_id)


def record(row: TokenRow, status: str, signals: RowSignals) -> ValueRow:
    """What is stored of a row that could be read."""
    return ValueRow(
        row_id=row.row_id,
        source=row.source,
        line=row.line,
        id=row.id,
        status=status,
        input_ids=row.input_ids,
        response=row.response,
        signals=signals,
    )


def _rejected(bad: BadRow) -> ValueRow:
    return ValueRow(
        row_id=bad.row_id,
        source=bad.source,
        line=bad.line,
        id=None,
        status="rejected",
        input_ids=np.empty(0, np.int32),
        response=np.empty(0, np.bool_),
    )


def _facts(prepared: Prepared, spec: ScorerSpec) -> Facts:
    """What every shard tells along, before its own plan and counts: nothing of time, place or path."""
    about = spec.store.fields
    digested = ("model", "reference", "tokenizer", "template", "tokens")
    return Facts(
        inputs=tuple(_inputs(prepared)),
        digests={name: about[name] for name in digested},  # type: ignore[misc]
        settings={name: value for name, value in about.items() if name not in (*digested, "data", "schema_version")},
        versions={
            "python": platform.python_version(),
            "device": str(spec.device).split(":")[0],
            **{name: importlib.metadata.version(name) for name in _VERSIONED},
        },
        checkpoint=Path(prepared.source.name).name,
        plan=Plan(batch_tokens=0),
    )


def _inputs(prepared: Prepared) -> list[Input]:
    read: dict[str, int] = {}
    sources = [row.source for row in (*prepared.rows, *prepared.held_out)] + [bad.source for bad in prepared.bad]
    for source in sources:
        read[source] = read.get(source, 0) + 1
    return [Input(source=f.source, digest=f.digest, bytes=f.bytes, rows=read.get(f.source, 0)) for f in prepared.files]


def _write_beside(run: Path, prepared: Prepared) -> bool:
    """Write config.yaml, rejects.jsonl and the vocabulary; returns whether the manifest must be written after them.

    In a finished run they stay as they are, and only what was lost is written again.
    """
    makers: dict[str, Callable[[Prepared], bytes]] = {"config.yaml": _config_yaml}
    if prepared.bad:
        makers["rejects.jsonl"] = _rejects
    if prepared.tokenizer is not None:
        makers[VOCABULARY] = _vocabulary
    unfinished = not (run / manifest.NAME).is_file()
    wanted = [name for name in makers if unfinished or not (run / name).is_file()]
    for name in wanted:
        content = makers[name](prepared)
        with atomic_file(run / name) as sink:
            sink.write(content)
    return unfinished or bool(wanted)


def _config_yaml(prepared: Prepared) -> bytes:
    settings: dict[str, Any] = {f.name: getattr(prepared.config, f.name) for f in fields(ScoreConfig)}
    settings["data"] = list(prepared.config.data)
    head = b"# Replay this run: alphatoken-curate score --config THIS FILE -o ANOTHER FOLDER\n"
    return head + yaml.safe_dump(settings, sort_keys=True, allow_unicode=True).encode()


def _rejects(prepared: Prepared) -> bytes:
    lines = []
    for bad in prepared.bad:
        line = {"file": bad.source, "line": bad.line, "row_id": bad.row_id, "reason": bad.reason}
        lines.append(orjson.dumps(line | {"message": bad.message, "excerpt": bad.excerpt}) + b"\n")
    return b"".join(lines)


def _vocabulary(prepared: Prepared) -> bytes:
    tokenizer: Any = prepared.tokenizer
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    table = pa.table({"token_id": pa.array(range(len(texts)), pa.int32()), "text": pa.array(texts, pa.string())})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def mask(run: Path | str, config: MaskConfig) -> MaskSummary:
    """Make masks and loss weights again from stored values: no model, seconds. See `MaskConfig` for the choices."""
    folder = Path(run)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder. Make one with: alphatoken-curate score DATA -o {folder}")
    with one_writer(folder):
        sweep(folder)
        return _mask_and_card(folder, config, stale=False)[0]


def _mask_and_card(run: Path, config: MaskConfig, *, stale: bool) -> tuple[MaskSummary, Manifest]:
    """Make the mask, then the card where it is `stale` or names another mask."""
    made = make_mask(run, config)
    stored = manifest.read(run)
    if stale or not card.is_current(run, stored):
        card.write(run, stored)
    return made, stored
