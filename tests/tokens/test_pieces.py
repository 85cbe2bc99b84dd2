"""The true bytes of tokens, against what the tokenizers themselves decode."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alphatoken_curate.runs.schema import VOCABULARY_COLUMNS
from alphatoken_curate.tokens.pieces import Piece, pieces, vocabulary_table

TEXTS = [
    "What is 48/2? The answer is 24.",
    "  two spaces,\ttab\n\nand lines ",
    "naïve café, Ångström, ÿþ",
    "日本語のテキスト и русский ह‍िन्दी العربية",
    "🙂👩‍👧🏽 e\u0301 \u202eabc\u202c \x00\x1b[31m",
    "<|im_end|> is text here",
]


def wrapped(inner: tokenizers.Tokenizer) -> Any:
    """A tokenizer of transformers of which `<unk>` and `</s>` are special and `<tool>` is added text."""
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    made.add_tokens(["<tool>", "a▁b"])
    return made


def sentencepiece(decoder: decoders.Decoder, **options: Any) -> Any:
    """Spaces as `▁`, and bytes for what has no piece of its own, as Llama and Gemma have it."""
    known = [*"▁abcdeht", "▁a", "▁the", "he", "the", "▁t", "th"]
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *known]
    merges = [("▁", "a"), ("▁", "t"), ("t", "h"), ("th", "e"), ("h", "e"), ("▁", "the")]
    model = models.BPE(
        {name: place for place, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    inner = tokenizers.Tokenizer(model)
    inner.decoder = decoder
    for name, value in options.items():
        setattr(inner, name, value)
    return wrapped(inner)


def llama() -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    spaced = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece(decoders.Sequence(steps), normalizer=spaced)


def gemma() -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return sentencepiece(decoders.Sequence(steps), normalizer=normalizers.Replace(" ", "▁"))


def metaspace() -> Any:
    spaced = pre_tokenizers.Metaspace("▁", "always", split=False)
    return sentencepiece(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")]), pre_tokenizer=spaced
    )


def byte_level() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "</s>", *letters, "he", "the", "Ġthe", "Ã©"]
    merges = [("h", "e"), ("t", "he"), ("Ġ", "the"), ("Ã", "©")]
    model = models.BPE({name: place for place, name in enumerate(names)}, merges, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return wrapped(inner)


KINDS = {"byte level": byte_level, "llama": llama, "gemma": gemma, "metaspace": metaspace}
MADE = {name: make() for name, make in KINDS.items()}
FOUND = {name: pieces(made) for name, made in MADE.items()}


def joined(tokenizer: Any, found: list[Piece], text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return b"".join(found[number].content for number in ids).decode()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_text_are_the_text(name: str, text: str) -> None:
    # Llama and its like write a space in front, which their decoder drops.
    front = [" "] if name in ("llama", "metaspace") else []
    assert joined(MADE[name], FOUND[name], text) in [text, *(space + text for space in front)]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_any_text_is_its_bytes(text: str) -> None:
    text = text.replace("▁", "").encode("utf-8", "ignore").decode()
    for name in ("byte level", "gemma"):
        assert joined(MADE[name], FOUND[name], text) == text


def test_every_text_of_a_real_tokenizer_is_its_bytes(smollm2_tokenizer: Any) -> None:
    found = pieces(smollm2_tokenizer)
    assert len(found) == len(smollm2_tokenizer)
    for text in TEXTS:
        assert joined(smollm2_tokenizer, found, text) == text
    special = {number for number, token in smollm2_tokenizer.added_tokens_decoder.items() if token.special}
    assert special == {number for number, piece in enumerate(found) if piece.special}
    assert {found[number].content for number in special} >= {b"<|im_start|>", b"<|im_end|>", b"<|endoftext|>"}


@pytest.mark.parametrize("name", KINDS)
def test_added_tokens_are_their_text_and_only_some_are_special(name: str) -> None:
    found = {piece.content: piece.special for piece in FOUND[name]}
    assert found[b"</s>"] and found[b"<unk>"]
    assert found[b"<tool>"] is False
    assert found["a▁b".encode()] is False


def test_a_leading_space_and_a_byte_of_sentencepiece() -> None:
    tokenizer, found = MADE["gemma"], FOUND["gemma"]
    contents = {name: found[number].content for name, number in tokenizer.get_vocab().items()}
    assert contents["▁the"] == b" the"
    assert contents["<0xE2>"] == b"\xe2"
    assert contents["<0x0A>"] == b"\n"


def test_a_tokenizer_of_another_kind_is_asked_for_each_token() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "word": 2, "ha▁lf": 3}, unk_token="<unk>"))
    found = pieces(wrapped(inner))
    assert [piece.content.decode() for piece in found] == ["<unk>", "</s>", "word", "ha▁lf", "<tool>", "a▁b"]


def test_ids_that_stand_for_nothing_have_no_bytes() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "word": 3}, unk_token="<unk>"))
    found = pieces(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>"))
    assert found[2] == Piece(content=b"", special=False)


def test_the_table_has_each_text_alone() -> None:
    table = vocabulary_table([Piece(content=b" caf", special=False), Piece(content=b"\xc3", special=True)])
    assert table.schema.equals(VOCABULARY_COLUMNS)
    assert table.to_pylist() == [
        {"token_id": 0, "piece": b" caf", "text": " caf", "special": False},
        {"token_id": 1, "piece": b"\xc3", "text": "\ufffd", "special": True},
    ]
