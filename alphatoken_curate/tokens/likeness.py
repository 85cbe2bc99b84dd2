"""Whether a tokenizer gives the tokens of a run: ids alone say nothing of what they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate.errors import ModelError
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.vocabulary import is_whole, read_table
from alphatoken_curate.tokens.chat import Tokenizer
from alphatoken_curate.tokens.pieces import Piece, pieces


def check_same_tokens(
    run: Path, ids: NDArray[np.integer], tokenizer: Tokenizer, name: str, *, do: str, own: bool = True
) -> None:
    """Raise ModelError where some of the token `ids` that a run uses stand for something else in a tokenizer.

    `own` False: it may not be the one that is used, so that ids it lacks, and special tokens, which are often renamed,
    tell nothing. `name`: what the tokenizer is called, `do`: what to do. A run that was given as tokens has no
    vocabulary to compare with. Raises StoredDataError where that is damaged.
    """
    table = read_table(run)
    if table is None:
        return
    column = "piece" if is_whole(table.schema) else "text"
    table = table.filter(pc.is_in(table["token_id"], pa.array(np.unique(ids), pa.int32())))
    known = pieces(tokenizer)
    numbers, stored = table["token_id"].to_pylist(), table[column].to_pylist()
    odd = [
        (number, was)
        for number, was in zip(numbers, stored, strict=True)
        if was and _differs(was, known[number] if number < len(known) else None, own=own)
    ]
    if not odd:
        return
    number, was = odd[0]
    here = repr(_text(known[number].content)) if number < len(known) else "none"
    raise ModelError(
        f"{name}: not the tokenizer of {run}, whose rows are tokens of"
        f" {manifest.read(run).generations[0].checkpoint}: token {number} is {_text(was)!r} there and {here} here, the"
        f" first of {len(odd):,} that differ among the {len(numbers):,} that the rows use. {do}"
    )


def _differs(was: bytes | str, here: Piece | None, *, own: bool) -> bool:
    if here is None:
        return own
    if here.special and not own:
        return False
    return (here.content if isinstance(was, bytes) else _text(here.content)) != was


def _text(piece: bytes | str) -> str:
    return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")
