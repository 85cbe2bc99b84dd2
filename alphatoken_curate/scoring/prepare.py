"""From what a user named to what a run will do: rows, tokens, target rows, digests. No model is loaded here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.groups import GROUPS
from alphatoken_curate.errors import InputError, UsageError
from alphatoken_curate.models.load import ModelSource, find_model
from alphatoken_curate.rows.files import visible
from alphatoken_curate.rows.read import BadRow, InputFile, refuse
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.scoring.identity import Named, fields_of
from alphatoken_curate.scoring.named import check_blocks, check_named
from alphatoken_curate.scoring.reach import check_lengths
from alphatoken_curate.scoring.reader import Read, Reader, SideRows
from alphatoken_curate.scoring.shelf import Place
from alphatoken_curate.tokens.chat import Tokenizer
from alphatoken_curate.tokens.dealt import Rows
from alphatoken_curate.tokens.draws import keyed_uniform, of_turn
from alphatoken_curate.tokens.packed import Columns, columns_of_rows
from alphatoken_curate.tokens.tokenise import NO_TOKENIZER, OUT_OF_VOCABULARY, AnyRow, TokenRow, chosen
from alphatoken_curate.wording import count

R = TypeVar("R", TokenRow, AnyRow)

TARGET_DRAW, FISHER_DRAW, LOOKAHEAD_DRAW, PRECONDITION_DRAW = -1, -2, -3, -4
"""Positions under which the draws of whole rows are keyed; no token has a negative one."""

_DRAWN_AT_ONCE = 1 << 16
"""Rows: what is held beside them while some are drawn does not grow with them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """All that is known before a model is loaded."""

    config: ScoreConfig
    source: ModelSource
    tokenizer: Tokenizer | None
    kind: str
    files: list[InputFile]
    rows_read: int
    good: Mapping[str, int]
    """Rows that are not bad, by the source they are from."""
    rows: Rows
    """Rows to score, by row_id; those of a shard are read when they are asked for."""
    tokens: str
    """Digest of the tokens of these, and of those that are held out."""
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
    def every_row(self) -> Iterator[AnyRow]:
        """Rows of DATA and of files beside it."""
        beside = (one.rows for one in (self.target, self.retention, self.prompts))
        return chain(self.rows, self.held_out, *beside)

    @property
    def target_rows(self) -> list[TokenRow]:
        """Target rows, wherever they come from; of preference rows the chosen branch, as plain SFT."""
        return [chosen(row) for row in self.held_out] or self.target.rows


def prepare(config: ScoreConfig, place: Place | None = None, processes: int = 1) -> Prepared:
    """Read, check and tokenise everything. InputError names all bad rows at once, unless they are quarantined.

    `place`: where tokens are put that are too many to be held, and where they may be already; without one all are held.
    `processes`: how many tokenise DATA, where that takes long.
    """
    check_named(config)
    source = find_model(config.model)
    check_blocks(config, source)
    if place is None:
        return _prepared(config, source, None, processes)
    with place.begun():
        return _prepared(config, source, place, processes)


def _prepared(config: ScoreConfig, source: ModelSource, place: Place | None, processes: int) -> Prepared:
    reader = Reader(config, source)
    read = reader.data(place, processes)
    sides = {"target": config.target, "retention": config.retention, "prompts": config.fisher_prompts}
    side = {name: reader.side(name, path) for name, path in sides.items()}
    found, rows = read.found, read.kept.rows(read.found.read)
    _check_rows(config, reader, read, rows)
    kind = read.kind
    check_lengths(source, rows, kind, [row for one in side.values() for row in one.rows])
    by_dpo = kind == "preference" and config.rehearses and config.rehearse_simpo is None
    if by_dpo and config.rehearse_denominator == "sum":
        raise UsageError(
            f"--rehearse-denominator sum: {', '.join(config.data)} holds preference rows, whose training by DPO is the"
            " mean over pairs, whatever their tokens weigh. Leave it out; with --rehearse-simpo it divides branches."
        )
    held_out: list[AnyRow] = []
    if config.target is None:
        held_out = hold_out(rows, config.target_rows, config.seed)
        rows = rows.without([row.row_id for row in held_out])
    return Prepared(
        config=replace(config, template_date=reader.day.day.isoformat() if reader.day.written else None),
        source=source,
        tokenizer=reader.tokenizer,
        kind=kind,
        files=list(found.files),
        rows_read=found.read,
        good=found.good,
        rows=rows,
        tokens=reader.digest(read, held_out),
        held_out=held_out,
        bad=list(found.bad),
        told=dict(sorted(reader.told.items())),
        read_as=dict(sorted(reader.read_as.items())),
        **side,
    )


