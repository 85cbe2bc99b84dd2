"""Fingerprints: one sha256 of everything that changes a result, and the names of what differs between two."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import orjson

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What JSON holds."""


_DIGEST, _SHOWN, _FILES = "sha256:", 12, 2


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
    """`layers (3 there, 4 here), seed (0 there, 1 here)`: fields that differ, with the value of both sides."""
    return ", ".join(f"{name} ({_short(stored.get(name))} there, {_short(given.get(name))} here)" for name in names)


def _short(value: Json) -> str:
    """A value in a few words: digests by their beginning, lists of files by theirs."""
    if value is None:
        return "not set"
    if isinstance(value, str):
        return value if not value.startswith(_DIGEST) else value[len(_DIGEST) :][:_SHOWN]
    if isinstance(value, Sequence):
        shown = "; ".join(
            " ".join(map(_short, one)) if isinstance(one, list) else _short(one) for one in value[:_FILES]
        )
        return shown + (f" and {len(value) - _FILES} more" if len(value) > _FILES else "")
    return canonical(value).decode()
