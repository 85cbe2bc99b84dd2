"""What is said of a row whose answers have no sure place."""

from __future__ import annotations

import re

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.files import visible

_BEFORE, _EXCERPT = 20, 60
_OURS = re.compile("[\ufdd0-\ufddf]")  # set into chats by this package; nobody sees them

NOT_SPLITTABLE = "template_not_splittable"
"""The reason of such a row."""

RUNAWAY = "template_runs_away"
"""The reason of a row at which the chat template takes or makes more than any real one does."""


def not_splittable(why: str) -> RowFault:
    """The fault of such a row; `why` says what its chat template does."""
    return RowFault(NOT_SPLITTABLE, f"the chat template does not show where the answer is: {why}")


def excerpt(text: str) -> str:
    """The beginning of a text, in quotes, without what this package set into it."""
    return f"'{visible(_OURS.sub('', text), _EXCERPT)}'".replace("\\u000a", "\\n")


def parted(one: str, other: str) -> tuple[str, str]:
    """Excerpts of two texts, from shortly before the place where they part."""
    at = max(0, shared(one, other) - _BEFORE)
    return excerpt(one[at:]), excerpt(other[at:])


def shared(one: str, other: str) -> int:
    """Length of the longest prefix that both have."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
