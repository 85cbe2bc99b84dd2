"""One answer as a sequence of its own; a thought that its template leaves out is put back as it was asked for."""

from __future__ import annotations

from typing import Any

import pytest
from chats import answer, user
from kinds import KINDS
from templates import templates, tokenizer_of

from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.chat import ChatSettings, ChatTemplate, RenderedText
from alphatoken_curate.tokens.specials import Specials

THOUGHT = "<think>\nhm\n</think>\n\nFirst"


def rendered(tokenizer: Any, messages: list[dict[str, Any]], turns: str = "each") -> list[RenderedText]:
    template = ChatTemplate(tokenizer, Specials.of(tokenizer), turns=turns, chats=ChatSettings())
    return template.render(Messages(messages=messages))


def answers(items: list[RenderedText]) -> list[str]:
    return [item.text[start:end] for item in items for start, end in item.spans]


@pytest.mark.parametrize("content", [THOUGHT, "hm\n</think>\n\nFirst", "\n" + THOUGHT + "\n"])
def test_a_thought_that_the_prompt_opens_is_the_answers(content: str) -> None:
    """DeepSeek R1's template leaves every thought out and asks with an opened one."""
    tokenizer = tokenizer_of(templates()["deepseek_r1_distill"])
    (item,) = rendered(tokenizer, [user("One?"), answer(content)])
    head, end = "<s><｜User｜>One?<｜Assistant｜><think>\n", content[len(content.rstrip()) :] + "<｜end▁of▁sentence｜>"
    assert (item.text, item.spans) == (f"{head}hm\n</think>\n\nFirst{end}", [(len(head), len(item.text))])
    assert item.notes == ()


def test_an_answer_without_the_thought_that_its_prompt_opens_is_told_of() -> None:
    tokenizer = tokenizer_of(templates()["deepseek_r1_distill"])
    (item,) = rendered(tokenizer, [user("One?"), answer("First")])
    assert item.text == "<s><｜User｜>One?<｜Assistant｜>First<｜end▁of▁sentence｜>"
    assert item.notes == ("answers begin before the end of the generation prompt, as the template has them",)


def test_history_is_as_the_model_would_see_it() -> None:
    """Qwen3 leaves thoughts of earlier turns out; in its own turn each is whole."""
    tokenizer = tokenizer_of(templates()["qwen3"])
    items = rendered(tokenizer, KINDS["inline thoughts"])
    assert answers(items) == [
        "<think>\nhm One\n</think>\n\nFirst<|im_end|>",
        "<think>\nhm Two\n</think>\n\nSecond<|im_end|>",
    ]
    assert "hm One" not in items[1].text and "First" in items[1].text


def test_nothing_stands_behind_the_stop() -> None:
    tokenizer = tokenizer_of(templates()["qwen2_5"])
    for item in rendered(tokenizer, KINDS["several"]):
        assert item.text.endswith("<|im_end|>") and item.spans == [(item.spans[0][0], len(item.text))]
    (whole,) = rendered(tokenizer, KINDS["several"], "all")
    assert whole.text.endswith("<|im_end|>\n") and len(whole.spans) == 2


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3", "glm4moe", "cohere", "qwen3"])
@pytest.mark.parametrize("kind", ["several", "system", "letters", "same", "call with words"])
def test_a_sequence_begins_with_what_the_model_is_asked(name: str, kind: str) -> None:
    if name not in templates():
        pytest.skip(f"trl has no template {name}")
    tokenizer = tokenizer_of(templates()[name])
    chat = [message for message in KINDS[kind] if message["role"] != "tool" and not message.get("tool_calls")]
    places = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    try:
        heads = [tokenizer.apply_chat_template(chat[:i], tokenize=False, add_generation_prompt=True) for i in places]
    except Exception:  # a template raises what it likes
        pytest.skip("the template does not take such chats")
    for head, item in zip(heads, rendered(tokenizer, chat), strict=True):
        assert item.text[: item.spans[0][0]] == head
