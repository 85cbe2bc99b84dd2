"""Masks from stored values: read a generation, decide, write train/. No model is needed.

Runs in one process; memory grows with the response tokens of the run (about 70 bytes each), not with its rows.
Callers hold the run (`atomic.one_writer`) and write the card afterwards (`card.write`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate import composite, manifest, masks, shards
from alphatoken_curate.atomic import digest, sweep
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.fingerprint import Json, fingerprint
from alphatoken_curate.manifest import Generation, Manifest, Mask, MaskFacts
from alphatoken_curate.schema import COMPONENTS, SCHEMA_VERSION, SIGNALS, VALUES
from alphatoken_curate.shards import Footer, Shard, TrainRows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """The response tokens of the scored rows, in (row_id, position) order: N tokens of some shards.

    `row` (N,) int64 index among the scored rows; `columns`: name -> (N,); `per_shard`: tokens of each shard, in order.
    """

    row: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]]
    per_shard: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSummary:
    """What `make_mask` did. `created`: not there before; `newest`: what readers take who do not ask for a number."""

    mask: int
    path: Path
    created: bool
    newest: bool
    rows: int
    response_tokens: int
    kept_tokens: int
    rows_given_back: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spreads:
    """RMS of each component over the response tokens; `decisions_changed`: kept or dropped only due to stability."""

    components: Mapping[str, float]
    response_tokens: int
    decisions_changed: int


def make_mask(run: Path, config: MaskConfig) -> MaskSummary:
    """Mask and loss weights from the newest generation, in train/mask=NNNN and then in the manifest.

    Settings and values of an existing mask: that one is returned, nothing is written. A mask whose writing was cut off
    is finished with the same bytes. Other settings get a new number. Raises `UsageError` for settings that cannot be
    used, `StoredDataError` where the run has no manifest or is damaged.
    """
    masks.parse_keep(config.keep), masks.parse_scope(config.scope), masks.columns_needed(config.by)
    stored = manifest.read(run)
    generation = _newest(run, stored)
    about = _fields(config, generation)
    known = next((mask for mask in stored.masks if mask.fingerprint == fingerprint(about)), None)
    if known and all(_is_there(run, shard) for shard in known.shards):
        return _summary(run, known, stored, created=False)
    number = known.mask if known else _free_number(run, stored, fingerprint(about))
    mask = _write(run, number, generation, config, about)
    others = [other for other in stored.masks if other.mask != number]
    changed = replace(stored, masks=tuple(sorted([*others, mask], key=lambda one: one.mask)))
    manifest.write(run, changed)
    return _summary(run, mask, changed, created=True)


def spreads(run: Path, config: MaskConfig) -> Spreads:
    """How large each component is in the newest generation, and what stability changes in a mask by `config`.

    `decisions_changed` compares the mask with the one that stability weight 0 gives. Raises as `make_mask`.
    """
    generation = _newest(run, manifest.read(run))
    tokens = load(run, generation.shards, (*COMPONENTS, *masks.columns_needed(config.by)))
    with_stability, without = (
        masks.kept(
            _select(tokens, config, weight),
            tokens.row,
            tokens.columns["position"],
            keep=config.keep,
            scope=config.scope,
            allow_empty_rows=config.allow_empty_rows,
        )
        for weight in (config.stability_weight, 0.0)
    )
    return Spreads(
        components=composite.spreads(tokens.columns),
        response_tokens=len(tokens.row),
        decisions_changed=int(np.count_nonzero(with_stability != without)),
    )


def load(run: Path, files: Sequence[Shard], columns: Sequence[str]) -> Tokens:
    """Row ids, positions and these columns (signals or token_id) of the scored rows' response tokens.

    Signals are float32, NaN where null. Raises `StoredDataError` where a file is not the one the manifest names.
    """
    wanted = ["row_id", "position", *(name for name in dict.fromkeys(columns) if name not in ("row_id", "position"))]
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ["row", *wanted]}
    row, last = 0, -1
    for shard in files:
        table = _scored(run, shard, [name for name in wanted if name in SIGNALS])
        part = _flat(run / shard.path, table, wanted)
        row_ids = table["row_id"].to_numpy()
        if len(row_ids) and (row_ids[0] <= last or np.any(np.diff(row_ids) <= 0)):
            raise StoredDataError(f"{run / shard.path}: row ids do not ascend; run `verify`")
        parts["row"].append(part["row"] + row)
        for name in wanted:
            parts[name].append(part[name])
        row, last = row + len(row_ids), int(row_ids[-1]) if len(row_ids) else last
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return Tokens(row=joined.pop("row"), columns=joined, per_shard=tuple(len(part) for part in parts["row"]))


def _newest(run: Path, stored: Manifest) -> Generation:
    if not stored.generations or not stored.generations[-1].shards:
        raise StoredDataError(f"{run / manifest.NAME}: names no generation; run the `score` command that makes one")
    return stored.generations[-1]


def _fields(config: MaskConfig, generation: Generation) -> dict[str, Json]:
    """What decides the mask, and nothing that this mask does not depend on."""
    share = masks.parse_keep(config.keep)
    about: dict[str, Json] = {
        "schema_version": SCHEMA_VERSION,
        "generations": [generation.generation],
        "values": fingerprint({"shards": [shard.sha256 for shard in generation.shards]}),
        "keep": str(share) if share else "positive",
        "scope": config.scope,
        "weights": config.weights,
        "by": config.by,
        "allow_empty_rows": config.allow_empty_rows,
    }
    if masks.depends_on_value(config.by):
        about |= {"stability_weight": float(config.stability_weight), "stability_scale": config.stability_scale}
    return about | ({"seed": config.seed} if config.by == "random" else {})


def _is_there(run: Path, shard: Shard) -> bool:
    path = run / shard.path
    return path.is_file() and path.stat().st_size == shard.bytes


def _free_number(run: Path, stored: Manifest, mark: str) -> int:
    """The first number after all finished masks whose folder is empty or was begun with the same settings."""
    number = stored.masks[-1].mask + 1 if stored.masks else 0
    while paths := shards.listed(shards.train_folder(run, number)):
        if shards.read_footer(next(iter(paths.values()))).fingerprint == mark:
            break
        number += 1
    return number


def _write(run: Path, number: int, generation: Generation, config: MaskConfig, about: Mapping[str, Json]) -> Mask:
    tokens = load(run, generation.shards, masks.columns_needed(config.by))
    score = _select(tokens, config, config.stability_weight)
    decided = masks.weighed(
        score,
        tokens.row,
        tokens.columns["position"],
        keep=config.keep,
        scope=config.scope,
        weights=config.weights,
        allow_empty_rows=config.allow_empty_rows,
    )
    settings = {item.name: getattr(config, item.name) for item in fields(MaskConfig)}
    facts = MaskFacts(
        generations=(generation.generation,), settings=settings, rows_given_back=decided.given_back
    ).as_json()
    metadata = Footer(fields=about, facts=facts)
    folder = shards.train_folder(run, number)
    sweep(folder)
    sweep(run)
    done = shards.committed(folder, about)
    group = []
    for index, (shard, part) in enumerate(zip(generation.shards, _parts(tokens.per_shard), strict=True)):
        path = folder / shards.shard_name(index)
        if index not in done:
            rows = _train_rows(run, shard, decided.weight[part], score[part])
            done[index] = shards.write_train(path, rows, metadata)
        group.append((shards.read_footer(path), done[index]))
    return manifest.mask_of(number, folder, group)


def _select(tokens: Tokens, config: MaskConfig, stability_weight: float) -> NDArray[np.float32]:
    return masks.selection(
        config.by,
        tokens.columns,
        stability_weight=stability_weight,
        stability_scale=config.stability_scale,
        seed=config.seed,
    )


def _parts(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _scored(run: Path, shard: Shard, signals: Sequence[str]) -> pa.Table:
    path = run / shard.path
    if digest(path) != (shard.bytes, shard.sha256):
        raise StoredDataError(f"{path}: not the file that the manifest names; run `verify`")
    table = shards.read(path, VALUES, ["row_id", "status", "input_ids", "response", *signals])
    return table.filter(pc.equal(table["status"], "scored"))


def _flat(path: Path, table: pa.Table, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Columns of the response tokens of one shard; `row` counts from 0."""
    response, lengths = shards.entries(table["response"])
    rows = np.repeat(np.arange(len(lengths)), lengths)[response]
    starts = np.cumsum(lengths) - lengths
    made = {
        "row": lambda: rows,
        "row_id": lambda: table["row_id"].to_numpy()[rows],
        "position": lambda: (np.flatnonzero(response) - starts[rows]).astype(np.int32),
        "token_id": lambda: shards.entries(table["input_ids"])[0][response],
    }
    flat = {name: made[name]() for name in ("row", *names) if name in made}
    for name in names:
        if name not in made:
            values, ends = shards.entries(table[name])
            if not np.array_equal(ends, lengths):
                raise StoredDataError(f"{path}: `{name}` is not aligned with `input_ids`; run `verify`")
            flat[name] = values[response]
    return flat


def _train_rows(run: Path, shard: Shard, weight: NDArray[np.float32], score: NDArray[np.float32]) -> TrainRows:
    table = _scored(run, shard, ())
    response, lengths = shards.entries(table["response"])
    spread, value = np.zeros(len(response), np.float32), np.full(len(response), np.nan, np.float32)
    spread[response], value[response] = weight, score
    ids = shards.entries(table["input_ids"])[0].astype(np.int32)
    return TrainRows(row_id=table["row_id"].to_numpy(), lengths=lengths, input_ids=ids, weight=spread, value=value)


def _summary(run: Path, mask: Mask, stored: Manifest, *, created: bool) -> MaskSummary:
    return MaskSummary(
        mask=mask.mask,
        path=shards.train_folder(run, mask.mask),
        created=created,
        newest=mask.mask == stored.masks[-1].mask,
        rows=sum(shard.rows for shard in mask.shards),
        response_tokens=mask.response_tokens,
        kept_tokens=mask.kept_tokens,
        rows_given_back=mask.rows_given_back,
    )