def _check_rows(config: ScoreConfig, reader: Reader, read: Read, rows: Rows) -> None:
    """Raise InputError where there are none, or some that cannot be used and are to be refused."""
    bad = list(read.found.bad)
    if config.bad_rows == "refuse" or not rows:
        _check_tokenizer(config, reader, [*bad, *reader.bad])
    wanting = bad if config.bad_rows == "refuse" else []
    if wanting or reader.bad:
        raise refuse(wanting, reader.bad)
    if not rows:
        raise InputError(
            f"{', '.join(config.data)}: none of its {count(len(bad), 'row')} can be scored. Run check to see why."
        )


def _check_tokenizer(config: ScoreConfig, reader: Reader, bad: Sequence[BadRow]) -> None:
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


def hold_out(rows: Sequence[AnyRow], most: int, seed: int) -> list[AnyRow]:
    """The target rows of a run without --target: min(most, a tenth of the rows), at least one, drawn by the seed.

    Chats are held out whole: with all their turns.
    """
    rows = rows if isinstance(rows, Rows) else Rows.of(rows)
    firsts = rows.firsts()
    if len(firsts) < 2:
        raise InputError(
            "Only one row can be scored, and one must be held out as target. Give the task's rows with --target."
        )
    taken = _drawn(rows.columns, firsts, max(1, min(most, len(firsts) // 10)), seed, TARGET_DRAW)
    ends = np.append(firsts, len(rows))
    return rows.pick([place for one in taken for place in range(ends[one], ends[one + 1])])


def drawn(rows: Sequence[R], count: int, seed: int, position: int) -> list[R]:
    """At most `count` of the rows, or of their turns, drawn by (seed, row_id and turn, position), in their order."""
    columns = rows.columns if isinstance(rows, Rows) else columns_of_rows(rows)
    places = _drawn(columns, range(len(columns)), count, seed, position)
    if isinstance(rows, Rows):
        return rows.pick(places)  # type: ignore[return-value]
    return [rows[i] for i in places]


def _drawn(columns: Columns, among: NDArray[np.int64] | range, count: int, seed: int, position: int) -> list[int]:
    """Which of some rows, by their places in `columns`, have the least draws, ascending; of equal ones the first."""
    least, found = np.empty(0), np.empty(0, np.int64)
    for start in range(0, len(among), _DRAWN_AT_ONCE):
        some = np.array(among[start : start + _DRAWN_AT_ONCE], np.int64)
        turns = -columns["turn"][some].astype(np.int64)  # downwards, as the positions of these draws go
        draws = keyed_uniform(seed, columns["row_id"][some], of_turn(position, turns))
        least = np.concatenate([least, draws])
        found = np.concatenate([found, np.arange(start, start + len(some))])
        first = np.argsort(least, kind="stable")[:count]
        least, found = least[first], found[first]
    return sorted(found.tolist())


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
        "tokens": prepared.tokens,
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


def _tokens_digest(rows: Sequence[TokenRow]) -> str | None:
    """Digest of the tokens of rows beside DATA, as `Kept.digest`; of these it is not stored which end an answer."""
    found = hashlib.sha256()
    for row in rows:
        found.update(len(row.input_ids).to_bytes(8, "little") + row.input_ids.tobytes() + row.response.tobytes())
    return f"sha256:{found.hexdigest()}" if rows else None
