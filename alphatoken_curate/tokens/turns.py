"""Where the answers of a chat stand in its text, for templates that do not mark them themselves.

Nothing is searched for. Every text of a message gets a numbered mark behind its last character, the chat is rendered
with the marks and without, and both must be the same text. So it is known where each text ends, whatever it is.

An answer begins where the messages before it, rendered with the generation prompt, and the whole chat part, both read
on from the same mark: behind what header and generation prompt have in common. It ends behind the run of special
tokens that closes its turn: read on from the answer's last mark, the chat up to this answer and the whole chat agree
that far. Where a template closes a turn otherwise once messages follow, its own closing there counts; where none does,
the token that opens the next turn counts if the model stops at it (GLM), and no other.

Messages may be written otherwise in history (thoughts left out, another token for the end): all that is asked for is
that the answer stands there whole. What is left out besides is told, by the key it came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.files import visible

# noncharacters of Unicode, kept free for use inside a program
_OPEN, _DIGITS, _CLOSE = "\ufdd3", "\ufdd4\ufdd5\ufdd6\ufdd7\ufdd8\ufdd9\ufdda\ufddb\ufddc\ufddd", "\ufdde"
_NUMBERS = str.maketrans(_DIGITS, "0123456789")
_MARK = re.compile(f"{_OPEN}[{_DIGITS}]+{_CLOSE}")
# as a template writes them that turns text to ASCII
_ESCAPED_OPEN, _ESCAPED = r"\ufdd3", re.compile(r"\\ufdd3(?:\\ufdd[4-9a-d])+\\ufdde")
RESERVED = re.compile(f"[{_OPEN}-{_CLOSE}]")

_NAME = "name"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_THOUGHT_ENDS = "</think>"
_EDGE = re.compile(r"\s|[<\[]")

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
        return (self.firsts if leaf.key == _NAME else self.lasts).get(leaf.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Spans [start, end) of the answers in characters, where what each `said` ends, and what else the template did."""

    spans: list[tuple[int, int]]
    said: list[int]
    notes: list[str]


