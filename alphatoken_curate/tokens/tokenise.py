"""Rows become tokens and the mask of those that respond (see `speller`).

Each branch of a preference row is a sequence of its own. Where the texts of both begin with the same prompt, their
tokens do too: where a border falls otherwise in one of them, both are tokenised in pieces. Branches of which the same
tokens are left are refused, as rows without an answer are: nothing can be learnt from them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.errors import ModelError
from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.fields import BRANCHES
from alphatoken_curate.rows.files import visible
from alphatoken_curate.rows.read import BadRow, Row
from alphatoken_curate.rows.shapes import AnyRecord, Messages, Pair, Passage, Prompt, PromptCompletion, Record, Tokens
from alphatoken_curate.runs.schema import IGNORE_INDEX
from alphatoken_curate.tokens.chat import ChatSettings, RenderedText, Tokenizer, joined, unanswered
from alphatoken_curate.tokens.refusals import RUNAWAY
from alphatoken_curate.tokens.speller import Spelled, Speller, closing_stops

_BATCH_ROWS = 1000
_EXCERPT_TOKENS = 100

_CUT_AWAY = "truncated_away"
_MOST_RUNAWAYS = 20

NO_TOKENIZER = "no_tokenizer"
"""The reason of a row of text where the model has no tokenizer."""

CUT_WORD = "the prompt ends with a space, behind which no model expects a word: move it to the front of the answer"

OUT_OF_VOCABULARY = "token_out_of_vocabulary"
"""The reason of a row with a token that the model does not know."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenRow:
    """A row, or one turn of it, as T tokens. `truncated`: how many more there were before it was cut to the length."""

    row_id: int
    turn: int = 0
    """Which answer of the chat it ends with, where each is a sequence of its own."""
    source: str
    line: int
    id: str | None
    input_ids: NDArray[np.int32]
    """Shape (T,)."""
    response: NDArray[np.bool_]
    """Shape (T,): true at the tokens that would train; never at index 0, which nothing predicts."""
    end_of_turn: NDArray[np.bool_]
    """Shape (T,): true at those of them that end an answer, the run of tokens by which its turn is closed."""
    truncated: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PairRow:
    """A preference row as tokens: two answers, each with its own prompt; both have the row's place and id."""

    chosen: TokenRow
    rejected: TokenRow

    @property
    def row_id(self) -> int:
        """Place of the row among all rows read."""
        return self.chosen.row_id

    @property
    def turn(self) -> int:
        """0: a pair has one answer in each branch."""
        return self.chosen.turn

    @property
    def truncated(self) -> int:
        """Tokens that were cut off both branches."""
        return self.chosen.truncated + self.rejected.truncated


AnyRow = TokenRow | PairRow


def branches(row: AnyRow) -> tuple[TokenRow, ...]:
    """The sequences of a row: itself, or chosen and rejected."""
    return (row.chosen, row.rejected) if isinstance(row, PairRow) else (row,)


def chosen(row: AnyRow) -> TokenRow:
    """The sequence that is to be learnt: itself, or the chosen branch."""
    return branches(row)[0]


