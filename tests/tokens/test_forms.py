from __future__ import annotations

from typing import Any

import pytest
from chats import answer, responses, run, user
from kinds import KINDS, call
from templates import tokenizer_of

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.forms import PART, TEMPLATE_ERROR, as_borne, written_as_list

CALLED = [user("a"), answer("") | {"tool_calls": [call('{"city": "Ås"}')]}]


def tried(messages: list[dict[str, Any]], *reasons: str) -> list[Any]:
    """The forms that are rendered where each is refused for such a reason, the last one again and again."""
    forms: list[Any] = []

    def render(form: list[Any]) -> None:
        forms.append(form)
        raise RowFault(reasons[min(len(forms), len(reasons)) - 1], f"fault {len(forms)}")

    with pytest.raises(RowFault):
        as_borne(messages, render)
    return forms


def arguments(form: list[Any]) -> Any:
    return form[1]["tool_calls"][0]["function"]["arguments"]


def test_arguments_are_objects_and_text_only_where_a_template_fails_with_them() -> None:
    failing = [arguments(form) for form in tried(CALLED, TEMPLATE_ERROR)]
    assert failing == [{"city": "Ås"}, '{"city": "Ås"}', {"city": "Ås"}]
    assert [arguments(form) for form in tried(CALLED, "template_not_splittable")] == [{"city": "Ås"}] * 2
    odd = [user("a"), answer("") | {"tool_calls": [call("not JSON")]}]
    assert {arguments(form) for form in tried(odd, TEMPLATE_ERROR)} == {"not JSON"}


def test_content_is_empty_where_there_is_none_and_parts_at_last() -> None:
    bare = [user("a"), {"role": "assistant", "tool_calls": [call({})]}]
    forms = tried(bare, TEMPLATE_ERROR)
    assert ["content" in form[1] for form in forms] == [False, True, False, True, True]
    assert forms[-1][0]["content"] == [{"type": "text", "text": "a", PART: True}]


def test_the_first_fault_is_told_but_one_of_a_form_that_is_borne_before_others() -> None:
    def render(reasons: dict[bool, str]) -> Any:
        def rendered(form: list[Any]) -> None:
            is_parts = isinstance(form[0]["content"], list)
            raise RowFault(reasons[is_parts], str(is_parts))

        return rendered

    for reasons, told in (
        ({False: TEMPLATE_ERROR, True: TEMPLATE_ERROR}, "False"),
        ({False: TEMPLATE_ERROR, True: "other"}, "True"),
        ({False: "other", True: "other"}, "False"),
    ):
        with pytest.raises(RowFault) as raised:
            as_borne(KINDS["single"], render(reasons))
        assert raised.value.message == told


def test_a_template_that_writes_a_list_as_it_is_never_has_parts() -> None:
    """It takes three letters of a text, or three parts."""
    tokenizer = tokenizer_of("<|im_end|>")
    for write in ("m.content[:3]", "m.content[:3] | tojson(ensure_ascii=True)"):
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ " + write + " }}<|im_end|>{% endfor %}"
        tokenizer.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
        good, (bad,) = run(tokenizer, Messages(messages=KINDS["single"]))
        assert not good and "it leaves out answer 1, 'It is this.'" in bad.message
    assert written_as_list(f"[{{'{PART}': True}}]") and written_as_list(r"\ufddf") and not written_as_list("text")


def test_a_template_that_joins_arguments_to_text_has_them_as_text_and_others_never_twice() -> None:
    tokenizer = tokenizer_of("<|im_end|>")
    for write, shown in (
        ("{{ '(' + c.function.arguments + ')' }}", '({"city": "Ås"})<|im_end|>'),
        ("{{ c.function.arguments | tojson }}", '{"city": "Ås"}<|im_end|>'),
        ("{{ raise_exception('text') if c.function.arguments is mapping }}{{ c.function.arguments | tojson }}", None),
    ):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role + ':' + m.content }}"
            + "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
            + write
            + "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        )
        good, bad = run(tokenizer, Messages(messages=CALLED))
        assert ([responses(tokenizer, row) for row in good] == [["get_weather" + shown]]) if shown else not good
        assert shown or "as text of text" in bad[0].message


def test_arguments_are_the_same_as_an_object_or_the_row_is_refused() -> None:
    """A number is not rounded, nor is a key lost that stands twice."""
    for text, reason in (
        ('{"wei": 123456789012345678901}', "integer_too_large"),
        ('{"a": 1, "a": 2}', "duplicate_key"),
        ('{"a": NaN}', "not_a_number"),
    ):
        with pytest.raises(RowFault, match="arguments of a call: ") as raised:
            as_borne([user("a"), answer("") | {"tool_calls": [call(text)]}], lambda form: form)
        assert raised.value.reason == reason
    largest = '{"id": 18446744073709551615}'
    form = as_borne([user("a"), answer("") | {"tool_calls": [call(largest)]}], lambda form: form)
    assert arguments(form) == {"id": 2**64 - 1}