def find_answers(
    text: str,
    messages: list[dict[str, Any]],
    respond: Sequence[int],
    render: Render,
    *,
    specials: re.Pattern[str],
    stops: frozenset[str],
) -> Answers:
    """Where the messages `respond` stand in `text`, the chat as `render` has it.

    `stops` are the texts of special tokens that end an answer. Raises RowFault where a place is not sure.
    """
    chat = _Chat.of(text, messages, render)
    turns = [_Turn(chat, i, render, specials, stops) for i in respond]
    spans = [turn.span() for turn in turns]
    if any(after[0] < before[1] for before, after in pairwise(spans)):
        raise not_splittable("two answers overlap in it")
    notes = [note for turn in turns for note in (*left_out_notes(turn.left_out), *turn.notes)]
    return Answers(spans=spans, said=[turn.said for turn in turns], notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chat:
    """A chat with marks, and where they stand in the whole of it."""

    messages: list[dict[str, Any]]
    leaves: list[Leaf]
    whole: Rendering

    @classmethod
    def of(cls, text: str, messages: list[dict[str, Any]], render: Render) -> _Chat:
        """Marked as fully as the template bears."""
        for keys in ((*_THOUGHTS, "content", "tool_calls"), ("content",)):
            leaves: list[Leaf] = []
            marked = [_marked_message(message, i, keys, leaves) for i, message in enumerate(messages)]
            try:
                whole = _read(render(marked))
            except RowFault:
                continue
            if whole.text == text:
                return cls(messages=marked, leaves=leaves, whole=whole)
        raise not_splittable("it writes other text where the ends of messages are marked")

    def of_message(self, index: int) -> list[Leaf]:
        return [leaf for leaf in self.leaves if leaf.message == index]

    def before(self, index: int) -> list[Leaf]:
        return [leaf for leaf in self.leaves if leaf.message < index]


class _Turn:
    """One answer."""

    def __init__(
        self, chat: _Chat, index: int, render: Render, specials: re.Pattern[str], stops: frozenset[str]
    ) -> None:
        self.chat, self.index, self.specials, self.stops = chat, index, specials, stops
        self.whole, self.message = chat.whole, chat.messages[index]
        self.render = render
        self.mine = chat.of_message(index)
        self.notes: list[str] = []
        self.said = 0
        self.left_out = sorted({leaf.key for leaf in self.mine if self.whole.end(leaf) is None})

    def span(self) -> tuple[int, int]:
        """[start, end). Raises RowFault."""
        if self.index == 0:
            raise not_splittable("no message stands before the first answer")
        head = _read(self.render(self.chat.messages[: self.index], prompt=True))
        anchor = self._anchor(head)
        start = self._start(head, *anchor)
        self._check_kept(anchor[1])
        end = self._end(start, anchor)
        self._check_alone(start, end)
        self._check_calls(self.whole.text[start:end])
        return start, end

    # --- start

    def _anchor(self, head: Rendering) -> tuple[int, int]:
        """Where the last text of earlier messages that both have ends: in `head`, and in the whole."""
        return max(self._in_both(head, self.chat.before(self.index)), default=(0, 0))

    def _in_both(self, other: Rendering, leaves: Sequence[Leaf]) -> list[tuple[int, int]]:
        """Where texts end in another rendering and in the whole, of those that both have."""
        places = [(other.end(leaf), self.whole.end(leaf)) for leaf in leaves]
        return [(there, here) for there, here in places if there is not None and here is not None]

    def _start(self, head: Rendering, at_head: int, at_whole: int) -> int:
        tail, text = head.text[at_head:], self.whole.text
        shared = _shared(tail, text[at_whole:])
        start = at_whole + shared
        first = min((begin for leaf in self.mine if (begin := self._begin(leaf)) is not None), default=None)
        if shared < len(tail):
            self._check_header(head, shared - len(tail), tail[:shared])
            start = start if first is None else min(start, first)
            within = (one for one in self._specials_of(at_whole, len(text)) if one.start() < start < one.end())
            start = next((one.start() for one in within), start)
        elif first is not None and text[start:first].strip() and head.text == self._before().text:
            header = self._usual_header()
            if not header or not text.startswith(header, start, first):
                said = visible(text[start:first], 40)
                raise not_splittable(f"it has no generation prompt and writes {said!r} before an answer")
            start += len(header)
        return start

    def _usual_header(self) -> str:
        """The generation prompt behind the messages before the chat's first answer, where this one has none."""
        first = next(i for i, message in enumerate(self.chat.messages) if message["role"] == "assistant")
        before, head = (_read(self.render(self.chat.messages[:first], prompt=asked)).text for asked in (False, True))
        return head[len(before) :] if first and head.startswith(before) else ""

    def _check_header(self, head: Rendering, missing: int, shared: str) -> None:
        """What the whole has of a generation prompt must end where a word of it does."""
        before = self._before()
        prompt = head.text[len(before.text) :] if head.text.startswith(before.text) else ""
        kept, rest = prompt[:missing], head.text[missing:]
        if not kept or not (_EDGE.match(rest) or _EDGE.match(shared[-1:]) or self._closes(shared)):
            raise not_splittable(
                f"answer {self.index} does not begin with its generation prompt: that goes on with"
                f" {visible(rest, 40)!r}, the chat does not"
            )

    def _before(self) -> Rendering:
        return _read(self.render(self.chat.messages[: self.index]))

    def _closes(self, text: str) -> bool:
        return any(found.end() == len(text) for found in self.specials.finditer(text))

    def _begin(self, leaf: Leaf) -> int | None:
        """Where a text begins, if it stands there as it is."""
        end = self.whole.end(leaf)
        if end is None or not self.whole.text.endswith(leaf.text.lstrip(), 0, end):
            return None
        return end - len(leaf.text.lstrip())

    # --- end

    def _end(self, start: int, anchor: tuple[int, int]) -> int:
        text = self.whole.text
        is_last = self.index == len(self.chat.messages) - 1
        through = self.whole if is_last else _read(self.render(self.chat.messages[: self.index + 1]))
        places = self._in_both(through, self.mine)
        if places:
            there, here = max(places, key=lambda place: place[1])
            at, there = max(start, here), there + max(0, start - here)
        else:
            at = there = start
            if not is_last:
                there = self._same_place(through, start, anchor)
        self.said = at
        tail = through.text[there:]
        agreed = _shared(tail, text[at:])
        runs = self._runs(at, at + agreed)
        if runs and places and not self.message.get("tool_calls"):
            return runs[0][0]
        # Behind calls, and where nothing was said, other special tokens stand before those that close the turn.
        if closing := next((end for end, names in runs if self.stops & set(names)), None):
            return closing
        if agreed < len(tail):
            return self._other_closing(runs[-1][0] if runs else at, tail[runs[-1][0] - at if runs else 0 :])
        if stop := self._next_stop(at + agreed):
            return stop
        if not runs:
            self.notes.append("the chat template writes no token to stop at behind an answer")
        return runs[-1][0] if runs else at + agreed

    def _same_place(self, through: Rendering, start: int, anchor: tuple[int, int]) -> int:
        """In the chat up to this answer: the place that is `start` in the whole."""
        both = self._in_both(through, self.chat.before(self.index))
        return next((there for there, here in both if here == anchor[1]), 0) + start - anchor[1]

    def _runs(self, start: int, end: int) -> list[tuple[int, list[str]]]:
        """Special tokens within [start, end) that stand one behind the other: where such a run ends, and its tokens."""
        runs: list[tuple[int, list[str]]] = []
        place = -1
        for found in self._specials_of(start, end):
            if found.start() == place:
                runs[-1] = found.end(), [*runs[-1][1], found[0]]
            else:
                runs.append((found.end(), [found[0]]))
            place = found.end()
        return runs

    def _other_closing(self, at: int, tail: str) -> int:
        """History closes a turn otherwise: by as many special tokens as `tail` does, as far as they stand in a row."""
        text = self.whole.text
        wanted = len(list(_run(self.specials, tail, len(tail) - len(tail.lstrip()))))
        ends = list(_run(self.specials, text, len(text) - len(text[at:].lstrip())))[: max(1, wanted)]
        if not ends:
            raise not_splittable(
                f"it writes answer {self.index} otherwise once messages follow: first"
                f" {visible(tail, 40)!r}, then {visible(text[at:], 40)!r}"
            )
        return ends[-1]

    def _next_stop(self, at: int) -> int | None:
        """Behind the special token that stands at `at`, if the model stops at it."""
        found = self.specials.match(self.whole.text, at)
        return found.end() if found and found[0] in self.stops else None

    def _specials_of(self, start: int, end: int) -> Iterator[re.Match[str]]:
        return self.specials.finditer(self.whole.text, start, end)

    # --- checks

    def _check_kept(self, since: int) -> None:
        """The answer's own text stands whole before its mark, but for a thought that history leaves out."""
        for leaf in self.mine:
            if leaf.key != "content":
                continue
            end = self.whole.end(leaf)
            if end is None:
                raise not_splittable(f"it leaves out answer {self.index}")
            if not self.whole.text.endswith(leaf.text, since, end):
                self.left_out += left_out(leaf.text, self.index, _squeezed(self.whole.text[since:end]).endswith)

    def _check_calls(self, turn: str) -> None:
        names = [(call.get("function") or call).get("name") for call in self.message.get("tool_calls") or ()]
        written = _MARK.sub("", turn)
        lost = [name for name in names if name is not None and _MARK.sub("", str(name)) not in written]
        if lost or {"tool_calls", _NAME} & {*self.left_out}:
            raise not_splittable(f"it does not write the tool_calls of answer {self.index}")

    def _check_alone(self, start: int, end: int) -> None:
        for leaf in self.chat.leaves:
            if leaf.message != self.index and start < (self.whole.end(leaf) or -1) <= end:
                raise not_splittable(f"answer {self.index} encloses another message")


def left_out(text: str, index: int, stands: Callable[[str], bool]) -> list[str]:
    """What of the text of answer `index` was not written, which may be a thought. Raises RowFault where more is lost.

    `stands` tells it of a text without white space.
    """
    if stands(_squeezed(text)):
        return []
    thought, _, said = text.rpartition(_THOUGHT_ENDS)
    if thought and stands(_squeezed(said)):
        return [THOUGHT]
    raise not_splittable(f"it leaves out or rewrites part of answer {index}")


def left_out_of_turn(message: dict[str, Any], index: int, turn: str) -> list[str]:
    """The same of a message, in a turn that the template marked."""
    content, written = message.get("content") or "", _squeezed(turn)
    parts = [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
    return [key for part in parts for key in left_out(part, index, written.__contains__)]


THOUGHT = f"content up to {_THOUGHT_ENDS}"
"""What is left out of an answer where that is the thought it begins with."""


def left_out_notes(keys: Iterable[str]) -> list[str]:
    """What is said of texts that a template left out, by the keys they came from."""
    return [f"the chat template leaves out their {key}" for key in keys]


def not_splittable(why: str) -> RowFault:
    """The fault of a row whose answers have no sure place."""
    return RowFault(
        "template_not_splittable",
        f"the chat template does not show where the answer is: {why}; try --turns last, or input_ids + labels rows",
    )


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
            made = {name: item if name in ("type", "id", "name") else walk(item, key) for name, item in value.items()}
            if key == "tool_calls" and isinstance(value.get("name"), str) and len(leaves) == before:
                made["name"] = mark(value["name"], _NAME)  # of a call whose arguments are no texts
            return made
        return value

    return {key: walk(item, key) if key in keys else item for key, item in message.items()}


def _read(marked: str) -> Rendering:
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


def _run(specials: re.Pattern[str], text: str, at: int) -> Iterator[int]:
    """The ends of special tokens that stand one behind the other from `at` on."""
    while found := specials.match(text, at):
        at = found.end()
        yield at


def _shared(one: str, other: str) -> int:
    """Length of the longest prefix that both have."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _squeezed(text: str) -> str:
    return "".join(text.split())
