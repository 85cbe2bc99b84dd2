"""Tokens and their values made visible: levels 0-16, a palette, and text that is safe to show anywhere.

One place for terminals and pages. The scale is diverging and centred at 0: level 0 is the most negative (blue), 8 is
about 0 (white), 16 the most positive (orange); the two ends differ for every common kind of colour blindness.
Token text comes from training data: nothing in it may move a cursor, change a title or reverse the reading order.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks.criteria import is_expression
from alphatoken_curate.runs.schema import ERRORS, PER_STEP, units_of

LEVELS = 17
MIDDLE = 8
NO_LEVEL = -1
"""The level of a token without a value."""

SCALE_PERCENTILE = 98
"""Values beyond this percentile of |value| share the end colours, so that one outlier does not pale all others."""

_WEIGHT = "multiples of the mean"
_UNSIGNED = ("nll", "entropy", "reference_nll", "loss_weight")


# ------------------------------------------------------------------------------------------------ values to colours


@dataclass(frozen=True, slots=True, kw_only=True)
class Colour:
    """`background` and the `text` colours that are legible on it, `#rrggbb`; `faded` is for dropped tokens."""

    background: str
    text: str
    faded: str


def scale_of(values: NDArray[np.floating[Any]]) -> float:
    """The magnitude of the end levels: the 98th percentile of |value| (a value itself, by nearest rank).

    NaN is left out. Where the percentile is 0 the largest magnitude is taken, and 1 where all values are 0 or missing.
    """
    sizes = np.sort(np.abs(values[~np.isnan(values)].astype(np.float64)))
    if not len(sizes):
        return 1.0
    rank = -(-len(sizes) * SCALE_PERCENTILE // 100)
    return float(sizes[rank - 1]) or float(sizes[-1]) or 1.0


def levels(values: NDArray[np.floating[Any]], scale: float) -> NDArray[np.int8]:
    """Levels 0-16 of values, linear from -scale to scale and clipped beyond; `NO_LEVEL` where NaN. Same shape, int8."""
    if not scale > 0:
        raise UsageError(f"scale: found {scale}; give a magnitude above 0")
    missing = np.isnan(values)
    share = np.clip(np.where(missing, 0, values).astype(np.float64) / scale, -1, 1)
    return np.where(missing, NO_LEVEL, np.rint(MIDDLE + MIDDLE * share)).astype(np.int8)


def _mix(a: tuple[int, ...], b: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def _hex(rgb: tuple[int, ...]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _colour(level: int) -> Colour:
    white, dark = (255, 255, 255), (0, 0, 0)
    half, end = ((140, 190, 235), (10, 65, 140)) if level < MIDDLE else ((250, 190, 110), (140, 55, 0))
    share = abs(level - MIDDLE) / MIDDLE
    rgb = _mix(white, half, 2 * share) if share <= 0.5 else _mix(half, end, 2 * share - 1)
    text = dark if luminance(rgb) > 0.18 else white
    return Colour(background=_hex(rgb), text=_hex(text), faded=_hex(_mix(text, rgb, 0.3)))


def luminance(rgb: tuple[int, ...]) -> float:
    """Relative luminance (WCAG 2) of an sRGB colour of three numbers 0-255, in 0-1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


PALETTE = tuple(_colour(level) for level in range(LEVELS))
"""A colour per level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """How the numbers of one row are written: divided by 10**exponent, with so many decimals."""

    name: str
    exponent: int = 0
    decimals: int = 2
    signed: bool = True

    @property
    def label(self) -> str:
        """`nats`, or `1e-3 nats` where numbers are written divided by a thousandth; empty where they have no unit."""
        return f"1e{self.exponent} {self.name}".rstrip() if self.exponent else self.name

    def write(self, value: float) -> str:
        """`+0.42`; `0` for exactly 0, nothing for NaN."""
        if np.isnan(value):
            return ""
        return f"{value / 10.0**self.exponent:{'+' if self.signed else ''}.{self.decimals}f}" if value else "0"


def unit_of(column: str, scale: float, of_values: str = PER_STEP) -> Unit:
    """The unit in which numbers of this magnitude have about three digits. Columns of one unit share one exponent."""
    named = "" if is_expression(column) else units_of(column, "none", of_values)
    name = _WEIGHT if column == "loss_weight" else named
    if column in _UNSIGNED:
        return Unit(name=name, signed=False)
    digits = int(np.floor(np.log10(scale)))
    exponent = 0 if -1 <= digits <= 2 else digits // 3 * 3
    decimals = 3 if digits < exponent else 2 if digits - exponent < 2 else 1
    return Unit(name=name, exponent=exponent, decimals=decimals, signed=column not in ERRORS)


# ---------------------------------------------------------------------------------------------------- text to be seen

_SYMBOLS = {"\t": "⇥", "\x7f": "␡", " ": " ", "\u200c": "\u200c", "\u200d": "\u200d"}
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
_JOINERS = "\u200c\u200d"


def readable(text: str, *, alone: bool = False, dots: bool = True) -> str:
    """A token's text with all that cannot be seen, or should not reach a terminal, as symbols.

    Newline is ⏎ and a line break, tab ⇥, other control characters their pictures (escape is ␛), C1, direction and
    other format characters ⟨U+202E⟩, spaces other than the usual one ␣, U+FFFD (a piece of a character that tokens
    split) ▯. Joiners stay inside text. `dots`: spaces at either end are ·. `alone`: shown apart from its neighbours:
    no line break after ⏎, a combining mark stands on ◌, and behind text of a right-to-left script stands U+200E, which
    is not seen and keeps what comes next (numbers above all) to the right of it.
    """
    bare = text.strip(" ")
    start = len(text) - len(text.lstrip(" "))
    if not bare.strip(_JOINERS):
        shown = "".join(f"⟨U+{ord(c):04X}⟩" for c in bare)
    else:
        lines = re.sub("\ufffd+", "\ufffd", bare).split("\n")
        shown = ("⏎" if alone else "⏎\n").join("".join(map(_glyph, line)) for line in lines)
    if alone and shown and unicodedata.category(shown[0]).startswith("M"):
        shown = "◌" + shown
    if alone and any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in shown):
        shown += "\u200e"
    space = "·" if dots else " "
    return space * start + shown + space * (len(text) - len(bare) - start)


@lru_cache(maxsize=4096)
def _glyph(c: str) -> str:
    if c in _SYMBOLS:
        return _SYMBOLS[c]
    if c < " ":
        return chr(0x2400 + ord(c))
    if c == "\ufffd":
        return "▯"
    category = unicodedata.category(c)
    if category in ("Cc", "Cf", "Cs", "Zl", "Zp") or c in _BLANKS:
        return f"⟨U+{ord(c):04X}⟩"
    return "␣" if category == "Zs" else c
