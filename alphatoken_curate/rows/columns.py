"""Which keys of a row are looked at, and `--map`: columns of the user's under the names that rows are read by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alphatoken_curate.errors import UsageError
from alphatoken_curate.rows.beside import BESIDE_SHAPES
from alphatoken_curate.rows.fields import SYSTEM
from alphatoken_curate.rows.padding import BESIDE, MASKS
from alphatoken_curate.rows.pairs import PREFERENCE, PROMPT_LIKE
from alphatoken_curate.rows.shapes import OPEN, SFT, SIDE
from alphatoken_curate.wording import nearest

_SHAPES = (SFT, PREFERENCE, OPEN, *SIDE.values())

NAMES = frozenset(
    {
        *(key for shapes in _SHAPES for keys in shapes for key in keys),
        *PROMPT_LIKE,
        *BESIDE_SHAPES,
        *(prefix + name for prefix in ("", "chosen_", "rejected_") for name in (*BESIDE, *MASKS)),
        *SYSTEM,
        *("id", "tools", "functions", "chat_template_kwargs"),
    }
)
"""Every key that is looked at."""


def named_columns(text: str | None) -> dict[str, str]:
    """The pairs of `question=prompt,answer=completion`: what a column is read as. Raises UsageError."""
    if text is None:
        return {}
    pairs = [item.rpartition("=")[::2] for item in text.split(",")]
    for source, name in pairs:
        if name not in NAMES:
            known = nearest(name, NAMES) or " Rows are read by prompt, completion, response, messages and so on."
            raise UsageError(f"--map {source}={name}: rows are not read by {name!r}.{known}")
    for place, kind in ((0, "is mapped twice"), (1, "is what two columns are mapped to")):
        given = [pair[place] for pair in pairs]
        if twice := [name for name in given if given.count(name) > 1]:
            raise UsageError(f"--map {text}: {twice[0]!r} {kind}. Name each once.")
    return dict(pairs)


def mapped(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with those columns under their new names; what had such a name before gives way."""
    if not columns or columns.keys().isdisjoint(record):
        return record
    taken = {name for source, name in columns.items() if source in record}
    kept = {key: value for key, value in record.items() if key not in taken and key not in columns}
    return kept | {name: record[source] for source, name in columns.items() if source in record}


def unmet(columns: Mapping[str, str], missing: Iterable[str], found: Iterable[str]) -> UsageError:
    """The error of columns that no row has; `found` are those of a row."""
    there = sorted(found)
    source = next(iter(missing))
    hint = nearest(source, there) or f" The first row has {', '.join(there[:20])}."
    return UsageError(f"--map {source}={columns[source]}: no row has a column {source!r}.{hint}")
