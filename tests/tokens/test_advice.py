"""What is told works: see `test_matrix.py` for real templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chats import answer, user
from kinds import SYSTEM, record_of

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.shapes import Messages, Prompt
from alphatoken_curate.tokens.advice import Adviser, Takes

FAULT = RowFault("template_error", "the chat template fails: no")
NOTHING = "name a template that can with --chat-template FILE, or give rows of input_ids + labels"


def told(takes: Takes, record: Messages | Prompt, template: str = "", turns: str = "all") -> str:
    adviser = Adviser(takes=takes, template=template, turns=turns)
    fault = adviser.advised(FAULT, record)
    assert fault.reason == FAULT.reason and fault.message.startswith(FAULT.message + "; ")
    return fault.message.removeprefix(FAULT.message + "; ")


def test_only_what_takes_the_row_is_told() -> None:
    record = record_of("several")
    assert told(lambda _, turns, __: turns == "last", record) == "--turns last takes this row"
    assert told(lambda *_: True, record, turns="last") == NOTHING  # nothing of it can be left out
    assert told(lambda *_: False, record) == NOTHING


def test_switches_that_the_template_names_are_tried() -> None:
    def takes(_: Messages | Prompt, __: bool, settings: Mapping[str, Any]) -> bool:
        return settings == {"preserve_thinking": True}

    record = record_of("echoes")
    wanted = "--chat-template-kwargs '{\"preserve_thinking\": true}' takes this row"
    assert told(takes, record, "{% if preserve_thinking %}") == wanted
    assert told(takes, record, "{% if other %}") == NOTHING


def test_rows_without_what_is_in_the_way_are_tried() -> None:
    def without(key: str) -> Takes:
        return lambda record, *_: not any(key in message for message in record.messages)

    def of_roles(*roles: str) -> Takes:
        return lambda record, *_: [message["role"] for message in record.messages] == list(roles)

    assert told(without("thinking"), record_of("echoes")) == "it takes this row without thinking"
    assert told(of_roles("user", "assistant"), record_of("users in a row")) == NOTHING
    joined = of_roles("user", "assistant", "user", "assistant")
    assert told(joined, record_of("users in a row")).endswith("with messages in a row of one role as one")
    assert told(joined, record_of("system")).endswith("without its system message")
    calls = of_roles("user", "assistant", "tool", "assistant", "tool", "assistant")
    assert told(calls, record_of("calls")).endswith("with one call to a message")
    prompt = Prompt(messages=[SYSTEM, user("a")])
    assert told(of_roles("user"), prompt) == "it takes this row without its system message"


def test_messages_of_an_open_prompt_are_not_taken_out() -> None:
    record = Messages(messages=[SYSTEM, user("a"), answer("b")], respond_from=2)
    assert told(lambda one, *_: len(one.messages) == 2, record) == NOTHING


def test_it_is_tried_once_for_each_kind_and_never_for_more_than_a_hundred() -> None:
    tried = 0

    def takes(*_: Any) -> bool:
        nonlocal tried
        tried += 1
        return False

    adviser = Adviser(takes=takes, template="", turns="all")
    for i in range(1000):
        adviser.advised(RowFault("template_error", f"answer {i} of 'text {i}'"), record_of("several"))
    assert tried < 10
    for i in range(1000):
        adviser.advised(RowFault("template_error", "no " + "x" * i), record_of("single"))
    assert tried < 1000
