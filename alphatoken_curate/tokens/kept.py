"""What of an answer its chat template did not write: told where it is a thought, refused where it is more."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.fields import ROLES
from alphatoken_curate.tokens.marks import BARE, NAME, MarkedChat, without_marks
from alphatoken_curate.tokens.refusals import excerpt, not_splittable, parted

_THOUGHT_ENDS = "</think>"

_WORDS = {"true": True, "false": False, "null": None, "none": None}
_VALUE = re.compile(
    r"(?<![\w.])(?:-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|" + "|".join(_WORDS) + r")(?!\w)",
    re.IGNORECASE | re.ASCII,
)
"""A number, a boolean or nothing, as JSON or Python write them."""

_MOST_DIGITS = 20
"""Of an integer that a row may hold, with its sign."""

THOUGHT = f"content up to {_THOUGHT_ENDS}"
"""What is left out of an answer where that is the thought it begins with."""


def check_kept(chat: MarkedChat, index: int, since: int) -> list[str]:
    """The keys of texts of answer `index` that were not written. Raises RowFault where more than a thought is lost.

    Nothing of the answer stands before `since`.
    """
    whole, leaves = chat.whole, chat.of_message(index)
    keys = sorted({leaf.key for leaf in leaves if whole.end(leaf) is None})
    others = _unwritten(chat.messages[index], {leaf.key for leaf in leaves}, whole.text)
    if {"tool_calls", NAME} & {*keys}:
        raise _lost_calls(chat.messages[index], index)
    texts = [without_marks(given).rstrip() for _, given in _calls(chat.messages[index]) if isinstance(given, str)]
    for leaf in leaves:
        end = whole.end(leaf)
        if leaf.key == "tool_calls" and leaf.text in texts and whole.begin(leaf) is None:
            raise not_splittable(f"it writes the arguments of answer {index}, {excerpt(leaf.text)}, as text of text")
        if leaf.key == "content" and end is None:
            raise not_splittable(f"it leaves out answer {index}, {excerpt(leaf.text)}")
        if leaf.key == "content" and not whole.text.endswith(leaf.text, since, end):
            keys += _left_out(leaf.text, index, whole.text[since:end])
    return keys + others


def check_calls(chat: MarkedChat, index: int, spans: Sequence[tuple[int, int]]) -> None:
    """Raises RowFault where answer `index`, which stands in `spans`, has not all of its calls.

    Marks tell of texts; here it is names, and what of the arguments is no text.
    """
    message = chat.messages[index]
    if not (calls := _calls(message)):
        return
    written = "".join(chat.whole.text[start:end] for start, end in spans)
    names = Counter(without_marks(str(name)) for name, _ in calls if name is not None)
    wanted = Counter(_key(value) for _, given in calls for value in _values(given))
    if any(written.count(name) < times for name, times in names.items()):
        raise _lost_calls(message, index)
    if wanted and wanted - Counter(_written_values(chat, index, spans)):
        raise _lost_calls(message, index)
    bears = any(leaf.key in ("tool_calls", NAME) for leaf in chat.of_message(index))
    sought = [key for _, given in calls for key in _keys_of_empty(given)]
    sought += [text for _, given in calls for text in (_bare_texts(given) if bears else _texts(given))]
    if any(not _stands(text, written) for text in sought):
        raise _lost_calls(message, index)


def _values(given: Any) -> Iterator[Any]:
    """What of arguments is no text: numbers, booleans, nulls within lists."""
    if isinstance(given, dict):
        yield from (value for item in given.values() for value in _values(item))
    elif isinstance(given, list):
        yield from (value for item in given for value in _values(item))
        yield from (None for item in given if item is None)
    elif given is not None and not isinstance(given, str):
        yield given


def _keys_of_empty(given: Any) -> Iterator[str]:
    """Keys of arguments of which the value is empty, so that nothing else shows whether they were written."""
    if isinstance(given, dict):
        yield from (key for key, value in given.items() if value in ([], {}) or not str(value).strip())
        yield from (key for value in given.values() for key in _keys_of_empty(value))
    elif isinstance(given, list):
        yield from (key for value in given for key in _keys_of_empty(value))


def _written_values(chat: MarkedChat, index: int, spans: Sequence[tuple[int, int]]) -> Iterator[object]:
    """The values that stand in an answer outside of its texts."""
    text = chat.whole.text
    texts = [(chat.whole.begin(leaf), chat.whole.end(leaf)) for leaf in chat.of_message(index) if leaf.key != NAME]
    for start, end in spans:
        place = start
        for begin, stop in sorted((one, other) for one, other in texts if one is not None and other is not None):
            if place <= begin and stop <= end:
                yield from (_read(found[0]) for found in _VALUE.finditer(text[place:begin]))
                place = stop
        yield from (_read(found[0]) for found in _VALUE.finditer(text[place:end]))


def _read(word: str) -> object:
    """The key of a value that is written so."""
    if word.lower() in _WORDS:
        return _key(_WORDS[word.lower()])
    is_whole = word.lstrip("-").isdigit() and len(word) <= _MOST_DIGITS
    return _key(int(word) if is_whole else float(word))


def _key(value: Any) -> object:
    """One for values that may be written alike: 5 and 5.0, but not 1 and true."""
    return (value,) if value is None or isinstance(value, bool) else value


def _stands(text: str, written: str) -> bool:
    """Whether a text stands there, as it is or as JSON writes it."""
    return text in written or any(json.dumps(text, ensure_ascii=one)[1:-1] in written for one in (False, True))


def _texts(value: Any) -> Iterator[str]:
    """The texts within a value, without the white space round them."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        yield from (text for item in (value.values() if isinstance(value, dict) else value) for text in _texts(item))


