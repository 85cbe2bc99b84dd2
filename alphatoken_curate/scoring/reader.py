"""Rows of files become tokens as the model of a run has them. No model is loaded here."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.models.load import (
    ModelSource,
    generation_stops,
    model_config,
    tokenizer_digest,
    vocabulary_size,
)
from alphatoken_curate.rows.columns import named_columns
from alphatoken_curate.rows.files import find_files
from alphatoken_curate.rows.read import BadRow, InputFile, Reading, Row, RowStream, kind_of
from alphatoken_curate.rows.shapes import PromptCompletion
from alphatoken_curate.runs.atomic import digest
from alphatoken_curate.runs.fingerprint import Json, differing
from alphatoken_curate.scoring.identity import tokens_are_digested
from alphatoken_curate.scoring.shelf import Found, Kept, Known, Place, Shelf, known
from alphatoken_curate.scoring.tokenising import Recipe, tokenised, tokenizer_with
from alphatoken_curate.tokens.chat import ChatSettings, Tokenizer
from alphatoken_curate.tokens.dates import TemplateDay
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, chosen, tokenise, tokenise_prompts
from alphatoken_curate.urls import expanded

_OF_TOKENS = (
    *("map", "subset", "split", "limit", "turns", "max_length", "rows_per_shard"),
    *("chat_template_kwargs", "assistant_specials", "trust_remote_code"),
)
"""Settings that tokens and their shards are made by, beside what files say."""

_VERSIONED = ("alphatoken-curate", "transformers", "tokenizers", "jinja2", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SideRows:
    """Rows of a file beside DATA: target, retention or prompts. Empty where no file was named."""

    rows: list[TokenRow] = field(default_factory=list)
    files: list[InputFile] = field(default_factory=list)

    @property
    def digests(self) -> list[str] | None:
        """What their files are known by in a fingerprint."""
        return [file.digest for file in self.files] or None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Read:
    """DATA as it was read: by this command, or `before` by an earlier one."""

    kept: Kept
    found: Found
    samples: list[Row] = field(default_factory=list)
    before: Known | None = None

    @property
    def kind(self) -> str:
        """Of all rows. Raises InputError where some are of either."""
        return kind_of(self.samples) if self.before is None else self.before.kind


class Reader:
    """Reads rows as the model of a run tokenises them.

    `bad` are the rows of files beside DATA that cannot be used; `told` counts those that are not as they were given.
    The tokenizer is loaded once there is a row: where the first cannot be had, that is told at once.
    """

    def __init__(self, config: ScoreConfig, source: ModelSource) -> None:
        self.bad: list[BadRow] = []
        self.told: Counter[str] = Counter()
        self.read_as: Counter[str] = Counter()
        given = config.template_date
        self.day = TemplateDay(day=date.fromisoformat(given) if given else date.today())
        self._config, self._source = config, source

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """That of the model, with the chat template that was asked for; None where it has none."""
        return tokenizer_with(self._template, self._source, trust_remote_code=self._config.trust_remote_code)

    @cached_property
    def _template(self) -> str | None:
        if self._config.chat_template is None:
            return None
        path = expanded(self._config.chat_template)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"--chat-template {path}: it cannot be read as UTF-8 text ({error}).") from error

    @cached_property
    def _chats(self) -> ChatSettings:
        return ChatSettings(
            kwargs=orjson.loads(self._config.chat_template_kwargs or "{}"),
            stops=stop_texts(generation_stops(self._source), self.tokenizer),
            day=self.day,
            assistant_specials=self._config.assistant_specials,
        )

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        of_model = model_config(self._source).get("eos_token_id") if self.tokenizer is None else None
        return stop_ids(generation_stops(self._source), of_model, self.tokenizer)

    @cached_property
    def vocabulary(self) -> int | None:
        """Number of tokens the model knows; None where only loading it would tell."""
        if self._source.gguf:
            return None if self.tokenizer is None else len(self.tokenizer)
        return vocabulary_size(self._source)

    def data(self, place: Place | None, processes: int = 1) -> Read:
        """The tokens of DATA, made by so many processes; or those that an earlier command kept in `place`.

        Raises InputError as `RowStream`, ModelError as `tokenised`.
        """
        if place is not None and (before := self._known(place)) is not None:
            self.told += Counter(before.found.told)
            self.read_as += Counter(before.found.read_as)
            self.day.written |= before.found.day is not None
            return before
        if place is not None and not tokens_are_digested(self._source):
            place.keep_nothing()  # no later command could know them again
        stream = RowStream(self._config.data, limit=self._config.limit, reading=reading_of(self._config))
        shelf, bad = Shelf(per_shard=self._config.rows_per_shard, place=place), list[BadRow]()
        rows = self._told_of_plain_text(_begun(stream))
        for made in tokenised(rows, self._recipe(), self.tokenizer, processes):
            shelf.add(made.table)
            bad += made.bad
            self.told += made.told
            self.day.written |= made.day_written
        self.read_as += stream.told
        found = Found(
            files=tuple(stream.files),
            read=stream.read,
            good=dict(shelf.good),
            bad=tuple(sorted([*stream.bad, *bad], key=lambda one: one.row_id)),
            told=dict(self.told),
            read_as=dict(self.read_as),
            day=self.day.day.isoformat() if self.day.written else None,
        )
        return Read(kept=shelf.close(), found=found, samples=stream.samples)

    def digest(self, read: Read, aside: Sequence[AnyRow]) -> str:
        """Digest of the tokens of DATA, those of `aside` behind all others. What was read is whole, and may be kept."""
        if read.before is not None and read.before.aside == tuple(row.row_id for row in aside):
            return read.before.tokens
        tokens = read.kept.digest(aside)
        if read.before is None and read.kept.tables.files:
            key = self._key([[file.source, file.digest] for file in read.found.files], read.found.day)
            read.kept.commit(key, read.found, read.kind, aside, tokens)
        return tokens

    def _known(self, place: Place) -> Read | None:
        """What an earlier command kept of the same rows, settings and libraries."""
        if (before := known(place)) is None or before.found.day not in (None, self.day.day.isoformat()):
            return None
        named = find_files(self._config.data, self._config.subset, self._config.split)
        if before.found.read == self._config.limit:
            named = named[: len(before.found.files)]  # the limit was reached in the last of these
        if not all(file.is_local for file in named) or not tokens_are_digested(self._source):
            return None
        files = [[file.source, f"sha256:{digest(Path(file.path))[1]}"] for file in named]
        if differing(before.key, self._key(files, before.found.day)):
            return None
        if (kept := before.kept(self._config.rows_per_shard)) is None:
            return None
        there = [replace(one, path=file.path) for one, file in zip(before.found.files, named, strict=True)]
        return Read(kept=kept, found=replace(before.found, files=tuple(there)), before=before)

    def _key(self, files: list[list[str]], day: str | None) -> dict[str, Json]:
        about: dict[str, Json] = {name: getattr(self._config, name) for name in _OF_TOKENS}
        versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
        return {
            **about,
            "data": files,
            "tokenizer": tokenizer_digest(self._source),
            "template": str(getattr(self.tokenizer, "chat_template", None)),
            "stops": sorted(self._stop_ids),
            "vocabulary": self.vocabulary,
            "day": day,
            "versions": {"python": platform.python_version(), **versions},
        }

    def _recipe(self) -> Recipe:
        return Recipe(
            source=self._source,
            trust_remote_code=self._config.trust_remote_code,
            template=self._template,
            chats=self._chats,
            turns=self._config.turns,
            max_length=self._config.max_length,
            vocab_size=self.vocabulary,
            stop_ids=self._stop_ids,
        )

    def _tokens(self, found: RowStream) -> tuple[list[AnyRow], list[BadRow]]:
        """Tokens of rows beside DATA, and those that have none to score."""
        return tokenise(
            self._told_of_plain_text(_begun(found)),
            self.tokenizer,
            max_length=self._config.max_length,
            turns=self._config.turns,
            vocab_size=self.vocabulary,
            chats=self._chats,
            stop_ids=self._stop_ids,
            told=self.told,
        )

    def _told_of_plain_text(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows; those of plain text are counted where the model has a chat template that they do not use."""
        for row in rows:
            if isinstance(row.record, PromptCompletion) and getattr(self.tokenizer, "chat_template", None):
                self.read_as["prompt + completion is plain text, without the chat template (a chat: response)"] += 1
            yield row

    def side(self, name: str, path: str | None) -> SideRows:
        """Rows of a file beside DATA; of preference rows the chosen branch."""
        if path is None:
            return SideRows()
        reading = reading_of(self._config, path)
        if name == "prompts":
            found = RowStream([path], also=("prompt",), reading=reading)
            rows, unusable = tokenise_prompts(
                _begun(found),
                self.tokenizer,
                max_length=self._config.max_length,
                vocab_size=self.vocabulary,
                chats=self._chats,
            )
        else:
            found = RowStream([path], also=("text",) if name == "retention" else (), reading=reading)
            both, unusable = self._tokens(found)
            rows = [chosen(row) for row in both]
        self.read_as += found.told
        self.bad += sorted([*found.bad, *unusable], key=lambda bad: bad.row_id)
        return SideRows(rows=rows, files=found.files)


