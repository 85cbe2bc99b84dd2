from __future__ import annotations

import re

import pytest
from chats import answer, run, user
from kinds import KINDS, call
from templates import tokenizer_of

from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.closings import closing, ends_in_a_row, next_header, of_turns, partner

SPECIALS = re.compile("</s>|<e>|</call>")


def names(text: str, said: int = 0) -> list[str]:
    return [found[0] for found in closing(SPECIALS, text, said, len(text))]


def test_what_closes_is_the_run_that_a_text_ends_with() -> None:
    assert names("a<e></s>") == ["</s>", "<e>"]
    assert names("a<e> </s>\n") == ["</s>"]
    assert names("a<e>b") == [] == names("")
    assert names("<e></s>", said=3) == ["</s>"]
    assert list(ends_in_a_row(SPECIALS, "a<e></s> <e>", 1)) == [4, 8]


def test_what_ends_a_call_closes_no_turn() -> None:
    run = closing(SPECIALS, "a</call><e></s>", 0, 15)
    assert [found[0] for found in of_turns(run, {"<e>", "</s>"})] == ["</s>", "<e>"]
    assert [found[0] for found in of_turns(run, {"</s>"})] == ["</s>"]
    assert len(of_turns(run, {"<e>"})) == 3  # the last is unknown: all do


def test_partners() -> None:
    assert partner("<think>") == "</think>" and partner("</think>") == "<think>"


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + (c.function.arguments|tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


@pytest.mark.parametrize("turns", ["all", "each", "last"])
@pytest.mark.parametrize("ends", ["<|im_end|>", "<|im_end|><|endoftext|>"])
def test_the_end_tokens_of_a_call_are_those_of_its_turn(ends: str, turns: str) -> None:
    tokenizer = tokenizer_of("<|im_start|><|im_end|><|endoftext|><call></call>")
    tokenizer.eos_token = ends[ends.rindex("<") :]
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", ends)
    called = answer("") | {"tool_calls": [call({"n": 5})]}
    chats = [user("a"), called], KINDS["several"]
    for chat in chats:
        good, bad = run(tokenizer, Messages(messages=chat), turns=turns)
        assert good and not bad
        for row in good:
            found = tokenizer.decode(row.input_ids[row.end_of_turn])
            assert found and found == ends * (len(found) // len(ends))
            assert all(row.response[row.end_of_turn])


@pytest.mark.parametrize(
    ("tail", "before", "at"),
    [
        ("\n[assistant] ", "[user] a\n[assistant] ", 0),
        (" END\n[assistant] ", "[user] a\n[assistant] ", 4),
        (" END", "[user] a END", 4),
        ("", "[user] a", 0),
    ],
)
def test_the_header_of_a_turn_to_come_begins_where_the_chat_before_has_it(tail: str, before: str, at: int) -> None:
    assert next_header(tail, before, "assistant") == at
