"""What stands beside the keys of a row's shape and says what the row would be read without: read, or refused by name.

Columns of such names may hold something else, so each is looked at only as far as it is of the kind in question: an
`image` that is a link as text, a `label` that is an object, an `output` that is a number say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.fields import BRANCHES, REJECTED, chat_of
from alphatoken_curate.rows.files import visible
from alphatoken_curate.rows.pairs import PREFERENCE
from alphatoken_curate.rows.shapes import (
    SFT,
    AnyRecord,
    Messages,
    Pair,
    Passage,
    Prompt,
    PromptCompletion,
    Record,
    Tokens,
)
from alphatoken_curate.runs.schema import IGNORE_INDEX

UNWANTED = ("label", "kto_tag")
"""Keys that are false, or 0, where an answer is not to be learnt from (KTO)."""

BRANCHED = (REJECTED, "rejected_messages", "rejected")
"""Keys that hold another answer: beside one answer, a row is a pair or none."""

ANSWERS = ("response", "output", "completion", "chosen")
"""Keys that hold an answer: one beside a shape without them is to be an answer of the row, too."""

WEIGHTS = ("weight", "loss_weight", "loss_scale")
SWITCHES = ("train", "trainable", "loss")
"""Keys that say of a whole row whether it trains: by a number or a switch, by a switch alone."""

MEDIA = ("images", "videos", "audios")
MEDIUM = ("image", "video", "audio")
"""Keys that hold what is no text: lists, or one. One that is text may be a link that nothing refers to."""

BESIDE_SHAPES = (*UNWANTED, *BRANCHED, *ANSWERS, *WEIGHTS, *SWITCHES, *MEDIA, *MEDIUM, "input", "context", "history")
"""Every key that is looked at here."""

_ASKED = (
    *(("instruction", "output"), ("instruction", *BRANCHES)),
    *(("prompt", "response"), ("prompt", "response", REJECTED)),
)
"""Shapes of a question that may be text, but for pairs of `prompt`, `chosen` and `rejected`."""


def check_keys(record: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Raise RowFault for keys beside those of the shape by which the row is none of that shape."""
    shape = " + ".join(keys)
    if keys in SFT:
        for key in UNWANTED:
            if isinstance(value := record.get(key), int | float) and value == 0:
                message = f"{key} is {_written(value)}: an answer that is not to be learnt from (KTO). Drop the row"
                message += ", or put it under rejected beside a chosen answer"
                other = "" if value is False else f". Where {key} says something else, leave it out"
                raise RowFault("unwanted_answer", message + other)
    if keys not in PREFERENCE:
        for key in BRANCHED:
            if isinstance(record.get(key), str | list) and record[key]:
                message = f"{key} beside {shape}: which answer it stands against is not known; give the pair as chosen"
                raise RowFault("ambiguous_shape", f"{message} and rejected")
    if isinstance(history := record.get("history"), list) and history and not _reads_history(record, keys):
        message = f"history beside {shape}: where its turns belong is not known; put them among messages"
        raise RowFault("ambiguous_shape", message)


def check_made(record: dict[str, Any], keys: tuple[str, ...], made: AnyRecord) -> None:
    """Raise RowFault for what the row says besides and `made`, which it is read as, does not hold."""
    _check_media(record, made)
    if isinstance(made, Prompt | Passage):
        return
    _check_marks(record, keys, made)
    if not _is_tokens(made):
        _check_input(record, keys)
        _check_answers(record, keys, made)


def notes(record: dict[str, Any], made: AnyRecord) -> Iterator[str]:
    """How such keys were read, where a user would not expect it."""
    if not isinstance(made, Prompt | Passage) and any(_weight(record, key) not in (None, 0, 1) for key in WEIGHTS):
        yield "weights of rows (weight, loss_weight, loss_scale) are left aside: every row weighs as much as any"
    if isinstance(made.chosen if isinstance(made, Pair) else made, Messages | Prompt) and _holds_json(record):
        yield "a prompt or an answer that is messages as JSON text is read as these"
    if _is_repeated(record):
        yield "answers begin with all of the prompt, which stands twice then: leave it out of one of both"
    if isinstance(made, Pair) and _prompt(made.chosen) != _prompt(made.rejected):
        yield "the tokens before chosen_labels and before rejected_labels differ: they are two prompts"


def _is_repeated(record: dict[str, Any]) -> bool:
    """Whether a prompt of several words is the beginning of every answer, both being texts."""
    prompt = next((record[key] for key in ("prompt", "instruction") if isinstance(record.get(key), str)), "")
    answers = [record[key] for key in (*ANSWERS, REJECTED, "rejected") if isinstance(record.get(key), str)]
    begin = prompt.strip()
    return len(begin.split()) > 2 and bool(answers) and all(text.lstrip().startswith(begin) for text in answers)


def _prompt(record: Record) -> list[int] | None:
    """The tokens before the first that responds, of a row that is tokens."""
    if not isinstance(record, Tokens):
        return None
    start = next(i for i, label in enumerate(record.labels) if label != IGNORE_INDEX)
    return record.input_ids[:start]


def _holds_json(record: dict[str, Any]) -> bool:
    """Whether what may be text or messages is those as JSON text (`with_chats`)."""
    if record.get("messages") or record.get("conversations"):
        return isinstance(record.get(REJECTED), str) and chat_of(record[REJECTED]) is not None
    found = [isinstance(record.get(key), str) and chat_of(record[key]) is not None for key in ("prompt", *BRANCHES)]
    return found[0] or all(found[1:])


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else visible(str(value), 40)


