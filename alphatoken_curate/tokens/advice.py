"""What to do about a chat that its template cannot show: what is told was tried, and takes the row.

It is tried once for each kind of refusal and of row, not for each row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.shapes import Messages, Prompt
from alphatoken_curate.tokens.marks import THOUGHTS

Chat = list[dict[str, Any]]
Takes = Callable[[Messages | Prompt, str, Mapping[str, Any]], bool]
"""(record, which of its answers respond, settings of the template) -> whether they are found."""

_SWITCHES = ("enable_thinking", "thinking", "preserve_thinking", "clear_thinking", "truncate_history_thinking")
_MOST_KINDS = 100
_NOTHING = "name a template that can with --chat-template FILE, or give rows of input_ids + labels"


@dataclass(kw_only=True)
class Adviser:
    """Of one chat template."""

    takes: Takes
    template: str
    turns: str
    _known: dict[object, str] = field(default_factory=dict)

    def advised(self, fault: RowFault, record: Messages | Prompt) -> RowFault:
        """The fault with what to do about it."""
        kind = re.sub(r"'.*'|\d+", "", fault.message), _traits(record)
        if kind not in self._known:
            self._known[kind] = self._first(record) if len(self._known) < _MOST_KINDS else _NOTHING
        return RowFault(fault.reason, f"{fault.message}; {self._known[kind]}")

    def _first(self, record: Messages | Prompt) -> str:
        try:
            return next(self._found(record), _NOTHING)
        except RowFault:  # the template runs away at what is tried
            return _NOTHING

    def _found(self, record: Messages | Prompt) -> Iterator[str]:
        """All that helps."""
        for turns in self._other_turns(record):
            if self.takes(record, turns, {}):
                yield f"--turns {turns} takes this row"
        for name in _SWITCHES:
            for value in (False, True) if name in self.template else ():
                if self.takes(record, self.turns, {name: value}):
                    yield f"--chat-template-kwargs '{json.dumps({name: value})}' takes this row"
        for said, messages in _edits(record.messages):
            if isinstance(record, Messages) and record.respond_from and len(messages) != len(record.messages):
                continue
            if self.takes(replace(record, messages=messages), self.turns, {}):
                yield f"it takes this row {said}"

    def _other_turns(self, record: Messages | Prompt) -> tuple[str, ...]:
        if not isinstance(record, Messages) or self.turns == "last":
            return ()
        # A branch of a pair is no sequence for each of its answers.
        return ("all", "last") if self.turns == "each" else ("last",) if record.respond_from else ("each", "last")


def _edits(messages: Chat) -> Iterator[tuple[str, Chat]]:
    """Other rows of the same answers, and what they are."""
    questions = [message for message in messages if message["role"] not in ("system", "developer")]
    answered = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1) + 1
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    for said, changed in (
        ("with `system` for `developer`", [_renamed(message) for message in messages]),
        ("without its system message", questions),
        ("from its first question on", messages[first:]),
        ("up to its last answer", messages[:answered]),
        ("with messages in a row of one role as one", list(_joined(messages))),
        ("without content beside tool_calls", [_without_words(message) for message in messages]),
        ("with empty content for none", [{"content": "", **message} for message in messages]),
        ("with one call to a message", list(_one_call_each(messages))),
        *((f"without {key}", [_without(message, key) for message in messages]) for key in THOUGHTS),
    ):
        if changed and changed != messages:
            yield said, changed


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _without(message: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != key}


def _without_words(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": ""} if message.get("tool_calls") else message


def _joined(messages: Chat) -> Iterator[dict[str, Any]]:
    for role, group in groupby(messages, key=lambda message: message["role"]):
        together = list(group)
        plain = all(set(one) == {"role", "content"} and isinstance(one["content"], str) for one in together)
        if role in ("user", "assistant", "system") and plain:
            yield {"role": role, "content": "\n\n".join(one["content"] for one in together)}
        else:
            yield from together


def _one_call_each(messages: Chat) -> Iterator[dict[str, Any]]:
    """Each call of several in a message of its own, with its result behind it."""
    waiting: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] != "tool" or not waiting:
            yield from waiting
            waiting = []
            first, *waiting = _parted(message)
            yield first
        else:
            yield message
            yield waiting.pop(0)
    yield from waiting


def _parted(message: dict[str, Any]) -> Chat:
    calls = message.get("tool_calls") or []
    if len(calls) < 2:
        return [message]
    first = {**message, "tool_calls": calls[:1]}
    return [first, *({**message, "content": "", "tool_calls": [call]} for call in calls[1:])]


def _traits(record: Messages | Prompt) -> object:
    """What of a row the advice may depend on; few rows differ in it."""
    roles = [message["role"] for message in record.messages]
    keys = frozenset(key for message in record.messages for key in message)
    in_a_row = frozenset(one for one, other in pairwise(roles) if one == other)
    several = any(len(message.get("tool_calls") or ()) > 1 for message in record.messages)
    beside = any(message.get("tool_calls") and message.get("content") for message in record.messages)
    return roles[0], roles[-1], frozenset(roles), keys, in_a_row, several, beside, roles.count("assistant") > 1
