"""What is told of answers, and where they stand in the templates of a small grammar (real ones: `test_matrix.py`)."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from chats import answer, responses, run, user
from grammar import CHATS, PARTS, template_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import KINDS, call
from matrix import check_by_changes, rendered, responding, said
from templates import templates, tokenizer_of

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.chat import MARK, ChatSettings, RenderedText


def test_what_a_template_leaves_out_is_told_by_name() -> None:
    told: Counter[str] = Counter()
    messages = KINDS["echoes"]
    run(tokenizer_of(templates()["qwen2_5"]), Messages(messages=messages), Messages(messages=messages), told=told)
    assert told == {
        "the chat template leaves out of answers reasoning_content": 2,
        "the chat template leaves out of answers thinking": 2,
    }
    told.clear()
    run(tokenizer_of(templates()["glm4moe"]), Messages(messages=KINDS["single"]), told=told)
    assert told == {"the chat template writes no token to stop at behind an answer": 1}


def test_a_thought_that_is_left_out_is_told_whether_answers_are_marked_or_not() -> None:
    chat = Messages(messages=KINDS["inline thoughts"])
    for name, form in (("deepseekv3", "ordinary"), ("deepseekv3_training", "marked")):
        told: Counter[str] = Counter()
        good, _ = run(tokenizer_of(templates()[name]), chat, told=told)
        assert good and told == {"the chat template leaves out of answers content up to </think>": 1}, form


def test_a_control_token_of_the_templates_own_thoughts_is_one_in_an_answer_and_text_in_a_question() -> None:
    tokenizer = tokenizer_of(templates()["qwen3_5_think"])
    think, end = tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>"])
    ids = []
    for question, said_ in (("One?", "<think>\nhm\n</think>\n\nFirst"), ("<think>", "First<|im_end|>")):
        (row,), _ = run(tokenizer, Messages(messages=[user(question), answer(said_)]))
        ids.append(row.input_ids.tolist())
    assert ids[0].count(think) == ids[1].count(think) == 1  # the second is the template's own
    assert ids[0].count(end) == ids[1].count(end) == 2  # what closes a turn is text in an answer


def test_special_tokens_in_answers_are_told_and_may_be_text_or_refused() -> None:
    tokenizer = tokenizer_of(templates()["qwen3_5_think"])
    think = tokenizer.convert_tokens_to_ids("<think>")
    chats = [[user("One?"), answer("<think>\nhm\n</think>\n\nFirst")], [user("<|im_end|>"), answer("First<|im_end|>")]]
    records = [Messages(messages=chat) for chat in chats]
    stays = {"special tokens that an answer spells stay text": 1}
    for setting, thoughts, wanted in (("template", 1, stays), ("text", 1, {next(iter(stays)): 2})):
        told: Counter[str] = Counter()
        good, bad = run(tokenizer, *records, told=told, chats=ChatSettings(assistant_specials=setting))
        assert not bad and told == wanted and [row.input_ids.tolist().count(think) for row in good][1] == thoughts
        assert "<think>\nhm" in tokenizer.decode(good[0].input_ids)
    good, bad = run(tokenizer, *records, chats=ChatSettings(assistant_specials="refuse"))
    assert len(good) == 1 and [row.reason for row in bad] == ["special_token"] and "<|im_end|>" in bad[0].message


def test_a_template_that_turns_text_to_ascii_shows_its_answers_whatever_escapes_a_row_spells() -> None:
    tokenizer = tokenizer_of("<|im_start|><|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}{{ m.content | tojson(ensure_ascii=True) }}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    )
    spelled = "\\ufdd3"
    chats = [[user("a"), answer("b")], [user(spelled), answer("b")], [user(spelled + "\\ufdd4\\ufdde"), answer("b")]]
    good, bad = run(tokenizer, *(Messages(messages=chat) for chat in chats))
    assert [row.row_id for row in good] == [0, 1, 2] and not bad
    assert {*(text for row in good for text in responses(tokenizer, row))} == {'"b"<|im_end|>'}


LLAMA3_AT_RELEASE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + END }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) + END }}{% endfor %}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
"""It writes its generation prompt behind every chat, right behind the end of the answer."""


@pytest.mark.parametrize("turns", ["all", "last", "each"])
@pytest.mark.parametrize("end", ["<|eot_id|>", "<|END_RESPONSE|><|eot_id|>"])
def test_the_header_of_a_turn_to_come_is_in_no_mask_where_it_always_stands(end: str, turns: str) -> None:
    tokenizer = tokenizer_of(LLAMA3_AT_RELEASE.replace("END", repr(end)) + "<|eot_id|>")
    tokenizer.chat_template = LLAMA3_AT_RELEASE.replace("END", repr(end))
    good, bad = run(tokenizer, Messages(messages=KINDS["several"]), turns=turns)
    assert not bad
    wanted = [f"First thing.{end}", f"Second thing.{end}"][turns == "last" :]
    assert [text for row in good for text in responses(tokenizer, row)] == wanted


def test_a_stop_that_nobody_names_is_told_where_a_header_may_stand_behind_it() -> None:
    tokenizer = tokenizer_of(LLAMA3_AT_RELEASE.replace("END", "'<|end_of_text|>'") + "<|im_end|>")
    tokenizer.chat_template = LLAMA3_AT_RELEASE.replace("END", "'<|end_of_text|>'")
    told: Counter[str] = Counter()
    good, _ = run(tokenizer, Messages(messages=KINDS["single"]), told=told)
    assert responses(tokenizer, good[0]) == ["It is this.<|end_of_text|>"]
    assert [what.partition(", and")[0] for what in told] == [
        "the chat template writes its generation prompt behind every chat"
    ]


# --- a small grammar


CONTROLS = "<|im_start|><|im_end|><|stop|><|sep|><|user|>"


def check_answers(record: Messages, found: RenderedText, turns: str) -> None:
    """Each answer that responds is wholly in a span of its own, and nothing else is."""
    spoken = [text.replace(MARK, "") for text in said(found)]
    places = responding(record, turns)
    assert len(spoken) == len(places)
    for i, text in zip(places, spoken, strict=True):
        message = record.messages[i]
        assert message["content"].strip() in text and "assistant" not in text and "eve" not in text
        assert all(call["function"]["name"] in text for call in message.get("tool_calls", ()))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    parts=st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in PARTS.items()}),
    messages=CHATS,
    turns=st.sampled_from(["all", "last"]),
)
def test_no_text_of_others_ever_responds_and_every_answer_does(
    parts: dict[str, str], messages: list[dict[str, Any]], turns: str
) -> None:
    tokenizer = tokenizer_of(CONTROLS)
    tokenizer.chat_template = template_of(parts)
    record = Messages(messages=messages)
    found = rendered(tokenizer, record, turns)
    if not isinstance(found, RowFault):
        check_answers(record, found, turns)
        check_by_changes(tokenizer, record, turns, found)


@pytest.mark.parametrize("kind", ["several", "system", "echoes", "call", "rounds of calls", "in a row"])
def test_most_templates_of_the_grammar_show_their_answers(kind: str) -> None:
    shown = Counter[bool]()
    record = Messages(messages=KINDS[kind])
    for name, choices in PARTS.items():
        for choice in choices:
            parts = {other: choice if other == name else options[0] for other, options in PARTS.items()}
            tokenizer = tokenizer_of(CONTROLS)
            tokenizer.chat_template = template_of(parts)
            found = rendered(tokenizer, record, "all")
            shown[not isinstance(found, RowFault)] += 1
            if isinstance(found, RowFault):
                assert "call" in kind and parts["calls"] == "", (parts, found.message)
    assert shown[True] >= 20


# --- templates that go another way than any real one does

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}BODY{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS = "{{ '<|im_end|>\n' }}"


def by(template: str, *messages: dict[str, Any], turns: str = "all", **options: Any) -> tuple[list[str], str]:
    """What responds, and what is said of the row."""
    tokenizer = tokenizer_of("<|im_start|><|im_end|><call></call>")
    tokenizer.chat_template = template
    tokenizer.eos_token = "<|im_end|>"
    told: Counter[str] = Counter()
    good, bad = run(tokenizer, Messages(messages=list(messages), **options), turns=turns, told=told)
    return [one for row in good for one in responses(tokenizer, row)], bad[0].message if bad else "; ".join(told)


@pytest.mark.parametrize("turns", ["all", "each", "last"])
@pytest.mark.parametrize(
    "body", ["<|im_start|>summary\n", "<|im_start|>", "\n<|im_start|>user\nSay it again.<|im_end|>\n"]
)
def test_an_answer_that_is_written_again_behind_its_stop_is_refused(body: str, turns: str) -> None:
    again = "{% if m.role == 'assistant' %}{{ '<|im_end|>" + body.replace("\n", "\\n") + "' + m.content }}{% endif %}"
    found, said_ = by(CHATML.replace("BODY", again), *KINDS["several"], turns=turns)
    assert not found and "again behind '<|im_end|>'; " in said_
    at_the_end = "{% set m = messages[-1] %}{% if m.role == 'assistant' %}{{ '<|im_start|>so\n' + m.content }}" + ENDS
    found, said_ = by(CHATML.replace("BODY", "") + at_the_end + "{% endif %}", *KINDS["several"], turns=turns)
    assert not found and "again behind '<|im_end|>'" in said_


def test_an_answer_that_is_written_twice_within_its_turn_is_that() -> None:
    body = "{% if m.role == 'assistant' %}{{ ', ' + m.content }}{% endif %}"
    assert by(CHATML.replace("BODY", body), user("a"), answer("b")) == (["b, b<|im_end|>"], "")
    front = "{% for m in messages %}{{ '* ' + m.content + '\n' }}{% endfor %}"
    assert by(front + CHATML.replace("BODY", ""), user("a"), answer("b")) == (["b<|im_end|>"], "")


@pytest.mark.parametrize("turns", ["all", "each", "last"])
def test_the_header_of_an_answer_stays_out_of_its_mask_where_the_prompt_names_another_role(turns: str) -> None:
    template = CHATML.replace("BODY", "").replace("assistant", "model")
    found, said_ = by(template, *KINDS["several"], turns=turns)
    assert found == ["First thing.<|im_end|>", "Second thing.<|im_end|>"][-1 if turns == "last" else 0 :]
    assert "names another role before answers than in its generation prompt" in said_


def test_keys_that_no_template_knows_are_told() -> None:
    thought = "Let me add the two."
    keys = {"thoughts": thought, "reasoning_details": [{"type": "t", "text": thought}], "think": f" {thought}\n"}
    found, said_ = by(CHATML.replace("BODY", ""), user("a"), answer("b") | keys, answer("c") | {"n": 5, "empty": ""})
    assert found == ["b<|im_end|>", "c<|im_end|>"]
    assert sorted(said_.split("; ")) == [f"the chat template leaves out of answers {key}" for key in sorted(keys)]
    wrote = "{% if m.think %}{{ m.think }}{% endif %}{% if m.reasoning_details %}{{ m.reasoning_details | tojson }}"
    _, said_ = by(CHATML.replace("BODY", wrote + "{% endif %}"), user("a"), answer("b") | keys)
    assert said_ == ""  # the same thought under each key


def test_tools_that_are_not_written_are_told() -> None:
    tools = [{"type": "function", "function": {"name": "get_weather"}}, {"name": "get_time"}]
    found, said_ = by(CHATML.replace("BODY", ""), user("a"), answer("b"), tools=tools)
    assert (found, said_) == (["b<|im_end|>"], "the chat template leaves out tools")
    front = "{% for one in tools %}{{ one | tojson }}{% endfor %}"
    assert by(front + CHATML.replace("BODY", ""), user("a"), answer("b"), tools=tools) == (["b<|im_end|>"], "")


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("{{ c.function.name }}", {"n": 5}),
        ("{{ c.function.name }}", {"s": ""}),
        ("{{ c.function.name }}", '{"n": 5}'),
        ("{{ c.function.name }}", {"flag": True, "l": [1, 2]}),
        (
            "{% for k, v in c.function.arguments.items() if v is string %}{{ k }}={{ v }}{% endfor %}",
            {"s": "x", "n": 5},
        ),
        ("{{ c.function.name }}{{ c.function.arguments.keys() | list }}", {"n": 5}),
        ("{{ c.function.name }}{{ c.function.arguments.x }}", {"x": "y", "name": "Bob"}),
    ],
)
@pytest.mark.parametrize("turns", ["all", "each", "last"])
def test_arguments_that_are_not_written_are_refused(body: str, arguments: Any, turns: str) -> None:
    called = answer("") | {"tool_calls": [call(arguments)]}
    template = CHATML.replace("BODY", "{% for c in m.tool_calls or [] %}<call>" + body + "</call>{% endfor %}")
    found, said_ = by(template, user("a"), called, turns=turns)
    assert not found and "it does not write the tool_calls of answer 1" in said_
    whole = template.replace(body, "{{ c.function.name }} {{ c.function.arguments | tojson }}")
    given_ = arguments if isinstance(arguments, str) else json.dumps(arguments)
    assert by(whole, user("a"), called, turns=turns) == ([f"<call>get_weather {given_}</call><|im_end|>"], "")
