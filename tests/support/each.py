"""What `--turns each` must give: a sequence for each answer, as at inference, from the template alone.

The messages before an answer with the generation prompt are what the model is given; behind them stands what it wrote,
to its stop. The text of the answer is taken from the chat that ends with it, where no template writes it as history.
"""

from __future__ import annotations

import re
from typing import Any

from matrix import Chat, forms, written

from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.specials import Specials


def each_answer(tokenizer: Any, record: Messages) -> list[tuple[str, str]] | None:
    """(what is given, what responds) of each answer, in order.

    None where the template raises, or where some answer alone is not written behind its generation prompt.
    """
    for chat in forms(record):
        if not all(_is_written(tokenizer, chat, record)):
            continue
        found = [_answer(tokenizer, chat, i, record) for i, one in enumerate(chat) if one["role"] == "assistant"]
        if all(found):
            return [one for one in found if one is not None]
    return None


def _is_written(tokenizer: Any, chat: Chat, record: Messages) -> list[bool]:
    """Of each text of a question whether it is there: some templates take content in one form and lose the other."""
    whole = written(tokenizer, chat, record) or ""
    texts = [one["content"] for one in record.messages if one["role"] in ("user", "system")]
    return [isinstance(text, str) and text.strip() in whole for text in texts]


def _answer(tokenizer: Any, chat: Chat, index: int, record: Messages) -> tuple[str, str] | None:
    if index == 0:
        return None
    given = written(tokenizer, chat[:index], record, prompt=True)
    whole = written(tokenizer, chat[: index + 1], record)
    if given is None or whole is None or not whole.startswith(given):
        return None
    return given, to_its_stop(tokenizer, whole[len(given) :])


def to_its_stop(tokenizer: Any, said: str) -> str:
    """Up to the end of the first special tokens of those that close it; white space behind them is the template's."""
    one = f"(?:{Specials.of(tokenizer).pattern.pattern})"
    closing = re.search(rf"(?:{one}|\s)*$", said)
    first = re.match(rf"\s*{one}+", said[closing.start() :]) if closing else None
    return said[: closing.start() + first.end()] if closing and first else said
