"""Chats, templates and what tokenising them gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from alphatoken_curate.rows.read import BadRow, Row
from alphatoken_curate.rows.shapes import AnyRecord, Messages, Record
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, tokenise, tokenise_prompts

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def rows_of(*records: AnyRecord) -> list[Row]:
    return [
        Row(row_id=i, source="a.jsonl", line=i + 1, id=None, shape="messages", record=record)
        for i, record in enumerate(records)
    ]


def chat(*messages: dict[str, Any], **options: Any) -> Messages:
    return Messages(messages=list(messages), **options)


def run_any(tokenizer: Any, *records: AnyRecord, **options: Any) -> tuple[list[AnyRow], list[BadRow]]:
    settings_ = {"max_length": 4096, "turns": "all", "vocab_size": None, **options}
    return tokenise(rows_of(*records), tokenizer, **settings_)


def run(tokenizer: Any, *records: Record, **options: Any) -> tuple[list[TokenRow], list[BadRow]]:
    good, bad = run_any(tokenizer, *records, **options)
    assert all(isinstance(row, TokenRow) for row in good)
    return [row for row in good if isinstance(row, TokenRow)], bad


def run_prompts(tokenizer: Any, *records: AnyRecord, **options: Any) -> tuple[list[TokenRow], list[BadRow]]:
    settings_ = {"max_length": 4096, "vocab_size": None, **options}
    return tokenise_prompts(rows_of(*records), tokenizer, **settings_)


def responses(tokenizer: Any, row: TokenRow) -> list[str]:
    """The text of each run of response tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.response, [False]]).astype(np.int8)))
    runs = edges.reshape(-1, 2)
    return [tokenizer.decode(row.input_ids[a:b], clean_up_tokenization_spaces=False) for a, b in runs]


@pytest.fixture
def tokenizer(smollm2_tokenizer: Any) -> Iterator[Any]:
    """SmolLM2's tokenizer, whose template a test may replace."""
    template = smollm2_tokenizer.chat_template
    yield smollm2_tokenizer
    smollm2_tokenizer.chat_template = template
