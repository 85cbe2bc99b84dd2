"""`jsonl-weights`: chats as text for services that tokenise themselves, where tokens can only be weighed in groups.

Two files of the same rows (by --turns each, of chats up to each answer), since services take one or the other: a 0/1
`weight` on each assistant message, 0 where the mask left none of its tokens but what `--always-keep` keeps, its end or
what is special (OpenAI, Mistral); or a float `weight` on each row, the mean over its response tokens (Fireworks).
Assistant messages are matched to the runs of response tokens, in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.exports.form import (
    TOKEN_ALIGNED,
    Asked,
    Dropped,
    Form,
    Items,
    Kept,
    Told,
    jsonl_rows,
    quoted,
    unlike,
)
from alphatoken_curate.exports.originals import Original, originals
from alphatoken_curate.masks.always import BY_KIND, special_ids
from alphatoken_curate.reading.trainset import TrainSet
from alphatoken_curate.rows.shapes import Messages, Tokens
from alphatoken_curate.runs.atomic import atomic_file
from alphatoken_curate.wording import count

BY_MESSAGE, BY_ROW = "messages.jsonl", "samples.jsonl"


def with_text(items: Items, opened: TrainSet) -> Items:
    """Each row with its chat and weights, as they are written. Raises `UsageError` for rows that are no chats."""
    source = originals(opened)
    settings = opened.stored.settings
    most = settings.get("max_length")
    always = opened.mask.settings.get("always_keep", "none")
    special = special_ids(opened.run, opened.stored) if always == "special" else np.empty(0, np.int32)
    for item in items:
        if isinstance(item, Dropped):
            yield item
            continue
        row_id, turn = item.row.row_id, item.row.turn
        original = next((one for one in source if (one.row_id, one.turn) == (row_id, turn)), None)
        if original is None or len(original.response) != len(item.row.branches[0].input_ids):
            raise StoredDataError(f"{opened.run}: row {row_id} of train/ is not in values/; run `verify`")
        chat = _chat(original)
        turns = chat.responding(last_only=settings.get("turns") == "last")
        if settings.get("turns") == "each":
            turns = [turns[turn]]
            chat = replace(chat, messages=chat.messages[: turns[0] + 1])
        runs = _runs(original.response)
        if len(runs) < len(turns) and len(original.response) == most:
            yield Dropped(row_id=row_id, turn=turn, reason="cut_when_scored")
        else:
            branch = item.row.branches[0]
            weight = branch.loss_weight
            # An answer of which only its end is left, or what is special, since that is always kept, says nothing that
            # is to be learnt.
            silent = np.isin(branch.input_ids, special) | (original.end_of_turn & (always in BY_KIND))
            says = np.where(silent, np.float32(0), weight)
            text = _records(original, chat, turns, runs, weight, says)
            trained = sum(message.get("weight", 0) for message in text[0]["messages"])
            yield replace(item, text=text, answers=len(turns), answers_trained=trained)
    for _ in source:  # to the end, where the digests of what was read are compared
        pass


def _chat(original: Original) -> Messages:
    record = original.record
    if isinstance(record, Messages):
        return record
    kind = "pre-tokenised (input_ids + labels)" if isinstance(record, Tokens) else "raw text (prompt + completion)"
    raise UsageError(
        f"{original.place}: {kind}, with no messages to weigh; --for jsonl-weights takes chats. Export tokens, such as"
        " --for hf."
    )


def _runs(response: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, end) of each run of response tokens."""
    edges = np.flatnonzero(np.diff(response.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _records(
    original: Original,
    chat: Messages,
    turns: list[int],
    runs: list[tuple[int, int]],
    weight: NDArray[np.float32],
    says: NDArray[np.float32],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row as it stands in either file; `says`: the weights that decide whether an answer trains."""
    if len(runs) != len(turns):
        raise UsageError(
            f"{original.place}: {count(len(turns), 'answer')} and {count(len(runs), 'run')} of response tokens, so"
            " which token is of which message cannot be told. Export tokens, such as --for hf."
        )
    alive = {turn for turn, (start, end) in zip(turns, runs, strict=True) if says[start:end].any()}
    messages = [
        {**message, "weight": int(i in alive)} if message["role"] == "assistant" else message
        for i, message in enumerate(chat.messages)
    ]
    rest: dict[str, Any] = {"tools": chat.tools} if chat.tools else {}
    if chat.template_kwargs:
        rest["chat_template_kwargs"] = chat.template_kwargs
    mean = float(weight[original.response].mean(dtype=np.float64))
    # By the row's weight every answer would train: what was not to respond is kept out of it.
    plain = [
        {**message, "weight": 0} if message["role"] == "assistant" and i not in turns else message
        for i, message in enumerate(chat.messages)
    ]
    return {"messages": messages, **rest}, {"messages": plain, **rest, "weight": mean}


def _write(folder: Path, batches: Iterator[list[Kept]], asked: Asked) -> None:
    with atomic_file(folder / BY_MESSAGE) as messages, atomic_file(folder / BY_ROW) as samples:
        for kept in (kept for rows in batches for kept in rows):
            for sink, record in zip((messages, samples), kept.text, strict=True):
                sink.write(_line(record, kept.row.row_id))


def _line(record: Mapping[str, Any], row_id: int) -> bytes:
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError as error:
        found = f"a message of row {row_id} holds what JSON has no form for ({error})"
        raise UsageError(f"{found}; take it out and score again, or export tokens, such as --for hf.") from error


def _check(folder: Path, rows: Iterator[Kept], asked: Asked) -> None:
    found = [jsonl_rows(folder / name) for name in (BY_MESSAGE, BY_ROW)]
    for kept in rows:
        for stored, wanted in zip(found, kept.text, strict=True):
            if next(stored, None) != wanted:
                raise unlike(folder, f"row_id {kept.row.row_id} is not as the mask has it")
    if any(next(stored, None) is not None for stored in found):
        raise unlike(folder, "it holds more rows than were written")


def _columns(told: Told) -> Iterator[str]:
    yield f"- `{BY_MESSAGE}`: `messages`, with `weight` 0 or 1 on each assistant message; `tools` and"
    yield "  `chat_template_kwargs` where a row has them"
    yield f"- `{BY_ROW}`: `messages`, `tools`, and a float `weight` on the row; 0 on answers not to respond"


def _use(told: Told) -> Iterator[str]:
    yield f"OpenAI, Mistral and services with their format: upload {quoted(told.file(BY_MESSAGE))}. A message has"
    yield "weight 0 where the mask left none of its tokens, or by --always-keep its end or special ones alone, or where"
    yield "it was not to respond; otherwise all of it trains."
    yield ""
    yield f"Fireworks: upload {quoted(told.file(BY_ROW))}. The weight is the mean loss weight over the row's"
    yield "response tokens, those dropped by the mask counted as 0."


FORM = Form(
    name="jsonl-weights",
    reader="hosted services that take chats: OpenAI, Mistral, Fireworks",
    checked={
        "openai": "its API description, 2026-11, documentation",
        "mistral": "secondary source, not verified",
        "fireworks": "its documentation, 2026-11",
    },
    data=BY_MESSAGE,
    alignment=TOKEN_ALIGNED,
    pairs=False,
    floats=lambda asked: True,
    destroys="",
    divides="what the service divides by, which it does not say",
    columns=_columns,
    use=_use,
    write=_write,
    check=_check,
    beware=(
        "A token mask cannot be sent to these services: where a message keeps one token, other than its"
        " end by --always-keep, all of it trains.",
        "The service tokenises by its own model and template: values are those of yours.",
    ),
    cuts=False,
    refine=with_text,
)