def reading_of(config: ScoreConfig, beside: str | None = None) -> Reading:
    """How rows of DATA are found and named, or those of a file `beside` it.

    There columns may have their own names already, a split is named with the dataset, and a configuration is that of
    DATA where it is the same dataset.
    """
    columns = named_columns(config.map)
    if beside is None:
        return Reading(columns=columns, subset=config.subset, split=config.split, all_there=True)
    names = {name.partition(":")[0] for name in config.data}
    return Reading(columns=columns, subset=config.subset if beside.partition(":")[0] in names else None)


def stop_texts(stops: Any, tokenizer: Tokenizer | None) -> frozenset[str]:
    """Texts of the tokens that a generation config ends an answer by."""
    if tokenizer is None:
        return frozenset()
    known = [one for one in _ids(stops) if 0 <= one < len(tokenizer)]
    return frozenset(map(str, tokenizer.convert_ids_to_tokens(known)))


def stop_ids(stops: Any, of_model: Any, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens that end an answer: by a generation config and the tokenizer, or else by the model's own config."""
    if tokenizer is not None:
        return frozenset([*_ids(stops), *_ids(tokenizer.eos_token_id)])
    return frozenset(_ids(of_model if stops is None else stops))


def _ids(stops: Any) -> list[int]:
    """One token or several, as configs name them."""
    return [one for one in (stops if isinstance(stops, list) else [stops]) if isinstance(one, int)]


def _begun(found: RowStream) -> Iterator[Row]:
    """The rows, of which the first is read now."""
    rows = iter(found)
    return chain([first for first in [next(rows, None)] if first is not None], rows)
