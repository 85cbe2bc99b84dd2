"""Fields of rows: JSON held as text, the turns of `history`, roles and content."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alphatoken_curate.rows.containers import RawRow
from alphatoken_curate.rows.read import RowStream, rows_of
from alphatoken_curate.rows.shapes import Messages, Pair, Prompt

USER: dict[str, Any] = {"role": "user", "content": "W?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "It is 5."}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Oslo"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "w"}}]


def read(record: dict[str, Any]) -> Any:
    """Its normal form, or the bad row."""
    found = rows_of([record], "a.jsonl")
    return found.rows[0].record if found.rows else found.bad[0]


WHOLE: dict[str, Any] = {"messages": [USER, CALLED, ANSWER], "tools": TOOLS}
PACKED: dict[str, dict[str, Any]] = {
    "messages": {"messages": json.dumps([USER, CALLED, ANSWER])},
    "each message": {"messages": [json.dumps(one) for one in (USER, CALLED, ANSWER)]},
    "calls": {"messages": [USER, {**CALLED, "tool_calls": json.dumps([CALL])}, ANSWER]},
    "each call": {"messages": [USER, {**CALLED, "tool_calls": [json.dumps(CALL)]}, ANSWER]},
    "tools": {"tools": json.dumps(TOOLS)},
    "each tool": {"tools": [json.dumps(one) for one in TOOLS]},
}


@pytest.mark.parametrize("name", PACKED)
def test_json_as_text_is_what_it_holds(name: str) -> None:
    assert read(WHOLE | PACKED[name]) == Messages(**WHOLE)
    assert read({"conversations": (WHOLE | PACKED[name])["messages"], "tools": TOOLS}) == Messages(**WHOLE)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"messages": "[{"}, "messages is text that is no JSON: "),
        ({"messages": "hello"}, "messages is text; it must be a list of messages"),
        ({"messages": ["{"]}, "messages[0] is text that is no JSON: "),
        ({"messages": ["hello"]}, "messages[0] is text; it must be an object with role and content"),
        ({"messages": [USER, {**CALLED, "tool_calls": ["{"]}]}, "messages[1].tool_calls[0] is text that is no JSON: "),
        ({"messages": [USER, ANSWER], "tools": ["x"]}, "tools[0] is text that is no JSON: "),
        ({"messages": [USER, ANSWER], "tools": ["[1]"]}, "tools is a list; it must be a list of objects"),
        (
            {"messages": [USER, {"role": "assistant", "content": {"token_ids": [1], "loss_scale": [1]}}]},
            "messages[1].content holds token_ids, as an export for ms-swift does",
        ),
    ],
)
def test_text_that_is_no_json_is_named(record: dict[str, Any], told: str) -> None:
    bad = read(record)
    assert bad.reason == "wrong_type" and bad.message.startswith(told)


def test_what_a_user_writes_stays_text() -> None:
    record = read({"prompt": "[1, 2]", "response": '{"a": null}'})
    assert [message["content"] for message in record.messages] == ["[1, 2]", '{"a": null}']


# --- history


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


HISTORY = [["q1", "a1"], ["q2", "a2"]]


@pytest.mark.parametrize("history", [HISTORY, json.dumps(HISTORY)])
def test_history_is_read_as_earlier_turns(history: Any) -> None:
    """As LLaMA-Factory trains it: answers of earlier turns respond, too."""
    alpaca = {"instruction": "q3", "input": "", "output": "a3", "history": history, "system": "s"}
    made = read(alpaca)
    assert made == Messages(messages=[{"role": "system", "content": "s"}, *said("q1", "a1", "q2", "a2", "q3", "a3")])
    assert made.responding() == [2, 4, 6] and made.responding(last_only=True) == [6]
    assert read({"prompt": "q3", "response": "a3", "history": history}).messages == made.messages[1:]


def test_history_of_a_pair_is_its_prompt() -> None:
    pair = read({"prompt": "q3", "chosen": "a3", "rejected": "b3", "history": HISTORY})
    assert isinstance(pair, Pair) and isinstance(pair.chosen, Messages) and isinstance(pair.rejected, Messages)
    assert pair.chosen.messages == said("q1", "a1", "q2", "a2", "q3", "a3") and pair.chosen.responding() == [5]
    assert pair.rejected.responding() == [5] and pair.rejected.plain is None
    assert read({"prompt": "q", "response": "a", "rejected_response": "b", "history": HISTORY}).chosen.responding() == [
        5
    ]


@pytest.mark.parametrize("empty", [None, [], ""])
def test_no_history(empty: Any) -> None:
    stream = RowStream(())
    record = {"instruction": "q", "output": "a", "history": empty}
    (row,) = stream.sort([RawRow(1, record, record)], "a.jsonl")
    assert row.record == Messages(messages=said("q", "a")) and not stream.told


@pytest.mark.parametrize("history", [["q1", "a1"], [["q1"]], [["q", "a", "b"]], {"q": "a"}, [{"role": "user"}], 3, "{"])
def test_history_of_another_form_is_named(history: Any) -> None:
    bad = read({"instruction": "q", "output": "a", "history": history})
    assert bad.reason == "wrong_type" and bad.message.startswith("history is ")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": said("q", "a")},
        {"conversations": said("q", "a")},
        {"prompt": "q", "completion": "a"},
        {"prompt": said("q"), "response": said("q", "a")[1:]},
        {"chosen": "the one", "rejected": "the other"},
        {"prompt": said("q"), "chosen": said("q", "a")[1:], "rejected": said("q", "b")[1:]},
    ],
    ids="+".join,
)
def test_history_beside_another_shape_is_ambiguous(record: dict[str, Any]) -> None:
    bad = read(record | {"history": HISTORY})
    assert bad.reason == "ambiguous_shape" and bad.message.startswith("history beside ")
    # A column of that name which holds no turns says nothing.
    assert read(record | {"history": "imported"}) == read(record)


# --- roles by other names, calls that are messages of their own


@pytest.mark.parametrize(("role", "answers"), [("human", "gpt"), ("user", "model"), ("human", "assistant")])
def test_roles_by_other_names(role: str, answers: str) -> None:
    made = read({"messages": [{"role": role, "content": "W?"}, {"role": answers, "content": "It is 5."}]})
    assert made == Messages(messages=[USER, ANSWER])
    sharegpt = [{"from": role, "value": "W?"}, {"from": answers, "value": "It is 5."}]
    assert read({"conversations": sharegpt}) == made


CALL_TEXT = '{"name": "w", "arguments": {"city": "Oslo"}}'


@pytest.mark.parametrize(("caller", "result"), [("function_call", "observation"), ("tool_call", "tool_response")])
@pytest.mark.parametrize("packed", [CALL_TEXT, json.dumps(CALL), f"[{CALL_TEXT}]", json.loads(CALL_TEXT)])
def test_calls_that_are_messages_of_their_own(caller: str, result: str, packed: Any) -> None:
    turns = [("human", "W?"), (caller, packed), (result, "5"), ("gpt", "It is 5.")]
    wanted: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "5"},
        ANSWER,
    ]
    made = read({"conversations": [{"from": role, "value": text} for role, text in turns], "tools": TOOLS})
    assert made == Messages(messages=wanted, tools=TOOLS) and made.responding() == [1, 3]
    assert read({"messages": [{"role": role, "content": text} for role, text in turns], "tools": TOOLS}) == made


def test_calls_in_a_row_and_behind_text_are_one_turn() -> None:
    call = {"role": "tool_call", "content": CALL_TEXT}
    made = read({"messages": [USER, {"role": "assistant", "content": "Let me see."}, call, call]})
    assert made.messages == [USER, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}]
    off = read({"messages": [USER, {"role": "assistant", "content": "No.", "weight": 0}, call]})
    assert len(off.messages) == 3 and off.responding() == [2]  # a mark is that of its own message
    own = {"role": "assistant", "tool_calls": [CALL]}
    assert read({"messages": [USER, ANSWER, own]}).messages == [USER, ANSWER, own]


@pytest.mark.parametrize("content", ["hello", "3", "{}", '{"name": 3}', '{"function": {"name": null}}', None, "[1]"])
def test_a_call_that_is_none_is_named(content: Any) -> None:
    bad = read({"messages": [USER, {"role": "function_call", "content": content}]})
    assert bad.reason == "wrong_type" and bad.message.startswith("messages[1].content")


def test_a_call_has_no_calls_besides() -> None:
    bad = read({"messages": [USER, {"role": "function_call", "content": CALL_TEXT, "tool_calls": [CALL]}]})
    assert bad.reason == "wrong_type" and bad.message.startswith("messages[1] is a call by its role and has tool_calls")


def test_a_refusal_is_named() -> None:
    bad = read({"messages": [USER, {"role": "assistant", "content": None, "refusal": "I cannot."}]})
    assert bad.message == "messages[1].content is null beside a refusal; give what was said as content"


# --- the system text of a row

SYSTEM, NO = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "No."}
SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "conversations": {"conversations": [USER, ANSWER]},
    "texts": {"prompt": "W?", "response": "It is 5."},
    "lists": {"prompt": [USER], "completion": [ANSWER]},
    "instruction": {"instruction": "W?", "output": "It is 5."},
}
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "W?", "chosen": "It is 5.", "rejected": "No."},
    "chats": {"chosen": [USER, ANSWER], "rejected": [USER, NO]},
    "rejected_response": {"messages": [USER, ANSWER], "rejected_response": "No."},
    "rejected_messages": {"messages": [USER, ANSWER], "rejected_messages": [USER, NO]},
}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_every_shape_of_a_chat_reads_the_system_text_of_its_row(key: str) -> None:
    for name, record in SHAPES.items():
        assert read(record | {key: "Be kind."}).messages == [SYSTEM, USER, ANSWER], name
        assert read(record | {key: ""}) == read(record | {key: None}) == read(record), name
    for name, record in PAIRS.items():
        pair = read(record | {key: "Be kind."})
        assert isinstance(pair, Pair) and isinstance(pair.chosen, Messages), name
        assert pair.chosen.messages == [SYSTEM, USER, ANSWER] and pair.chosen.responding() == [2], name
        assert isinstance(pair.rejected, Messages) and pair.rejected.messages[:2] == [SYSTEM, USER], name


def test_a_system_message_is_said_once_and_another_is_refused() -> None:
    whole = {"messages": [SYSTEM, USER, ANSWER]}
    for told in ("Be kind.", " Be  kind.\n", "kind"):
        assert read(whole | {"system": told}) == read(whole)
    assert read(SHAPES["messages"] | {"system": "Be kind.", "system_prompt": "Be kind."}) == read(whole)
    for beside in ({"system": "Be rude."}, {"system_prompt": "Be kind. Be rude."}):
        bad = read(whole | beside)
        assert bad.reason == "ambiguous_shape" and "is not that of the system message" in bad.message
    bad = read(SHAPES["messages"] | {"system": "Be kind.", "system_prompt": "Be rude."})
    assert bad.message == "system and system_prompt are different texts; leave one of them"
    assert read(SHAPES["messages"] | {"system": ["Be kind."]}).reason == "wrong_type"


def test_text_that_continues_text_has_no_system_message() -> None:
    record = {"prompt": "a", "completion": " b"}
    assert read(record | {"system": " "}) == read(record)
    bad = read(record | {"system": "Be kind."})
    assert bad.reason == "ambiguous_shape" and "--map completion=response" in bad.message


def test_prompts_have_the_system_text_too() -> None:
    for record in ({"messages": [USER]}, {"conversations": [USER]}, {"prompt": [USER]}, {"prompt": "W?"}):
        found = rows_of([record | {"system_prompt": "Be kind."}], "a.jsonl", ("prompt",)).rows[0].record
        assert isinstance(found, Prompt) and found.messages == [SYSTEM, USER] and found.plain is None


ARGUMENTS = '{"city":"Rome"}'
OLD = {"name": "w", "arguments": ARGUMENTS}
OF_OLD = [{"type": "function", "function": OLD}]
LEGACY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "beside text": ({"content": "Let me look.", "function_call": OLD}, {"content": "Let me look."}),
    "without content": ({"content": None, "function_call": OLD}, {}),
    "as text": ({"content": None, "function_call": json.dumps(OLD)}, {}),
    "beside the same call": ({"content": "", "function_call": OLD, "tool_calls": OF_OLD}, {"content": ""}),
    "beside no calls": ({"content": "", "function_call": OLD, "tool_calls": []}, {"content": ""}),
}


@pytest.mark.parametrize("name", LEGACY)
def test_a_function_call_is_a_call_of_a_tool(name: str) -> None:
    given, content = LEGACY[name]
    result = {"content": "21", "name": "w"}
    found = read({"messages": [USER, {"role": "assistant", **given}, {"role": "function", **result}, ANSWER]})
    called = {"role": "assistant", **content, "tool_calls": OF_OLD}
    assert found == Messages(messages=[USER, called, {"role": "tool", **result}, ANSWER])
    assert json.dumps(found.messages[1]["tool_calls"])


@pytest.mark.parametrize("empty", [{}, "", None, {"name": None, "arguments": None}])
def test_an_empty_function_call_is_none(empty: object) -> None:
    assert read({"messages": [USER, ANSWER | {"function_call": empty}]}) == Messages(messages=[USER, ANSWER])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (["w"], "messages[1].function_call is a list; it must be an object with a name"),
        ({"arguments": "{}"}, "messages[1].function_call is an object; it must be an object with a name"),
        ("w", "messages[1].function_call is text that is no JSON"),
    ],
)
def test_a_function_call_that_is_none_is_named(call: object, told: str) -> None:
    assert told in read({"messages": [USER, ANSWER | {"function_call": call}]}).message


def test_two_different_calls_are_refused() -> None:
    bad = read({"messages": [USER, {"role": "assistant", "function_call": OLD, "tool_calls": [CALL]}, ANSWER]})
    assert bad.message == "messages[1] has function_call and tool_calls, which differ; leave one of them"


@pytest.mark.parametrize("functions", [[{"name": "w"}], json.dumps([{"name": "w"}]), [json.dumps({"name": "w"})]])
@pytest.mark.parametrize("tools", [None, [], TOOLS, [{"name": "w"}]])
def test_functions_are_tools(functions: object, tools: object) -> None:
    found = read({"messages": [USER, ANSWER], "functions": functions, "tools": tools})
    assert found.tools == (tools or TOOLS)


def test_functions_beside_other_tools_are_refused() -> None:
    bad = read({"messages": [USER, ANSWER], "functions": [{"name": "v"}], "tools": TOOLS})
    assert bad.message == "the row has tools and functions, which differ; leave one of them"


@pytest.mark.parametrize("other", ["sin and cos", ["sin"], 3, [{"sin": 1}], "[", None, []])
def test_another_column_of_that_name_is_none(other: object) -> None:
    assert read({"messages": [USER, ANSWER], "functions": other}).tools is None


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "self", "conversations"])
def test_what_a_row_may_not_tell_its_template_is_named(name: str) -> None:
    bad = read({"messages": [USER, ANSWER], "chat_template_kwargs": {name: True}})
    assert bad.message == f"chat_template_kwargs names {name}, which is not the row's to set"


# --- messages where text may stand, too

NO: dict[str, Any] = {"role": "assistant", "content": "No."}
SAID = {"prompt": [USER], "completion": [ANSWER], "response": [ANSWER], "chosen": [ANSWER], "rejected": [NO]}


def columns(messages: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """As `datasets` stores a sequence of objects."""
    return {key: [one[key] for one in messages] for key in messages[0]}


@pytest.mark.parametrize("write", [json.dumps, columns])
@pytest.mark.parametrize("keys", [("prompt", "completion"), ("prompt", "response"), ("prompt", "chosen", "rejected")])
def test_messages_are_messages_however_they_are_stored(keys: tuple[str, ...], write: Any) -> None:
    plain = read({key: SAID[key] for key in keys})
    assert isinstance(plain, Messages | Pair)
    assert read({key: write(SAID[key]) for key in keys}) == plain
    assert read({key: SAID[key] if key == "prompt" else write(SAID[key]) for key in keys}) == plain
    assert read({key: write(SAID[key]) if key == "prompt" else SAID[key] for key in keys}) == plain
    assert read({"messages": columns([USER, ANSWER])}) == read({"messages": [USER, ANSWER]})


@pytest.mark.parametrize("write", [json.dumps, columns])
def test_whole_chats_of_a_pair_are_chats_however_they_are_stored(write: Any) -> None:
    both = {"chosen": [USER, ANSWER], "rejected": [USER, NO]}
    assert read({key: write(one) for key, one in both.items()}) == read(both)
    beside = {"messages": [USER, ANSWER], "rejected_response": [NO]}
    assert read(beside | {"rejected_response": write([NO])}) == read(beside)
    text = {"prompt": "W?", **both}
    assert read({"prompt": "W?", **{key: write(one) for key, one in both.items()}}) == read(text)


def test_messages_of_a_sharegpt_stored_as_columns() -> None:
    sharegpt = [{"from": "human", "value": "W?"}, {"from": "gpt", "value": "It is 5."}]
    assert read({"conversations": columns(sharegpt)}) == read({"conversations": sharegpt})
    uneven = {"from": ["human"], "value": ["W?", "It is 5."]}
    assert read({"conversations": uneven}).message == "conversations is an object; it must be a list of messages"


def test_text_that_only_looks_like_messages_stays_text() -> None:
    """An answer beside a prompt of text is text; so is what is a list of something else, or one of two branches."""
    chat = json.dumps([ANSWER])
    assert read({"prompt": "Write a chat.", "completion": chat}).completion == chat
    assert read({"prompt": "Write a chat.", "response": chat}).messages[-1]["content"] == chat
    for other in ('[{"name": "x"}]', "[1, 2]", "[]", "[not JSON", '[{"role": "user"}]'):
        assert read({"prompt": other, "completion": "5"}).prompt == other
    assert read({"prompt": "W?", "chosen": chat, "rejected": "No."}).chosen.messages[-1]["content"] == chat


def test_that_text_was_read_as_messages_is_told() -> None:
    told = "a prompt or an answer that is messages as JSON text is read as these"
    rows = [
        {"prompt": json.dumps([USER]), "completion": "5"},
        {"chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, NO])},
        {"messages": [USER, ANSWER], "rejected_response": json.dumps([NO])},
        {"prompt": "W?", "completion": json.dumps([ANSWER])},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [USER, ANSWER], "prompt": json.dumps([USER])},
    ]
    stream = RowStream(())
    assert len(list(stream.sort([RawRow(i, row, row) for i, row in enumerate(rows, 1)], "a.jsonl"))) == len(rows)
    assert stream.told == {told: 3}


@pytest.mark.parametrize("key", ["completion", "response"])
def test_text_beside_messages_is_the_users_or_the_assistants(key: str) -> None:
    whole = read({"prompt": [USER], key: [ANSWER]})
    assert read({"prompt": [USER], key: "It is 5."}) == whole == read({"prompt": "W?", key: [ANSWER]})
    told = read({"prompt": [USER], key: "It is 5.", "system": "Be brief."})
    assert told.messages[0] == {"role": "system", "content": "Be brief."} and told.respond_from == 2
    assert read({"prompt": [USER], key: " "}).reason == "no_response"


def test_half_a_character_is_named() -> None:
    for record in ({"prompt": "Cut \ud83d", "response": "5"}, {"messages": [USER, {**ANSWER, "content": "\udc00"}]}):
        assert read(record).reason == "lone_surrogate" and "\\ud83d" not in read(record).message
