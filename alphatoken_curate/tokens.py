"""Rows become tokens and the mask of those that respond.

The text is tokenised whole, once, and character spans are mapped to tokens. The tokens of every response are then
decoded and must spell the answer and its end-of-turn token exactly. Where a token straddles the border (a byte-level
token may even hold half a character of either side) the text is cut at the borders and tokenised in pieces, so that
the border is one between tokens; where even that does not spell the answer, the row is refused.

Text of a chat that spells a special token stays text (see `chat`). Prompt and completion in raw text are the exception:
there special tokens are recognised, since ready-made chats are stored so. They are joined, a BOS goes in front where
the tokenizer adds one and an EOS behind where the completion does not end with it; the EOS responds.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.chat import MARK, ChatTemplate, RenderedText, Specials, Tokenizer
from alphatoken_curate.containers import RowFault
from alphatoken_curate.files import visible
from alphatoken_curate.rows import BadRow, Messages, PromptCompletion, Row, Tokens
from alphatoken_curate.schema import IGNORE_INDEX

_BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenRow:
    """A row as tokens, T of them. `truncated`: how many more there were before the row was cut to the length asked."""

    row_id: int
    source: str
    line: int
    id: str | None
    input_ids: NDArray[np.int32]
    """Shape (T,)."""
    response: NDArray[np.bool_]
    """Shape (T,): true at the tokens that would train; never at index 0, which nothing predicts."""
    truncated: int


def tokenise(
    rows: Sequence[Row], tokenizer: Tokenizer | None, *, max_length: int, turns: str, vocab_size: int | None
) -> tuple[list[TokenRow], list[BadRow]]:
    """Tokens of every row, in order, and the rows that have none that respond or cannot be tokenised, with reasons.

    `turns` is "all" or "last" (assistant turns that respond). Rows are cut at the right to `max_length` tokens.
    `vocab_size`, where given, bounds every token. Pre-tokenised rows need no tokenizer.
    """
    speller = None if tokenizer is None else _Speller(tokenizer, last_only=turns == "last")
    good: list[TokenRow] = []
    bad: list[BadRow] = []
    waiting = iter(rows)
    while batch := list(islice(waiting, _BATCH_ROWS)):
        for row, result in zip(batch, _encode_all(batch, speller), strict=True):
            try:
                if isinstance(result, RowFault):
                    raise result
                good.append(_token_row(row, *result, max_length, vocab_size))
            except RowFault as fault:
                bad.append(_bad_row(row, fault))
    return good, bad


_Encoded = tuple[list[int], NDArray[np.bool_]]


def _encode_all(rows: Sequence[Row], speller: _Speller | None) -> Iterator[_Encoded | RowFault]:
    results: list[_Encoded | RenderedText | RowFault] = []
    for row in rows:
        try:
            results.append(_prepare(row, speller))
        except RowFault as fault:
            results.append(fault)
    texts = [item for item in results if isinstance(item, RenderedText)]
    encoded = iter(speller.encode(texts) if speller else ())
    return (next(encoded) if isinstance(item, RenderedText) else item for item in results)


def _prepare(row: Row, speller: _Speller | None) -> _Encoded | RenderedText:
    record = row.record
    if isinstance(record, Tokens):
        return record.input_ids, np.array(record.labels) != IGNORE_INDEX
    if speller is None:
        raise RowFault("no_tokenizer", "a row of text needs a tokenizer; name a model that has one")
    if isinstance(record, PromptCompletion):
        text = record.prompt + record.completion
        return RenderedText(text=text, spans=[(len(record.prompt), len(text))], raw=True)
    return speller.template.render(record)


def _token_row(
    row: Row, tokens: list[int], response: NDArray[np.bool_], max_length: int, vocab_size: int | None
) -> TokenRow:
    input_ids = np.array(tokens, dtype=np.int32)
    if vocab_size is not None and len(input_ids) and int(input_ids.max()) >= vocab_size:
        i = int((input_ids >= vocab_size).argmax())
        message = f"input_ids[{i}] is {tokens[i]}; the model has {vocab_size} tokens, from 0"
        raise RowFault("token_out_of_vocabulary", message)
    response[:1] = False
    if not response.any():
        raise RowFault("no_response", "no token responds that another one precedes")
    if not response[:max_length].any():
        first = int(response.argmax())
        raise RowFault("truncated_away", f"the answer starts at token {first} and rows are cut to {max_length} tokens")
    return TokenRow(
        row_id=row.row_id,
        source=row.source,
        line=row.line,
        id=row.id,
        input_ids=input_ids[:max_length],
        response=response[:max_length],
        truncated=max(0, len(tokens) - max_length),
    )


def _bad_row(row: Row, fault: RowFault) -> BadRow:
    record = row.record
    stored: Any = record.messages if isinstance(record, Messages) else None
    if isinstance(record, PromptCompletion):
        stored = {"prompt": record.prompt, "completion": record.completion}
    elif isinstance(record, Tokens):
        stored = {"input_ids": record.input_ids[:100], "labels": record.labels[:100]}
    excerpt = visible(json.dumps(stored, ensure_ascii=False, default=str))
    place = {"row_id": row.row_id, "source": row.source, "line": row.line}
    return BadRow(**place, reason=fault.reason, message=fault.message, excerpt=excerpt)  # type: ignore[arg-type]


class _Speller:
    """A tokenizer with what has to be known of it."""

    def __init__(self, tokenizer: Tokenizer, *, last_only: bool) -> None:
        self._tokenizer = tokenizer
        self._specials = Specials.of(tokenizer)
        self.template = ChatTemplate(tokenizer, self._specials, last_only=last_only)

    def encode(self, items: Sequence[RenderedText]) -> Iterator[_Encoded | RowFault]:
        """Tokens and response mask of each text, in order."""
        whole = [item for item in items if not item.marked] if self._tokenizer.is_fast else []
        encoded = self._call([item.text for item in whole], return_offsets_mapping=True) if whole else {}
        ready = zip(encoded.get("input_ids", ()), encoded.get("offset_mapping", ()), strict=True)
        for item in items:
            tokens, offsets = next(ready) if whole and not item.marked else ([], [])
            try:
                yield self._encode(item, tokens, offsets)
            except RowFault as fault:
                yield fault

    def _encode(self, item: RenderedText, tokens: list[int], offsets: list[tuple[int, int]]) -> _Encoded:
        spans = self._token_spans(item, tokens, offsets)
        if spans is None:
            tokens, spans = self._in_pieces(item)
        response = np.zeros(len(tokens), dtype=np.bool_)
        for start, end in spans:
            response[start:end] = True
        if item.raw:
            return self._framed(item, tokens, response)
        return tokens, response

    def _token_spans(
        self, item: RenderedText, tokens: list[int], offsets: list[tuple[int, int]]
    ) -> list[tuple[int, int]] | None:
        """The tokens of each character span, or None where they do not spell it."""
        if not tokens:
            return None
        starts, ends = np.array(offsets).T  # both (T,)
        for name, (left, right) in self._specials.greedy.items():  # its span takes in the white space beside it
            here = np.array(tokens) == self._specials.ids[name]
            if left:
                starts[here] = ends[here] - len(name)
            elif right:
                ends[here] = starts[here] + len(name)
        spans = []
        for start, end in item.spans:
            inside = np.flatnonzero((starts >= start) & (ends <= end) & (ends > start))
            if not len(inside):
                return None
            span = int(inside[0]), int(inside[-1]) + 1
            if len(inside) != span[1] - span[0] or not self._spells(tokens, span, item.text[start:end]):
                return None
            spans.append(span)
        return spans

    def _in_pieces(self, item: RenderedText) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of the text cut at the borders of its spans, and the tokens of each span. Raises RowFault."""
        tokens: list[int] = []
        spans = []
        place = 0
        for start, end in item.spans:
            tokens += self._piece(item.text[place:start], item.marked)
            first = len(tokens)
            tokens += self._piece(item.text[start:end], item.marked)
            spans.append((first, len(tokens)))
            place = end
            if any(
                right and item.text.endswith(name, start, end) for name, (_, right) in self._specials.greedy.items()
            ):
                place = len(item.text) - len(item.text[end:].lstrip())
            if not self._spells(tokens, spans[-1], item.text[start:end].replace(MARK, "")):
                message = (
                    f"the tokenizer cannot spell the answer; its tokens read {visible(self._decode(tokens[first:]))}"
                )
                raise RowFault("mask_mismatch", message)
        tokens += self._piece(item.text[place:], item.marked)
        if item.marked:
            written = len(self._specials.pattern.findall(item.text))
            ids = set(self._specials.ids.values())
            if sum(token in ids for token in tokens) != written:
                raise RowFault("mask_mismatch", "text that spells a special token cannot be kept apart from it")
        return tokens, spans

    def _piece(self, text: str, marked: bool) -> list[int]:
        if not marked:
            return self._ids_of(text)
        tokens: list[int] = []
        place = 0
        for found in self._specials.pattern.finditer(text):
            left, right = self._specials.greedy.get(found[0], (False, False))
            before = text[place : found.start()].replace(MARK, "")
            tokens += self._ids_of(before.rstrip() if left else before, split_special_tokens=True)
            tokens.append(self._specials.ids[found[0]])
            place = len(text) - len(text[found.end() :].lstrip()) if right else found.end()
        return tokens + self._ids_of(text[place:].replace(MARK, ""), split_special_tokens=True)

    def _framed(self, item: RenderedText, tokens: list[int], response: NDArray[np.bool_]) -> _Encoded:
        """Raw text with the BOS that the tokenizer adds itself and an EOS that responds."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        own = self._tokenizer("", add_special_tokens=True)["input_ids"]
        front = [bos] if bos is not None and own[:1] == [bos] and tokens[:1] != [bos] else []
        back = [eos] if eos is not None and tokens[-1:] != [eos] else []
        mask = np.concatenate([np.zeros(len(front), dtype=np.bool_), response, np.ones(len(back), dtype=np.bool_)])
        return [*front, *tokens, *back], mask

    def _ids_of(self, text: str, **options: Any) -> list[int]:
        return list(self._call(text, **options)["input_ids"]) if text else []

    def _call(self, text: str | list[str], **options: Any) -> Any:
        return self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)

    def _spells(self, tokens: list[int], span: tuple[int, int], text: str) -> bool:
        """Do the tokens of the span decode to `text`, up to the tokenizer's Unicode normal form?"""
        if _same(self._decode(tokens[span[0] : span[1]]), text):
            return True
        # decoders that drop a leading space need what stands before it
        return _same(self._decode(tokens[: span[1]]), self._decode(tokens[: span[0]]) + text)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _same(decoded: str, text: str) -> bool:
    return decoded == text or any(
        unicodedata.normalize(form, decoded) == unicodedata.normalize(form, text) for form in ("NFC", "NFKC")
    )
