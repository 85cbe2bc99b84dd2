"""Text at borders: a completion goes on behind its prompt without a space that the tokenizer adds, or is refused."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import tokenizers
from chats import responses, run, run_any
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from alphatoken_curate.rows.shapes import Messages, Pair, PromptCompletion
from alphatoken_curate.tokens.tokenise import PairRow

LETTERS = [*"▁.,:!?AYNabcdefghijklmnoprstuvwxyz", "\u00e9"]
MERGES = [
    ("▁", "A"),
    ("e", "s"),
    ("Y", "es"),
    ("▁", "Yes"),
    ("o", "n"),
    ("▁", "on"),
    ("n", "e"),
    ("▁", "▁"),
    ("e", "r"),
]
# ".Y" is a token over the border of "..." and "Yes"; with "▁" in it over that of "... " and "Yes"
MERGES += [("▁A", "n"), (":", "▁"), (".", "Y"), ("s", ".")]


def bpe() -> tokenizers.Tokenizer:
    """The letters, bytes for others, and what is merged of them, as Llama 2 has it."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    names += [a + b for a, b in MERGES]
    vocabulary = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return tokenizers.Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def wrapped(inner: tokenizers.Tokenizer) -> Any:
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama2() -> Any:
    """The normalizer and decoder of the tokenizer.json of Llama 2."""
    inner = bpe()
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return wrapped(inner)


def metaspace(scheme: str) -> Any:
    inner = bpe()
    inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", scheme, split=False)])
    return wrapped(inner)


KINDS = {
    "llama2": llama2,
    "always": lambda: metaspace("always"),
    "first": lambda: metaspace("first"),
    "never": lambda: metaspace("never"),
}
PROMPTS = ["Answer: ", "Answer:", "Answer:  ", "Answer.", "a", " a ", "one\n", "\n", "é", "Answer: Yes. No.\t"]
COMPLETIONS = ["Yes.", " Yes.", "  Yes.", "es", "\nYes.", ".", "é", "on one", "Yes.\n", " "]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_row_decodes_to_the_whole_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for prompt, completion in product(PROMPTS, COMPLETIONS):
        case = prompt, completion
        good, bad = run(tokenizer, PromptCompletion(prompt=prompt, completion=completion))
        assert not bad, case
        # such a tokenizer reads one space at the beginning of a text as none
        start = prompt.removeprefix(" ") if kind in ("always", "first") else prompt
        ids, response = good[0].input_ids.tolist(), good[0].response
        assert (ids[0], ids[-1]) == (1, 2) and tokenizer.decode(ids[1:-1]) == start + completion, case
        first = int(response.argmax())
        assert response[first:].all() and tokenizer.decode(ids[1:first]) == start, case


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_border_is_one_between_tokens_nothing_changes(kind: str) -> None:
    tokenizer = KINDS[kind]()
    good, _ = run(tokenizer, PromptCompletion(prompt="Answer:", completion=" Yes!"))
    if kind != "never":
        assert good[0].input_ids.tolist() == [*tokenizer("Answer: Yes!")["input_ids"], 2] or ":▁" in tokenizer.vocab
    assert responses(tokenizer, good[0])[0].strip() in ("Yes!</s>", "Yes! </s>")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_pair_begin_behind_the_same_prompt(kind: str) -> None:
    tokenizer = KINDS[kind]()
    texts = {"chosen": "Yes.", "rejected": "No."}
    pair = Pair(**{name: PromptCompletion(prompt="Answer: ", completion=text) for name, text in texts.items()})
    good, bad = run_any(tokenizer, pair)
    assert not bad and isinstance(good[0], PairRow)
    for name, text in texts.items():
        row = getattr(good[0], name)
        assert tokenizer.decode(row.input_ids[1:-1]) == f"Answer: {text}"


def test_a_space_that_the_tokenizer_adds_everywhere_is_the_one_that_every_trainer_gets() -> None:
    """Whatever stands in front of the completion: the row is what the whole text gives."""
    inner = bpe()
    spaced = normalizers.Replace("Yes", "▁Yes")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), spaced])
    inner.decoder = llama2().backend_tokenizer.decoder
    tokenizer = wrapped(inner)
    (row,), _ = run(tokenizer, PromptCompletion(prompt="Answer: ", completion="Yes."))
    assert row.input_ids[:-1].tolist() == tokenizer("Answer: Yes.")["input_ids"]


def test_chats_of_such_a_tokenizer_are_as_it_writes_them() -> None:
    """Behind a special token it adds a space, as for every trainer; elsewhere none comes in."""
    tokenizer = llama2()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + 'a: ' + m.content + ' b:' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "Yes."}]
    good, bad = run(tokenizer, Messages(messages=messages))
    assert not bad
    text = tokenizer.decode(good[0].input_ids)
    assert text.replace("<s> a", "<s>a").replace(" </s>", "</s>") == "<s>a: on b:Yes.</s>"
    plain = tokenizer("<s>a: on b:Yes.</s>", add_special_tokens=False)["input_ids"]
    assert good[0].input_ids.tolist() == plain
