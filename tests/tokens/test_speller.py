"""Rows as tokens of real tokenizers of several kinds: what responds reads as the answers, and the whole as the text."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from chats import CHATML, answer, chat, responses, run, user
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, record_of
from matrix import cell, rendered
from templates import family_tokenizer, tokenizer_of
from tokenizers import AddedToken, Regex
from tokenizers.pre_tokenizers import Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers_made import LOSSY, MAKERS, made_tokenizer
from transformers import PreTrainedTokenizerFast

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.shapes import PromptCompletion
from alphatoken_curate.tokens.chat import MARK, ChatSettings, RenderedText
from alphatoken_curate.tokens.speller import Spelled, Speller
from alphatoken_curate.tokens.tokenise import CUT_WORD

TEMPLATES = {
    "ChatML": CHATML,
    "no token of its own": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "Llama 2": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
    "right behind a token": "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
}
SPECIAL = re.compile(r"(<\|im_start\|>|<\|im_end\|>|</?s>) +")


def speller(kind: str) -> Speller:
    return Speller(made_tokenizer(kind), turns="all", chats=ChatSettings())


def spelled(kind: str, found: RenderedText) -> Spelled | RowFault:
    (one,) = speller(kind).encode([found])
    return one


def read(tokenizer: Any, tokens: list[int]) -> str:
    return bare(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def bare(text: str) -> str:
    """Without the spaces behind special tokens and before all, where some tokenizers put one in."""
    return SPECIAL.sub(r"\1", text.replace(MARK, "")).lstrip(" ")


def check(tokenizer: Any, found: RenderedText, tokens: list[int], mask: list[bool]) -> None:
    """What stands before, and up to, the end of each answer reads as the text does up to there."""
    edges = [i for i in range(len(mask) + 1) if (mask[i - 1] if i else False) != (mask[i] if i < len(mask) else False)]
    places = [place for span in found.spans for place in span]
    places = [place for place in places if places.count(place) == 1]  # what touches is one
    assert len(edges) == len(places)
    for edge, place in zip([*edges, len(tokens)], [*places, len(found.text)], strict=True):
        assert read(tokenizer, tokens[:edge]).rstrip(" ") == bare(found.text[:place]).rstrip(" ")
    assert read(tokenizer, tokens) == bare(found.text)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", MAKERS)
def test_rows_read_as_their_text_whatever_the_tokenizer(kind: str, template: str) -> None:
    tokenizer = made_tokenizer(kind)
    tokenizer.chat_template = TEMPLATES[template]
    right = 0
    for name in KINDS:
        found = rendered(tokenizer, record_of(name), "all")
        if isinstance(found, RowFault):
            continue
        one = spelled(kind, found)
        if isinstance(one, RowFault):
            assert kind in LOSSY and one.reason == "mask_mismatch", (name, one.message)
            continue
        if kind in LOSSY:  # its answers are short, and read the same
            masked = [token for token, inside in zip(one.tokens, one.response, strict=True) if inside]
            assert read(tokenizer, masked).strip() == bare("".join(found.text[a:b] for a, b in found.spans)).strip()
            continue
        check(tokenizer, found, one[0], one[1].tolist())
        right += 1
    assert right == 0 if kind in LOSSY else right >= 35


EDGE = st.text(alphabet=" a\n.[é", max_size=4)
WORDS = st.tuples(EDGE, st.sampled_from(["It is this.", "First", "assistant:", "x"]), EDGE).map("".join)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=60, deadline=None)
@given(prompt=WORDS, completion=WORDS)
def test_no_space_is_put_in_or_lost_between_prompt_and_completion(kind: str, prompt: str, completion: str) -> None:
    tokenizer = made_tokenizer(kind)
    good, bad = run(tokenizer, PromptCompletion(prompt=prompt, completion=completion))
    if bad:
        assert bad[0].reason == "mask_mismatch"
        return
    (row,) = good
    (said,) = responses(tokenizer, row)
    assert said.removesuffix("<|im_end|>").removeprefix("##").strip(" ") == completion.strip(" ")
    if kind not in LOSSY:
        assert read(tokenizer, row.input_ids.tolist()) == bare(prompt + completion + "<|im_end|>")


def test_few_rows_are_refused_where_a_tokenizer_reads_back_what_it_wrote() -> None:
    pairs = [(one, other) for one in ("Q: ", "Q:", "Q:\n", "a b") for other in ("It is", " It is", "\nIt", "a")]
    for kind in MAKERS:
        tokenizer = made_tokenizer(kind)
        good, _ = run(tokenizer, *(PromptCompletion(prompt=one, completion=other) for one, other in pairs))
        assert len(good) == (len(pairs) if kind not in LOSSY else len(good)), kind


def test_white_space_that_a_control_token_takes_in_is_no_part_of_an_answer() -> None:
    """As Phi-3's, `<|assistant|>` takes in the line break behind it, and an answer's own white space."""
    tokenizer, found = family_tokenizer("phi3"), cell("phi3", "white space")
    assert isinstance(found, RenderedText) and found.text[found.spans[0][0] :].startswith("  padded")
    ((tokens, mask, *_),) = Speller(tokenizer, turns="all", chats=ChatSettings()).encode([found])
    assert tokens == tokenizer(found.text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([token for token, inside in zip(tokens, mask, strict=True) if inside]) == (
        "padded \n<|end|>new line<|end|>"
    )


def test_a_text_at_which_the_tokenizer_breaks_off_is_a_bad_row() -> None:
    tokenizer = tokenizer_of(CHATML)
    endless = Split(Regex("(x+x+)+y"), "isolated")  # takes for ever at many x, which its library breaks off
    made = tokenizer.backend_tokenizer
    made.pre_tokenizer = Sequence([endless, made.pre_tokenizer])
    rows = [chat(user(text), answer("yes")) for text in ("a", "x" * 40, "b")]
    good, (bad,) = run(tokenizer, *rows)
    assert [row.row_id for row in good] == [0, 2] and (bad.row_id, bad.reason) == (1, "tokenizer_fails"), bad


@pytest.mark.parametrize(
    ("front", "bos"), [(["[GMASK]", "<sop>"], None), (["</s>"], "<s>"), (["<s>"], "<s>"), ([], "<s>")]
)
def test_raw_text_begins_as_the_tokenizer_begins_it(front: list[str], bos: str | None) -> None:
    """With a BOS mostly; GLM's puts two other tokens there, XGLM's its EOS."""
    made = PreTrainedTokenizerFast(tokenizer_object=MAKERS["byte-level BPE"]())
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("[GMASK]", "<sop>", "<s>", "</s>")])
    made.eos_token = "</s>"
    if bos:
        made.bos_token = bos
    places = [(name, made.convert_tokens_to_ids(name)) for name in dict.fromkeys([*front, "</s>"])]
    for end in ([], ["</s>"]):
        single = " ".join([*front, "$A", *end])
        made._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=places)
        for begun in ("", "".join(front)):
            record = PromptCompletion(prompt=f"{begun}What is it?", completion=" It is this.")
            ((row,), _) = run(made, record)
            expected = made("What is it? It is this.")["input_ids"]
            assert row.input_ids.tolist() == expected + ([] if end else [made.eos_token_id])


@pytest.mark.long
def test_a_prompt_that_ends_with_a_space_is_told_where_it_cuts_a_word(smollm2_tokenizer: Any) -> None:
    told = Counter[str]()
    border = [("A: ", "The"), ("A:", " The"), ("A:\n", "The"), ("A: ", "5"), ("A ", " The"), ("", "The")]
    rows, _ = run(smollm2_tokenizer, *(PromptCompletion(prompt=a, completion=b) for a, b in border), told=told)
    first = [smollm2_tokenizer.decode(row.input_ids[row.response][:1]) for row in rows]
    assert first[:4] == ["The", " The", "The", "5"]
    assert told == {CUT_WORD: 1}
