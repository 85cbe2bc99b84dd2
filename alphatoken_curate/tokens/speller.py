"""Text becomes tokens and the mask of those that respond.

The text is tokenised whole, once, and character spans are mapped to tokens. The tokens of every response are then
decoded and must spell the answer and its end-of-turn token exactly. Where a token straddles the border (a byte-level
token may even hold half a character of either side) the text is cut at the borders and tokenised in pieces, so that
the border is one between tokens; where even that does not spell the answer, the row is refused.

Text of a chat that spells a special token stays text (see `chat`). Raw text is the exception: there special tokens are
recognised, since ready-made chats are stored so. A BOS goes in front of it where the tokenizer adds one and, behind a
completion that does not end with it, an EOS that responds.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.files import visible
from alphatoken_curate.tokens.chat import MARK, ChatSettings, ChatTemplate, RenderedText, Specials, Tokenizer

_CARRIERS = ("\n", "x", ".")

Spelled = tuple[list[int], NDArray[np.bool_]]
"""T tokens and their response mask, shape (T,)."""


class Speller:
    """A tokenizer with what has to be known of it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        last_only: bool,
        chats: ChatSettings,
    ) -> None:
        self._tokenizer = tokenizer
        self._specials = Specials.of(tokenizer)
        self.template = ChatTemplate(tokenizer, self._specials, last_only=last_only, chats=chats)

    def encode(self, items: Sequence[RenderedText]) -> Iterator[Spelled | RowFault]:
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

    def _encode(self, item: RenderedText, tokens: list[int], offsets: list[tuple[int, int]]) -> Spelled:
        spans = self._token_spans(item, tokens, offsets)
        return self.encode_in_pieces(item) if spans is None else self._framed(item, tokens, spans)

    def encode_in_pieces(self, item: RenderedText) -> Spelled:
        """Tokens and response mask of the text cut at the borders of its spans. Raises RowFault."""
        return self._framed(item, *self._in_pieces(item))

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
            if len(inside) != span[1] - span[0] or not self._spells(tokens, span, item.text[start:end], raw=item.bos):
                return None
            spans.append(span)
        return spans

    def _in_pieces(self, item: RenderedText) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of the text cut at the borders of its spans, and the tokens of each span. Raises RowFault."""
        tokens: list[int] = []
        spans = []
        place = 0
        for start, end in item.spans:
            tokens += self._piece(item.text[place:start], item.marked, tokens)
            first = len(tokens)
            tokens += self._piece(item.text[start:end], item.marked, tokens)
            spans.append((first, len(tokens)))
            place = end
            if any(
                right and item.text.endswith(name, start, end) for name, (_, right) in self._specials.greedy.items()
            ):
                place = len(item.text) - len(item.text[end:].lstrip())
            if not self._spells(tokens, spans[-1], item.text[start:end].replace(MARK, ""), raw=item.bos):
                message = (
                    f"the tokenizer cannot spell the answer; its tokens read {visible(self._decode(tokens[first:]))}"
                )
                raise RowFault("mask_mismatch", message)
        tokens += self._piece(item.text[place:], item.marked, tokens)
        if item.marked:
            written = len(self._specials.pattern.findall(item.text))
            if sum(token in self._special_ids for token in tokens) != written:
                raise RowFault("mask_mismatch", "text that spells a special token cannot be kept apart from it")
        return tokens, spans

    def _piece(self, text: str, marked: bool, before: Sequence[int]) -> list[int]:
        """The tokens of a piece of text that stands behind the tokens `before`."""
        if not marked:
            return self._following(text, before)
        tokens: list[int] = []
        place = 0
        for found in self._specials.pattern.finditer(text):
            left, right = self._specials.greedy.get(found[0], (False, False))
            apart = text[place : found.start()].replace(MARK, "")
            apart = apart.rstrip() if left else apart
            tokens += self._behind(apart, [*before, *tokens])
            tokens.append(self._specials.ids[found[0]])
            place = len(text) - len(text[found.end() :].lstrip()) if right else found.end()
        return tokens + self._behind(text[place:].replace(MARK, ""), [*before, *tokens])

    def _behind(self, text: str, before: Sequence[int]) -> list[int]:
        """The tokens of text in which no special token is meant; behind one it begins as text does."""
        is_begun = bool(before) and before[-1] not in self._special_ids
        return self._following(text, before if is_begun else (), split_special_tokens=True)

    def _following(self, text: str, before: Sequence[int], **options: Any) -> list[int]:
        """The tokens of text that goes on behind others.

        Older SentencePiece tokenizers put a space in front of whatever they are given. The text is given to them
        behind a character that is taken off again, where it would not go on without a space otherwise.
        """
        tokens = self._ids_of(text, **options)
        if not text or not before or not self._begins_with_a_space or self._goes_on(before, tokens, text):
            return tokens
        for carrier in _CARRIERS:
            alone, both = self._ids_of(carrier, **options), self._ids_of(carrier + text, **options)
            rest = both[len(alone) :]
            if both[: len(alone)] == alone and self._goes_on(before, rest, text):
                return rest
        return tokens

    @cached_property
    def _begins_with_a_space(self) -> bool:
        """Whether text that is tokenised in two pieces decodes otherwise than as one."""
        return self._decode(self._ids_of("x") * 2) != "xx"

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._specials.ids.values())

    def _framed(self, item: RenderedText, tokens: list[int], spans: list[tuple[int, int]]) -> Spelled:
        """Tokens and response mask, with the BOS that the tokenizer adds itself and an EOS that responds."""
        response = np.zeros(len(tokens), dtype=np.bool_)
        for start, end in spans:
            response[start:end] = True
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        front = [bos] if item.bos and tokens[:1] != [bos] and self._adds_bos() else []
        back = [eos] if item.eos and eos is not None and tokens[-1:] != [eos] else []
        mask = np.concatenate([np.zeros(len(front), dtype=np.bool_), response, np.ones(len(back), dtype=np.bool_)])
        return [*front, *tokens, *back], mask

    def _adds_bos(self) -> bool:
        bos = self._tokenizer.bos_token_id
        return bos is not None and self._tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]

    def _ids_of(self, text: str, **options: Any) -> list[int]:
        return list(self._call(text, **options)["input_ids"]) if text else []

    def _call(self, text: str | list[str], **options: Any) -> Any:
        return self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)

    def _spells(self, tokens: list[int], span: tuple[int, int], text: str, *, raw: bool) -> bool:
        """Do the tokens of the span decode to `text`, up to the tokenizer's Unicode normal form?

        Of `raw` text the tokens up to there must decode to the text up to there: no space comes in at the border.
        """
        if not (raw and self._begins_with_a_space) and _same(self._decode(tokens[span[0] : span[1]]), text):
            return True
        # decoders that drop a leading space need what stands before it
        return self._goes_on(tokens[: span[0]], tokens[span[0] : span[1]], text)

    def _goes_on(self, before: Sequence[int], tokens: Sequence[int], text: str) -> bool:
        return _same(self._decode([*before, *tokens]), self._decode(before) + text)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _same(decoded: str, text: str) -> bool:
    return decoded == text or any(
        unicodedata.normalize(form, decoded) == unicodedata.normalize(form, text) for form in ("NFC", "NFKC")
    )
