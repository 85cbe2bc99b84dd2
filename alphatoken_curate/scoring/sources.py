"""The files that a scoring reads, watched from before they are read until the last shard is committed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from alphatoken_curate.config import FISHER_MODES, ScoreConfig
from alphatoken_curate.models.load import ModelSource, digest_files, find_model, model_files, tokenizer_files
from alphatoken_curate.rows.files import find_files
from alphatoken_curate.rows.read import InputFile
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.watched import Source, Watched, digest_of_one
from alphatoken_curate.urls import expanded

_OF_FIELDS = {"model": "model", "reference": "reference", "tokenizer": "tokenizer", "chat_template": "template"}
_FISHER = "fisher"


def watch_inputs(config: ScoreConfig) -> Watched:
    """All files that `score` will read, as they are now."""
    return Watched(_inputs(config))


def of_model(source: ModelSource, what: str = "model") -> Source:
    """The files of a model."""
    return Source(what=what, files=tuple(model_files(source)), digest=digest_files)


def of_fisher(config: ScoreConfig) -> list[Source]:
    """The user's own Fisher, where there is one."""
    if config.fisher in FISHER_MODES:
        return []
    return [Source(what=_FISHER, files=(expanded(config.fisher),), digest=digest_of_one)]


def digests_of(fields: Mapping[str, Json], files: Sequence[InputFile] = ()) -> dict[str, str]:
    """What each source was fingerprinted as: by the fields of a run, and by the files of rows as they were read."""
    found = {what: str(fields[name]) for name, what in _OF_FIELDS.items() if fields.get(name)}
    return {**found, _FISHER: str(fields[_FISHER]), **{_rows(file.path): file.digest for file in files}}


def _inputs(config: ScoreConfig) -> Iterator[Source]:
    model = find_model(config.model)
    yield of_model(model)
    yield Source(what="tokenizer", files=tuple(tokenizer_files(model)), digest=digest_files)
    if config.reference not in (None, config.model):
        yield of_model(find_model(str(config.reference)), "reference")
    yield from of_fisher(config)
    if config.chat_template is not None:
        path = expanded(config.chat_template)
        yield Source(what=_OF_FIELDS["chat_template"], files=(path,), digest=digest_of_one)
    beside = [find_files([one]) for one in (config.target, config.retention, config.fisher_prompts) if one]
    for file in chain(find_files(config.data, config.subset, config.split), *beside):
        if file.is_local:  # objects of stores are looked at while they are read, and not later
            yield Source(what=_rows(file.path), files=(Path(file.path),), digest=digest_of_one)


def _rows(path: str) -> str:
    return f"rows {path}"
