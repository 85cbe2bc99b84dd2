"""A finished run folder of a few made-up rows, written by the same functions that a real run uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.runs import card, manifest
from alphatoken_curate.runs.documents import sealed
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.manifest import Facts, Input, Plan
from alphatoken_curate.runs.schema import LAYOUTS, SCHEMA_VERSION, components
from alphatoken_curate.runs.shards import Branch, Footer, ValueRow, shard_name, values_folder, write_values
from alphatoken_curate.signals import composite
from alphatoken_curate.tokens.pieces import Piece, vocabulary_table

VOCABULARY = 50
BETA = 0.1
FIELDS = {"schema_version": SCHEMA_VERSION, "seed": 3, "input": "sha256:" + "0" * 64}


def closes(response: np.ndarray) -> np.ndarray:
    """The last token of each run of a response (T,): what ends an answer in rows that are made up."""
    return response & ~np.append(response[1:], False)


def published(**settings: Any) -> MaskConfig:
    """The mask of the paper (Eq. 13), but for these settings."""
    return MaskConfig(**{"keep": 0.5, "by": "value", "always_keep": "none", **settings})


def tokens(row_id: int, length: int, number: int = 0) -> Branch:
    """A sequence of `length` tokens whose last half or so responds, in two turns where it is long enough."""
    response = np.arange(length) >= max(1, length // 2)
    if length > 6:
        response[2] = True
    ids = np.random.default_rng((row_id, number)).integers(0, VOCABULARY, length)
    return Branch(input_ids=ids.astype(np.int32), response=response, end_of_turn=closes(response))


def scored(
    row: ValueRow,
    *,
    reference: bool = True,
    seed: int = 0,
    estimator: str = "published",
    errors: bool = False,
    stability_weight: float = 1.5,
) -> ValueRow:
    """The row with signals drawn by the seed, and `errors` of them: another seed stands for another checkpoint."""
    branches, found = [], components(estimator)
    for number, branch in enumerate(row.branches):
        draws, signals = np.random.default_rng((seed, row.row_id, number)), {}
        for name in ("nll", "entropy", *(["reference_nll"] if reference else []), *found.of_value, *found.upstream):
            drawn = draws.normal(size=len(branch.response))
            signals[name] = np.where(branch.response, drawn, np.nan).astype(np.float32)
        signals["value"] = composite.value(signals, found, stability_weight=stability_weight)
        for name in ("adapt_error", "stab_error") if errors else ():
            drawn = np.abs(draws.normal(size=len(branch.response))) / 4
            signals[name] = np.where(branch.response, drawn, np.nan).astype(np.float32)
        if errors:
            signals["value_error"] = composite.value_error(signals, stability_weight)
        branches.append(replace(branch, signals=signals))
    row = replace(row, status="scored", branches=tuple(branches))
    return row if len(branches) == 1 else paired(row)


def paired(row: ValueRow) -> ValueRow:
    """A scored pair with the margin and omega that its losses make (paper Eq. 14)."""
    margin = np.float32(BETA * (log_ratio(row.branches[0]) - log_ratio(row.branches[1])))
    omega = np.float32(BETA * np.exp(-np.logaddexp(0.0, np.float64(margin))))
    return replace(row, margin=float(margin), omega=float(omega))


def value_row(row_id: int, length: int, status: str = "scored", *, kind: str = "sft", **how: Any) -> ValueRow:
    """A row of `length` tokens; of a pair, that many in the chosen branch. `how` it is scored: see `scored`."""
    lengths = (length, 2 + (length * 3) % 11)[: len(LAYOUTS[kind].branches)]
    row = ValueRow(
        row_id=row_id,
        source="rows.jsonl",
        line=row_id + 1,
        id=None if row_id % 2 else f"n{row_id}",
        status=status,
        branches=tuple(tokens(row_id, 0 if status == "rejected" else n, i) for i, n in enumerate(lengths)),
    )
    return scored(row, **how) if status == "scored" else row


def log_ratio(one: Branch) -> float:
    """Log-probability of the answer under the model less that under the reference; 0 without a reference."""
    if "reference_nll" not in one.signals:
        return 0.0
    return float((one.signals["reference_nll"] - one.signals["nll"])[one.response].sum(dtype=np.float64))


def value_rows(count: int = 12, *, kind: str = "sft", **how: Any) -> list[ValueRow]:
    """Rows of every status: the fourth is rejected, the sixth failed, the eighth held out.

    Another seed gives other signals of the same tokens, as another checkpoint does.
    """
    odd = {3: "rejected", 5: "failed", 7: "target"}
    return [value_row(i, 2 + (i * 5) % 11, odd.get(i, "scored"), kind=kind, **how) for i in range(count)]


def kind_of(rows: list[ValueRow]) -> str:
    """`sft` or `preference`."""
    return "preference" if any(len(row.branches) == 2 for row in rows) else "sft"


def estimator_of(rows: list[ValueRow]) -> str:
    """The estimator whose signals the rows have; what exact gives could be published."""
    names = {name for row in rows for one in row.branches for name in one.signals}
    return (
        "influence" if "adapt_influence" in names else "exact+influence" if "adapt_upstream" in names else "published"
    )


REHEARSAL: dict[str, Json] = {
    "direction": "rehearsal",
    "rehearse_lr": 3e-5,
    "rehearse_epochs": 2,
    "rehearse_rows_per_step": 4,
    "rehearse_optimizer": "adamw",
    "target_groups": 8,
    "groups": 8,
}
"""Settings of a run whose values are of a rehearsed training, with errors."""


def facts(
    rows: int,
    kind: str = "sft",
    checkpoint: str = "base",
    estimator: str = "published",
    more: Mapping[str, Json] | None = None,
) -> Facts:
    """Facts of a run of one input file; `more` settings."""
    settings: dict[str, Json] = {
        "kind": kind,
        "estimator": estimator,
        "stability_weight": 1.5,
        "data": ["rows.jsonl"],
    }
    return Facts(
        inputs=(Input(source="rows.jsonl", digest="sha256:" + "0" * 64, bytes=100, rows=rows),),
        digests={"model": "sha256:" + "1" * 64, "reference": None},
        settings=settings | ({"beta": BETA} if kind == "preference" else {}) | dict(more or {}),
        versions={"alphatoken-curate": "0", "numpy": np.__version__},
        checkpoint=checkpoint,
        plan=Plan(batch_tokens=4096, halvings=1),
        truncated_rows=1,
        truncated_tokens=7,
    )


def write_generation(
    run: Path,
    rows: list[ValueRow],
    per_shard: int = 5,
    number: int = 0,
    read: int | None = None,
    more: Mapping[str, Json] | None = None,
) -> None:
    """values/ of these rows (of either kind), of `read` in the input (default: all of them), at checkpoint-NUMBER."""
    kind, read = kind_of(rows), read or len({row.row_id for row in rows})
    told = facts(read, kind, f"checkpoint-{number}" if number else "base", estimator_of(rows), more)
    metadata = Footer(fields={**FIELDS, "kind": kind, "generation": number}, facts=told.as_json())
    layout = LAYOUTS[kind].along((more or {}).get("direction"))
    for index, start in enumerate(range(0, len(rows), per_shard)):
        path = values_folder(run, number) / shard_name(index)
        write_values(path, rows[start : start + per_shard], metadata, layout)


def write_vocabulary(run: Path) -> None:
    """artifacts/vocab.parquet."""
    (run / "artifacts").mkdir(parents=True)
    write_pieces(run, [Piece(content=f"<{i}>".encode(), special=False) for i in range(VOCABULARY)])


def write_pieces(run: Path, found: list[Piece]) -> None:
    """artifacts/vocab.parquet of these tokens; another one there is replaced."""
    pq.write_table(vocabulary_table(found), run / "artifacts" / "vocab.parquet")
    renamed(run)


def write_rejects(run: Path, lines: Sequence[object]) -> None:
    """rejects.jsonl of these."""
    (run / "rejects.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    renamed(run)


def renamed(run: Path) -> None:
    """Have the manifest, if there is one, name the files of the run as they are now."""
    if (run / manifest.NAME).is_file():
        manifest.write(run, replace(manifest.read(run), files=manifest.rebuild(run).files))


def sealed_manifest(whole: dict[str, Any]) -> bytes:
    """A manifest that says this, as if a run had written it."""
    return sealed({name: value for name, value in whole.items() if name != "seal"})


def small_run(
    run: Path,
    rows: list[ValueRow] | None = None,
    *,
    config: MaskConfig | None = None,
    per_shard: int = 5,
    kind: str = "sft",
    estimator: str = "published",
    generations: Sequence[int] = (0,),
    settings: Mapping[str, Json] | None = None,
) -> Path:
    """A whole run with one mask of its newest generation; returns its folder.

    `rows` (default: `value_rows` of `kind` and `estimator`) are those of the first generation; the others hold the
    same rows with the signals of another seed, the number of the generation. `settings`: more that the run was told.
    """
    first = value_rows(kind=kind, estimator=estimator) if rows is None else rows
    for place, number in enumerate(generations):
        errors = any("value_error" in one.signals for row in first for one in row.branches)
        how: dict[str, Any] = {"seed": number, "estimator": estimator_of(first), "errors": errors}
        again = [scored(row, **how) if row.status == "scored" else row for row in first]
        write_generation(run, again if place else first, per_shard, number, more=settings)
    write_vocabulary(run)
    (run / "config.yaml").write_text("keep: 0.5\n")
    (run / "rejects.jsonl").write_text("{}\n")
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, config or published())
    card.write(run, manifest.read(run))
    return run


def run_with_errors(run: Path, count: int = 30, kind: str = "sft", **how: Any) -> Path:
    """A run of rehearsed values, each with its error."""
    settings, estimator = how.pop("settings", {}), "influence" if kind == "sft" else "published"
    made = {"estimator": estimator, "errors": True, "stability_weight": settings.get("stability_weight", 1.5)}
    return small_run(run, value_rows(count, kind=kind, **made), kind=kind, settings={**REHEARSAL, **settings}, **how)


def changed(row: ValueRow, change: Callable[[str, np.ndarray], np.ndarray]) -> ValueRow:
    """The row with other components, its values to match."""
    branches = []
    for one in row.branches:
        signals = {name: change(name, x) for name, x in one.signals.items()}
        if signals:
            signals["value"] = composite.value(signals, components("published"), stability_weight=1.5)
        branches.append(replace(one, signals=signals))
    return replace(row, branches=tuple(branches))


def with_stability(row: ValueRow, factor: float) -> ValueRow:
    """The same row with its stability multiplied."""
    return changed(row, lambda name, x: x * np.float32(factor) if name.startswith("stab") else x)


def with_by(run: Path, by: str) -> Path:
    """The run, with another `by` stored in its masks' settings, as another release or a stranger may have it."""
    stored = manifest.read(run)
    masks = tuple(replace(one, settings={**one.settings, "by": by}) for one in stored.masks)
    manifest.write(run, replace(stored, masks=masks))
    return run
