"""A chat with a numbered mark behind each of its texts, so that a rendering shows where each of them ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.tokens.refusals import not_splittable, parted

# noncharacters of Unicode, kept free for use inside a program
_OPEN, _DIGITS, _CLOSE = "\ufdd3", "\ufdd4\ufdd5\ufdd6\ufdd7\ufdd8\ufdd9\ufdda\ufddb\ufddc\ufddd", "\ufdde"
_NUMBERS = str.maketrans(_DIGITS, "0123456789")
_MARK = re.compile(f"{_OPEN}[{_DIGITS}]+{_CLOSE}")
# as a template writes them that turns text to ASCII
_ESCAPED_OPEN, _ESCAPED = r"\ufdd3", re.compile(r"\\ufdd3(?:\\ufdd[4-9a-d])+\\ufdde")

RESERVED = re.compile("[\ufdd0-\ufddf]")
"""Those that this package sets into chats, here and elsewhere in `tokens`."""

NAME = "name"
"""The key of a text that is the name of a call."""

BARE = ("type", "id", "name")
"""Keys within calls whose texts are not marked: templates look at them."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
"""Keys under which templates read a thought."""

Render = Callable[..., str]
"""(messages, prompt=False) -> text. Raises RowFault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A text of a message: its number, whose it is, the key it came from, and the text without white space behind."""

    number: int
    message: int
    key: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A chat as text, without marks, and where the first and the last mark of each number stood."""

    text: str
    firsts: dict[int, int]
    lasts: dict[int, int]

    def end(self, leaf: Leaf) -> int | None:
        """Where a text ends; None where it was not written. The name of a call may be written again with its result."""
        return (self.firsts if leaf.key == NAME else self.lasts).get(leaf.number)

    def begin(self, leaf: Leaf) -> int | None:
        """Where a text begins, if it stands there as it is."""
        end, text = self.end(leaf), leaf.text.lstrip()
        return None if end is None or not self.text.endswith(text, 0, end) else end - len(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedChat:
    """A chat with marks, and where they stand in the whole of it."""

    messages: list[dict[str, Any]]
    leaves: list[Leaf]
    whole: Rendering

    @classmethod
    def of(cls, text: str, messages: list[dict[str, Any]], render: Render) -> MarkedChat:
        """Marked as fully as the template bears. `text` is the chat without marks. Raises RowFault."""
        fault = None
        for keys in ((*THOUGHTS, "content", "tool_calls"), ("content",)):
            leaves: list[Leaf] = []
            marked = [_marked_message(message, i, keys, leaves) for i, message in enumerate(messages)]
            try:
                whole = read_marks(render(marked))
            except RowFault as raised:
                fault = fault or raised
                continue
            if whole.text == text:
                return cls(messages=marked, leaves=leaves, whole=whole)
            plain, other = parted(text, whole.text)
            fault = not_splittable(f"it writes {other} for {plain} where the ends of texts are marked")
        raise fault or not_splittable("no text of it can be marked")

    def of_message(self, index: int) -> list[Leaf]:
        """The texts of a message."""
        return [leaf for leaf in self.leaves if leaf.message == index]

    def before(self, index: int) -> list[Leaf]:
        """The texts of all messages before that one."""
        return [leaf for leaf in self.leaves if leaf.message < index]


def without_marks(text: str) -> str:
    """The text of a message, or of a rendering, as it was before it was marked."""
    return _MARK.sub("", text)


def read_marks(marked: str) -> Rendering:
    """The text without its marks, and where those of each number stood."""
    if _ESCAPED_OPEN in marked:
        marked = _ESCAPED.sub(lambda found: "".join(chr(int(code, 16)) for code in found[0].split(r"\u")[1:]), marked)
    first, *others = marked.split(_OPEN)
    parts, length = [first], len(first)
    firsts: dict[int, int] = {}
    lasts: dict[int, int] = {}
    for other in others:
        digits, _, text = other.partition(_CLOSE)
        number = int(digits.translate(_NUMBERS))
        lasts[number] = length
        firsts.setdefault(number, length)
        parts.append(text)
        length += len(text)
    return Rendering(text="".join(parts), firsts=firsts, lasts=lasts)


def _marked_message(message: dict[str, Any], index: int, keys: Sequence[str], leaves: list[Leaf]) -> dict[str, Any]:
    """The message with a mark behind each text of these keys, which are added to `leaves`."""

    def mark(text: str, key: str) -> str:
        core = text.rstrip()
        if not core:
            return text
        leaves.append(Leaf(number=len(leaves), message=index, key=key, text=core))
        digits = "".join(_DIGITS[int(digit)] for digit in str(len(leaves) - 1))
        return f"{core}{_OPEN}{digits}{_CLOSE}{text[len(core) :]}"

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, str):
            return mark(value, key)
        if isinstance(value, list):
            return [walk(item, key) for item in value]
        if isinstance(value, dict):
            before = len(leaves)
            made = {name: item if name in BARE else walk(item, key) for name, item in value.items()}
            if key == "tool_calls" and isinstance(value.get("name"), str) and len(leaves) == before:
                made["name"] = mark(value["name"], NAME)  # of a call whose arguments are no texts
            return made
        return value

    return {key: walk(item, key) if key in keys else item for key, item in message.items()}
