"""Where answers stand: against the marks of training templates, by hand for ten families, and by a small grammar."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from chats import answer, responses, run, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import CHATS, templates, tokenizer_of, tools_of, unmarked

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.chat import MARK, ChatSettings, ChatTemplate, RenderedText, Specials
from alphatoken_curate.tokens.tokenise import TokenRow

TRAINING = sorted(name for name in templates() if name.endswith("_training"))
STOPS = frozenset({"<|user|>", "<|observation|>"})
"""Of GLM, which closes no turn: what its generation_config.json names."""


def rendered(tokenizer: Any, kind: str) -> RenderedText | RowFault:
    template = ChatTemplate(tokenizer, Specials.of(tokenizer), turns="all", chats=ChatSettings(stops=STOPS))
    try:
        return template.render(Messages(messages=CHATS[kind], tools=tools_of(kind)))[0]
    except RowFault as fault:
        return fault


def said(found: RenderedText | RowFault) -> list[str] | str:
    if isinstance(found, RowFault):
        return found.message
    return [found.text[start:end] for start, end in found.spans]


OWN_REFUSALS = ("the chat template fails", "does not write the tool_calls", "leaves out")
"""Where a template raises, or would lose an answer: of every family."""

OUT_OF_ORDER = (
    "encloses another message",
    "otherwise once messages follow",
    "does not begin with its generation prompt",
)
"""Of Gemma 4, which writes the words beside a call behind its result, and makes one turn of two answers in a row."""


# --- the marks of training forms


HEADERS = ("", "<｜Assistant｜>", "<｜Assistant｜><think>", "<|start|>assistant", "<｜tool▁outputs▁end｜>")
HEADERS += ("<think>", "<think></think>")
"""What some mark, or write in history as the generation prompt does, before what a model itself writes."""

OTHER_RENDERING = {"phi3_training", "phi3_5_training"}
"""They mark an end of text behind the whole chat, too, which no answer needs."""


def within_marks(marks: RenderedText, found: RenderedText) -> bool:
    """Whether all of each answer was marked, and nothing else but headers and white space behind stops."""
    marked, mine = (np.zeros(len(found.text), dtype=np.bool_) for _ in range(2))
    for mask, spans in ((marked, marks.spans), (mine, found.spans)):
        for start, end in spans:
            mask[start:end] = True
    if marks.text != found.text or (mine & ~marked).any():
        return False
    edges = np.flatnonzero(np.diff((marked & ~mine).astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return all("".join(found.text[start:end].split()) in HEADERS for start, end in edges)


@pytest.mark.parametrize("name", TRAINING)
def test_without_its_marks_a_training_template_gives_the_answers_it_marks(name: str) -> None:
    template = templates()[name]
    marked, plain = tokenizer_of(template), tokenizer_of(unmarked(template))
    compared = 0
    for kind in CHATS:
        wanted, found = rendered(marked, kind), rendered(plain, kind)
        if isinstance(wanted, RowFault):
            continue
        if isinstance(found, RowFault):
            # The marks of some have nothing but a stop for a call that is not written: nobody wants to learn that.
            known = OWN_REFUSALS + OUT_OF_ORDER
            assert kind in ("in a row", *filter(tools_of, CHATS)) and any(why in found.message for why in known), kind
            continue
        if name in OTHER_RENDERING:
            wanted = wanted._replace(spans=[span for span in wanted.spans if span[1] < len(wanted.text)])
        assert within_marks(wanted, found), (kind, said(wanted), said(found))
        compared += 1
    assert compared >= 8


# --- by hand


EXPECTED: dict[str, dict[str, list[str]]] = {
    "qwen2_5": {
        "several": ["First thing.<|im_end|>", "Second thing.<|im_end|>"],
        "call": [
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
            "It is 5 C.<|im_end|>",
        ],
    },
    "qwen3": {
        "several": ["First thing.<|im_end|>", "<think>\n\n</think>\n\nSecond thing.<|im_end|>"],
        "call with numbers": [
            '<tool_call>\n{"name": "get_weather", "arguments": {"n": 3}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nIt is 5 C.<|im_end|>",
        ],
        "echoes": ["40<|im_end|>", "<think>\nThen 41 it is: 41.\n</think>\n\n41<|im_end|>"],
        "inline thoughts": ["First<|im_end|>", "<think>\nhm Two\n</think>\n\nSecond<|im_end|>"],
    },
    "qwen3_5_think": {
        "several": ["First thing.<|im_end|>", "\n</think>\n\nSecond thing.<|im_end|>"],
        "echoes": ["40<|im_end|>", "Then 41 it is: 41.\n</think>\n\n41<|im_end|>"],
        "inline thoughts": ["First<|im_end|>", "hm Two\n</think>\n\nSecond<|im_end|>"],
    },
    "llama3_1": {
        "several": ["First thing.<|eot_id|>", "Second thing.<|eot_id|>"],
        "call as text": ['{"name": "get_weather", "parameters": {"city": "Oslo"}}<|eot_id|>', "It is 5 C.<|eot_id|>"],
        "white space": ["padded<|eot_id|>", "new line<|eot_id|>"],
    },
    "gemma3": {
        "several": ["First thing.<end_of_turn>", "Second thing.<end_of_turn>"],
        "letters": ["a<end_of_turn>", "final<end_of_turn>"],
    },
    "gptoss": {
        "several": [
            "<|channel|>final<|message|>First thing.<|end|>",
            "<|channel|>final<|message|>Second thing.<|return|>",
        ],
        "letters": ["<|channel|>final<|message|>a<|end|>", "<|channel|>final<|message|>final<|return|>"],
        "echoes": [
            "<|channel|>final<|message|>40<|end|>",
            "<|channel|>analysis<|message|>Then 41 it is: 41.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>41<|return|>",
        ],
        "call as text": [
            ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
            "<|channel|>final<|message|>It is 5 C.<|return|>",
        ],
        "white space": [
            "<|channel|>final<|message|>  padded \n<|end|>",
            "<|channel|>final<|message|>\nnew line<|return|>",
        ],
        "empty": ["<|channel|>final<|message|><|end|>", "<|channel|>final<|message|>Yes<|return|>"],
    },
    "cohere2": {
        "several": [
            "First thing.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "Second thing.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ]
    },
    "deepseek_r1_distill": {
        "several": ["First thing.<｜end▁of▁sentence｜>", "Second thing.<｜end▁of▁sentence｜>"],
    },
    "glm4moe": {
        "several": ["\n<think></think>\nFirst thing.<|user|>", "\n<think></think>\nSecond thing."],
        "call": [
            "\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
            "</tool_call><|observation|>",
            "\n<think></think>\nIt is 5 C.",
        ],
    },
    "phi3": {
        "several": ["First thing.<|end|>", "Second thing.<|end|>"],
        "names": ["assistant<|end|>", "user<|end|>"],
    },
    "idefics3": {"several": [" First thing.<end_of_utterance>", " Second thing.<end_of_utterance>"]},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_families_by_hand(name: str) -> None:
    tokenizer = tokenizer_of(templates()[name])
    assert {kind: said(rendered(tokenizer, kind)) for kind in EXPECTED[name]} == EXPECTED[name]


ENDS: dict[str, dict[str, list[str]]] = {
    "qwen2_5": {"several": ["<|im_end|>", "<|im_end|>"], "call": ["</tool_call><|im_end|>", "<|im_end|>"]},
    "qwen3": {"several": ["<|im_end|>", "<|im_end|>"], "inline thoughts": ["<|im_end|>", "<|im_end|>"]},
    "llama3_1": {"several": ["<|eot_id|>", "<|eot_id|>"]},
    "gemma3": {"letters": ["<end_of_turn>", "<end_of_turn>"]},
    # The end of a thought within an answer ends no answer.
    "gptoss": {"echoes": ["<|end|>", "<|return|>"], "call as text": ["<|call|>", "<|return|>"]},
    "cohere2": {"several": ["<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"] * 2},
    "deepseekv3": {"several": ["<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]},
    # It closes no turn, and writes nothing behind the last one.
    "glm4moe": {"several": ["<|user|>", ""], "call": ["</tool_call><|observation|>", ""]},
    # White space that is marked too stands behind the stop; both texts are in `letters` part of the stop's own name.
    "idefics3_training": {"letters": ["<end_of_utterance>", "<end_of_utterance>"]},
    "glm4moe_training": {"names": ["<|user|>", "<|user|>"]},
    # An answer without a word: what stands behind its header.
    "lfm2": {"empty": ["<|im_end|>", "<|im_end|>"]},
}


def ends_of(tokenizer: Any, row: TokenRow) -> list[str]:
    """Of each run of the response the tokens that end it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.response, [False]]).astype(np.int8))).reshape(-1, 2)
    parts = [row.input_ids[start:end][row.end_of_turn[start:end]] for start, end in edges]
    assert row.end_of_turn.sum() == sum(map(len, parts)), "nothing off the response ends an answer"
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts]


