"""What changed in DATA since a run was begun: by file, and by row where the run has rows to compare with."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from alphatoken_curate.errors import FingerprintError
from alphatoken_curate.rows.files import visible
from alphatoken_curate.runs import shards
from alphatoken_curate.runs.documents import decode
from alphatoken_curate.runs.manifest import Facts
from alphatoken_curate.runs.records import read_records
from alphatoken_curate.runs.schema import LAYOUTS
from alphatoken_curate.scoring.prepare import Prepared
from alphatoken_curate.tokens.tokenise import branches
from alphatoken_curate.wording import count

_DECIDE_TOKENS = frozenset({"kind", "tokenizer", "template", "turns", "max_length"})
"""Where one of these differs too, tokens say nothing of the rows they were made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A row by its place in its file, and a digest of its id and tokens."""

    line: int
    key: bytes


@contextmanager
def told_of_data(run: Path, prepared: Prepared) -> Iterator[None]:
    """Where the block is refused since DATA is another than that of the run, the error says what changed in it."""
    try:
        yield
    except FingerprintError as error:
        if "data" not in error.fields:
            raise
        told = " ".join([str(error), *_told(run, prepared, error)])
        raise FingerprintError(told, error.fields, error.stored) from error


def _told(run: Path, prepared: Prepared, error: FingerprintError) -> Iterator[str]:
    was = _digests(error.stored.get("data"))
    now = {file.source: file.digest for file in prepared.files}
    gone, new = [name for name in was if name not in now], [name for name in now if name not in was]
    for name in list(gone):
        if (other := next((one for one in new if now[one] == was[name]), None)) is not None:
            yield f"{visible(name)} is called {visible(other)} now."
            gone.remove(name)
            new.remove(other)
    yield from (f"{visible(name)} was read too." for name in gone)
    yield from (f"{visible(name)} was not read." for name in new)
    changed = [name for name in was if name in now and was[name] != now[name]]
    if set(was) == set(now) and not changed:
        yield f"The same files were read in another order: {', '.join(map(visible, was))}."
    if not changed:
        return
    stored, rows = _stored(run, str(error.stored.get("kind")))
    found = {} if _DECIDE_TOKENS.intersection(error.fields) else _prepared(prepared)
    for name in changed:
        comparable = name in rows and name in found
        what = next(_rows(stored.get(name, []), rows[name], found[name])) if comparable else "its bytes are others"
        yield f"{visible(name)}: {what}."


def _digests(data: object) -> dict[str, str]:
    return {str(source): str(digest) for source, digest in data} if isinstance(data, list) else {}


def _rows(was: Sequence[_Line], rows: int, now: Sequence[_Line]) -> Iterator[str]:
    """What happened to the rows of a file, which had so many, of which `was` are stored: the first that holds."""
    before, after = [one.key for one in was], [one.key for one in now]
    same = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(was), len(now)))
    place = next((f"line {one.line}" for one in (*now[same : same + 1], *was[same : same + 1])), "the end")
    more, counts = len(now) - rows, f"it had {count(rows, 'row')}, and has {count(len(now), 'row')}"
    if same == len(was) < rows:
        yield f"the {count(same, 'row')} scored so far are the same; {counts}"
    if same == len(was) == len(now):
        yield "every row gives the same tokens; what else it holds differs, or how it is written"
    if more > 0 and before == after[:same] + after[same + more :]:
        yield f"{count(more, 'row')} added{' at the end' if same == len(was) else ''}, from {place} on"
    if more < 0 and after == before[:same] + before[same - more :]:
        yield f"{count(-more, 'row')} removed{' at the end' if same == len(now) else ''}, from line {was[same].line} on"
    if Counter(before) == Counter(after):
        yield f"the same rows in another order, from {place} on"
    if more == 0:
        edited = sum(a != b for a, b in zip(before, after, strict=False))
        yield f"{count(edited, 'row')} edited, the first at {place}"
    yield f"its rows differ from {place} on; {counts}"


def _stored(run: Path, kind: str) -> tuple[dict[str, list[_Line]], dict[str, int]]:
    """By source: the rows of shards that are committed, up to the first that is missing, and how many were read."""
    lines: dict[str, list[_Line]] = {}
    paths = shards.listed(shards.values_folder(run, 0))
    if 0 not in paths or kind not in LAYOUTS:
        return {}, {}
    for index in range(len(paths)):
        if index not in paths:
            break
        records = read_records(run, shards.facts_of(paths[index])[1], LAYOUTS[kind])
        for _, group in groupby(records, key=lambda row: row.row_id):
            turns = list(group)
            parts = [(one.input_ids, one.response) for row in turns for one in row.branches if len(one.input_ids)]
            first = turns[0]
            lines.setdefault(first.source, []).append(_Line(line=first.line, key=_key(first.id, parts)))
    facts = decode(Facts, dict(shards.read_footer(paths[0]).facts))
    return lines, {one.source: one.rows for one in facts.inputs}


def _prepared(prepared: Prepared) -> dict[str, list[_Line]]:
    """By source: all rows as they are now, in order."""
    rows: dict[int, tuple[str, _Line]] = {}
    for row_id, group in groupby(chain(prepared.rows, prepared.held_out), key=lambda row: row.row_id):
        turns = [one for row in group for one in branches(row)]
        key = _key(turns[0].id, [(one.input_ids, one.response) for one in turns])
        rows[row_id] = (turns[0].source, _Line(line=turns[0].line, key=key))
    for bad in prepared.bad:
        rows[bad.row_id] = (bad.source, _Line(line=bad.line, key=_key(None, [])))
    lines: dict[str, list[_Line]] = {}
    for _, (source, line) in sorted(rows.items()):
        lines.setdefault(source, []).append(line)
    return lines


def _key(name: str | None, parts: Iterable[tuple[Any, Any]]) -> bytes:
    """Bad rows are alike: nothing is known of them."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=16)
    for input_ids, response in parts:
        digest.update(len(input_ids).to_bytes(8, "little") + input_ids.tobytes() + response.tobytes())
    return digest.digest()
