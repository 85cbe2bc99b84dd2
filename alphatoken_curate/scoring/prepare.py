"""From what a user named to what a run will do: rows, tokens, target rows, digests. No model is loaded here."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.groups import GROUPS
from alphatoken_curate.errors import InputError, UsageError
from alphatoken_curate.models.load import (
    ModelSource,
    find_model,
    generation_stops,
    load_tokenizer,
    model_config,
    vocabulary_size,
)
from alphatoken_curate.rows.columns import named_columns
from alphatoken_curate.rows.files import visible
from alphatoken_curate.rows.read import BadRow, InputFile, Reading, Row, RowStream, kind_of, refuse
from alphatoken_curate.rows.shapes import PromptCompletion
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.scoring.identity import Named, fields_of
from alphatoken_curate.scoring.named import check_named
from alphatoken_curate.tokens.chat import ChatSettings, Tokenizer
from alphatoken_curate.tokens.dates import TemplateDay
from alphatoken_curate.tokens.draws import keyed_uniform, of_turn
from alphatoken_curate.tokens.plan import sequences
from alphatoken_curate.tokens.tokenise import (
    NO_TOKENIZER,
    OUT_OF_VOCABULARY,
    AnyRow,
    TokenRow,
    chosen,
    tokenise,
    tokenise_prompts,
)
from alphatoken_curate.wording import count

R = TypeVar("R", TokenRow, AnyRow)

TARGET_DRAW, FISHER_DRAW, LOOKAHEAD_DRAW, PRECONDITION_DRAW = -1, -2, -3, -4
"""Positions under which the draws of whole rows are keyed; no token has a negative one."""


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
class Prepared:
    """All that is known before a model is loaded."""

    config: ScoreConfig
    source: ModelSource
    tokenizer: Tokenizer | None
    kind: str
    files: list[InputFile]
    rows_read: int
    rows: list[AnyRow]
    """Rows to score, by row_id."""
    held_out: list[AnyRow]
    """Rows of DATA set aside as target; empty where --target was given."""
    target: SideRows
    retention: SideRows
    prompts: SideRows
    bad: list[BadRow]
    """Bad rows of DATA, by row_id."""
    told: dict[str, int]
    """How many rows, of DATA and of files beside it, are not as they were given, by what the chat template did."""
    read_as: dict[str, int]
    """How many were read in a way that a user may not expect, by that."""

    @property
    def inputs(self) -> list[InputFile]:
        """All files of rows that were read."""
        return [*self.files, *self.target.files, *self.retention.files, *self.prompts.files]

    @property
    def target_rows(self) -> list[TokenRow]:
        """Target rows, wherever they come from; of preference rows the chosen branch, as plain SFT."""
        return [chosen(row) for row in self.held_out] or self.target.rows


def prepare(config: ScoreConfig) -> Prepared:
    """Read, check and tokenise everything. InputError names all bad rows at once, unless they are quarantined."""
    check_named(config)
    source = find_model(config.model)
    reader = _Reader(config, source)
    found = RowStream(config.data, limit=config.limit, reading=reading_of(config))
    rows, unusable = reader.tokens(found)
    bad = sorted([*found.bad, *unusable], key=lambda bad: bad.row_id)
    sides = {"target": config.target, "retention": config.retention, "prompts": config.fisher_prompts}
    side = {name: reader.side(name, path) for name, path in sides.items()}
    if config.bad_rows == "refuse" or not rows:
        _check_tokenizer(config, reader, [*bad, *reader.bad])
    wanting = bad if config.bad_rows == "refuse" else []
    if wanting or reader.bad:
        raise refuse(wanting, reader.bad)
    if not rows:
        raise InputError(
            f"{', '.join(config.data)}: none of its {count(len(bad), 'row')} can be scored. Run check to see why."
        )
    kind = kind_of(found.samples)
    if kind == "preference" and config.rehearses:
        raise UsageError(
            f"--direction rehearsal: {', '.join(config.data)} holds preference rows, and only the training on rows of"
            " one answer is rehearsed. Leave --direction out."
        )
    held_out: list[AnyRow] = []
    if config.target is None:
        held_out = hold_out(rows, config.target_rows, config.seed)
        taken = {row.row_id for row in held_out}
        rows = [row for row in rows if row.row_id not in taken]
    return Prepared(
        config=replace(config, template_date=reader.day.day.isoformat() if reader.day.written else None),
        source=source,
        tokenizer=reader.tokenizer,
        kind=kind,
        files=found.files,
        rows_read=found.read,
        rows=rows,
        held_out=held_out,
        bad=bad,
        told=dict(sorted(reader.told.items())),
        read_as=dict(sorted((found.told + reader.read_as).items())),
        **side,
    )


class _Reader:
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
        found = load_tokenizer(self._source, trust_remote_code=self._config.trust_remote_code)
        if found is not None and self._config.chat_template is not None:
            found.chat_template = _template(Path(self._config.chat_template).expanduser())
        return found

    @cached_property
    def _chats(self) -> ChatSettings:
        return ChatSettings(
            kwargs=orjson.loads(self._config.chat_template_kwargs or "{}"),
            stops=_stops(self._source, self.tokenizer),
            day=self.day,
            assistant_specials=self._config.assistant_specials,
        )

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        found = generation_stops(self._source)
        if self.tokenizer is not None:
            return frozenset([*_ids(found), *_ids(self.tokenizer.eos_token_id)])
        return frozenset(_ids(model_config(self._source).get("eos_token_id") if found is None else found))

    @cached_property
    def vocabulary(self) -> int | None:
        """Number of tokens the model knows; None where only loading it would tell."""
        return _vocabulary(self._source, self.tokenizer)

    def tokens(self, found: RowStream) -> tuple[list[AnyRow], list[BadRow]]:
        """Tokens of rows that were read, and those that have none to score."""
        config = self._config
        return tokenise(
            self._told_of_plain_text(_begun(found)),
            self.tokenizer,
            max_length=config.max_length,
            turns=config.turns,
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
            both, unusable = self.tokens(found)
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


def _check_tokenizer(config: ScoreConfig, reader: _Reader, bad: Sequence[BadRow]) -> None:
    """One line where the model has no tokenizer, or one with tokens that it does not know, and not one for each row."""
    tokenizer, known = reader.tokenizer, reader.vocabulary
    found = [one for one in bad if one.reason == (NO_TOKENIZER if tokenizer is None else OUT_OF_VOCABULARY)]
    if not found:
        return
    place = f"{visible(found[0].source)}:{found[0].line}"
    if tokenizer is None:
        raise InputError(
            f"{config.model}: it has no tokenizer, and {place} is a row of text, the first of {len(found):,}. Save a"
            " tokenizer beside the model (save_pretrained), or give rows as input_ids and labels."
        )
    if known is not None and len(tokenizer) > known:
        raise InputError(
            f"{config.model}: its tokenizer has {len(tokenizer):,} tokens and its embeddings {known:,}, and {place} has"
            f" one that the model does not know, the first row of {len(found):,}. Save the tokenizer that the model was"
            " trained with beside it, or the model as it was resized and trained (resize_token_embeddings)."
        )


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--chat-template {path}: it cannot be read as UTF-8 text ({error}).") from error


def _stops(source: ModelSource, tokenizer: Tokenizer | None) -> frozenset[str]:
    """Texts of the tokens that end an answer by generation_config.json."""
    if tokenizer is None:
        return frozenset()
    known = [one for one in _ids(generation_stops(source)) if 0 <= one < len(tokenizer)]
    return frozenset(map(str, tokenizer.convert_ids_to_tokens(known)))


def _ids(stops: Any) -> list[int]:
    """One token or several, as configs name them."""
    return [one for one in (stops if isinstance(stops, list) else [stops]) if isinstance(one, int)]


def _begun(found: RowStream) -> Iterator[Row]:
    """The rows, of which the first is read now."""
    rows = iter(found)
    return chain([first for first in [next(rows, None)] if first is not None], rows)


def hold_out(rows: Sequence[AnyRow], most: int, seed: int) -> list[AnyRow]:
    """The target rows of a run without --target: min(most, a tenth of the rows), at least one, drawn by the seed.

    Chats are held out whole: with all their turns.
    """
    firsts = list({row.row_id: row for row in reversed(rows)}.values())[::-1]
    if len(firsts) < 2:
        raise InputError(
            "Only one row can be scored, and one must be held out as target. Give the task's rows with --target."
        )
    taken = {row.row_id for row in drawn(firsts, max(1, min(most, len(firsts) // 10)), seed, TARGET_DRAW)}
    return [row for row in rows if row.row_id in taken]


def drawn(rows: Sequence[R], count: int, seed: int, position: int) -> list[R]:
    """At most `count` of the rows, or of their turns, drawn by (seed, row_id and turn, position), in their order."""
    turns = [-row.turn for row in rows]  # downwards, as the positions of these draws go
    draws = keyed_uniform(seed, [row.row_id for row in rows], of_turn(position, turns))
    return [rows[i] for i in sorted(np.argsort(draws, kind="stable")[:count])]


def fingerprint_fields(prepared: Prepared, reference: ModelSource, dtype: str) -> dict[str, Json]:
    """Everything that changes values/, under the names users know it by; None where it plays no part."""
    template = getattr(prepared.tokenizer, "chat_template", None)
    named = Named(
        data=[[file.source, file.digest] for file in prepared.files],
        model=prepared.source,
        reference=reference,
        target=prepared.target.digests,
        retention=prepared.retention.digests,
        prompts=prepared.prompts.digests,
    )
    return {
        **fields_of(prepared.config, named, kind=prepared.kind, dtype=dtype),
        "template": f"sha256:{hashlib.sha256(str(template).encode()).hexdigest()}" if template else None,
        "tokens": _tokens_digest(sequences([*prepared.rows, *prepared.held_out]), ends=True),
        "target_tokens": _tokens_digest(prepared.target.rows),
        "retention_tokens": _tokens_digest(prepared.retention.rows),
        "prompt_tokens": _tokens_digest(prepared.prompts.rows),
        **({"groups": groups} if (groups := _groups(prepared)) > 1 else {}),
    }


def _groups(prepared: Prepared) -> int:
    """Groups of target rows that errors are told by; 1 where none are."""
    rows, wanted = len(prepared.target_rows), prepared.config.target_groups
    if wanted is not None:
        return min(wanted, rows)
    return min(GROUPS, rows // 2) if prepared.config.rehearses else 1


def _tokens_digest(rows: Sequence[TokenRow], *, ends: bool = False) -> str | None:
    """Digest of the tokens themselves: other releases of what makes them change them, and nothing else does.

    `ends`: and of which of them end an answer, which is stored of DATA alone.
    """
    found = hashlib.sha256()
    for row in rows:
        found.update(len(row.input_ids).to_bytes(8, "little") + row.input_ids.tobytes() + row.response.tobytes())
        found.update(row.end_of_turn.tobytes() if ends else b"")
    return f"sha256:{found.hexdigest()}" if rows else None


def _vocabulary(source: ModelSource, tokenizer: Tokenizer | None) -> int | None:
    """Number of tokens the model knows; None where only loading the model would tell."""
    if source.gguf:
        return None if tokenizer is None else len(tokenizer)
    return vocabulary_size(source)