def ends_in(tokenizer: Any, kind: str) -> list[str] | None:
    record = Messages(messages=CHATS[kind], tools=tools_of(kind))
    good, _ = run(tokenizer, record, chats=ChatSettings(stops=STOPS))
    return ends_of(tokenizer, good[0]) if good else None


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_an_answer_by_hand(name: str) -> None:
    tokenizer = tokenizer_of(templates()[name])
    assert {kind: ends_in(tokenizer, kind) for kind in ENDS[name]} == ENDS[name]


@pytest.mark.parametrize("name", sorted({*TRAINING} - OTHER_RENDERING))
def test_marks_and_places_tell_the_same_ends_of_answers(name: str) -> None:
    template, compared = templates()[name], 0
    for kind in CHATS:
        # Two answers in a row are one turn in some; of an empty one some mark more of the header.
        if kind in ("in a row", "empty") or (name == "diffusion_gemma_training" and "echo" in kind):
            continue
        marked, placed = (ends_in(tokenizer_of(one), kind) for one in (template, unmarked(template)))
        if marked is not None and placed is not None:
            assert marked == placed, kind
            compared += 1
    assert compared >= 6


def test_special_tokens_that_an_answer_spells_at_its_end_do_not_end_it() -> None:
    template = templates()["qwen2_5_training"]
    for text, ends in (
        ("Then </tool_call>", ["<|im_end|>"]),
        ("Then <|im_end|>", ["<|im_end|>"]),
        ("Then", ["<|im_end|>"]),
    ):
        for one in (template, unmarked(template)):
            tokenizer = tokenizer_of(one)
            good, _ = run(tokenizer, Messages(messages=[user("One?"), answer(text)], tools=None))
            assert ends_of(tokenizer, good[0]) == ends


