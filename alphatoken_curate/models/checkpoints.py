"""Checkpoints of a training: which are there, whether each is whole, and which are new.

What is relied on, as transformers 5.23 writes a `checkpoint-<step>` (`Trainer._save_checkpoint`):
* a whole model: config.json, then each safetensors file, then (sharded) model.safetensors.index.json;
* an adapter: adapter_model.safetensors, then adapter_config.json;
* then the tokenizer, training_args.bin, optimizer, scheduler and random states, and trainer_state.json last of all,
  with `save_only_model` too. Old checkpoints are deleted after that (`save_total_limit`), file by file.
safetensors 0.8 writes to `.tmp*` in the same folder and renames; earlier ones write in place, the header first.
Nothing else is taken for granted: a folder that another tool writes or copies is told to be whole by its own files, and
to be at rest by two looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    is_adapter,
    json_object,
    model_weights,
    pickled,
    refuse_pickles,
)
from alphatoken_curate.models.formats import unfinished
from alphatoken_curate.models.load import NO_PICKLES, ModelSource, digest_files, find_model
from alphatoken_curate.models.tensors import header_problems
from alphatoken_curate.urls import FILE_ADVICE, check_local, expanded
from alphatoken_curate.wording import count

Signature: TypeAlias = tuple[tuple[str, int, int], ...]
"""(name, size in bytes, time of the last change in ns) of each file of a folder, by name."""

_STEP = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")
_LAST_WRITTEN = "trainer_state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A whole model or an adapter that training saved; `step` is None where the folder's name does not tell it."""

    name: str
    step: int | None
    source: ModelSource


def find_checkpoints(path: str | Path, *, base: ModelSource | None) -> list[Checkpoint]:
    """The checkpoints at `path`: a model, an adapter of `base` (None: what it names), or a Trainer's output folder.

    Those of an output folder come in the order of their steps; the model that the folder holds itself comes last,
    unless its weights are those of the last step. Raises ModelError where there is none, where one is half-written
    (all such are named) or is an adapter of another model than `base`.
    """
    check_local(path, FILE_ADVICE)
    folder = expanded(path)
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise ModelError(
                f"{path}: it is a file. A checkpoint is a folder that a training saved, or a .gguf file; {NO_PICKLES}"
            )
        return [Checkpoint(name=folder.stem, step=None, source=find_model(str(folder)))]
    if not folder.is_dir():
        raise ModelError(f"{path}: no such folder. A checkpoint is a folder that a training saved, or a .gguf file.")
    steps = _steps(folder)
    own = bool(model_weights(folder)) or (folder / ADAPTER_WEIGHTS).is_file()
    if not own and not steps:
        _refuse_empty(folder)
    folders = [*steps.values(), *([folder] if own or not steps else [])]
    _refuse_half(folders)
    found = [_checkpoint(one, base) for one in folders]
    if own and steps and _weights_digest(found[-1].source) == _weights_digest(found[-2].source):
        found.pop()
    return found