def _bare_texts(given: Any) -> Iterator[str]:
    """The texts within arguments that are not marked."""
    if isinstance(given, dict):
        for key, value in given.items():
            yield from map(without_marks, _texts(value) if key in BARE else _bare_texts(value))
    elif isinstance(given, list):
        yield from (text for value in given for text in _bare_texts(value))


def _unwritten(message: dict[str, Any], marked: Collection[str], written: str) -> list[str]:
    """Keys of other names than those that are marked, of which the longest text stands nowhere."""
    keys = message.keys() - {"role", "content", "tool_calls", *marked}
    longest = {key: max(_texts(message[key]), key=len, default="") for key in sorted(keys)}
    return [key for key, text in longest.items() if not _stands(text, written)]


_LOST_MESSAGES = {role: f"the chat template leaves out messages of role {role}" for role in ROLES}
_LOST_CALLS = "the chat template leaves out tool_calls of answers that are context"
CONTEXT_LOST = (*_LOST_MESSAGES.values(), _LOST_CALLS)
"""What is said where the model does not see what was said before an answer."""


def context_notes(chat: MarkedChat, respond: Collection[int]) -> list[str]:
    """What is said of messages that do not respond, and of which the template has not written the text or the calls."""
    notes = list[str]()
    for i, message in enumerate(chat.messages):
        leaves = [] if i in respond else chat.of_message(i)
        if any(leaf.key == "content" and chat.whole.end(leaf) is None for leaf in leaves):
            notes.append(_LOST_MESSAGES[message["role"]])
        calls = [chat.whole.end(leaf) for leaf in leaves if leaf.key in ("tool_calls", NAME)]
        if calls and all(end is None for end in calls):
            notes.append(_LOST_CALLS)
    return notes


def left_out_notes(keys: Iterable[str]) -> list[str]:
    """What is said of texts that a template left out, by the keys they came from."""
    return [f"the chat template leaves out of answers {key}" for key in keys]


def tools_notes(tools: Sequence[Any] | None, text: str) -> list[str]:
    """What is said where the chat template has not written all of a row's tools."""
    named = [tool.get("function") or tool for tool in tools or () if isinstance(tool, dict)]
    names = [one["name"] for one in named if isinstance(one, dict) and isinstance(one.get("name"), str)]
    return ["the chat template leaves out tools"] if any(not _stands(name, text) for name in names) else []


def _left_out(text: str, index: int, written: str) -> list[str]:
    """What of the text was not written, if that is a thought; white space may be trimmed."""
    stands = _squeezed(written)
    if stands.endswith(_squeezed(text)):
        return []
    thought, _, said = text.rpartition(_THOUGHT_ENDS)
    if thought and stands.endswith(_squeezed(said)):
        return [THOUGHT]
    has, other = parted(text, written.lstrip())
    raise not_splittable(f"where answer {index} has {has}, it writes {other}")


def _calls(message: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Name and arguments of each call."""
    calls = [call.get("function") or call for call in message.get("tool_calls") or ()]
    return [(call.get("name"), call.get("arguments")) for call in calls]


def _lost_calls(message: dict[str, Any], index: int) -> RowFault:
    called = ", ".join(f"{name}({json.dumps(given, ensure_ascii=False)})" for name, given in _calls(message))
    return not_splittable(f"it does not write the tool_calls of answer {index}, {excerpt(without_marks(called))}")


def _squeezed(text: str) -> str:
    return "".join(text.split())
