"""Check a run folder: digests, checksums, footers, counts and alignment. Reports problems, repairs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate import card, manifest, shards
from alphatoken_curate.atomic import TEMPORARY, digest
from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.manifest import File, Generation, Manifest, Mask
from alphatoken_curate.schema import IGNORE_INDEX, SIGNALS, STATUSES, TRAIN, VALUES
from alphatoken_curate.shards import Shard, entries

AGAIN = "delete it and run the command that made it again"
_FOLDERS = ("values", "train", "artifacts")
_MEAN = 1e-4
"""How far the mean of float32 loss weights may be from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """`file` relative to the run, what was `found` there and what to `do`."""

    file: str
    found: str
    do: str


@dataclass(slots=True, kw_only=True)
class _Total:
    """What the shards of a generation or mask hold, added up as they are read."""

    rows: int = 0
    tokens: int = 0
    response: int = 0
    kept: int = 0
    weight: float = 0.0


def verify(run: str | Path) -> list[Problem]:
    """Every problem of a run folder, file by file; an empty list means that all of it is as it was written.

    A file whose digest is not the manifest's is not read further. Where the manifest is damaged the shards on disk are
    checked by their own footers. Raises nothing for damage.
    """
    folder = Path(run)
    problems: list[Problem] = []
    try:
        stored = manifest.read(folder)
    except StoredDataError as error:
        problems.append(Problem(file=manifest.NAME, found=str(error), do="run the same command again to make it anew"))
        try:
            stored = manifest.rebuild(folder)
        except StoredDataError as also:
            return [*problems, *_each_alone(folder, also), *_strangers(folder, None)]
    problems += _digests(folder, stored)
    if not problems:
        problems += _against_footers(folder, stored)
    broken = {problem.file for problem in problems}
    for generation in stored.generations:
        problems += _generation(folder, stored, generation, broken)
    for mask in stored.masks:
        problems += _mask(folder, stored, mask, broken)
    return [*problems, *_card(folder, stored), *_strangers(folder, stored)]


# ------------------------------------------------------------------------------------------------- files as a whole


def _digests(run: Path, stored: Manifest) -> Iterator[Problem]:
    for file in _named(stored):
        try:
            found = digest(run / file.path)
        except StoredDataError as error:
            yield Problem(file=file.path, found=str(error), do="restore it, or run the command that made it again")
            continue
        if found != (file.bytes, file.sha256):
            have = f"{found[0]} bytes, sha256 {found[1]}"
            yield Problem(file=file.path, found=f"{have}; written {file.bytes} bytes, {file.sha256}", do=AGAIN)


def _named(stored: Manifest) -> list[File]:
    """All files that the manifest names."""
    groups: list[Generation | Mask] = [*stored.generations, *stored.masks]
    shards = [shard for group in groups for shard in group.shards]
    return [*stored.files, *(File(path=one.path, bytes=one.bytes, sha256=one.sha256) for one in shards)]


def _against_footers(run: Path, stored: Manifest) -> Iterator[Problem]:
    """What the manifest says of runs and masks is also in the footers: a changed manifest shows against them."""
    try:
        told = manifest.rebuild(run)
    except StoredDataError:
        return  # the shard that prevents it is reported for itself
    for name in ("schema_version", "inputs", "digests", "settings", "versions", "counts", "generations", "masks"):
        if getattr(told, name) != getattr(stored, name):
            do = "delete manifest.json and run the same command again"
            yield Problem(file=manifest.NAME, found=f"its `{name}` are not what the shards say", do=do)


def _each_alone(run: Path, reason: StoredDataError) -> Iterator[Problem]:
    """No manifest and none to be made: each shard by its own footer and checksums."""
    yield Problem(file=".", found=str(reason), do="run the same command again to make what is missing")
    for pattern, schema in (("values/generation=*/part-*.parquet", VALUES), ("train/mask=*/part-*.parquet", TRAIN)):
        for path in sorted(run.glob(pattern)):
            try:
                shards.read(path, schema)
            except StoredDataError as error:
                yield Problem(file=path.relative_to(run).as_posix(), found=str(error), do=AGAIN)


