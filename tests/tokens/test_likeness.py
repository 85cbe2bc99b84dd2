"""Tokenizers that give the tokens of a run, and those that do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_run import renamed, small_run, write_pieces
from trainer_runs import WORDS, tokenizer
from transformers import PreTrainedTokenizerFast
from two_tokenizers import TEXTS, byte_level, padded

from alphatoken_curate import ModelError
from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.runs.schema import VOCABULARY
from alphatoken_curate.tokens.likeness import check_same_tokens
from alphatoken_curate.tokens.pieces import Piece, pieces


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose tokens are those of a byte-level tokenizer: some are no text by themselves."""
    run = small_run(tmp_path / "run")
    write_pieces(run, pieces(byte_level(TEXTS["numbers"])))
    return run


def check(run: Path, tokenizer: PreTrainedTokenizerFast, *, own: bool = True) -> None:
    check_same_tokens(run, np.arange(0, 290, 2), tokenizer, "other", do="Do it.", own=own)


def test_the_same_tokens(run: Path) -> None:
    check(run, byte_level(TEXTS["numbers"]))
    check(run, padded(byte_level(TEXTS["numbers"])))
    check(run, byte_level(TEXTS["numbers"], size=330))  # more tokens than the run has


def test_other_tokens_are_told_by_the_first(run: Path) -> None:
    here, there = (byte_level(TEXTS[name]) for name in ("english", "numbers"))
    odd = [i for i in range(0, 290, 2) if pieces(here)[i] != pieces(there)[i]]
    texts = [pieces(one)[odd[0]].content.decode() for one in (there, here)]
    with pytest.raises(ModelError) as caught:
        check(run, here)
    assert str(caught.value) == (
        f"other: not the tokenizer of {run}, whose rows are tokens of base: token {odd[0]} is {texts[0]!r}"
        f" there and {texts[1]!r} here, the first of {len(odd)} that differ among the 145 that the rows use. Do it."
    )
    with pytest.raises(ModelError, match="Do it"):
        check(run, here, own=False)


def test_bytes_that_are_no_text_are_compared_too(run: Path) -> None:
    """A part of a character is U+FFFD as text, whatever part it is."""
    found = pieces(byte_level(TEXTS["numbers"]))
    cut = [i for i, one in enumerate(found) if one.content in (b"\xc3", b"\xe2")]
    found[cut[0]], found[cut[1]] = found[cut[1]], found[cut[0]]
    write_pieces(run, found)
    with pytest.raises(ModelError, match="first of 2 that differ"):
        check_same_tokens(run, np.array(cut), byte_level(TEXTS["numbers"]), "other", do="")


def test_tokens_that_the_other_lacks(run: Path) -> None:
    short = byte_level(TEXTS["numbers"], size=270)
    with pytest.raises(ModelError, match=r"token 270 is '.*' there and none here, the first of 10 that differ"):
        check(run, short)
    check(run, short, own=False)


def test_tokens_that_the_rows_do_not_use_may_differ(run: Path) -> None:
    found = pieces(byte_level(TEXTS["numbers"]))
    found[5] = Piece(content=b"other", special=False)
    write_pieces(run, found)
    check(run, byte_level(TEXTS["numbers"]))
    found[6] = Piece(content=b"", special=False)  # stands for nothing that is known
    write_pieces(run, found)
    check(run, byte_level(TEXTS["numbers"]))


def test_renamed_special_tokens(run: Path) -> None:
    found = pieces(byte_level(TEXTS["numbers"]))
    found[0] = Piece(content=b"<begin>", special=True)
    write_pieces(run, found)
    check(run, byte_level(TEXTS["numbers"]), own=False)
    with pytest.raises(ModelError, match=r"token 0 is '<begin>' there and '<s>' here"):
        check(run, byte_level(TEXTS["numbers"]))


def test_texts_of_an_early_run_are_compared(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    pq.write_table(pq.read_table(run / VOCABULARY).select(["token_id", "text"]), run / VOCABULARY)
    renamed(run)
    ids = np.arange(len(WORDS))
    check_same_tokens(run, ids, tokenizer(), "other", do="")
    with pytest.raises(ModelError, match="token 9 is '<9>' there and 'x' here"):
        check_same_tokens(run, ids, tokenizer([*WORDS[:9], "x", *WORDS[10:]]), "other", do="")


def test_a_run_without_a_vocabulary_has_nothing_to_compare_with(run: Path) -> None:
    (run / VOCABULARY).write_bytes((run / VOCABULARY).read_bytes()[:-9])
    with pytest.raises(StoredDataError, match="vocab"):
        check(run, tokenizer())
    (run / VOCABULARY).unlink()
    check(run, tokenizer())
