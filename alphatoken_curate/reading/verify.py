"""Check a run folder: digests, checksums, footers, counts and alignment. Reports problems, repairs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.reading import rules
from alphatoken_curate.runs import card, manifest, sealed, shards
from alphatoken_curate.runs.atomic import TEMPORARY, digest
from alphatoken_curate.runs.manifest import File, Generation, Manifest, Mask
from alphatoken_curate.runs.schema import LAYOUTS, SFT, STATUSES, Components, Layout
from alphatoken_curate.runs.shards import Shard
from alphatoken_curate.wording import count

AGAIN = "delete it and run the command that made it again"
_MANIFEST_AGAIN = "delete it and run the `score` command that began the run again"
_WITHOUT = "delete manifest.json and run the `score` command that began the run again, which goes on without it"
_FOLDERS = ("values", "train", "artifacts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """`file` relative to the run, what was `found` there and what to `do`."""

    file: str
    found: str
    do: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run folder, what is said of it, its columns and signals, and the files that are `broken` and not read again."""

    folder: Path
    stored: Manifest
    layout: Layout
    components: Components
    broken: set[str] = field(default_factory=set)


def verify(run: str | Path) -> list[Problem]:
    """Every problem of a run folder, file by file; an empty list means that all of it is as it was written.

    A file whose digest is not the manifest's is not read further. Where the manifest is damaged the shards on disk are
    checked by their own footers. Raises nothing for damage, and `UsageError` for what is no run folder.
    """
    folder = Path(run)
    problems: list[Problem] = []
    try:
        stored = manifest.read(folder)
        layout, components = manifest.layout(stored), manifest.components(stored)
    except StoredDataError as error:
        found, _, do = str(error).removeprefix(f"{folder / manifest.NAME}: ").rpartition("; ")
        problems.append(Problem(file=manifest.NAME, found=found, do=do))
        try:
            stored = manifest.rebuild(folder)
            layout, components = manifest.layout(stored), manifest.components(stored)
        except StoredDataError as also:
            return [*problems, *_each_alone(folder, also), *_strangers(folder, None)]
    problems += _digests(folder, stored)
    if not problems:
        problems += _against_footers(folder, stored)
    broken = {problem.file for problem in problems}
    about = _Run(folder=folder, stored=stored, layout=layout, components=components, broken=broken)
    for generation in stored.generations:
        problems += _generation(about, generation)
    for mask in stored.masks:
        problems += _mask(about, mask)
    return [*problems, *_card(folder, stored), *_strangers(folder, stored)]


# ------------------------------------------------------------------------------------------------- files as a whole


def _digests(run: Path, stored: Manifest) -> Iterator[Problem]:
    for file in _named(stored):
        missing, damaged = _repairs(file.path)
        try:
            size, sha256 = digest(run / file.path)
        except StoredDataError as error:
            found = str(error).removeprefix(f"{run / file.path}: ").partition(";")[0]
            yield Problem(file=file.path, found=found, do=missing)
            continue
        if (size, sha256) != (file.bytes, file.sha256):
            have = f"{size} bytes, sha256 {sha256}"
            found = f"{have}; written {file.bytes} bytes, {file.sha256}"
            yield Problem(file=file.path, found=found, do=damaged)


def _repairs(path: str) -> tuple[str, str]:
    """What to do where a file is missing, and where it is damaged. No finished run makes again what it is made from."""
    if path.endswith(".safetensors"):
        return f"restore it, or {_WITHOUT}", f"delete it; then {_WITHOUT}"
    return "restore it, or run the command that wrote it again", AGAIN


def _named(stored: Manifest) -> list[File]:
    """All files that the manifest names."""
    return [*stored.files, *(File(path=one.path, bytes=one.bytes, sha256=one.sha256) for one in _shards(stored))]


def _shards(stored: Manifest) -> list[Shard]:
    groups: list[Generation | Mask] = [*stored.generations, *stored.masks]
    return [shard for group in groups for shard in group.shards]


def _against_footers(run: Path, stored: Manifest) -> Iterator[Problem]:
    """What the manifest says of runs and masks is also in the footers: a changed manifest shows against them.

    What it does not name, a command that was stopped left: `_strangers` speaks of that.
    """
    try:
        told = manifest.rebuild(run, only={(run / shard.path).parent for shard in _shards(stored)})
    except StoredDataError:
        return  # the shard that prevents it is reported for itself
    for name in ("schema_version", "inputs", "digests", "settings", "versions", "counts", "generations", "masks"):
        if getattr(told, name) != getattr(stored, name):
            yield Problem(file=manifest.NAME, found=f"its `{name}` are not what the shards say", do=_MANIFEST_AGAIN)


def _each_alone(run: Path, reason: StoredDataError) -> Iterator[Problem]:
    """No manifest and none to be made: each shard by its own footer and checksums."""
    yield Problem(file=".", found=str(reason), do="run the `score` command of the run again to make what is missing")
    for folder in ("values/generation=*", "train/mask=*"):
        for path in sorted(run.glob(f"{folder}/part-*.parquet")):
            try:
                layout = sealed.opened(path, lambda file: _layout_of(file.schema_arrow))
                shards.read(path, layout.values if folder.startswith("values") else layout.train)
            except StoredDataError as error:
                yield Problem(file=path.relative_to(run).as_posix(), found=str(error), do=AGAIN)


