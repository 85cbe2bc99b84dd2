"""The text of tokens: characters that tokens split put together, and what class of text a token is.

Text comes from training data. Nothing here makes it safe to show: see `heat.readable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alphatoken_curate.runs.schema import VOCABULARY
from alphatoken_curate.runs.vocabulary import is_whole, read_table, sound

PART = "\ufffd"
"""The text of a token that ends no character: it is a part of one that a later token ends."""

CLASSES = ("digits", "words", "punctuation", "whitespace", "code", "special")
"""Classes of tokens, in the order they are told in."""

Ids = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Vocabulary:
    """Tokens by id: the `pieces` of text they stand for, their `texts` alone, and which are `special`.

    A text has U+FFFD where its piece cuts a character. Spaces in front of words are there. Tokens that stand for
    nothing, and all of a run that was given as tokens, are missing or empty. The vocabulary of an early run has texts
    alone: no pieces, and which are special is None.
    """

    pieces: Mapping[int, bytes]
    texts: Mapping[int, str]
    special: frozenset[int] | None


def read_vocabulary(run: Path, ids: Ids | None = None) -> Vocabulary:
    """The tokens of a run, or only those of `ids`; none where it has no vocabulary.

    Raises `StoredDataError` where it is not the one that the run wrote.
    """
    table = read_table(run)
    if table is None:
        return Vocabulary(pieces={}, texts={}, special=frozenset())
    whole = is_whole(table.schema)
    if ids is not None:
        table = table.filter(pc.is_in(table["token_id"], pa.array(np.unique(ids), pa.int32())))
    numbers = table["token_id"].to_pylist()
    return Vocabulary(
        pieces=dict(zip(numbers, table["piece"].to_pylist(), strict=True)) if whole else {},
        texts=dict(zip(numbers, table["text"].to_pylist(), strict=True)),
        special=frozenset(table["token_id"].filter(table["special"]).to_pylist()) if whole else None,
    )


def scan_vocabulary(run: Path) -> pl.LazyFrame | None:
    """token_id int32, text and class string of the tokens of a run; None where it has no vocabulary.

    That of an early run does not say which tokens are special: class is null. Raises `StoredDataError` where it is not
    the one that the run wrote.
    """
    path = run / VOCABULARY
    if not path.is_file():
        return None
    with sound(run):
        whole = is_whole(pq.read_schema(path))
    vocabulary = pl.scan_parquet(path, glob=False, hive_partitioning=False)
    kind = class_of(pl.col("text"), pl.col("special")) if whole else pl.lit(None, pl.String)
    return vocabulary.select("token_id", "text", kind.alias("class"))


def spelled(ids: Ids, vocabulary: Vocabulary) -> list[str]:
    """What each token of a sequence adds to its text, never empty: to be read one after the other.

    A character that several tokens share stands at the one that ends it; those that end none are `PART`. Bytes that are
    no text are U+FFFD. Tokens that are not known, or stand for nothing, are `<ID>`.
    """
    numbers = [int(number) for number in ids]
    texts = [vocabulary.texts.get(number) or f"<{number}>" for number in numbers]
    # Only tokens that are no text by themselves can share a character, and only with their neighbours.
    for cut, places in groupby(range(len(texts)), key=lambda place: PART in texts[place]):
        run = list(places)
        if cut and all(numbers[place] in vocabulary.pieces for place in run):
            joined = _joined([vocabulary.pieces[numbers[place]] for place in run])
            for place, text in zip(run, joined, strict=True):
                texts[place] = text or PART
    return texts


def joined(ids: Ids, vocabulary: Vocabulary) -> str:
    """The text of a sequence of tokens as one, without tokens that are not known."""
    return b"".join(vocabulary.pieces.get(int(number), b"") for number in ids).decode("utf-8", "replace")


def _joined(pieces: Sequence[bytes]) -> list[str]:
    """Each character of the joined pieces, at the piece that holds its last byte."""
    ends = np.cumsum([len(piece) for piece in pieces])
    texts, place, end = [""] * len(pieces), 0, 0
    # An escape stands for one byte that is no text.
    for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
        stray = "\udc80" <= character <= "\udcff"
        end += 1 if stray else len(character.encode())
        while ends[place] < end:
            place += 1
        if not stray:
            texts[place] += character
        elif not texts[place].endswith(PART):
            texts[place] += PART
    return texts


# ------------------------------------------------------------------------------------------------- classes of tokens

_BLANK = r"[\s\p{Z}\p{Cc}\p{Cf}]*"
_LETTERS = r"[\p{L}\p{M}\x{200C}\x{200D}\x{FFFD}]+"
_PATTERNS = {
    "whitespace": rf"^{_BLANK}$",
    "digits": rf"^{_BLANK}[\p{{N}}.,]*\p{{N}}[\p{{N}}.,]*{_BLANK}$",
    "words": rf"^{_BLANK}['’-]?{_LETTERS}(['’-]{_LETTERS})*['’]?{_BLANK}$",
    "code": r"[_{}\[\]<>=+*/\\|^~`]|\(\)",
    "punctuation": rf"^{_BLANK}[\p{{P}}\p{{S}}\p{{M}}\p{{Cf}}]+{_BLANK}$",
}
"""The first that is found in a token's text is its class. Patterns are those of Rust's `regex`, which polars has."""


def class_of(text: pl.Expr, special: pl.Expr) -> pl.Expr:
    """The class of each token, one of `CLASSES`, of its text and whether it is special; null where the text is.

    `special`: end of turn and the like. `whitespace`: nothing to be seen. `digits`: numerals, with points and commas
    between them. `words`: letters of any script, with apostrophes and hyphens; a part of a character counts as one.
    `punctuation`: marks, symbols and emoji. `code`: what is left, code, formulas and markup: operators, brackets but
    round ones, and letters, digits and marks mixed in one token.
    """
    found = pl.lit("code")
    for name, pattern in reversed(_PATTERNS.items()):
        found = pl.when(text.str.contains(pattern)).then(pl.lit(name)).otherwise(found)
    return pl.when(special).then(pl.lit("special")).when(text.is_not_null()).then(found)


def classes(texts: Sequence[str], special: Iterable[bool]) -> list[str]:
    """`class_of` each text, (N,) of both."""
    frame = pl.DataFrame({"text": texts, "special": list(special)}, schema={"text": pl.String, "special": pl.Boolean})
    return frame.select(class_of(pl.col("text"), pl.col("special"))).to_series().to_list()
