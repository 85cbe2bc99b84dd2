"""Text becomes tokens and the mask of those that respond.

The text is tokenised whole, once, and character spans are mapped to tokens. The tokens of every response are then
decoded and must spell the answer and its end-of-turn token exactly. Where a token straddles the border (a byte-level
token may even hold half a character of either side) the text is cut at the borders and tokenised in pieces, so that
the border is one between tokens; where even that does not spell the answer, or a space is put in or lost at a border,
the row is refused. Some tokenizers put a space before each text: none is put before a piece that text stands before.

Text of a chat that spells a special token stays text (see `chat`). Raw text is the exception: there special tokens are
recognised, since ready-made chats are stored so. What the tokenizer adds, a BOS mostly, goes in front of it and, behind
a completion that does not end with it, an EOS that responds.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.files import visible
from alphatoken_curate.tokens.chat import MARK, ChatSettings, ChatTemplate, RenderedText, Tokenizer
from alphatoken_curate.tokens.specials import Specials

_SPACES = ("▁", "Ġ")
"""How vocabularies write the space before a word."""

_ANCHORS = ("\n", ":", "a")
"""Texts to put before a piece, so that the space goes before them; one that melts into the piece will not do."""


class Spelled(NamedTuple):
    """T tokens, their response mask, shape (T,), and which of those that respond end an answer, shape (T,).

    `cut`: whether the text by itself has a token of the space that ends the prompt and what the answer begins with.
    """

    tokens: list[int]
    response: NDArray[np.bool_]
    end_of_turn: NDArray[np.bool_]
    cut: bool = False


def closing_stops(tokens: Sequence[int], response: NDArray[np.bool_], stops: Collection[int]) -> NDArray[np.bool_]:
    """Of tokens that are given as such: the stops (T,) behind which, in their run of the response, nothing is said."""
    stop = response & np.isin(np.array(tokens, np.int64), list(stops))
    found = np.zeros(len(stop), np.bool_)
    for last in np.flatnonzero(stop & ~np.append(response[1:], False)):
        place = int(last)
        while place >= 0 and stop[place]:
            found[place] = True
            place -= 1
    return found


class Speller:
    """A tokenizer with what has to be known of it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        turns: str,
        chats: ChatSettings,
    ) -> None:
        self._tokenizer = tokenizer
        self._specials = Specials.of(tokenizer, chats.stops)
        self._stops = {tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, chats.stops)} - {None}
        self.template = ChatTemplate(tokenizer, self._specials, turns=turns, chats=chats)

    def encode(self, items: Sequence[RenderedText]) -> Iterator[Spelled | RowFault]:
        """Tokens and response mask of each text, in order."""
        whole = [item for item in items if not item.marked] if self._tokenizer.is_fast else []
        try:
            encoded = self._call([item.text for item in whole], return_offsets_mapping=True) if whole else {}
        except RowFault:  # told of the texts that it is of, each by itself
            whole, encoded = [], {}
        ready = zip(encoded.get("input_ids", ()), encoded.get("offset_mapping", ()), strict=True)
        for item in items:
            tokens, offsets = next(ready) if whole and not item.marked else ([], [])
            try:
                yield self._encode(item, tokens, offsets)
            except RowFault as fault:
                yield fault

    def _encode(self, item: RenderedText, tokens: list[int], offsets: list[tuple[int, int]]) -> Spelled:
        spans = self._token_spans(item, tokens, offsets)
        if spans is not None:
            return self._framed(item, tokens, spans)
        return self.encode_in_pieces(item)._replace(cut=_cuts_a_word(item, offsets))

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
            if len(inside) != span[1] - span[0] or not self._spells(tokens, span, self._kept(item.text, start, end)):
                return None
            spans.append(span)
        return spans

    def _in_pieces(self, item: RenderedText) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of the text cut at the borders of its spans, and the tokens of each span. Raises RowFault."""
        tokens: list[int] = []
        spans = []
        place = 0
        for start, end in item.spans:
            tokens += self._piece(item, place, start)
            first = len(tokens)
            tokens += self._piece(item, self._behind_greedy(item.text, start), end)
            spans.append((first, len(tokens)))
            place = self._behind_greedy(item.text, end)
            if not self._spells(tokens, spans[-1], self._kept(item.text, start, end).replace(MARK, "")):
                message = (
                    f"the tokenizer cannot spell the answer; its tokens read {visible(self._decode(tokens[first:]))}"
                )
                raise RowFault("mask_mismatch", message)
        tokens += self._piece(item, place, len(item.text))
        if not self._is_whole(tokens, item):
            raise RowFault("mask_mismatch", "the tokenizer puts in or loses a space where an answer begins or ends")
        if item.marked:
            written = len(self._specials.pattern.findall(item.text))
            ids = set(self._specials.ids.values())
            if sum(token in ids for token in tokens) != written:
                raise RowFault("mask_mismatch", "text that spells a special token cannot be kept apart from it")
        return tokens, spans

    def _behind_greedy(self, text: str, place: int) -> int:
        """`place`, or behind the white space there that a control token before it takes in."""
        before = text[:place].rstrip()
        if any(right and before.endswith(name) for name, (_, right) in self._specials.greedy.items()):
            return len(text) - len(text[len(before) :].lstrip())
        return place

    def _kept(self, text: str, start: int, end: int) -> str:
        """A span without the white space that control tokens take in."""
        if not self._specials.greedy:
            return text[start:end]
        kept, place = "", self._behind_greedy(text, start)
        for found in self._specials.pattern.finditer(text, place, end):
            left, right = self._specials.greedy.get(found[0], (False, False))
            before = text[place : found.start()]
            kept += (before.rstrip() if left else before) + found[0]
            place = self._behind_greedy(text, found.end()) if right else found.end()
        return kept + text[place:end]

    def _is_whole(self, tokens: list[int], item: RenderedText) -> bool:
        """Whether tokens of pieces read as the text does, or as the tokens of the whole text if those read otherwise.

        But for spaces behind special tokens, where some tokenizers put one in.
        """

        def bare(text: str) -> str:
            return self._behind_special.sub(lambda found: found[1], text).lstrip(" ")

        text = item.text.replace(MARK, "")
        read = bare(self._decode(tokens))
        if _same(read, bare(self._kept(item.text, 0, len(item.text)).replace(MARK, ""))):
            return True
        plain = bare(self._decode(self._ids_of(text)))
        return read == plain or (item.marked and not _same(plain, bare(text)))

    def _piece(self, item: RenderedText, start: int, end: int) -> list[int]:
        """Tokens of a piece of the text."""
        if not item.marked:
            return self._ids_within(item.text, start, end)
        tokens: list[int] = []
        place = start
        for found in self._specials.pattern.finditer(item.text, start, end):
            left, right = self._specials.greedy.get(found[0], (False, False))
            before = item.text[place : found.start()]
            stop = place + len(before.rstrip()) if left else found.start()
            tokens += self._ids_within(item.text, place, stop, split_special_tokens=True)
            tokens.append(self._specials.ids[found[0]])
            place = self._behind_greedy(item.text[:end], found.end()) if right else found.end()
        return tokens + self._ids_within(item.text, place, end, split_special_tokens=True)

    def _ids_within(self, text: str, start: int, end: int, **options: Any) -> list[int]:
        """Tokens of a piece without the space that the tokenizer puts before a whole text, if other text precedes."""
        piece, before = text[start:end].replace(MARK, ""), text[:start]
        if not piece or not before or not self._puts_space:
            return self._ids_of(piece, **options)
        if self._space_behind_specials and any(
            one.end() == start for one in self._specials.pattern.finditer(text, 0, start)
        ):
            return self._ids_of(piece, **options)
        for anchor in _ANCHORS:
            front, both = self._ids_of(anchor, **options), self._ids_of(anchor + piece, **options)
            if both[: len(front)] == front:
                return both[len(front) :]
        return self._ids_of(piece, **options)

    @cached_property
    def _puts_space(self) -> bool:
        """Whether the tokenizer puts a space before a text."""
        names = self._tokenizer.convert_ids_to_tokens(self._ids_of("a"))
        return bool(names) and str(names[0]).startswith(_SPACES)

    @cached_property
    def _space_behind_specials(self) -> bool:
        """And before the text behind a special token, too."""
        name = next(iter(self._specials.ids), "")
        return bool(name) and self._ids_of(name + "a")[1:] == self._ids_of("a")

    @cached_property
    def _behind_special(self) -> re.Pattern[str]:
        return re.compile(f"({self._specials.pattern.pattern}) +")

    def _framed(self, item: RenderedText, tokens: list[int], spans: list[tuple[int, int]]) -> Spelled:
        """Tokens and response mask, with the BOS that the tokenizer adds itself and an EOS that responds."""
        response, ends = np.zeros((2, len(tokens)), dtype=np.bool_)
        special = np.isin(np.array(tokens, np.int64), list(self._specials.ids.values()))
        for (start, end), closing in zip(spans, item.closings or [0] * len(spans), strict=True):
            response[start:end] = True
            places = start + np.flatnonzero(special[start:end])
            ends[places[max(0, len(places) - closing) :]] = True
        eos, front = self._tokenizer.eos_token_id, self._front if item.bos else []
        front = [] if tokens[: len(front)] == front else front
        back = [eos] if item.eos and eos is not None and tokens[-1:] != [eos] else []
        before, behind = np.zeros(len(front), dtype=np.bool_), np.ones(len(back), dtype=np.bool_)
        whole, mask = [*front, *tokens, *back], np.concatenate([before, response, behind])
        closed = closing_stops(whole, mask, self._stops) if item.eos else np.concatenate([before, ends, behind])
        return Spelled(whole, mask, closed)

    @cached_property
    def _front(self) -> list[int]:
        """What the tokenizer puts before a text: mostly BOS, of some models other tokens."""
        bare, whole = self._ids_of("a"), self._tokenizer("a", add_special_tokens=True)["input_ids"]
        places = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return list(whole[: next(places, 0)])

    def _ids_of(self, text: str, **options: Any) -> list[int]:
        return list(self._call(text, **options)["input_ids"]) if text else []

    def _call(self, text: str | list[str], **options: Any) -> Any:
        try:
            return self._tokenizer(
                text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
            )
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # of Rust; no module has its class
                why = f"the tokenizer breaks off at it: {visible(str(error), 60)}"
                raise RowFault("tokenizer_fails", f"{why}; look at the patterns in its tokenizer.json") from None
            raise

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


def _cuts_a_word(item: RenderedText, offsets: Sequence[tuple[int, int]]) -> bool:
    """Whether a token of the whole text holds the space that ends the prompt and the first of the answer."""
    first = item.spans[0][0] if item.spans else 0
    within = any(start < first < end for start, end in offsets)
    return within and item.text[first - 1] == " " and not item.text[first].isspace()