# --- every template


@pytest.mark.parametrize("name", sorted(templates()))
def test_every_answer_is_in_the_mask_to_its_end_and_nothing_else_is(name: str) -> None:
    tokenizer = tokenizer_of(templates()[name])
    for kind, messages in CHATS.items():
        found = rendered(tokenizer, kind)
        if isinstance(found, RowFault):
            known = OWN_REFUSALS + (OUT_OF_ORDER if kind in ("call with words", "in a row") and "gemma" in name else ())
            assert any(why in found.message for why in known), (kind, found.message)
            assert "call" in kind or "gemma" in name or "template fails" in found.message, (kind, found.message)
            continue
        texts = [message["content"].rpartition("</think>")[2].strip() for message in messages]
        answers = [text for text, message in zip(texts, messages, strict=True) if message["role"] == "assistant"]
        if "generation" not in templates()[name]:
            assert len(found.spans) == len(answers), kind
        for (start, end), text in zip(found.spans, answers, strict=False):
            assert text in found.text[start:end] or "generation" in templates()[name], (kind, found.text[start:end])
        for other in ("One?", "Two?", "Really?", "Weather?", "Be kind.", "What is it?"):
            assert not any(other in text for text in said(found)), (kind, said(found))
        good, bad = run(tokenizer, Messages(messages=messages, tools=tools_of(kind)))
        assert good or bad[0].reason == "no_response", (kind, bad)
        if good:
            assert tokenizer.decode(good[0].input_ids, clean_up_tokenization_spaces=False) == found.text.replace(
                MARK, ""
            ), kind


