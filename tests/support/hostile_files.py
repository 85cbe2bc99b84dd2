"""Files of models that say what cannot be: GGUF by its header, `tokenizer.json` by its parts."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

_TEXT, _ARRAY = 8, 9  # GGUF's kinds of values


def _u32(number: int) -> bytes:
    return struct.pack("<I", number)


def _u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def _text(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return _u64(len(raw)) + raw


def _value(key: str | bytes, kind: int, value: bytes) -> bytes:
    return _text(key) + _u32(kind) + value


def _head(tensors: int, values: int, version: int = 3) -> bytes:
    return b"GGUF" + _u32(version) + _u64(tensors) + _u64(values)


def _tensor(dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return _text("token_embd.weight") + _u32(len(dims)) + b"".join(map(_u64, dims)) + _u32(kind) + _u64(offset)


_PAD, _LLAMA = b"\0" * 64, _value("general.architecture", _TEXT, _text("llama"))
_ONE = _head(1, 1) + _LLAMA
_TWO = _head(0, 2) + _LLAMA

GGUFS: dict[str, bytes] = {
    "nothing": b"",
    "magic alone": b"GGUF",
    "tensors without end": _head(2**40, 1) + _LLAMA + _PAD,
    "tensors beyond 63 bits": _head(2**63, 1) + _LLAMA + _PAD,
    "values without end": _head(0, 2**40) + _LLAMA + _PAD,
    "long text": _head(0, 1) + _text("general.architecture") + _u32(_TEXT) + _u64(2**40) + _PAD,
    "long text in a long file": _head(0, 1) + _text("general.architecture") + _u32(_TEXT) + _u64(2**63) + b"x" * 10**6,
    "long key": _head(0, 1) + _u64(2**40) + _PAD,
    "long list of texts": _TWO + _value("tokenizer.ggml.tokens", _ARRAY, _u32(_TEXT) + _u64(2**40)) + _PAD,
    "long list of empty texts": _TWO
    + _value("tokenizer.ggml.tokens", _ARRAY, _u32(_TEXT) + _u64(2**40))
    + bytes(10**6),
    "long list of numbers": _TWO + _value("a.b", _ARRAY, _u32(0) + _u64(2**40)) + _PAD,
    "lists in lists": _TWO + _value("a.b", _ARRAY, (_u32(_ARRAY) + _u64(1)) * 20_000) + _PAD,
    "list of no kind": _TWO + _value("a.b", _ARRAY, _u32(77) + _u64(1)) + _PAD,
    "value of no kind": _TWO + _value("a.b", 99, bytes(8)) + _PAD,
    "shape beyond 64 bits": _ONE + _tensor([2**40, 2**40]) + _PAD,
    "shape beyond 63 bits": _ONE + _tensor([2**63]) + _PAD,
    "large shape": _ONE + _tensor([2**33]) + _PAD,
    "many dimensions": _ONE + _text("token_embd.weight") + _u32(2**31) + _PAD,
    "no elements": _ONE + _tensor([0, 4]) + _PAD,
    "place beyond the end": _ONE + _tensor([4, 4], offset=2**50) + _PAD,
    "last place of all": _ONE + _tensor([4, 4], offset=2**64 - 1) + _PAD,
    "place between numbers": _ONE + _tensor([4, 4], offset=3) + _PAD,
    "numbers of no kind": _ONE + _tensor([4, 4], kind=250) + _PAD,
    "tensor twice": _head(2, 1) + _LLAMA + _tensor([4]) * 2 + _PAD,
    "key twice": _head(0, 2) + _LLAMA * 2 + _PAD,
    "architecture of numbers": _head(0, 1) + _value("general.architecture", 4, _u32(7)) + _PAD,
    "architecture of none": _head(0, 0) + _PAD,
    "architecture of no letters": _head(0, 1) + _value("general.architecture", _TEXT, _text(b"\xff\xfe")) + _PAD,
    "architecture that commands": _head(0, 1) + _value("general.architecture", _TEXT, _text("\x1b[2Jx")) + _PAD,
    "key of no letters": _TWO + _value(b"\xff\xfe", 4, _u32(7)) + _PAD,
    "version 0": _head(0, 1, version=0) + _LLAMA,
    "version 99": _head(0, 1, version=99) + _LLAMA,
    "alignment 0": _TWO + _value("general.alignment", 4, _u32(0)) + _PAD,
    "alignment of text": _TWO + _value("general.alignment", _TEXT, _text("x")) + _PAD,
}


def changed_gguf(data: bytes, key: str, number: int) -> bytes:
    """A GGUF file with another number at a key."""
    mark = _text(key) + _u32(4)
    place = data.index(mark) + len(mark)
    return data[:place] + _u32(number) + data[place + 4 :]


Change = Callable[[dict[str, Any]], Any]


def _added(**changes: Any) -> Change:
    plain = {"id": 260, "content": "<new>", "special": True, "normalized": False}
    plain |= {"single_word": False, "lstrip": False, "rstrip": False}
    return lambda told: told["added_tokens"].append(plain | changes)


def _vocab(**changes: Any) -> Change:
    return lambda told: told["model"]["vocab"].update(changes)


def _model(**changes: Any) -> Change:
    return lambda told: told["model"].update(changes)


def _top(**changes: Any) -> Change:
    return lambda told: told.update(changes)


_SWELL = {"type": "Replace", "pattern": {"String": "h"}, "content": "h" * 1000}

TOKENIZERS: dict[str, Change] = {
    "unknown version": _top(version="9.9"),
    "unknown model": _model(type="Evil"),
    "no model": _top(model=None),
    "vocabulary of numbers": _model(vocab=[1, 2]),
    "ids of text": _vocab(zz="7"),
    "negative id": _vocab(zz=-1),
    "id beyond 32 bits": _vocab(zz=2**32),
    "id twice": _vocab(zz=5),
    "merge of no tokens": _model(merges=[["zz", "yy"]]),
    "merge of numbers": _model(merges=[1, 2]),
    "merges dropped": _model(dropout=0.5),
    "merges dropped too often": _model(dropout=2.0),
    "added negative": _added(id=-1),
    "added beyond 32 bits": _added(id=2**32),
    "added beyond the vocabulary": _added(id=10**6),
    "added for another": _added(id=5),
    "added twice": _added(content="<|im_end|>"),
    "added with an id of text": _added(id="7"),
    "added without end": _added(content="x" * 5_000_000),
    "nothing added": _top(added_tokens=None),
    "unknown normalizer": _top(normalizer={"type": "Evil"}),
    "normalizer that swells": _top(normalizer={"type": "Sequence", "normalizers": [_SWELL] * 4}),
    "no pattern": _top(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$("}, "content": "x"}),
    "unknown decoder": _top(decoder={"type": "x"}),
}

WHOLE_TOKENIZERS: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "not UTF-8": b"\xff" * 1000,
    "deep": b'{"a":' * 100_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
}

HARMLESS_TOKENIZERS: dict[str, Change] = {
    "truncation": _top(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
    "padding": _top(
        padding={
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<s>",
        }
    ),
}
"""Those whose settings are not for us: tokens are the same."""


def changed_json(data: bytes, change: Change) -> bytes:
    """JSON after a change."""
    told = json.loads(data)
    change(told)
    return json.dumps(told).encode()