def _steps(folder: Path) -> dict[int, Path]:
    """The `checkpoint-<step>` folders in a folder, by step; none where there is no folder yet."""
    try:
        named = [(_STEP.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return {}
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def _checkpoint(folder: Path, base: ModelSource | None) -> Checkpoint:
    name = folder.resolve().name
    match = _STEP.fullmatch(name)
    return Checkpoint(name=name, step=int(match[1]) if match else None, source=find_model(str(folder), base=base))


def _refuse_empty(folder: Path) -> None:
    refuse_pickles(folder)
    if unfinished(folder) is None and not any((folder / one).is_file() for one in ("config.json", ADAPTER_CONFIG)):
        raise ModelError(
            f"{folder}: neither a model nor an adapter nor a checkpoint-<step> folder is in it."
            " Name a folder that save_pretrained or a Trainer wrote."
        )


def _refuse_half(folders: list[Path]) -> None:
    half = {folder: problem for folder in folders if (problem := is_complete(folder)) is not None}
    if not half:
        return
    whole = next((folder for folder in reversed(folders) if folder not in half and _STEP.fullmatch(folder.name)), None)
    if other := {folder: told for folder in half if (told := pickled(folder)) is not None}:
        first, *more = other
        also = f" {count(len(more), 'more checkpoint is', 'more checkpoints are')} like it." if more else ""
        instead = f" {whole.name} can be scored as it is." if whole is not None else ""
        raise ModelError(f"{first}: {other[first]}{also}{instead}")
    named = "; ".join(f"{folder.name}: {problem}" for folder, problem in half.items())
    instead = f", or name one that is whole ({whole})" if whole is not None else ""
    raise ModelError(f"{next(iter(half)).parent}: not written to the end: {named}. Wait until it is saved{instead}.")


def _weights_digest(source: ModelSource) -> str:
    return digest_files([source.adapter / ADAPTER_WEIGHTS] if source.adapter else source.weight_files())


def is_complete(folder: Path) -> str | None:
    """None where every file that a model or an adapter needs is there, to its last byte; else what is missing.

    Only names, sizes and headers are read. Whether anyone still writes is `Watcher`'s to tell.
    """
    try:
        return next(_problems(folder), None)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"


def _problems(folder: Path) -> Iterator[str]:
    if folder.name.startswith("tmp-checkpoint-"):
        yield "its name says that it is being written"
    state = _changed(folder / _LAST_WRITTEN)
    for path in sorted(folder.iterdir()):
        temporary = path.name.startswith(".tmp") or path.name.endswith((".tmp", ".incomplete"))
        # One that is older than the end of the save was left by a save that was killed.
        if temporary and (state is None or path.stat().st_ctime_ns > state):
            yield f"{path.name} is being written"
    adapter = is_adapter(folder)
    weights = [folder / ADAPTER_WEIGHTS] if adapter else model_weights(folder)
    if not weights or not weights[0].is_file():
        found = unfinished(folder) or pickled(folder)
        yield from [found] if found is not None else []
    yield from _config_problems(folder / (ADAPTER_CONFIG if adapter else "config.json"))
    if not weights or not weights[0].is_file():
        yield f"no {ADAPTER_WEIGHTS}" if adapter else "no *.safetensors"
    for path in weights:
        yield from header_problems(path)
    if not adapter:
        yield from _shard_problems(folder, [path.name for path in weights])


def _config_problems(path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"no {path.name}"
        return
    try:
        json_object(path)
    except ModelError:
        yield f"{path.name} is not a JSON object"


def _shard_problems(folder: Path, names: list[str]) -> Iterator[str]:
    indexes = {path.name for path in folder.glob("*.safetensors.index.json")}
    for stem, all_ in sorted({(match[1], match[3]) for match in map(_SHARD.fullmatch, names) if match}):
        wanted = {f"{stem}-{i:05}-of-{all_}.safetensors" for i in range(1, int(all_) + 1)}
        if missing := sorted(wanted - set(names)):
            yield f"no {missing[0]} ({len(missing)} of {count(len(wanted), 'file')} missing)"
        if f"{stem}.safetensors.index.json" not in indexes:
            yield f"no {stem}.safetensors.index.json"
    for name in sorted(indexes):
        if name.removesuffix(".index.json") in names:
            continue  # left by an earlier save; one file with everything goes before it
        try:
            listed = set(json_object(folder / name)["weight_map"].values())
        except (ModelError, KeyError, AttributeError, TypeError):
            yield f"{name} is not an index of weights"
            continue
        if missing := sorted(map(str, listed - set(names))):
            yield f"no {missing[0]}, which {name} lists"


def signature(folder: Path) -> Signature:
    """What tells a folder's files from what they were: a caller keeps digests by it. Folders inside do not count."""
    found = []
    for path in folder.iterdir():
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            found.append((path.name, stat.st_size, stat.st_mtime_ns))
    return tuple(sorted(found))


def _changed(path: Path) -> int | None:
    """Time in ns at which a file came to be as and where it is; unlike its mtime, a copy does not keep it."""
    try:
        return path.stat().st_ctime_ns
    except FileNotFoundError:
        return None


def _saved_to_the_end(folder: Path) -> bool:
    """Whether the Trainer has written its last file, after all that a model is made of."""
    state = _changed(folder / _LAST_WRITTEN)
    if state is None:
        return False
    made_of = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
    return all((changed := _changed(path)) is not None and changed <= state for path in made_of)


class Watcher:
    """Looks at a Trainer's output folder, which need not be there yet, for checkpoints that are whole and at rest.

    At rest: the Trainer's last file is there and is the newest, or no file changed since the look before; so let some
    seconds pass between looks. Only `checkpoint-<step>` folders count.
    """

    def __init__(self, folder: str | Path, base: ModelSource | None) -> None:
        check_local(folder, FILE_ADVICE)
        self.folder = expanded(folder)
        self.base = base
        self.waiting: dict[str, str] = {}
        """Names of the checkpoints that the last look found not ready, and why."""
        self.refused: dict[str, str] = {}
        """Names of those that no waiting makes fit to be scored, and why: adapters of another model, pickles."""
        self._seen: dict[int, Signature] = {}
        self._found: dict[tuple[int, Signature], Checkpoint] = {}

    def ready(self) -> list[Checkpoint]:
        """All that are ready now, in the order of their steps; those deleted since the last look are gone."""
        before, self._seen, self.waiting, self.refused = self._seen, {}, {}, {}
        found = [self._look(step, folder, before.get(step)) for step, folder in _steps(self.folder).items()]
        return [checkpoint for checkpoint in found if checkpoint is not None]

    def _look(self, step: int, folder: Path, before: Signature | None) -> Checkpoint | None:
        try:
            now = self._seen[step] = signature(folder)
            problem = is_complete(folder)
            if problem is None and not (before == now or _saved_to_the_end(folder)):
                problem = "its files may still change"
            if problem is None:
                # To find a base can ask the network or read it all: once for what does not change.
                found = self._found.get((step, now)) or _checkpoint(folder, self.base)
                if signature(folder) == now:
                    return self._found.setdefault((step, now), found)
                problem = "its files changed during the look"
        except (FileNotFoundError, ModelError) as error:
            if (problem := is_complete(folder)) is None:
                self.refused[folder.name] = str(error)
                return None
        if folder.is_dir():
            told = self.refused if problem == pickled(folder) else self.waiting
            told[folder.name] = problem
        return None