def _reads_history(record: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """Whether a row of this shape is a question as text, with an answer that is."""
    if keys == BRANCHES and record.get("prompt") is None:
        return False
    asks = ("prompt", *BRANCHES) if keys == BRANCHES else keys
    return asks in (*_ASKED, ("prompt", *BRANCHES)) and all(isinstance(record[key], str) for key in asks)


def _is_tokens(made: AnyRecord) -> bool:
    return isinstance(made.chosen if isinstance(made, Pair) else made, Tokens)


# --- the row does not train


def _weight(record: dict[str, Any], key: str) -> float | None:
    """The number under a key, as far as it is one; columns write no value as NaN."""
    value = record.get(key)
    return None if not isinstance(value, int | float) or math.isnan(value) else value


def _check_marks(record: dict[str, Any], keys: tuple[str, ...], made: AnyRecord) -> None:
    for key in (*WEIGHTS, *SWITCHES):
        value = record.get(key)
        if isinstance(value, list) and value and key in WEIGHTS and not _is_tokens(made):
            message = f"{key} is a list beside {' + '.join(keys)}: of what is not known; put it into the messages"
            raise RowFault("message_weight", message)
        number = _weight(record, key) if key in WEIGHTS or isinstance(value, bool) else None
        if number is not None and number < 0:
            raise RowFault("message_weight", f"{key} is {_written(value)}; a row trains by 1 and does not by 0")
        if number == 0:
            message = f"{key} is {_written(value)}: the whole row is marked off, and nothing responds. Drop the row"
            raise RowFault("marked_off", f"{message}, or leave {key} out where it says something else")


# --- what is no text


def _check_media(record: dict[str, Any], made: AnyRecord) -> None:
    for key in (*MEDIA, *MEDIUM):
        value = record.get(key)
        is_there = value and not isinstance(value, int | float) and value != "[]"
        if is_there and isinstance(value, str) and key in MEDIUM:
            is_there = any(f"<{key}>" in text for text in _texts(made))
        if is_there:
            raise RowFault(
                "not_text", f"{key} beside the text: only text is read. Drop the row, or {key} where none is"
            )


def _texts(made: AnyRecord) -> Iterator[str]:
    """Every text of a row as read."""
    if isinstance(made, Pair):
        yield from _texts(made.chosen)
        yield from _texts(made.rejected)
    elif isinstance(made, Messages | Prompt):
        yield from (message.get("content", "") for message in made.messages)
    elif isinstance(made, PromptCompletion):
        yield from (made.prompt, made.completion)
    elif isinstance(made, Passage):
        yield made.text


# --- more of the question, other answers


def _check_input(record: dict[str, Any], keys: tuple[str, ...]) -> None:
    """`input` is read behind an instruction alone, `context` nowhere; beside a prompt `input` is to be a part of it."""
    extra, prompt, context = (record.get(key) for key in ("input", "prompt", "context"))
    if "instruction" in keys and isinstance(context, str) and context.strip() and not extra:
        message = f"context beside {' + '.join(keys)}: where it belongs is not known"
        raise RowFault("ambiguous_shape", f"{message}; have it behind the instruction by --map context=input")
    if "instruction" in keys or prompt is None or not isinstance(extra, str) or not extra.strip():
        return
    if keys[0] == "prompt" or keys == BRANCHES:
        told = prompt if isinstance(prompt, list) else [{"content": prompt}]
        if not any(_holds(message.get("content"), extra) for message in told if isinstance(message, dict)):
            way = "put it into the prompt"
            if keys == ("prompt", "response"):
                way += ", or have it behind the question by --map prompt=instruction,response=output"
            raise RowFault("ambiguous_shape", f"input beside {' + '.join(keys)}: where it belongs is not known; {way}")


def _check_answers(record: dict[str, Any], keys: tuple[str, ...], made: AnyRecord) -> None:
    beside = [key for key in ANSWERS if key not in keys and record.get(key)]
    if not beside:
        return
    known = list(_answers(made))
    for key in beside:
        for text in _said(record[key]):
            if not any(_holds(one, text) for one in known):
                message = f"{key} beside {' + '.join(keys)} holds another answer; leave one of them, or"
                raise RowFault("ambiguous_shape", f"{message} give a pair as chosen and rejected")


def _answers(made: AnyRecord) -> Iterator[str]:
    if isinstance(made, Pair):
        yield from _answers(made.chosen)
        yield from _answers(made.rejected)
    elif isinstance(made, Messages):
        yield from (one.get("content", "") for one in made.messages if one["role"] == "assistant")
    elif isinstance(made, PromptCompletion):
        yield from (made.completion, made.prompt + made.completion)


def _said(value: Any) -> Iterator[str]:
    """The answers under a key: text, texts, or messages of the assistant."""
    for one in value if isinstance(value, list) else [value]:
        is_said = isinstance(one, dict) and (one.get("role") or one.get("from")) in ("assistant", "gpt", "model")
        text = (one.get("content") or one.get("value")) if is_said else one
        if isinstance(text, str):
            yield text


def _holds(whole: Any, part: str) -> bool:
    """Whether a text is within another, white space aside."""
    return isinstance(whole, str) and " ".join(part.split()) in " ".join(whole.split())
