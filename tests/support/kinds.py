"""Chats of many kinds, as rows hold them, and the records that they become."""

from __future__ import annotations

from functools import cache
from typing import Any

from chats import answer, user

from alphatoken_curate.rows.shapes import Messages, messages_of


def _tool(name: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "w", "parameters": parameters}}


TOOLS = [_tool("get_weather", "city"), _tool("get_time", "zone")]

_OSLO, _ROME = {"city": "Oslo"}, {"city": "Rome"}


def thinking(text: str, thought: str) -> dict[str, Any]:
    """An answer with a thought under either key that templates read."""
    return answer(text) | {"reasoning_content": thought, "thinking": thought}


def call(arguments: Any, name: str = "get_weather", number: int = 1) -> dict[str, Any]:
    return {"type": "function", "id": f"call0000{number}", "function": {"name": name, "arguments": arguments}}


def calling(text: str, *arguments: Any) -> dict[str, Any]:
    """Calls of the tool, one for each of the arguments."""
    return answer(text) | {"tool_calls": [call(item, number=i + 1) for i, item in enumerate(arguments)]}


def result(text: str, name: str = "get_weather", number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": text, "tool_call_id": f"call0000{number}"}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


SYSTEM = {"role": "system", "content": "Be kind."}
_ASKED = user("Weather?")
_THOUGHT = "<think>\nhm {0}\n</think>\n\n"

_PLAIN: dict[str, list[dict[str, Any]]] = {
    "single": [user("What is it?"), answer("It is this.")],
    "several": [user("One?"), answer("First thing."), user("Two?"), answer("Second thing.")],
    "six turns": [message for i in range(6) for message in (user(f"Question {i}?"), answer(f"Reply {i}."))],
    "one letter": [user("Pick"), answer("a")],
    "letters": [user("Pick"), answer("a"), user("n?"), answer("final")],
    "names": [user("assistant"), answer("assistant"), user("user"), answer("user")],
    "same": [user("yes"), answer("yes"), user("yes"), answer("yes")],
    "quoted": [user("Say: It is so."), answer("It is so."), user("Why did you say: It is so."), answer("It is so.")],
    "unanswered": [user("One?"), answer("First"), user("Two?")],
    "unanswered single turn": [user("One?"), answer("First"), user("Really?"), user("Two?")],
    "headers": [
        user("One?"),
        answer("assistant\nmodel\nuser:\n### Response:"),
        user("Two?"),
        answer("[INST] No [/INST]"),
    ],
    "json": [user("One?"), answer('{"a": [1, "b"]}'), user("Two?"), answer('{"name": "get_weather", "arguments": {}}')],
    "code": [user("One?"), answer("```python\nif a:\n\n    b()\n```"), user("Two?"), answer("<b>bold</b> <|no|> </a>")],
    "scripts": [user("Été?"), answer("Zażółć 日本 🙂"), user("שלום"), answer("e\u0301 שלום مرحبا")],
    "escapes": [user("\\n {{ x }}"), answer("\\n {{ y }} {% z %} \\ufdd3"), user("&lt;"), answer("&amp; 'a' \"b\"")],
}
_ROLES: dict[str, list[dict[str, Any]]] = {
    "system": [SYSTEM, user("One?"), answer("1"), user("Two?"), answer("2")],
    "developer": [{"role": "developer", "content": "Be kind."}, user("One?"), answer("1")],
    "system later": [user("One?"), answer("First"), SYSTEM, user("Two?"), answer("Second")],
    "system alone": [SYSTEM, answer("Hello there.")],
    "users in a row": [user("One?"), user("Really?"), answer("First"), user("Two?"), answer("Second")],
    "in a row": [user("One?"), answer("First"), answer("And more"), user("Two?"), answer("Second")],
    "in a row last": [user("One?"), answer("First"), answer("And more")],
    "answer first": [answer("Hello there."), user("One?"), answer("First")],
}
_SPACE: dict[str, list[dict[str, Any]]] = {
    "white space": [user("One?"), answer("  padded \n"), user("Two?"), answer("\nnew line")],
    "blank lines": [user("One?\n"), answer("a\n\n\nb\n\n"), user("\nTwo?"), answer("\n\nc \t")],
    "empty": [user("One?"), answer(""), user("Two?"), answer("Yes")],
    "empty last": [user("One?"), answer("Yes"), user("Two?"), answer("")],
    "blank": [user("One?"), answer(" \n"), user("Two?"), answer("Yes")],
    "empty question": [user(""), answer("Yes")],
    "empty system": [{"role": "system", "content": ""}, user("One?"), answer("Yes")],
    "parts": [user("x") | {"content": parts("One", "?")}, answer("x") | {"content": parts("First ", "thing.")}],
}
_THOUGHTS: dict[str, list[dict[str, Any]]] = {
    "echo": [user("One?"), thinking("40", "Forty makes 40, so that is it.")],
    "echoes": [user("One?"), thinking("40", "Forty makes 40."), user("Two?"), thinking("41", "Then 41 it is: 41.")],
    "thought of a letter": [user("Pick"), thinking("a", "a or b: a")],
    "empty thought": [user("One?"), thinking("First", ""), user("Two?"), thinking("Second", "")],
    "one thought of two": [user("One?"), answer("First"), user("Two?"), thinking("Second", "hm")],
    "thought unanswered": [user("One?"), thinking("First", "hm"), user("Two?")],
    "inline thought": [user("One?"), answer(_THOUGHT.format("One") + "First")],
    "inline thoughts": [
        *(user("One?"), answer(_THOUGHT.format("One") + "First")),
        *(user("Two?"), answer(_THOUGHT.format("Two") + "Second")),
    ],
    "inline echo": [user("One?"), answer("<think>\nThen 41 it is: 41\n</think>\n\n41")],
    "inline empty": [user("One?"), answer("<think>\n\n</think>\n\nFirst"), user("Two?"), answer("Second")],
    "inline later": [user("One?"), answer("Well. <think>hm</think> First"), user("Two?"), answer("Second")],
    "thought and call": [
        _ASKED,
        calling("", _OSLO) | {"reasoning_content": "Oslo then."},
        result("5 C"),
        answer("5 C."),
    ],
}
_CALLS: dict[str, list[dict[str, Any]]] = {
    "call": [_ASKED, calling("", _OSLO), result("5 C"), answer("It is 5 C.")],
    "call as text": [_ASKED, calling("", '{"city": "Oslo"}'), result("5 C"), answer("It is 5 C.")],
    "call last": [_ASKED, calling("", _OSLO)],
    "call with words": [_ASKED, calling("Let me see.", _OSLO), result("5 C"), answer("5 C.")],
    "call with words last": [_ASKED, calling("Let me see.", _OSLO)],
    "call with numbers": [_ASKED, calling("", {"n": 3}), result("5 C"), answer("It is 5 C.")],
    "call of nothing": [_ASKED, calling("", {}), result("5 C"), answer("It is 5 C.")],
    "call of much": [
        _ASKED,
        calling("", {"city": "Oslo", "at": {"days": [1, 2], "ok": True}}),
        result("5"),
        answer("5."),
    ],
    "call without content": [
        *(_ASKED, {"role": "assistant", "content": None, "tool_calls": [call(_OSLO)]}),
        *(result("5 C"), answer("It is 5 C.")),
    ],
    "call unanswered": [_ASKED, calling("", _OSLO), result("5 C")],
    "calls": [_ASKED, calling("", _OSLO, _ROME), result("5 C"), result("9 C", number=2), answer("5 and 9 C.")],
    "calls last": [_ASKED, calling("", _OSLO, _ROME)],
    "rounds of calls": [
        *(_ASKED, calling("", _OSLO), result("5 C"), calling("", _ROME), result("9 C")),
        *(answer("5 and 9 C."), user("Time?"), answer("") | {"tool_calls": [call({"zone": "x"}, "get_time")]}),
        *(result("12", "get_time"), answer("Noon.")),
    ],
    "call after an answer": [user("Hello?"), answer("Hi."), _ASKED, calling("", _OSLO)],
    "call of text result": [_ASKED, calling("", _OSLO), result('{"t": "5 C"}'), answer("5 C")],
    "tools not called": [SYSTEM, user("Hello?"), answer("Hi."), user("Bye?"), answer("Bye.")],
}

GROUPS = {"plain": _PLAIN, "roles": _ROLES, "white space": _SPACE, "thoughts": _THOUGHTS, "calls": _CALLS}
"""Messages by kind, in the columns of the table."""

KINDS = {kind: messages for group in GROUPS.values() for kind, messages in group.items()}
"""Messages by kind."""

CALLS = frozenset(_CALLS) | {"thought and call"}
"""The kinds that are given tools."""


def tools_of(kind: str) -> list[Any] | None:
    return TOOLS if kind in CALLS else None


@cache
def record_of(kind: str) -> Messages:
    """The row in its normal form."""
    return Messages(messages=messages_of({"messages": KINDS[kind]}, "messages"), tools=tools_of(kind))
