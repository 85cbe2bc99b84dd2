"""What one rendering of a chat template may cost: steps that are taken, characters that are made.

Both are counted, not timed, so that a row is refused on every machine or on none. What a template is given sets the
bounds: long chats take long. The clock alone stops what no count sees, far behind either bound.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

STEPS, STEPS_EACH = 2_000_000, 200
"""Steps that a template may take, and more for each character that it is given. A step is a part of a loop's or a
macro's body, whether it is reached or not: real templates take some hundred for a message."""

ROOM, ROOM_EACH, LARGEST_ROOM = 4_000_000, 1000, 512_000_000
"""Characters that it may make, on the way to its text too; more for each that it is given; and the most."""

SECONDS = 20.0
"""Of this thread's processor time."""

_SLICE = 500  # steps between looks at the clock
_NODE = 8  # characters that a value in a list counts as
_NUMBER = re.compile(r"\d+")
_NESTED = re.compile(r"\{[^{}]*[:!][^{}]*\{")
_PADDING = ("ljust", "rjust", "center", "zfill", "to_bytes", "batch", "slice", "lipsum")
_FORMATTING = ("format", "format_map", "%")
_CONTAINERS = (list, tuple, dict)


class RunawayError(Exception):
    """A template that takes or makes more than any real one does."""