class Runaways:
    """Rows at which a template ran away, each in words: every one takes about a second."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, told: str) -> None:
        """One more, in the order of rows. Raises ModelError where these are too many."""
        self.told.append(told)
        if self.enough:
            raise ModelError(f"{told}. It ran away at {len(self.told) - 1} rows before it, too, and no more are tried.")

    @property
    def enough(self) -> bool:
        """Whether these are too many."""
        return len(self.told) >= _MOST_RUNAWAYS


def tokenise(
    rows: Iterable[Row],
    tokenizer: Tokenizer | None,
    *,
    max_length: int,
    turns: str,
    vocab_size: int | None,
    chats: ChatSettings | None = None,
    stop_ids: frozenset[int] = frozenset(),
    told: Counter[str] | None = None,
    runaways: Runaways | None = None,
    speller: Speller | None = None,
) -> tuple[list[AnyRow], list[BadRow]]:
    """Tokens of every row, in order, and the rows that have none that respond or cannot be tokenised, with reasons.

    Rows are taken as they are needed, and not kept: of a `RowStream` some thousand are held at a time.

    `turns` is "all" or "last" (assistant turns that respond), or "each": one sequence for each of them, in a row's
    place. Rows are cut at the right to `max_length` tokens, each branch of a pair by itself. A pair is bad where one of
    its branches is, a chat where one of its turns is. `vocab_size`, where given, bounds every token. Pre-tokenised rows
    need no tokenizer; of these, answers end with `stop_ids`. `chats` says how chats are read. In `told` the rows are
    counted that are not as they were given, by what became of them. `runaways`: those of calls before; `speller`: that
    of these (`speller_of`). Raises ModelError where a template runs away at too many rows.
    """
    good: list[AnyRow] = []
    bad: list[BadRow] = []
    speller = speller or speller_of(tokenizer, chats, turns=turns)
    for row, found in _spelled(rows, speller, stop_ids, told, runaways):
        try:
            made, beyond = _any_rows(row, found, max_length, vocab_size)
        except RowFault as fault:
            bad.append(_bad_row(row, fault))
            continue
        good += made
        if beyond and told is not None:
            told["answers begin where rows are cut, and are left out"] += 1
    return good, bad


def tokenise_prompts(
    rows: Iterable[Row],
    tokenizer: Tokenizer | None,
    *,
    max_length: int,
    vocab_size: int | None,
    chats: ChatSettings | None = None,
) -> tuple[list[TokenRow], list[BadRow]]:
    """Tokens of the prompt of every row, in order, of which none responds, and the rows that have none, with reasons.

    The prompt is what stands before the first token that responds, of a pair in the chosen branch; a row that is a
    prompt alone is that with the chat template's generation prompt. Prompts are cut at the left to `max_length` tokens.
    """
    good: list[TokenRow] = []
    bad: list[BadRow] = []
    speller = speller_of(tokenizer, chats, turns="all")
    for row, (found, *_) in _spelled(rows, speller):
        try:
            good.append(_prompt_row(row, found, max_length, vocab_size))
        except RowFault as fault:
            bad.append(_bad_row(row, fault))
    return good, bad


# --- text to tokens ---


def speller_of(tokenizer: Tokenizer | None, chats: ChatSettings | None, *, turns: str) -> Speller | None:
    """What tokenises text for these settings, and has found out by then how; None without a tokenizer."""
    return None if tokenizer is None else Speller(tokenizer, turns=turns, chats=chats or ChatSettings())


def _spelled(
    rows: Iterable[Row],
    speller: Speller | None,
    stop_ids: frozenset[int] = frozenset(),
    told: Counter[str] | None = None,
    runaways: Runaways | None = None,
) -> Iterator[tuple[Row, list[Spelled | RowFault]]]:
    """Every row with the tokens of each of its branches or turns, or why there are none."""
    waiting = iter(rows)
    runaways = Runaways() if runaways is None else runaways
    while batch := list(islice(waiting, _BATCH_ROWS)):
        prepared = []
        for row in batch:
            prepared.append(_items(row.record, speller, stop_ids))
            if ran := [item for item in prepared[-1] if isinstance(item, RowFault) and item.reason == RUNAWAY]:
                runaways.note(f"{row.source}:{row.line}: {ran[0].message}")
        texts = [item for items in prepared for item in items if isinstance(item, RenderedText)]
        encoded = iter(speller.encode(texts) if speller else ())
        for row, items in zip(batch, prepared, strict=True):
            found = [_finished(row, item if not isinstance(item, RenderedText) else next(encoded)) for item in items]
            if told is not None:
                told.update({note for item in items if isinstance(item, RenderedText) for note in item.notes})
                told.update({CUT_WORD for one in found if isinstance(one, Spelled) and one.cut})
            yield row, _with_one_prompt(items, found, speller)


def _records(record: AnyRecord) -> tuple[Record, ...]:
    return (record.chosen, record.rejected) if isinstance(record, Pair) else (record,)


_Item = Spelled | RenderedText | RowFault


def _items(record: AnyRecord, speller: Speller | None, stop_ids: frozenset[int]) -> list[_Item]:
    """What each branch or turn of a row is made from."""
    if not isinstance(record, Pair):
        return _prepare(record, speller, stop_ids)
    both = [_prepare(one, speller, stop_ids) for one in _records(record)]
    return [found[0] if len(found) == 1 else _SEVERAL for found in both]


_SEVERAL = RowFault(
    "several_turns",
    "it holds several answers, and the preference loss is of all of them together; use --turns all or --turns last",
)


def _prepare(record: Record, speller: Speller | None, stop_ids: frozenset[int]) -> list[_Item]:
    if isinstance(record, Tokens):
        response = np.array(record.labels) != IGNORE_INDEX
        return [Spelled(record.input_ids, response, closing_stops(record.input_ids, response, stop_ids))]
    if speller is None:
        return [RowFault(NO_TOKENIZER, "a row of text needs a tokenizer; name a model that has one")]
    try:
        return [*_texts(record, speller)]
    except RowFault as fault:
        return [fault]


def _texts(record: PromptCompletion | Passage | Prompt | Messages, speller: Speller) -> list[RenderedText]:
    if isinstance(record, PromptCompletion):
        return [joined(record)]
    if isinstance(record, Passage):
        return [unanswered(record.text)]
    return [speller.template.render_prompt(record)] if isinstance(record, Prompt) else speller.template.render(record)


def _finished(row: Row, found: Spelled | RowFault) -> Spelled | RowFault:
    """Every token of a passage responds."""
    if isinstance(row.record, Passage) and not isinstance(found, RowFault):
        return found._replace(response=np.ones(len(found.tokens), dtype=np.bool_))
    return found


def _with_one_prompt(
    items: Sequence[Spelled | RenderedText | RowFault], found: list[Spelled | RowFault], speller: Speller | None
) -> list[Spelled | RowFault]:
    """What was found, with one tokenisation of the prompt where both texts of a pair begin with the same prompt."""
    texts = [item for item in items if isinstance(item, RenderedText) and item.spans]
    spelled = [item for item in found if not isinstance(item, RowFault)]
    if speller is None or len(texts) != len(BRANCHES) or len(spelled) != len(BRANCHES):
        return found
    heads = [item.text[: item.spans[0][0]] for item in texts]
    prompts = [one.tokens[: int(one.response.argmax())] for one in spelled]
    if heads[0] != heads[1] or prompts[0] == prompts[1]:
        return found
    marked = any(item.marked for item in texts)  # text around special tokens is then cut alike in both
    try:
        return [speller.encode_in_pieces(item._replace(marked=marked)) for item in texts]
    except RowFault:  # each is right by itself
        return found


# --- tokens to rows ---


def _any_rows(
    row: Row, found: Sequence[Spelled | RowFault], max_length: int, vocab_size: int | None
) -> tuple[list[AnyRow], int]:
    """The pair or sequences of a row, and how many of its turns begin where rows are cut. Raises RowFault."""
    if isinstance(row.record, Pair):
        return [_pair_row(row, found, max_length, vocab_size)], 0
    made: list[AnyRow] = []
    beyond = []
    for turn, one in enumerate(found):
        try:
            made.append(replace(_token_row(row, one, max_length, vocab_size), turn=turn))
        except RowFault as fault:
            if fault.reason != _CUT_AWAY:
                raise
            beyond.append(fault)
    if not made:
        raise beyond[0]
    return made, len(beyond)


def _pair_row(row: Row, found: Sequence[Spelled | RowFault], max_length: int, vocab_size: int | None) -> PairRow:
    made = []
    for name, result in zip(BRANCHES, found, strict=True):
        try:
            made.append(_token_row(row, result, max_length, vocab_size))
        except RowFault as fault:
            raise fault.within(name) from None
    pair = PairRow(chosen=made[0], rejected=made[1])
    if all(np.array_equal(getattr(made[0], name), getattr(made[1], name)) for name in ("input_ids", "response")):
        if pair.truncated:
            message = f"chosen and rejected are the same up to {max_length} tokens, where rows are cut"
            raise RowFault(_CUT_AWAY, message)
        raise RowFault("same_branches", "chosen and rejected become the same tokens: neither is preferred")
    return pair


def _token_row(row: Row, found: Spelled | RowFault, max_length: int, vocab_size: int | None) -> TokenRow:
    tokens, response, ends = _checked(found, vocab_size)
    response[:1] = ends[:1] = False
    if not response.any():
        raise RowFault("no_response", "no token responds that another one precedes")
    if not response[:max_length].any():
        first = int(response.argmax())
        raise RowFault(_CUT_AWAY, f"the answer starts at token {first} and rows are cut to {max_length} tokens")
    over = max(0, len(tokens) - max_length)
    if over:
        tokens, response, ends = tokens[:max_length], response[:max_length], ends[:max_length]
    return _placed(row, tokens, response, ends, over)


def _prompt_row(row: Row, found: Spelled | RowFault, max_length: int, vocab_size: int | None) -> TokenRow:
    tokens, response, _ = _checked(found, vocab_size)
    prompt = tokens[: int(response.argmax())] if response.any() else tokens
    if not len(prompt):
        raise RowFault("no_prompt", "no token stands before the first that responds: there is no prompt")
    kept = prompt[-max_length:]
    nothing = np.zeros(len(kept), dtype=np.bool_)
    return _placed(row, kept, nothing, nothing, len(prompt) - len(kept))


def _checked(
    found: Spelled | RowFault, vocab_size: int | None
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]:
    if isinstance(found, RowFault):
        raise found
    tokens, response, ends, _ = found
    input_ids = np.array(tokens, dtype=np.int32)
    if vocab_size is not None and len(input_ids) and int(input_ids.max()) >= vocab_size:
        i = int((input_ids >= vocab_size).argmax())
        message = f"input_ids[{i}] is {tokens[i]}; the model has {vocab_size} tokens, from 0"
        raise RowFault(OUT_OF_VOCABULARY, message)
    return input_ids, response, ends


def _placed(
    row: Row,
    input_ids: NDArray[np.int32],
    response: NDArray[np.bool_],
    end_of_turn: NDArray[np.bool_],
    truncated: int,
) -> TokenRow:
    return TokenRow(
        row_id=row.row_id,
        source=row.source,
        line=row.line,
        id=row.id,
        input_ids=input_ids,
        response=response,
        end_of_turn=end_of_turn,
        truncated=truncated,
    )


def _bad_row(row: Row, fault: RowFault) -> BadRow:
    stored = [_stored(record) for record in _records(row.record)]
    whole = dict(zip(BRANCHES, stored, strict=True)) if isinstance(row.record, Pair) else stored[0]
    return BadRow(
        row_id=row.row_id,
        source=row.source,
        line=row.line,
        reason=fault.reason,
        message=fault.message,
        excerpt=visible(json.dumps(whole, ensure_ascii=False, default=str)),
    )


def _stored(record: Record) -> object:
    """What an excerpt is made of."""
    if isinstance(record, Messages | Prompt):
        return record.messages
    if isinstance(record, Tokens):
        return {"input_ids": record.input_ids[:_EXCERPT_TOKENS], "labels": record.labels[:_EXCERPT_TOKENS]}
    return asdict(record)
