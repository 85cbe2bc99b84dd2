from __future__ import annotations

import json
from typing import Any

import pytest
from chats import answer, user
from kinds import call

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.tokens.marks import NAME, RESERVED, MarkedChat, read_marks, without_marks

CALLED = answer("") | {"tool_calls": [call({"city": "Oslo"}), call({"n": 3})]}


def written(messages: list[dict[str, Any]], **_: Any) -> str:
    return "".join(f"[{m['role']}] {m['content']}{json.dumps(m.get('tool_calls', ''))}" for m in messages)


def marked(messages: list[dict[str, Any]], render: Any = written) -> MarkedChat:
    return MarkedChat.of(render(messages), messages, render)


def test_a_mark_behind_each_text_tells_where_it_ends() -> None:
    messages = [user("yes"), answer("yes \n"), user("yes")]
    chat = marked(messages)
    assert chat.whole.text == written(messages) and RESERVED.search(chat.messages[1]["content"])
    assert [(leaf.message, leaf.key, leaf.text) for leaf in chat.leaves] == [(i, "content", "yes") for i in range(3)]
    for leaf in chat.leaves:
        begin, end = chat.whole.begin(leaf), chat.whole.end(leaf)
        assert begin is not None and chat.whole.text[begin:end] == "yes"
        assert chat.whole.text[:end].count("yes") == leaf.message + 1
    assert chat.of_message(1) == [chat.leaves[1]] and chat.before(2) == chat.leaves[:2]


def test_texts_of_calls_are_marked_and_of_those_without_texts_the_name() -> None:
    """Even where a template writes them as ASCII: as json.dumps does."""
    chat = marked([user("a"), CALLED])
    assert [(leaf.key, leaf.text) for leaf in chat.leaves[1:]] == [("tool_calls", "Oslo"), (NAME, "get_weather")]
    assert [chat.whole.text[: chat.whole.end(leaf)][-4:] for leaf in chat.leaves[1:]] == ["Oslo", "ther"]
    assert without_marks(chat.messages[0]["content"]) == "a"


def test_a_text_written_twice_ends_last_but_a_name_first() -> None:
    chat = marked([user("a"), CALLED])
    twice = read_marks(written(chat.messages) * 2)
    _, oslo, name = chat.leaves
    assert twice.end(oslo) == (chat.whole.end(oslo) or 0) + len(chat.whole.text)
    assert twice.end(name) == chat.whole.end(name)


def test_what_a_template_does_not_write_has_no_end_and_what_it_writes_otherwise_no_begin() -> None:
    chat = marked([user("a"), answer("Bcd")], lambda messages, **_: messages[1]["content"].upper())
    first, second = chat.leaves
    assert chat.whole.end(first) is chat.whole.begin(first) is chat.whole.begin(second) is None
    assert chat.whole.end(second) == 3


def test_a_chat_is_marked_as_fully_as_its_template_bears() -> None:
    def render(messages: list[dict[str, Any]], **_: Any) -> str:
        if RESERVED.search(str(messages[1].get("thinking"))):
            raise RowFault("template_error", "no")
        return str(messages[1]["content"])

    chat = marked([user("a"), answer("b") | {"thinking": "hm"}], render)
    assert [leaf.key for leaf in chat.leaves] == ["content", "content"]


def test_a_template_that_writes_other_text_is_refused_with_both() -> None:
    with pytest.raises(RowFault, match="it writes 'long' for 'short' where the ends of texts are marked"):
        marked([user("a"), answer("b")], lambda messages, **_: "short" if len(messages[0]["content"]) == 1 else "long")