def _card(run: Path, stored: Manifest) -> Iterator[Problem]:
    if not card.is_current(run, stored):
        found = "missing, or its configs are not those of the newest generation and mask"
        yield Problem(file=card.NAME, found=found, do="run the command that made the newest mask again")


def _strangers(run: Path, stored: Manifest | None) -> Iterator[Problem]:
    """Temp files anywhere; and below values/, train/ and artifacts/ whatever the manifest does not name."""
    named = set() if stored is None else {file.path for file in _named(stored)}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if TEMPORARY.fullmatch(path.name):
            do = "delete it, or run the same command again, which does"
            yield Problem(file=name.as_posix(), found="left behind by a writer that was stopped", do=do)
        elif stored is not None and name.parts[0] in _FOLDERS and not path.is_dir() and name.as_posix() not in named:
            do = "finish it by the command that began it, or move it out of the run"
            yield Problem(file=name.as_posix(), found="not named by the manifest", do=do)


# ----------------------------------------------------------------------------------------------- what the files hold


def _generation(run: Path, stored: Manifest, generation: Generation, broken: set[str]) -> Iterator[Problem]:
    total, status, whole = _Total(), Counter[str](), True
    for shard in generation.shards:
        table, problem = _table(run, shard, VALUES, generation.fingerprint, broken)
        if table is None:
            whole = False
            total.rows += shard.rows
            yield from problem
            continue
        yield from (Problem(file=shard.path, found=found, do=AGAIN) for found in _values(table, shard, total))
        status.update(table["status"].to_pylist())
    newest = generation is stored.generations[-1]
    if whole and newest:
        counts = stored.counts
        have = {"read": total.rows, **{name: status[name] for name in STATUSES}}
        have |= {"tokens": total.tokens, "response_tokens": total.response}
        for name, number in have.items():
            if getattr(counts, name) != number:
                found = f"counts {getattr(counts, name)} {name}, the shards hold {number}"
                yield Problem(file=manifest.NAME, found=found, do="delete it and run the same command again")
    if newest and stored.counts.read != sum(getattr(stored.counts, name) for name in STATUSES):
        found = "rows read are not scored + target + failed + rejected"
        yield Problem(file=manifest.NAME, found=found, do="delete it and run the same command again")


def _table(
    run: Path, shard: Shard, schema: pa.Schema, mark: str, broken: set[str]
) -> tuple[pa.Table | None, list[Problem]]:
    if shard.path in broken:
        return None, []
    path = run / shard.path
    try:
        table, footer = shards.read(path, schema), shards.read_footer(path)
    except StoredDataError as error:
        return None, [Problem(file=shard.path, found=str(error), do=AGAIN)]
    if footer.fingerprint != mark:
        return None, [Problem(file=shard.path, found=f"fingerprint {footer.fingerprint}, not {mark}", do=AGAIN)]
    return table, []


def _values(table: pa.Table, shard: Shard, total: _Total) -> Iterator[str]:
    """What is wrong with a values shard, whose first row id is `total.rows`."""
    ids = table["row_id"].to_numpy()
    if not np.array_equal(ids, np.arange(total.rows, total.rows + len(ids))):
        yield f"row ids do not go on one by one from {total.rows}"
    status = np.array(table["status"].to_pylist(), dtype=object)
    if unknown := set(status) - set(STATUSES):
        yield f"status {sorted(unknown)[0]!r} is none of {', '.join(STATUSES)}"
    response, lengths = entries(table["response"])
    if not np.array_equal(entries(table["input_ids"])[1], lengths):
        yield "`response` is not as long as `input_ids`"
    starts = np.cumsum(lengths) - lengths
    if response[starts[lengths > 0]].any():
        yield "`response` is true at index 0"
    if (len(ids), len(response), int(response.sum())) != (shard.rows, shard.tokens, shard.response_tokens):
        yield f"{len(ids)} rows, {len(response)} tokens, {int(response.sum())} in responses: not as in the manifest"
    scored = status == "scored"
    off = ~response[np.repeat(scored, lengths)]
    for name in SIGNALS:
        yield from _signal(table, name, np.where(scored, lengths, 0), off, optional=name == "reference_nll")
    total.rows += len(ids)
    total.tokens += len(response)
    total.response += int(response.sum())