def _layout_of(schema: pa.Schema) -> Layout:
    """The layout whose first branch the columns have; nothing else says it of a single file."""
    return next((one for one in LAYOUTS.values() if f"{one.branches[0]}input_ids" in schema.names), SFT)


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
            do = "delete it, or run the command that was stopped again, which does"
            yield Problem(file=name.as_posix(), found="left behind by a writer that was stopped", do=do)
        elif stored is not None and name.parts[0] in _FOLDERS and not path.is_dir() and name.as_posix() not in named:
            first = "" if _is_passed(stored, name) else "finish it by the command that began it, or "
            yield Problem(file=name.as_posix(), found="not named by the manifest", do=f"{first}move it out of the run")


def _is_passed(stored: Manifest, name: Path) -> bool:
    """Whether a file is of a mask that a newer one came before: begun again, it gets a number of its own."""
    return bool(stored.masks) and name.parts[0] == "train" and name.parts[1] < f"mask={stored.masks[-1].mask:04d}"


# ----------------------------------------------------------------------------------------------- what the files hold


def _generation(run: _Run, generation: Generation) -> Iterator[Problem]:
    total, status, whole, gap = rules.Total(), Counter[str](), True, False
    for index, shard in enumerate(generation.shards):
        table, problem = _table(run, shard, run.layout.values, generation.fingerprint)
        if table is None:
            whole, gap = False, True
            yield from problem
            continue
        if gap and len(table):  # how many rows the lost one had, nothing says for sure: a row may be several sequences
            total.read, gap = max(total.read, table["row_id"][0].as_py()), False
        beta = run.stored.settings.get("beta")
        found = list(rules.values(table, run.layout, run.components, shard, total, beta=beta))
        found += _other_rows(run, generation, index, table)
        yield from (Problem(file=shard.path, found=what, do=AGAIN) for what in found)
        status.update(shards.rows_by_status(*(table[name].to_pylist() for name in ("row_id", "status"))))
    if generation is run.stored.generations[-1]:
        yield from _wrong_counts(run.stored, total, status if whole else None)


def _wrong_counts(stored: Manifest, total: rules.Total, status: Counter[str] | None) -> Iterator[Problem]:
    """Where the manifest's counts differ from those of the newest generation, if all of it was read."""
    counts, do = stored.counts, _MANIFEST_AGAIN
    have: dict[str, int] = {}
    if status is not None:
        have = {"read": total.read, "tokens": total.tokens, "response_tokens": total.response}
        have |= {name: status[name] for name in STATUSES}
    for name, number in have.items():
        if getattr(counts, name) != number:
            found = f"counts {getattr(counts, name)} {name}, the shards hold {number}"
            yield Problem(file=manifest.NAME, found=found, do=do)
    if counts.read != sum(getattr(counts, name) for name in STATUSES):
        yield Problem(file=manifest.NAME, found="rows read are not scored + target + failed + rejected", do=do)


def _other_rows(run: _Run, generation: Generation, index: int, table: pa.Table) -> Iterator[str]:
    first = run.stored.generations[0]
    if index >= len(first.shards):
        yield f"the first generation has {count(len(first.shards), 'shard')}, and none for these rows"
    elif generation is not first:
        rows, _ = _table(run, first.shards[index], run.layout.values, first.fingerprint)
        yield from () if rows is None else rules.other_rows(table, rows, run.layout)


def _table(run: _Run, shard: Shard, schema: pa.Schema, mark: str) -> tuple[pa.Table | None, list[Problem]]:
    if shard.path in run.broken:
        return None, []
    path = run.folder / shard.path
    try:
        table, footer = shards.read(path, schema), shards.read_footer(path)
    except StoredDataError as error:
        return None, [Problem(file=shard.path, found=str(error), do=AGAIN)]
    if footer.fingerprint != mark:
        return None, [Problem(file=shard.path, found=f"fingerprint {footer.fingerprint}, not {mark}", do=AGAIN)]
    return table, []


def _mask(run: _Run, mask: Mask) -> Iterator[Problem]:
    sources = [one for one in run.stored.generations if one.generation in mask.generations]
    totals, whole = [rules.Total() for _ in run.layout.branches], True
    for index, shard in enumerate(mask.shards):
        table, problem = _table(run, shard, run.layout.train, mask.fingerprint)
        yield from problem
        values = [_table(run, one.shards[index], run.layout.values, one.fingerprint)[0] for one in sources]
        scored = rules.scored_in_all(values)
        if table is None or scored is None:
            whole = False
            continue
        found = rules.train(table, scored, shard, run.layout, totals)
        yield from (Problem(file=shard.path, found=what, do=AGAIN) for what in found)
    if whole:
        folder = f"train/mask={mask.mask:04d}"
        yield from (Problem(file=folder, found=what, do=AGAIN) for what in rules.sums(mask, run.layout, totals))
