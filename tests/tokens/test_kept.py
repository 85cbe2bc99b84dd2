from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from chats import answer, rows_of, user
from kinds import call, thinking
from templates import family_tokenizer

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.kept import CONTEXT_LOST, check_calls, check_kept, context_notes, left_out_notes
from alphatoken_curate.tokens.marks import MarkedChat
from alphatoken_curate.tokens.tokenise import TokenRow, tokenise


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


def check_written(message: dict[str, Any], write: Any) -> None:
    messages = [user("a"), message]

    def render(chat: list[dict[str, Any]], **_: Any) -> str:
        return str(chat[0]["content"]) + write(chat[1])

    chat = MarkedChat.of(render(messages), messages, render)
    check_calls(chat, 1, [(1, len(chat.whole.text))])


def test_each_call_is_named_in_its_turn() -> None:
    message = {"role": "assistant", "tool_calls": [call({}), call({}, "get_time")]}
    check_written(message, lambda m: " ".join(one["function"]["name"] + "()" for one in m["tool_calls"]))
    with pytest.raises(RowFault, match=r"get_weather\({}\), get_time\({}\)"):
        check_written(message, lambda m: m["tool_calls"][0]["function"]["name"] + "()")
    twice = {"role": "assistant", "tool_calls": [call({}), call({})]}
    with pytest.raises(RowFault, match="does not write the tool_calls"):
        check_written(twice, lambda m: m["tool_calls"][0]["function"]["name"] + "()")


def by_json(given: Any) -> str:
    return json.dumps(given, ensure_ascii=False)


def by_python(given: Any) -> str:
    return repr(given)


def by_lines(given: Any) -> str:
    """As templates of XML write it."""
    items = ((key, value if isinstance(value, str) else by_json(value)) for key, value in given.items())
    return "".join(f"<parameter={key}>{value}</parameter>" for key, value in items)


GIVEN: dict[str, dict[str, Any]] = {
    "a number": {"n": 5},
    "a number beside a text": {"s": "x", "n": 5},
    "numbers": {"n": -5, "x": 0.5, "y": 1e-7, "z": 1e22, "m": 9_223_372_036_854_775_807},
    "a number twice": {"n": 5, "m": 5},
    "booleans": {"flag": True, "other": False},
    "a list": {"l": [1, [2, None], {"k": 3}]},
    "what is empty": {"s": "", "l": [], "o": {}, "b": " "},
    "a key to escape": {'\u00e9 "k"': ""},
}


@pytest.mark.parametrize("write", [by_json, by_python, by_lines])
@pytest.mark.parametrize("name", GIVEN)
def test_arguments_that_are_no_texts_are_found_where_they_are_written(name: str, write: Any) -> None:
    message = answer("On 5 of 5, so true.") | {"tool_calls": [call(GIVEN[name], "f_5")]}

    def wrote(m: dict[str, Any]) -> str:
        function = m["tool_calls"][0]["function"]
        return f"{m['content']}<call>{function['name']} {write(function['arguments'])}</call>"

    check_written(message, wrote)


NOT_TEXT = [name for name in GIVEN if "key" not in name]


@pytest.mark.parametrize("name", NOT_TEXT)
def test_arguments_that_are_no_texts_are_missed_where_they_are_not(name: str) -> None:
    """The template writes those that are texts; the answer's own words hold the same numbers."""
    message = answer("On 5 of 5, so true, 1 and null.") | {"tool_calls": [call(GIVEN[name], "f_5")]}

    def wrote(m: dict[str, Any]) -> str:
        function = m["tool_calls"][0]["function"]
        texts = [value for value in function["arguments"].values() if isinstance(value, str)]
        return f"{m['content']}<call>{function['name']} {texts}</call>"

    with pytest.raises(RowFault, match="does not write the tool_calls of answer 1"):
        check_written(message, wrote)


def test_one_of_two_equal_numbers_is_missed() -> None:
    message = answer("") | {"tool_calls": [call({"n": 5, "m": 5})]}
    with pytest.raises(RowFault, match="does not write the tool_calls of answer 1"):
        check_written(message, lambda m: 'get_weather {"n": 5}')


def test_a_number_of_very_many_digits_is_none_of_the_arguments() -> None:
    message = answer("") | {"tool_calls": [call({"n": 5})]}
    check_written(message, lambda m: f"get_weather {'1' * 5000} {'-1.' + '9' * 5000}e999 5")


CONTEXT = [
    {"role": "developer", "content": "Be brief."},
    user("Weather?"),
    answer("") | {"tool_calls": [call({"city": "Oslo"})]},
    {"role": "tool", "content": "5 C"},
    answer("It is 5 C."),
]


def context_told(write: Any, respond: list[int]) -> list[str]:
    def render(chat: list[dict[str, Any]], **_: Any) -> str:
        return "".join(map(write, chat))

    return context_notes(MarkedChat.of(render(CONTEXT), CONTEXT, render), respond)


def test_what_is_left_out_before_an_answer_is_told() -> None:
    def whole(message: dict[str, Any]) -> str:
        return message["content"] + "".join(str(one["function"]["arguments"]) for one in message.get("tool_calls", ()))

    assert context_told(whole, [2, 4]) == context_told(whole, [4]) == []
    assert context_told(lambda m: m["content"], [4]) == [
        "the chat template leaves out tool_calls of answers that are context"
    ]
    spoken = context_told(lambda m: m["content"] if m["role"] in ("user", "assistant") else "", [2, 4])
    assert spoken == [f"the chat template leaves out messages of role {role}" for role in ("developer", "tool")]
    assert {*spoken} < {*CONTEXT_LOST}
    assert context_told(lambda m: m["content"] if m["role"] == "user" else "", [2, 4]) == spoken


@pytest.mark.parametrize("family", ["qwen3", "llama3", "phi3", "gptoss"])
def test_templates_that_leave_out_a_call_are_not_advised_to(family: str) -> None:
    """`--turns last` would show the answer without the call that it goes by."""
    tokenizer, record = family_tokenizer(family), Messages(messages=CONTEXT[1:])
    for turns in ("all", "last"):
        told = Counter[str]()
        rows, bad = tokenise(rows_of(record), tokenizer, max_length=999, turns=turns, vocab_size=None, told=told)
        read = "".join(map(tokenizer.decode, (row.input_ids for row in rows if isinstance(row, TokenRow))))
        assert "Oslo" in read or bad or any("tool_calls" in one for one in told)
        assert not any("--turns last" in one.message for one in bad)
