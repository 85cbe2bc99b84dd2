"""What of an answer its chat template did not write: told where it is a thought, refused where it is more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.tokens.marks import NAME, MarkedChat, without_marks
from alphatoken_curate.tokens.refusals import excerpt, not_splittable, parted

_THOUGHT_ENDS = "</think>"

THOUGHT = f"content up to {_THOUGHT_ENDS}"
"""What is left out of an answer where that is the thought it begins with."""


def check_kept(chat: MarkedChat, index: int, since: int) -> list[str]:
    """The keys of texts of answer `index` that were not written. Raises RowFault where more than a thought is lost.

    Nothing of the answer stands before `since`.
    """
    whole, leaves = chat.whole, chat.of_message(index)
    keys = sorted({leaf.key for leaf in leaves if whole.end(leaf) is None})
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
    return keys


def check_calls(message: dict[str, Any], index: int, turn: str) -> None:
    """Raises RowFault where the turn of answer `index` has not the name of each of its calls."""
    written = without_marks(turn)
    if any(name is not None and without_marks(str(name)) not in written for name, _ in _calls(message)):
        raise _lost_calls(message, index)


def left_out_notes(keys: Iterable[str]) -> list[str]:
    """What is said of texts that a template left out, by the keys they came from."""
    return [f"the chat template leaves out of answers {key}" for key in keys]


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
