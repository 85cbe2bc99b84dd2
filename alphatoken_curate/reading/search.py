"""Rows of a run that have a text, wherever tokens begin and end in it. No model is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alphatoken_curate.errors import UsageError
from alphatoken_curate.reading.scan import choose_generation
from alphatoken_curate.reading.words import Vocabulary, read_vocabulary
from alphatoken_curate.runs import manifest, shards

_AROUND = 60
"""Characters told on either side of what was found."""

_ROW = ("row_id", "turn", "source", "line", "id", "status")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A row that has the text, and where: `found` with what stands `before` and `after` it. `branch` as in `RowView`.

    Text is as the tokens spell it: not safe to show (see `heat.readable`).
    """

    row_id: int
    turn: int = 0
    source: str
    line: int
    id: str | None
    status: str
    branch: str
    before: str
    found: str
    after: str


def search_rows(run: Path, text: str, *, generation: int | None = None) -> Iterator[Hit]:
    """Rows whose tokens spell `text` in prompt or response, upper and lower case alike, in order of row_id.

    The first place in each row, whichever turn it is in; of a pair chosen before rejected. Shard by shard. Raises
    `UsageError` where there is no text to search or for, or the generation is not there; `StoredDataError` for damage.
    """
    if not text:
        raise UsageError("search: found no text; give some")
    stored = manifest.read(run)
    layout = manifest.layout(stored)
    shown = choose_generation(run, stored, generation)
    vocabulary = read_vocabulary(run)
    if not vocabulary.pieces:
        why = (
            "it is of a schema version that kept no pieces of text"
            if vocabulary.texts
            else "its rows were given as tokens"
        )
        raise UsageError(f"{run}: has no text to search: {why}. Give --row N or --id ID")
    pattern = re.compile(re.escape(text), re.IGNORECASE)
    pieces, last = _pieces(vocabulary), -1
    for shard in shown.shards:
        names = [f"{prefix}input_ids" for prefix in layout.branches]
        table = shards.read_shard(run, shard, layout.values, [*_ROW, *names])
        spelled = zip(*(_texts(table[name], pieces) for name in names), strict=True)
        for row, texts in zip(table.select(_ROW).to_pylist(), spelled, strict=True):
            hits = (_hit(row, prefix, pattern.search(one)) for prefix, one in zip(layout.branches, texts, strict=True))
            for hit in [hit for hit in hits if hit is not None and hit.row_id != last][:1]:
                last = hit.row_id
                yield hit


def _pieces(vocabulary: Vocabulary) -> pa.Array:
    """The bytes of every token by its id, and at the end those of a token that is not known: none."""
    known = [b""] * (max(vocabulary.pieces) + 2)
    for number, piece in vocabulary.pieces.items():
        known[number] = piece
    return pa.array(known, pa.large_binary())


def _texts(column: pa.ChunkedArray, pieces: pa.Array) -> Iterator[str]:
    """The text of each row: all of a shard's bytes lie side by side, cut where its rows end."""
    ids, lengths = shards.entries(column)
    unknown = (ids < 0) | (ids >= len(pieces))
    joined = pieces.take(pa.array(np.where(unknown, len(pieces) - 1, ids).astype(np.int64)))
    sizes = pc.binary_length(joined).to_numpy()
    ends = np.concatenate([[0], np.cumsum(sizes)])[np.concatenate([[0], np.cumsum(lengths)])]
    content = b"".join(joined.to_pylist())
    for start, end in pairwise(ends.tolist()):
        yield content[start:end].decode("utf-8", "replace")


def _hit(row: dict[str, object], prefix: str, match: re.Match[str] | None) -> Hit | None:
    if match is None:
        return None
    text, (start, end) = match.string, match.span()
    before = ("…" if start > _AROUND else "") + text[max(0, start - _AROUND) : start]
    after = text[end : end + _AROUND] + ("…" if len(text) > end + _AROUND else "")
    return Hit(**row, branch=prefix.rstrip("_"), before=before, found=match[0], after=after)  # type: ignore[arg-type]
