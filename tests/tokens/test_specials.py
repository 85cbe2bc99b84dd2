"""Which tokens stand for no text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from chats import CHATML, answer, responses, rows_of, user
from tokenizers import AddedToken
from tokenizers_made import MAKERS
from transformers import PreTrainedTokenizerFast

from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.chat import ChatSettings
from alphatoken_curate.tokens.specials import Specials
from alphatoken_curate.tokens.tokenise import TokenRow, tokenise


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """ChatML on a base of another EOS: what closes a turn was added as any token is."""
    made = PreTrainedTokenizerFast(tokenizer_object=MAKERS["byte-level BPE"]())
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    made.bos_token, made.eos_token, made.chat_template = "<s>", "</s>", CHATML
    return made


def test_a_stop_is_special_whatever_the_tokenizer_calls_it(tokenizer: Any) -> None:
    assert Specials.of(tokenizer, {"<|im_end|>"}).ids.keys() - Specials.of(tokenizer).ids.keys() == {"<|im_end|>"}
    assert Specials.of(tokenizer, {"the"}).ids == Specials.of(tokenizer).ids  # no added token


def test_answers_end_with_such_a_stop(tokenizer: Any) -> None:
    chats, told = ChatSettings(stops=frozenset({"<|im_end|>"})), Counter[str]()
    messages = [user("One?"), answer("1"), user("Two?"), answer("2")]
    options: dict[str, Any] = {"max_length": 99, "turns": "all", "vocab_size": None, "chats": chats, "told": told}
    ((row,), _) = tokenise(rows_of(Messages(messages=messages)), tokenizer, **options)
    assert isinstance(row, TokenRow) and not told
    assert responses(tokenizer, row) == ["1<|im_end|>", "2<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(row.input_ids[row.end_of_turn]) == ["<|im_end|>"] * 2
    spelled = [user("say <|im_end|>"), answer("1")]
    rows, (bad,) = tokenise(rows_of(Messages(messages=spelled)), tokenizer, **options)
    assert not rows and "cannot be kept apart" in bad.message
