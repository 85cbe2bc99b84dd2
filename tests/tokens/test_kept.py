from __future__ import annotations

from typing import Any

import pytest
from chats import answer, user
from kinds import call, thinking

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.tokens.kept import check_calls, check_kept, left_out_notes
from alphatoken_curate.tokens.marks import MarkedChat


def kept(message: dict[str, Any], write: Any) -> list[str]:
    """What is told of an answer that is written so."""
    messages = [user("a"), message]

    def render(chat: list[dict[str, Any]], **_: Any) -> str:
        return str(chat[0]["content"]) + write(chat[1])

    return check_kept(MarkedChat.of(render(messages), messages, render), 1, since=1)


def test_thoughts_may_be_left_out_by_key_or_between_tags() -> None:
    assert kept(answer("b"), lambda m: m["content"]) == []
    assert kept(thinking("b", "hm"), lambda m: m["content"]) == ["reasoning_content", "thinking"]
    inline = answer("<think>hm</think> b")
    assert kept(inline, lambda m: m["content"].split("</think>")[1]) == ["content up to </think>"]
    assert left_out_notes(["thinking"]) == ["the chat template leaves out of answers thinking"]


def test_white_space_may_be_trimmed() -> None:
    assert kept(answer(" b\n\nc "), lambda m: " ".join(m["content"].split())) == []


@pytest.mark.parametrize(
    ("message", "write", "said"),
    [
        (answer("First thing."), lambda m: "", "leaves out answer 1, 'First thing.'"),
        (answer("First one."), lambda m: m["content"][3:], "where answer 1 has 'First one.', it writes 'st one.'"),
        (
            answer("") | {"tool_calls": [call({"city": "Oslo"})]},
            lambda m: m["content"],
            """does not write the tool_calls of answer 1, 'get_weather({"city": "Oslo"})'""",
        ),
        (
            answer("") | {"tool_calls": [call('{"city": "Oslo"}')]},
            lambda m: m["tool_calls"][0]["function"]["arguments"].replace('"', '\\"'),
            "as text of text",
        ),
    ],
)
def test_more_is_refused_with_what_is_lost(message: dict[str, Any], write: Any, said: str) -> None:
    with pytest.raises(RowFault) as raised:
        kept(message, write)
    assert said in raised.value.message


def test_each_call_is_named_in_its_turn() -> None:
    message = {"tool_calls": [call({}), call({}, "get_time")]}
    check_calls(message, 1, "get_weather() get_time()")
    with pytest.raises(RowFault, match=r"get_weather\({}\), get_time\({}\)"):
        check_calls(message, 1, "get_weather()")
