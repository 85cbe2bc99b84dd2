"""Text of tokens put together, and their classes."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import renamed, small_run, write_pieces

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.reading.words import (
    CLASSES,
    PART,
    Vocabulary,
    class_of,
    classes,
    joined,
    read_vocabulary,
    scan_vocabulary,
    spelled,
)
from alphatoken_curate.tokens.pieces import Piece, pieces


def vocabulary_of(*contents: bytes) -> Vocabulary:
    """Tokens 0, 1, ... of these bytes."""
    return Vocabulary(
        pieces=dict(enumerate(contents)),
        texts={number: content.decode("utf-8", "replace") for number, content in enumerate(contents)},
        special=frozenset(),
    )


def texts_of(*contents: bytes) -> list[str]:
    return spelled(range(len(contents)), vocabulary_of(*contents))


@pytest.mark.parametrize(
    ("contents", "texts"),
    [
        ([b"caf", b"\xc3", b"\xa9", b"!"], ["caf", PART, "é", "!"]),
        ([b" \xf0\x9f", b"\x99", b"\x82 ok"], [" ", PART, "🙂 ok"]),
        (["日".encode()[:2], "日".encode()[2:] + "本".encode()[:1], "本".encode()[1:]], [PART, "日", "本"]),
        # bytes that no later token makes a character
        ([b"a\xe2", b"b"], ["a" + PART, "b"]),
        ([b"\xe2\x82", b"", b"\xac"], [PART, "<1>", PART]),
        ([b"\xff\xfe\xff", b"x\xff"], [PART, "x" + PART]),
        ([b"\xe2\x82", b"\xac\xe2\x82", b"\xac"], [PART, "€", "€"]),
        # the character U+FFFD itself
        ([b"\xef\xbf\xbd", b"a"], ["\ufffd", "a"]),
        ([b"\xe2", b"\xef\xbf\xbd"], [PART, "\ufffd"]),
        ([b"\xed\xa0", b"\x80"], [PART, PART]),
        ([], []),
    ],
)
def test_a_character_stands_where_its_last_byte_does(contents: list[bytes], texts: list[str]) -> None:
    assert texts_of(*contents) == texts


@given(st.text(max_size=12), st.lists(st.integers(1, 4), min_size=1))
def test_however_a_text_is_cut_it_reads_the_same(text: str, sizes: list[int]) -> None:
    content = text.encode("utf-8", "ignore")
    text = content.decode().replace(PART, "")
    content, contents = text.encode(), []
    while content:
        size = sizes[len(contents) % len(sizes)]
        contents.append(content[:size])
        content = content[size:]
    found = texts_of(*contents)
    assert "".join(found).replace(PART, "") == text
    assert all(found)
    assert joined(range(len(contents)), vocabulary_of(*contents)) == text


@given(st.lists(st.binary(min_size=1, max_size=4), max_size=6))
def test_any_bytes_give_a_text_for_every_token(contents: list[bytes]) -> None:
    found = texts_of(*contents)
    assert len(found) == len(contents) and all(found)
    # Only how many U+FFFD stand for bytes that are no text may differ.
    whole = b"".join(contents).decode("utf-8", "replace")
    assert "".join(found).replace(PART, "") == whole.replace(PART, "")


def test_tokens_that_are_not_known_are_shown_by_number() -> None:
    assert spelled([1, 7], vocabulary_of(b"a", b"b")) == ["b", "<7>"]
    assert joined([1, 7, 0], vocabulary_of(b"a", b"b")) == "ba"


def test_real_text_in_pieces_of_characters(smollm2_tokenizer: Any) -> None:
    text = "naïve 🙂👩‍👧 日本語 ह‍िन्दी e\u0301 \u202eabc"
    ids = smollm2_tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(smollm2_tokenizer)
    vocabulary = vocabulary_of(*(piece.content for piece in found))
    parts = spelled(ids, vocabulary)
    assert PART in parts
    assert "".join(parts).replace(PART, "") == joined(ids, vocabulary) == text


def test_a_vocabulary_is_read_whole_in_part_or_not_at_all(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    write_pieces(run, [Piece(content=f"{i}".encode(), special=i == 3) for i in range(5)])
    whole, some = read_vocabulary(run), read_vocabulary(run, [3, 1, 3, 99])
    assert whole.texts == {i: str(i) for i in range(5)}
    assert some.pieces == {1: b"1", 3: b"3"}
    assert whole.special == some.special == {3}
    (run / "artifacts/vocab.parquet").unlink()
    assert read_vocabulary(run).pieces == {} and scan_vocabulary(run) is None


@pytest.mark.one_in(2)
@pytest.mark.parametrize("read", [read_vocabulary, scan_vocabulary])
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    run = small_run(tmp_path / "run")
    path = run / "artifacts/vocab.parquet"
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(len(whole) * 8), 50):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(StoredDataError, match=r"vocab\.parquet: damaged"):
            read(run)
    for content, found in ((b"no Parquet", ""), (None, r" \(its columns are not token_id, piece")):
        if content is None:
            pq.write_table(pa.table({"token_id": pa.array([1], pa.int32()), "letters": ["a"]}), path)
        else:
            path.write_bytes(content)
        renamed(run)
        with pytest.raises(StoredDataError, match=rf"vocab\.parquet: damaged{found}"):
            read(run)


# ------------------------------------------------------------------------------------------------- classes of tokens

EXAMPLES = {
    "digits": ["4", " 12", "3.14", "1,000", " 2024\n", ".5", "٣", "½", "1."],
    "words": [
        "the",
        " Don't",
        "'s",
        "’t",
        "don’t",
        "well-known",
        " naïve",
        "слово",
        "日本語",
        "e\u0301",
        "हिन्दी",
        PART,
    ],
    "punctuation": [".", ", ", "...", "!?", '"', " (", ").", "—", "$", "%", "#", ":\n", "\u0301\u2026"],
    "whitespace": [" ", "\n\n", "\t", "", "\u00a0", "\u200b", "\u202e", "\x00", " \r\n"],
    "code": ["x_1", "{", "[]", "==", "<<", "=", " +", "a1", "()", "();", ".append", "**", "`", "</", "https://", "24="],
}
EXAMPLES["punctuation"] += ["🙂", "👩\u200d👧", "❤\ufe0f"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_classes_by_example(name: str) -> None:
    texts = EXAMPLES[name]
    assert dict(zip(texts, classes(texts, [False] * len(texts)), strict=True)) == dict.fromkeys(texts, name)


def test_special_tokens_are_special_and_what_has_no_text_no_class() -> None:
    assert classes(["a", " ", "<|im_end|>"], [True, True, True]) == ["special"] * 3
    frame = pl.DataFrame({"text": ["a", None]}, schema={"text": pl.String}).with_columns(special=pl.lit(False))
    assert frame.select(class_of(pl.col("text"), pl.col("special"))).to_series().to_list() == ["words", None]


def plain_class(text: str) -> str:
    """The same by Python's own tables of characters, in so far as they say it simply."""
    kinds = {unicodedata.category(c)[0] for c in text} - set("ZC")
    if not kinds:
        return "whitespace"
    if re.search(r"[_{}\[\]<>=+*/\\|^~`]|\(\)", text):
        return "code"
    inner = {unicodedata.category(c)[0] for c in text.strip()}
    if inner == {"N"}:
        return "digits"
    if not inner - set("LM"):
        return "words"
    return "punctuation" if not inner - set("PS") else "either"


@given(
    st.text(alphabet=st.characters(codec="utf-8", max_codepoint=0x2FFF, exclude_categories=["Cn", "Co"]), max_size=4)
)
def test_every_text_has_one_class(text: str) -> None:
    (found,) = classes([text], [False])
    assert found in CLASSES
    wanted = plain_class(text)
    assert wanted in (found, "either")
