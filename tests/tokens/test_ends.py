"""Which tokens of an answer end it, by hand and by the marks of training forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chats import answer, run, user
from daily import daily
from kinds import KINDS, tools_of
from templates import templates, tokenizer_of, unmarked

from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.chat import ChatSettings
from alphatoken_curate.tokens.tokenise import TokenRow

TRAINING = sorted(name for name in templates() if name.endswith("_training"))
STOPS = frozenset({"<|user|>", "<|observation|>"})
"""Of GLM, which closes no turn: what its generation_config.json names."""

OTHER_RENDERING = {"phi3_training", "phi3_5_training"}
"""They mark an end of text behind the whole chat, too, which no answer needs."""
RENDERING = sorted({*TRAINING} - OTHER_RENDERING)

ENDS: dict[str, dict[str, list[str]]] = {
    "qwen2_5": {"several": ["<|im_end|>", "<|im_end|>"], "call": ["<|im_end|>", "<|im_end|>"]},
    "qwen3": {"several": ["<|im_end|>", "<|im_end|>"], "inline thoughts": ["<|im_end|>", "<|im_end|>"]},
    "llama3_1": {"several": ["<|eot_id|>", "<|eot_id|>"]},
    "gemma3": {"letters": ["<end_of_turn>", "<end_of_turn>"]},
    # The end of a thought within an answer ends no answer, nor does that of a call.
    "gptoss": {"echoes": ["<|end|>", "<|return|>"], "call as text": ["<|call|>", "<|return|>"]},
    "cohere2": {"several": ["<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"] * 2},
    "deepseekv3": {"several": ["<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]},
    # It closes no turn, and writes nothing behind the last one.
    "glm4moe": {"several": ["<|user|>", ""], "call": ["<|observation|>", ""]},
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
    record = Messages(messages=KINDS[kind], tools=tools_of(kind))
    good, _ = run(tokenizer, record, chats=ChatSettings(stops=STOPS))
    return ends_of(tokenizer, good[0]) if good else None


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_an_answer_by_hand(name: str) -> None:
    tokenizer = tokenizer_of(templates()[name])
    assert {kind: ends_in(tokenizer, kind) for kind in ENDS[name]} == ENDS[name]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", daily(RENDERING, RENDERING[::2]))
def test_marks_and_places_tell_the_same_ends_of_answers(name: str) -> None:
    template, compared = templates()[name], 0
    for kind in KINDS:
        # Two answers in a row are one turn in some; of an empty one some mark more of the header.
        if (
            "in a row" in kind
            or "empty" in kind
            or kind in ("blank", "thought and call")
            or (name == "diffusion_gemma_training" and ("echo" in kind or "call" in kind))
        ):
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
