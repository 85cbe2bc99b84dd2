"""manifest.json: what a finished run holds. Written last and atomically; it can be built again from the shards.

It names every file of the run except itself and the card, with size and sha256, and holds no time, process id or
absolute path: the same inputs and settings give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.runs import shards
from alphatoken_curate.runs.atomic import atomic_file, digest, kill_point
from alphatoken_curate.runs.documents import LATER, Unreadable, decode, sealed, unsealed
from alphatoken_curate.runs.fingerprint import Json, differing
from alphatoken_curate.runs.folder import MANIFEST, check_is_run
from alphatoken_curate.runs.schema import BY_ESTIMATOR, LAYOUTS, STATUSES, VERSIONS, Components, Layout
from alphatoken_curate.runs.shards import Footer, Shard
from alphatoken_curate.runs.train_shards import MaskFacts
from alphatoken_curate.wording import count

NAME = MANIFEST

T = TypeVar("T")
_MAX_BYTES = 64 << 20
_FILE = re.compile(r"config\.yaml|rejects\.jsonl|artifacts/[A-Za-z0-9_-][A-Za-z0-9._-]*")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A file of rows, bad ones counted: `digest` is `sha256:` and 64 hex digits of its bytes as stored."""

    source: str
    digest: str
    bytes: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the run that is no shard: config.yaml, rejects.jsonl or one under artifacts/."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a shard was run: padded tokens per batch, and how often memory ran out and halved them."""

    batch_tokens: int
    halvings: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Of the newest generation: rows read == scored + target + failed + rejected; `sequences` of the scored ones.

    None in runs of before. Tokens are those stored in values/, of every status, turn and branch.
    """

    read: int
    scored: int
    target: int
    failed: int
    rejected: int
    tokens: int
    response_tokens: int
    truncated_rows: int
    truncated_tokens: int
    sequences: int | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One scoring of all rows at one checkpoint; `plan` has an entry per shard."""

    generation: int
    fingerprint: str
    checkpoint: str
    plan: tuple[Plan, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """One mask made from `generations`, which ascend; tokens are those of the rows scored in each of them.

    `end_of_turn_tokens`: those that end an answer, and of them kept; None where values/ does not say it. `over_share`:
    by how many the tokens that are always kept exceed the share by themselves.
    """

    mask: int
    generations: tuple[int, ...]
    fingerprint: str
    settings: Mapping[str, Json]
    shards: tuple[Shard, ...]
    kept_tokens: int
    response_tokens: int
    rows_given_back: int
    end_of_turn_tokens: int | None = field(default=None, metadata=LATER)
    end_of_turn_kept: int | None = field(default=None, metadata=LATER)
    over_share: int | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of manifest.json; `told`: how many rows are not as they were given, by what became of them."""

    schema_version: int
    inputs: tuple[Input, ...]
    digests: Mapping[str, str | None]
    settings: Mapping[str, Json]
    versions: Mapping[str, str]
    counts: Counts
    files: tuple[File, ...]
    generations: tuple[Generation, ...]
    masks: tuple[Mask, ...]
    told: Mapping[str, int] = field(default_factory=dict, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a values shard's footer tells along, so that the manifest can be built from the shards (`as_json`).

    The first shard of the newest generation speaks for the run; `plan` and what was truncated are each shard's own.
    """

    inputs: tuple[Input, ...]
    digests: Mapping[str, str | None]
    settings: Mapping[str, Json]
    versions: Mapping[str, str]
    checkpoint: str
    plan: Plan
    truncated_rows: int = 0
    truncated_tokens: int = 0
    told: Mapping[str, int] = field(default_factory=dict, metadata=LATER)

    def as_json(self) -> dict[str, Json]:
        """For `Footer.facts`."""
        return asdict(self)


def write(run: Path, manifest: Manifest) -> None:
    """Commit manifest.json. Raises `CurateError` where the disk refuses."""
    kill_point("before-manifest")
    with atomic_file(run / NAME) as sink:
        sink.write(encode(manifest))
    kill_point("after-manifest")


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: a sealed document. What a mask cannot tell is left out."""
    document = asdict(manifest)
    document["masks"] = [{key: told for key, told in one.items() if told is not None} for one in document["masks"]]
    return sealed(document)


def read(run: Path) -> Manifest:
    """manifest.json, read strictly, of any schema version there ever was.

    Raises `UsageError` for what is no run folder, `StoredDataError` for anything that is not exactly a manifest.
    """
    check_is_run(run)
    try:
        return _read(run / NAME)
    except Unreadable as error:
        do = "run the `score`, `refresh` or `mask` command that came last again: it is made anew from the shards"
        raise StoredDataError(f"{run / NAME}: damaged ({error}); {do}") from error


def mend(run: Path) -> str | None:
    """Make a damaged manifest anew from the shards; returns what was found, None where there is no damage.

    Callers hold the run. Raises `StoredDataError` where the shards do not make one, or another release wrote it.
    """
    path = run / NAME
    if not path.is_file():
        return None
    try:
        _read(path)
    except Unreadable as error:
        try:
            write(run, rebuild(run))
        except StoredDataError as also:
            raise StoredDataError(f"{path}: damaged ({error}), and not made anew: {also}; or delete it first") from also
        return f"{path} was damaged ({error}): it is made anew from the shards."
    return None


def _read(path: Path) -> Manifest:
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise Unreadable(f"{size} bytes; a manifest has at most {_MAX_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoredDataError(f"{path}: missing: no finished run; run the `score` command that makes it") from error
    except OSError as error:
        raise StoredDataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    return decoded(data, path)


def decoded(data: bytes, where: Path | str) -> Manifest:
    """A manifest from its bytes. Raises `Unreadable`, or `StoredDataError` for a schema version that is not known."""
    document = unsealed(data)
    version = document.get("schema_version")
    if type(version) is int and version not in VERSIONS:
        known = f"this release reads {', '.join(map(str, VERSIONS))}: use the one that wrote it"
        raise StoredDataError(f"{where}: schema version {version}; {known}")
    manifest = decode(Manifest, document)
    for what in _contradictions(manifest):
        raise Unreadable(what)
    return manifest


def layout(stored: Manifest) -> Layout:
    """The columns of the run: those of its kind of rows. Raises `StoredDataError` where it is none that is known."""
    return _of_setting(stored, "kind", LAYOUTS).along(stored.settings.get("direction"))


def components(stored: Manifest) -> Components:
    """The signals of the run: those of its estimator. Raises `StoredDataError` where it is none that is known."""
    return _of_setting(stored, "estimator", BY_ESTIMATOR)


def _of_setting(stored: Manifest, name: str, known: Mapping[str, T]) -> T:
    found = stored.settings.get(name)
    if isinstance(found, str) and found in known:
        return known[found]
    odd = f"its settings have {name} {str(found)[:80]!r}, not {' or '.join(known)}"
    raise StoredDataError(f"{NAME}: damaged ({odd}); delete it and run the `score` command of the run again")


def _contradictions(manifest: Manifest) -> Iterator[str]:
    folders = [f"values/generation={g.generation}/" for g in manifest.generations]
    folders += [f"train/mask={m.mask:04d}/" for m in manifest.masks]
    groups: list[Generation | Mask] = [*manifest.generations, *manifest.masks]
    for folder, group in zip(folders, groups, strict=True):
        expected = [folder + shards.shard_name(i) for i in range(len(group.shards))]
        if [shard.path for shard in group.shards] != expected:
            yield f"the shards of {folder} are not part-00000.parquet and so on, one by one"
    yield from _wrong_numbers(manifest)
    paths = [file.path for file in manifest.files]
    if paths != sorted(set(paths)) or not all(_FILE.fullmatch(path) for path in paths):
        yield "its `files` are not those of a run, sorted, each once"
    hashes = [file.sha256 for file in manifest.files] + [shard.sha256 for group in groups for shard in group.shards]
    if not all(_HEX.fullmatch(sha256) for sha256 in hashes):
        yield "a sha256 is not 64 hex digits"


def _wrong_numbers(manifest: Manifest) -> Iterator[str]:
    lengths = {generation.generation: len(generation.shards) for generation in manifest.generations}
    for generation in manifest.generations:
        if len(generation.plan) != len(generation.shards):
            yield f"generation {generation.generation} has {count(len(generation.plan), 'plan')}"
    for mask in manifest.masks:
        if not _is_whole(mask, lengths):
            named = ", ".join(map(str, mask.generations)) or "none"
            has = f"{count(len(mask.shards), 'shard')} of generations {named}"
            yield f"mask {mask.mask} has {has}; the run has {lengths}"
    numbered = {"generation": [g.generation for g in manifest.generations], "mask": [m.mask for m in manifest.masks]}
    for name, numbers in numbered.items():
        if numbers != sorted(set(numbers)):
            yield f"the {name} numbers {numbers} do not ascend"


def _is_whole(mask: Mask, lengths: Mapping[int, int]) -> bool:
    """Whether its generations ascend and each has as many shards as it; `lengths`: shards of each that there is."""
    ascend = list(mask.generations) == sorted(set(mask.generations))
    return ascend and {lengths.get(number) for number in mask.generations} == {len(mask.shards)}


def rebuild(run: Path, known: Mapping[str, Shard] = {}, only: Collection[Path] | None = None) -> Manifest:
    """The manifest that the files on disk make. A run ends by writing it; a lost one comes back the same.

    Generations and masks that were begun and not finished are left out. Raises `StoredDataError` where no generation
    is whole, or a shard is damaged or of other settings than those beside it. `known`: as `facts_of`; `only`: folders.
    """
    generations: list[Generation] = []
    newest: tuple[int, Facts, Counts] | None = None
    for number, folder in _numbered(run / "values", r"generation=(0|[1-9][0-9]*)", only):
        group = _group(folder, known)
        told = [_facts_in(Facts, folder, footer) for footer, _ in group]
        counts = added_up([footer.counts for footer, _ in group], told)
        if group and counts.read == sum(item.rows for item in told[0].inputs):
            generations.append(_generation(number, group, told))
            newest = group[0][0].version, told[0], counts
    if newest is None:
        raise StoredDataError(f"{run}: holds no finished values; run the `score` command that makes them")
    version, first, counts = newest
    return Manifest(
        schema_version=version,
        inputs=first.inputs,
        digests=first.digests,
        settings=first.settings,
        versions=first.versions,
        counts=counts,
        files=tuple(_files(run)),
        generations=tuple(generations),
        masks=tuple(_masks(run, {g.generation: len(g.shards) for g in generations}, known, only)),
        told=first.told,
    )


def file_of(run: Path, path: str) -> File:
    """Size and sha256 of a file, named relative to its run. Raises `StoredDataError` where it cannot be read."""
    size, sha256 = digest(run / path)
    return File(path=path, bytes=size, sha256=sha256)


def check_file(run: Path, stored: Manifest, path: str) -> None:
    """Raise `StoredDataError` where a file that is no shard is not the one that the manifest names."""
    named = next((file for file in stored.files if file.path == path), None)
    if named is None or file_of(run, path) != named:
        raise StoredDataError(f"{run / path}: damaged: it is not the file that the manifest names; `verify` names all")


def _numbered(folder: Path, pattern: str, only: Collection[Path] | None) -> list[tuple[int, Path]]:
    found = [] if not folder.is_dir() else [(re.fullmatch(pattern, path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match and (only is None or path in only))


def _group(folder: Path, known: Mapping[str, Shard]) -> list[tuple[Footer, Shard]]:
    """All shards of a folder in order, up to the first that is missing. Raises where one is of another making."""
    paths = shards.listed(folder)
    whole = [paths[i] for i in range(len(paths)) if i in paths]
    group = [shards.facts_of(path, known) for path in whole]
    for path, (footer, _) in zip(whole, group, strict=True):
        if names := differing(group[0][0].fields, footer.fields):
            raise StoredDataError(f"{path}: made with other {', '.join(names)} than the first shard beside it")
    return group


def _facts_in(kind: type[T], folder: Path, footer: Footer) -> T:
    try:
        return decode(kind, dict(footer.facts))
    except Unreadable as error:
        raise StoredDataError(f"{folder}: the facts in a shard's footer cannot be read ({error})") from error


def _generation(number: int, group: list[tuple[Footer, Shard]], told: list[Facts]) -> Generation:
    return Generation(
        generation=number,
        fingerprint=group[0][0].fingerprint,
        checkpoint=told[0].checkpoint,
        plan=tuple(one.plan for one in told),
        shards=tuple(shard for _, shard in group),
    )


def added_up(counts: Sequence[Mapping[str, int]], told: Sequence[Facts]) -> Counts:
    """The counts of a generation, by those of its shards."""
    total = {name: sum(one[name] for one in counts) for name in (*STATUSES, "tokens", "response_tokens")}
    return Counts(
        read=sum(one.get("read", one["rows"]) for one in counts),
        sequences=None if any("sequences" not in one for one in counts) else sum(one["sequences"] for one in counts),
        truncated_rows=sum(one.truncated_rows for one in told),
        truncated_tokens=sum(one.truncated_tokens for one in told),
        **total,
    )


def _files(run: Path) -> list[File]:
    found = [*run.iterdir(), *((run / "artifacts").iterdir() if (run / "artifacts").is_dir() else ())]
    names = sorted(path.relative_to(run).as_posix() for path in found if path.is_file())
    return [file_of(run, name) for name in names if _FILE.fullmatch(name)]


def _masks(
    run: Path, lengths: Mapping[int, int], known: Mapping[str, Shard], only: Collection[Path] | None
) -> Iterator[Mask]:
    for number, folder in _numbered(run / "train", r"mask=([0-9]{4}|[1-9][0-9]{4,})", only):
        if (group := _group(folder, known)) and _is_whole(mask := mask_of(number, folder, group), lengths):
            yield mask


def mask_of(number: int, folder: Path, group: Sequence[tuple[Footer, Shard]]) -> Mask:
    """The manifest's entry of a mask, from its shards. Raises `StoredDataError` for footers that are no mask's."""
    footer = group[0][0]
    facts = _facts_in(MaskFacts, folder, footer)
    told = [name for name in ("end_of_turn_tokens", "end_of_turn_kept") if name in footer.counts]
    ends = {name: sum(one.counts[name] for one, _ in group) for name in told}
    return Mask(
        mask=number,
        generations=facts.generations,
        fingerprint=footer.fingerprint,
        settings=facts.settings,
        shards=tuple(shard for _, shard in group),
        kept_tokens=sum(one.counts["kept_tokens"] for one, _ in group),
        response_tokens=sum(one.counts["response_tokens"] for one, _ in group),
        rows_given_back=facts.rows_given_back,
        over_share=facts.over_share,
        **ends,
    )
