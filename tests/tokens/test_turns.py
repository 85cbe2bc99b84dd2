"""What is told of answers, and where they stand in the templates of a small grammar (real ones: `test_matrix.py`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from chats import answer, responses, run, user
from grammar import CHATS, PARTS, template_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import KINDS
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