def _signal(
    table: pa.Table, name: str, lengths: NDArray[np.int64], off: NDArray[np.bool_], *, optional: bool
) -> Iterator[str]:
    signal, found = entries(table[name])
    if not np.array_equal(found, lengths):
        yield f"`{name}` is not as long as `input_ids` for scored rows and empty for the others"
        return
    null = pc.is_null(pc.list_flatten(table[name])).to_numpy()
    if not np.array_equal(null, off) and not (optional and null.all()):
        yield f"`{name}` is not null exactly off the response"
    elif not np.isfinite(signal[~null]).all():
        yield f"`{name}` is not finite everywhere on the response"


def _mask(run: Path, stored: Manifest, mask: Mask, broken: set[str]) -> Iterator[Problem]:
    generation = {one.generation: one for one in stored.generations}.get(
        mask.generations[-1] if mask.generations else -1
    )
    if generation is None or len(generation.shards) != len(mask.shards):
        found = f"mask {mask.mask} is not made from a generation of the run"
        yield Problem(file=manifest.NAME, found=found, do="delete it and run the same command again")
        return
    total, whole = _Total(), True
    for shard, source in zip(mask.shards, generation.shards, strict=True):
        table, problem = _table(run, shard, TRAIN, mask.fingerprint, broken)
        values, _ = _table(run, source, VALUES, generation.fingerprint, broken)
        yield from problem
        if table is None or values is None:
            whole = False
            continue
        scored = values.filter(pc.equal(values["status"], "scored"))
        yield from (Problem(file=shard.path, found=found, do=AGAIN) for found in _train(table, scored, shard, total))
    if not whole:
        return
    folder = f"train/mask={mask.mask:04d}"
    if (total.kept, total.response) != (mask.kept_tokens, mask.response_tokens):
        found = f"{total.kept} of {total.response} tokens kept, not {mask.kept_tokens} of {mask.response_tokens}"
        yield Problem(file=folder, found=found, do=AGAIN)
    if total.kept and abs(total.weight / total.kept - 1) > _MEAN:
        yield Problem(file=folder, found=f"mean loss weight {total.weight / total.kept}, not 1", do=AGAIN)


def _train(table: pa.Table, scored: pa.Table, shard: Shard, total: _Total) -> Iterator[str]:
    """What is wrong with a train shard, beside the scored rows of its values shard."""
    if not table["row_id"].equals(scored["row_id"]) or not table["input_ids"].equals(scored["input_ids"]):
        yield "its rows are not the scored rows of the values shard"
        return
    ids, lengths = entries(table["input_ids"])
    columns = {name: entries(table[name]) for name in TRAIN.names if name not in ("row_id", "input_ids")}
    for name, (_, found) in columns.items():
        if not np.array_equal(found, lengths):
            yield f"`{name}` is not as long as `input_ids`"
            return
    flat = {name: found for name, (found, _) in columns.items()}
    response, found_lengths = entries(scored["response"])
    if not np.array_equal(found_lengths, lengths):
        return  # reported for the values shard
    weight = flat["loss_weight"]
    trains = weight > 0
    rules = {
        "`attention_mask` is not 1 everywhere": flat["attention_mask"] == 1,
        "`loss_weight` is not finite and >= 0 everywhere": np.isfinite(weight) & (weight >= 0),
        "`loss_weight` is above 0 off the response": response | ~trains,
        "`loss_mask` is not 1 exactly where `loss_weight` > 0": flat["loss_mask"] == trains,
        "`labels` are not the tokens where `loss_weight` > 0 and -100 elsewhere": (
            flat["labels"] == np.where(trains, ids, IGNORE_INDEX)
        ),
    }
    yield from (found for found, holds in rules.items() if not holds.all())
    yield from _signal(table, "value", lengths, ~response, optional=False)
    if (table.num_rows, len(ids), int(response.sum())) != (shard.rows, shard.tokens, shard.response_tokens):
        yield f"{table.num_rows} rows, {len(ids)} tokens: not as the manifest has it"
    total.kept += int(trains.sum())
    total.response += int(response.sum())
    total.weight += float(weight[trains].sum(dtype=np.float64))
