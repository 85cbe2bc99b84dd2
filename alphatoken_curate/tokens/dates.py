"""Templates that write today's date, by `strftime_now`, are told one day: what they write is the same on any other.

transformers gives templates the clock itself, and takes no function in its place. So a macro of that name stands in
front of the template, which puts the parts of the day into the format; each part is made by Python's own `strftime`.
"""

from __future__ import annotations

import datetime
import string
from dataclasses import dataclass
from functools import cached_property

_CLOCK = "strftime_now"
_FLAGS = ("", "-", "#", "0", "_", "^")  # `%-d` is a day without a leading zero, where the platform has it
# `%%` first: it is a per cent sign and begins no part. Block tags end lines, so that jinja trims nothing of a template.
_MACRO = (
    "{% macro strftime_now(format) %}{% set made = namespace(text=format) %}{% for part, value in __day %}"
    "{% set made.text = made.text.replace(part, value) %}{% endfor %}{{ made.text }}{% endmacro %}\n"
)
_PER_CENT = "\ufdd3"  # a noncharacter of Unicode


@dataclass(kw_only=True, eq=False)
class TemplateDay:
    """The day that templates are told, at 00:00; `written`: whether one asked for it."""

    day: datetime.date
    written: bool = False

    @cached_property
    def _parts(self) -> list[list[str]]:
        now = datetime.datetime.combine(self.day, datetime.time())
        parts = [f"%{flag}{letter}" for flag in _FLAGS for letter in string.ascii_letters]
        made = [[part, value] for part in parts if (value := now.strftime(part)) != part]
        return [["%%", _PER_CENT], *made, [_PER_CENT, "%"]]

    def told(self, template: str) -> tuple[str, dict[str, list[list[str]]]]:
        """A template that is told this day, and what it takes for that; any other as it is."""
        if _CLOCK not in template:
            return template, {}
        self.written = True
        return _MACRO + template, {"__day": self._parts}
