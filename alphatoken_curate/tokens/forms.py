"""Messages as templates may want them: arguments of calls as objects or as text, content as text or as parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from alphatoken_curate.rows.containers import RowFault, parse_json
from alphatoken_curate.tokens.refusals import RUNAWAY

TEMPLATE_ERROR = "template_error"
"""The reason of a row that the chat template itself fails at."""

Rendered = TypeVar("Rendered")

# a noncharacter of Unicode, kept free for use inside a program
PART = "\ufddf"
"""A key of each part of text that these forms make: no template writes it but one that writes a list as it is."""

_WRITTEN = (PART, r"\ufddf")


def as_borne(messages: list[Any], render: Callable[[list[Any]], Rendered]) -> Rendered:
    """What `render` makes of the messages in the first form that the template bears.

    Raises the first fault; one of a form that the template bears, but that shows no answer, before others. Arguments
    are text only where the template fails with objects: others would write them as text within text.
    """
    faults: list[RowFault] = []
    for form, of_text in _forms(messages):
        if of_text and any(fault.reason != TEMPLATE_ERROR for fault in faults):
            continue
        try:
            return render(form)
        except RowFault as fault:
            if fault.reason == RUNAWAY:
                raise
            faults.append(fault)
    raise min(faults, key=lambda fault: fault.reason == TEMPLATE_ERROR)


def _forms(messages: list[Any]) -> Iterator[tuple[list[Any], bool]]:
    """The messages in each form, the most usual first; each form once. And whether arguments are text there."""
    objects = [_with_arguments(message, _as_object) for message in messages]
    yield objects, False
    tried, filled = [objects], _with_content(objects)
    texts = [_with_arguments(message, _as_text) for message in messages]
    for form, of_text in ((filled, False), (texts, True), (_with_content(texts), True)):
        if form not in tried:
            tried.append(form)
            yield form, of_text
    if all(isinstance(message["content"], str) for message in filled):
        yield [{**message, "content": _parts(message["content"])} for message in filled], False


def written_as_list(text: str) -> bool:
    """Whether a template wrote a list of parts as it is, and not the text of its parts."""
    return any(name in text for name in _WRITTEN)


def _parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, PART: True}]


def _with_content(messages: list[Any]) -> list[Any]:
    """Empty content where a message of calls has none."""
    return [message if "content" in message else {**message, "content": ""} for message in messages]


def _with_arguments(message: dict[str, Any], change: Any) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    changed = [_with_changed(call, change) for call in calls]
    return message if changed == calls else {**message, "tool_calls": changed}


def _with_changed(call: Any, change: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _with_changed(function, change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    """The object, where they are its JSON, OpenAI's own form. Raises RowFault where it would not be the same."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = parse_json(arguments.encode())
    except RowFault as fault:
        if fault.reason in ("invalid_json", "two_values"):
            return arguments
        raise RowFault(fault.reason, f"arguments of a call: {fault.message}") from None
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
