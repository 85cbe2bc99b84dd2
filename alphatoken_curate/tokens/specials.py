"""The special tokens of a tokenizer: what no text is to become."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Specials:
    """The special tokens of a tokenizer."""

    pattern: re.Pattern[str]
    """Finds any of them in text, the longest first."""

    ids: dict[str, int]
    """Token id by text."""

    greedy: dict[str, tuple[bool, bool]]
    """Those that take in the white space on their (left, right)."""

    @classmethod
    def of(cls, tokenizer: Any, stops: Collection[str] = ()) -> Specials:
        """Collect them. Added tokens that the model stops at are some, whatever the tokenizer calls them."""
        every = tokenizer.added_tokens_decoder.values()
        added = [token for token in every if token.special or token.content in stops]
        names = {token.content for token in added} | set(tokenizer.all_special_tokens)
        ordered = sorted(names - {""}, key=lambda name: (-len(name), name))
        return cls(
            pattern=re.compile("|".join(map(re.escape, ordered)) or r"(?!)"),
            ids={name: int(tokenizer.convert_tokens_to_ids(name)) for name in ordered},
            greedy={t.content: (t.lstrip, t.rstrip) for t in added if t.lstrip or t.rstrip},
        )