class Meter:
    """Of one rendering at a time."""

    __slots__ = ("_given", "_known", "_left", "_made", "_started", "_taken")

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, given: object) -> None:
        """Begin anew; `given` is what the template is told."""
        self._given: object = given
        self._left, self._taken, self._made = _SLICE, 0, 0
        self._started: float | None = None
        self._known: dict[int, tuple[object, int]] = {}

    def step(self, count: int = 1) -> bool:
        """Take steps; True, so that it can stand in a condition. Raises RunawayError."""
        self._left -= count
        if self._left < 0:
            self._next_slice()
        return True

    def _next_slice(self) -> None:
        self._taken += _SLICE - self._left
        self._left = _SLICE
        if self._taken > STEPS and self._taken > (most := STEPS + STEPS_EACH * self._given_size()):
            raise RunawayError(f"it takes more than {most:,} steps: a loop or a macro in it goes on and on")
        now = time.thread_time()
        self._started = now if self._started is None else self._started
        if now - self._started > SECONDS:
            raise RunawayError(f"it takes more than {SECONDS:.0f} s")

    def make(self, characters: int) -> None:
        """Count characters before they are made, if that can be. Raises RunawayError."""
        self._made += characters
        if self._made > ROOM and self._made > (most := min(ROOM + ROOM_EACH * self._given_size(), LARGEST_ROOM)):
            raise RunawayError(f"it makes more than {most:,} characters")

    def made(self, value: Any) -> Any:
        """Count a value that was just made; `value` again. Raises RunawayError."""
        kind = type(value)
        if kind is str:
            self.make(len(value))
        elif isinstance(value, _CONTAINERS):
            self.make(self.size(value))
        elif isinstance(value, (str, bytes)):
            self.make(len(value))
        return value

    def weighed(self, value: Any) -> Any:
        """`value` again, once it is known not to grow beyond bounds when it is written out or compared."""
        kind = type(value)
        if kind is int:
            return value
        if kind is str:
            self.step(len(value) // 256)
        elif isinstance(value, _CONTAINERS):
            self.step(self.size(value) // 64)
        return value

    def size(self, value: Any) -> int:
        """Characters in a value, each as often as it would be written. Raises RunawayError where they are too many."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, _CONTAINERS):
            return _NODE
        known = self._known.get(id(value))
        if known is not None and known[0] is value:
            return known[1]
        items = [*value, *value.values()] if isinstance(value, dict) else value
        total = _NODE + sum(_NODE + (len(item) if type(item) is str else self.size(item)) for item in items)
        self._known[id(value)] = value, total  # held, so that its id stays its own
        if total > ROOM and total > min(ROOM + ROOM_EACH * self._given_size(), LARGEST_ROOM):
            raise RunawayError(f"it makes a value of {total:,} characters")
        return total

    def _given_size(self) -> int:
        return _plain_size(self._given)

    def grow(self, name: str, values: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Count what a method or a filter of this name will make of `values`, the first being its own."""
        if name not in GROWING:
            return
        if name in _PADDING:
            self.make(max((abs(one) for one in (*values, *named.values()) if isinstance(one, int)), default=0))
        elif name in _FORMATTING:
            self.make(_formatted(self, values, named))
        else:
            self.make(_ESTIMATES[name](self, *values, **named))


def _plain_size(value: object) -> int:
    """Characters in data that is a tree."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_NODE + len(str(key)) + _plain_size(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(_NODE + _plain_size(item) for item in value)
    return _NODE


def _formatted(meter: Meter, values: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    """The most that a format can become: its widths, and its largest value at each place."""
    text, *rest = (str(values[0]) if isinstance(values[0], str) else "", *values[1:], *named.values())
    told = [*rest, *(item for one in rest if isinstance(one, (tuple, list)) for item in one)]
    widths = [int(found) if len(found) < 12 else LARGEST_ROOM for found in _NUMBER.findall(text)]
    if "*" in text or _NESTED.search(text):  # a width is among the values
        widths += [abs(one) for one in told if isinstance(one, int)]
        widths += [int(one) if len(one) < 12 else LARGEST_ROOM for one in told if _is_number(one)]
    places = text.count("{") + text.count("%")
    return len(text) + sum(widths) + places * max((meter.size(one) for one in rest), default=0)


def _is_number(value: object) -> bool:
    return isinstance(value, str) and value.isdecimal()


def _joined(_: Meter, between: Any, items: Any = (), *rest: Any, **named: Any) -> int:
    """Of the method; the filter has the items first."""
    if isinstance(between, _CONTAINERS):
        between, items = (items if items != () else named.get("d", "")), between
    return len(str(between)) * len(items) if isinstance(items, _CONTAINERS) else 0


def _replaced(_: Meter, text: Any, old: Any = "", new: Any = "", *rest: Any, **named: Any) -> int:
    return str(text).count(str(old)) * len(str(new)) + len(str(text))


def _expanded(_: Meter, text: Any, tabsize: int = 8) -> int:
    tabs: int = text.count("\t" if isinstance(text, str) else b"\t")
    return len(text) + tabs * max(0, tabsize)


def _translated(_: Meter, text: str, table: Any) -> int:
    items = table.values() if isinstance(table, dict) else ()
    longest: int = max((len(one) for one in items if isinstance(one, str)), default=1)
    return len(text) * longest


def _searched(meter: Meter, text: Any, sought: Any = None, *rest: Any, **named: Any) -> int:
    """From the right, Python's search can take as long as both lengths multiplied."""
    if isinstance(sought, (str, bytes)):
        meter.step(len(text) * len(sought) // 256)
    return 0


def _scanned(meter: Meter, text: Any, *rest: Any, **named: Any) -> int:
    """These look at the whole again and again."""
    meter.step(len(str(text)) ** 2 // 4096)
    return 0


def _indented(_: Meter, text: Any, width: Any = 4, *rest: Any, **named: Any) -> int:
    return len(str(text)) + (str(text).count("\n") + 1) * (width if isinstance(width, int) else len(str(width)))


def _wrapped(_: Meter, text: Any, width: int = 79, *rest: Any, **named: Any) -> int:
    breaks = [one for one in (*rest, *named.values()) if isinstance(one, str)]
    return (len(str(text)) + 1) * max((len(one) for one in breaks), default=1)


def _as_json(meter: Meter, value: Any, ensure_ascii: bool = False, indent: Any = None, *rest: Any, **named: Any) -> int:
    width = indent if isinstance(indent, int) else len(str(indent or ""))
    return meter.size(value) * (1 + max(0, width))


def _summed(meter: Meter, items: Any, *rest: Any, **named: Any) -> int:
    plain = not isinstance(items, _CONTAINERS) or all(isinstance(one, (int, float)) for one in items)
    return 0 if plain else meter.size(items) * len(items)


_ESTIMATES: dict[str, Callable[..., int]] = {
    "join": _joined,
    "replace": _replaced,
    "expandtabs": _expanded,
    "translate": _translated,
    "rfind": _searched,
    "rindex": _searched,
    "rsplit": _searched,
    "rpartition": _searched,
    "striptags": _scanned,
    "urlize": _scanned,
    "indent": _indented,
    "wordwrap": _wrapped,
    "tojson": _as_json,
    "sum": _summed,
}

GROWING = frozenset((*_PADDING, *_FORMATTING, *_ESTIMATES))
"""Methods and filters that can make more than they are given, or take longer than its length."""
