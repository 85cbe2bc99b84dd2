"""The true bytes of every token of a tokenizer, so that characters that tokens split can be put together again.

Byte-level BPE writes each byte as a character of an alphabet of its own; sentencepiece writes spaces as `▁` and a byte
it has no piece for as `<0x0A>`. What decodes a single token loses both: half a character becomes U+FFFD, and the space
in front of a word is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa

from alphatoken_curate.runs.schema import VOCABULARY_COLUMNS
from alphatoken_curate.tokens.chat import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


class Piece(NamedTuple):
    """One token: the bytes it stands for, and whether it is special (`<|im_end|>`), not text."""

    content: bytes
    special: bool


def pieces(tokenizer: Tokenizer) -> list[Piece]:
    """Every token by its id; ids that stand for nothing have no bytes.

    Of a tokenizer that is neither byte-level nor writes spaces as `▁`, what each token decodes to alone.
    """
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    spell = _speller(tokenizer)
    found = []
    for number, name in enumerate(names):
        text = added[number].content.encode() if number in added else b"" if name is None else spell(number, name)
        found.append(Piece(content=text, special=number in special))
    return found


def vocabulary_table(found: list[Piece]) -> pa.Table:
    """A table of `schema.VOCABULARY_COLUMNS`. `text`: the bytes decoded alone, U+FFFD where they cut a character."""
    columns = {
        "token_id": range(len(found)),
        "piece": [one.content for one in found],
        "text": [one.content.decode("utf-8", "replace") for one in found],
        "special": [one.special for one in found],
    }
    return pa.table(columns, schema=VOCABULARY_COLUMNS)


def _speller(tokenizer: Tokenizer) -> Callable[[int, str], bytes]:
    """How this tokenizer's tokens, (id, name), become bytes."""
    kinds, replaced = _decoder(tokenizer)
    if "ByteLevel" in kinds or getattr(tokenizer, "byte_decoder", None):
        alphabet = {ord(letter): byte for byte, letter in enumerate(_letters())}
        return lambda _, name: _from_letters(name, alphabet)
    if _SPACE in replaced or "Metaspace" in kinds or getattr(tokenizer, "sp_model", None):
        return lambda _, name: _from_sentencepiece(name)
    return lambda number, _: str(tokenizer.decode([number], clean_up_tokenization_spaces=False)).encode()


def _decoder(tokenizer: Tokenizer) -> tuple[set[str], set[str]]:
    """The kinds of steps its decoder takes, and the texts it replaces."""
    if not tokenizer.is_fast:
        return set(), set()
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    patterns = [step.get("pattern", {}) for step in steps if step.get("type") == "Replace"]
    return {step["type"] for step in steps if "type" in step}, {pattern.get("String", "") for pattern in patterns}


def _letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable ones as they are, the others from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _from_letters(name: str, alphabet: dict[int, int]) -> bytes:
    try:
        return bytes(alphabet[ord(letter)] for letter in name)
    except KeyError:  # a token that was added as text
        return name.encode()


def _from_sentencepiece(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode()
