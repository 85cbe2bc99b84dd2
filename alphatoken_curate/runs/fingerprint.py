"""Fingerprints: one sha256 of everything that changes a result, and the names of what differs between two."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import orjson

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What JSON holds."""


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
