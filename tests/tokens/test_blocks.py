from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from chats import answer, responses, run, user
from kinds import KINDS, call
from templates import tokenizer_of

from alphatoken_curate.rows.shapes import Messages

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
END = "{{ '<|im_end|>' }}"


def said(inner: str, *messages: dict[str, Any], turns: str = "all") -> list[str] | str:
    tokenizer = tokenizer_of("<|im_start|><|im_end|>")
    tokenizer.chat_template = HEAD + inner + TAIL
    good, bad = run(tokenizer, Messages(messages=list(messages)), turns=turns)
    return responses(tokenizer, good[0]) if good else bad[0].message


def of_answers(inner: str) -> str:
    return "{% if m.role == 'assistant' %}" + inner + "{% else %}{{ m.content }}" + END + "{% endif %}"


MARKED = of_answers("{% generation %}{{ m.content }}" + END + "{% endgeneration %}")
APART = of_answers("{% generation %}{{ m.content }}{% endgeneration %}{% generation %}" + END + "{% endgeneration %}")


@pytest.mark.parametrize("inner", [MARKED, APART])
def test_marks_win_however_many_a_turn_has(inner: str) -> None:
    chat = KINDS["several"]
    assert said(inner, *chat) == ["First thing.<|im_end|>", "Second thing.<|im_end|>"]
    assert said(inner, *chat, turns="last") == ["Second thing.<|im_end|>"]
    assert said(inner, user("a"), answer(""), user("b"), answer("c"), turns="last") == ["c<|im_end|>"]
    assert said(inner, user("a"), answer(""), user("b"), answer("c")) == ["<|im_end|>", "c<|im_end|>"]


def test_an_answer_that_is_not_marked_is_refused_and_only_if_it_is_to_respond() -> None:
    last = "{% generation %}{{ m.content }}" + END + "{% endgeneration %}"
    inner = of_answers("{% if loop.last %}" + last + "{% else %}{{ m.content }}" + END + "{% endif %}")
    chat = KINDS["several"]
    assert "marks 1 answer of 2, and none of answer 1, 'First thing.'; --turns each takes this row" in said(
        inner, *chat
    )
    assert said(inner, *chat, turns="last") == ["Second thing.<|im_end|>"]
    half = of_answers("{{ m.content }}{% generation %}" + END + "{% endgeneration %}")
    assert "it marks '<|im_end|>' of answer 1, but not 'First thing.'" in said(half, *chat)


@pytest.mark.parametrize(
    "body",
    [
        "Sure: {% generation %}{{ m.content }}{% endgeneration %}",
        "{% generation %}{{ m.content }}{% endgeneration %} so",
        "{% generation %}{{ m.content }}{% endgeneration %}{% generation %} so{% endgeneration %}",
    ],
)
def test_a_mark_within_a_mark_is_refused_in_letters_that_are_seen(body: str) -> None:
    found = said(of_answers("{% generation %}" + body + "{% endgeneration %}" + END), *KINDS["several"])
    assert "marks an answer within an answer, one {% generation %} inside another" in found
    assert isinstance(found, str) and found.isascii()


def test_a_mark_round_a_question_is_refused() -> None:
    inner = "{% generation %}{{ m.content }}" + END + "{% endgeneration %}"
    assert "it marks messages [0] as one answer, 'One?<|im_end|>'" in said(inner, *KINDS["several"])


def test_a_call_that_is_not_written_is_refused() -> None:
    called = answer("") | {"tool_calls": [call({"city": "Oslo"})]}
    assert "does not write the tool_calls of answer 1" in said(MARKED, user("a"), called)
    assert "does not write the tool_calls of answer 1" in said(APART, user("a"), called)


def test_what_a_marked_template_leaves_out_is_told() -> None:
    tokenizer = tokenizer_of("<|im_start|><|im_end|>")
    tokenizer.chat_template = HEAD + MARKED + TAIL
    told = Counter[str]()
    run(tokenizer, Messages(messages=KINDS["echo"]), told=told)
    assert told["the chat template leaves out of answers reasoning_content"] == 1