def test_what_a_template_leaves_out_is_told_by_name() -> None:
    told: Counter[str] = Counter()
    messages = CHATS["echoes"]
    run(tokenizer_of(templates()["qwen2_5"]), Messages(messages=messages), Messages(messages=messages), told=told)
    assert told == {
        "the chat template leaves out their reasoning_content": 2,
        "the chat template leaves out their thinking": 2,
    }
    told.clear()
    run(tokenizer_of(templates()["glm4moe"]), Messages(messages=CHATS["single"]), told=told)
    assert told == {"the chat template writes no token to stop at behind an answer": 1}


def test_a_thought_that_is_left_out_is_told_whether_answers_are_marked_or_not() -> None:
    chat = Messages(messages=CHATS["inline thoughts"])
    for name, form in (("deepseekv3", "ordinary"), ("deepseekv3_training", "marked")):
        told: Counter[str] = Counter()
        good, _ = run(tokenizer_of(templates()[name]), chat, told=told)
        assert good and told == {"the chat template leaves out their content up to </think>": 1}, form


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


# --- a small grammar


TEXT = st.text(alphabet="ab <|>\n[]/A1", min_size=1, max_size=6).filter(str.strip)
PARTS = {
    "header": ["<|im_start|>{r}\n", "[{r}] ", "<|im_start|>{r}<|sep|>\n\n", "{r}: "],
    "close": ["<|im_end|>\n", "<|im_end|>", "<|im_end|><|stop|>\n", "\n"],
    "write": ["m.content", "m.content | trim", "' ' + m.content", "'<q>' + m.content + '</q>'"],
    "last": ["<|stop|>", "<|im_end|>", ""],
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    parts=st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in PARTS.items()}),
    turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
)
def test_no_text_of_a_user_ever_responds_and_every_answer_does(
    parts: dict[str, str], turns: list[tuple[str, str]]
) -> None:
    header, close = (parts[name].replace("\n", "\\n") for name in ("header", "close"))
    written = "{{ '" + header.replace("{r}", "' + m.role + '") + "' + (" + parts["write"] + ") }}"
    closing = f"{{% if loop.last and m.role == 'assistant' and '{parts['last']}' %}}{{{{ '{parts['last']}' }}}}"
    template = (
        f"{{% for m in messages %}}{written}{closing}{{% else %}}{{{{ '{close}' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{header.replace('{r}', 'assistant')}' }}}}{{% endif %}}"
    )
    tokenizer = tokenizer_of("<|im_start|><|im_end|><|stop|><|sep|>")
    tokenizer.chat_template = template
    messages = [message for one, other in turns for message in (user(f"Q{one}Q"), answer(f"Z{other}Z"))]
    chat = ChatTemplate(tokenizer, Specials.of(tokenizer), turns="all", chats=ChatSettings())
    try:
        (found,) = chat.render(Messages(messages=messages))
    except RowFault:
        return
    assert len(found.spans) == len(turns)
    for (start, end), (_, said_) in zip(found.spans, turns, strict=True):
        turn = found.text[start:end].replace(MARK, "")
        assert f"Z{said_}Z" in turn and "Q" not in turn and "assistant" not in turn
