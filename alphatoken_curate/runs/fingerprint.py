"""Fingerprints: one sha256 of everything that changes a result, and the names of what differs between two."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import orjson

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What JSON holds."""

_DIGEST, _SHOWN, _FILES, _MOST_CHARS = "sha256:", 12, 2, 60


def canonical(value: object) -> bytes:
    """JSON with sorted keys and no spaces: equal values, equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def fingerprint(fields: Mapping[str, Json]) -> str:
    """`sha256:` and 64 hex digits of the canonical JSON of `fields`."""
    return "sha256:" + hashlib.sha256(canonical(dict(fields))).hexdigest()


def differing(a: Mapping[str, Json], b: Mapping[str, Json]) -> tuple[str, ...]:
    """Names, sorted, whose values differ or that only one side has."""
    return tuple(
        name
        for name in sorted({*a, *b})
        if (name in a) != (name in b) or canonical(a.get(name)) != canonical(b.get(name))
    )


def told_apart(names: Sequence[str], stored: Mapping[str, Json], given: Mapping[str, Json]) -> str:
    """`layers (3 in the run, 4 now), seed (0 in the run, 1 now)`: fields that differ, with both values.

    Digests are told by their first hex digits, lists from the first item that differs, and what is long is cut.
    """
    both = ((name, *_from_difference(stored.get(name), given.get(name))) for name in names)
    return ", ".join(f"{name} ({_short(a)} in the run, {_short(b)} now)" for name, a, b in both)


def _from_difference(a: Json, b: Json) -> tuple[Json, Json]:
    """Two lists without what both begin with, unless one of them is no more than that; other values as they are."""
    if not (isinstance(a, list | tuple) and isinstance(b, list | tuple)):
        return a, b
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if canonical(x) != canonical(y)), 0)
    return a[same:], b[same:]


def _short(value: Json) -> str:
    """A value in a few words: digests by their beginning, lists of files by theirs."""
    if value is None:
        return "not set"
    if isinstance(value, str):
        return value[len(_DIGEST) :][:_SHOWN] if value.startswith(_DIGEST) else _cut(value)
    if isinstance(value, Sequence):
        if not value:
            return "none"
        shown = "; ".join(
            " ".join(map(_short, one)) if isinstance(one, list | tuple) else _short(one) for one in value[:_FILES]
        )
        return shown + (f" and {len(value) - _FILES} more" if len(value) > _FILES else "")
    return _cut(canonical(value).decode())


def _cut(text: str) -> str:
    """Text of at most so many characters: its middle is left out, since names often differ at their end."""
    half = (_MOST_CHARS - 1) // 2
    return text if len(text) <= _MOST_CHARS else f"{text[:half]}…{text[-half:]}"
