"""A cell of the matrix of chat templates and kinds of rows: what came of it, and what must have, without our code."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from kinds import record_of
from templates import family_tokenizer

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.chat import MARK, ChatSettings, ChatTemplate, RenderedText
from alphatoken_curate.tokens.specials import Specials

TURNS = ("all", "last")
"""The columns."""

STOPS = frozenset({"<|user|>", "<|observation|>"})
"""Of GLM, which closes no turn: what its generation_config.json names."""

Chat = list[dict[str, Any]]


def chat_template(tokenizer: Any, turns: str) -> ChatTemplate:
    settings = ChatSettings(stops=STOPS)
    return ChatTemplate(tokenizer, Specials.of(tokenizer), turns=turns, chats=settings)


def rendered(tokenizer: Any, record: Messages, turns: str) -> RenderedText | RowFault:
    try:
        return chat_template(tokenizer, turns).render(record)[0]
    except RowFault as fault:
        return fault


@cache
def cell(name: str, kind: str, turns: str = "all", marks: bool = True) -> RenderedText | RowFault:
    """Without `marks` a training form is read as if it were none."""
    return rendered(family_tokenizer(name, marks), record_of(kind), turns)


def said(found: RenderedText) -> list[str]:
    return [found.text[start:end] for start, end in found.spans]


def responding(record: Messages, turns: str) -> list[int]:
    """The messages that are to respond."""
    answers = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
    return answers[-1:] if turns == "last" else answers


# --- templates as they are, without our code


def forms(record: Messages) -> Iterator[Chat]:
    """The messages in every form that a trainer may give them in."""
    for as_text, as_parts, filled in itertools.product((False, True), repeat=3):
        chat = copy.deepcopy(record.messages)
        for message in chat:
            for call in message.get("tool_calls", ()):
                given = call["function"]["arguments"]
                given = json.loads(given) if isinstance(given, str) else given
                call["function"]["arguments"] = json.dumps(given, ensure_ascii=False) if as_text else given
            if filled:
                message.setdefault("content", "")
            if as_parts and "content" in message:
                message["content"] = [{"type": "text", "text": message["content"]}]
        yield chat


def written(tokenizer: Any, chat: Chat, record: Messages, prompt: bool = False) -> str | None:
    """The chat as the template writes it; None where it raises."""
    try:
        text = tokenizer.apply_chat_template(chat, tools=record.tools, tokenize=False, add_generation_prompt=prompt)
    except Exception:
        return None
    return str(text)


def changed(chat: Chat, which: Callable[[int, str], bool]) -> Chat:
    """The texts of those (message, key) with other letters and digits, as many; tags stay."""

    def change(value: Any) -> Any:
        if isinstance(value, str):
            return "".join(part if part.startswith("<") else _turned(part) for part in re.split(r"(<[^>]*>)", value))
        if isinstance(value, list):
            return [change(item) for item in value]
        if isinstance(value, dict):
            kept = ("type", "id", "name", "function")
            return {key: item if key in kept and key != "function" else change(item) for key, item in value.items()}
        return value + 1 if type(value) is int else value

    read = ("content", "tool_calls", "reasoning_content", "thinking")
    return [
        {key: change(item) if key in read and which(i, key) else item for key, item in message.items()}
        for i, message in enumerate(chat)
    ]


def _turned(text: str) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    ones = letters + letters.upper() + "0123456789"
    others = letters[1:] + "a" + letters[1:].upper() + "A" + "1234567890"
    return text.translate(str.maketrans(ones, others))


def differing(one: str, other: str) -> list[int] | None:
    """Where two texts of one length differ; None of others."""
    return [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b] if len(one) == len(other) else None


# --- what must have come of a cell


def check_by_changes(tokenizer: Any, record: Messages, turns: str, found: RenderedText) -> None:
    """With other letters in what responds, only the mask changes; with others in what does not, none of it does."""
    text = found.text.replace(MARK, "")
    inside = _inside(found)
    chat = chat_of(tokenizer, record, found)
    if any(isinstance(given, str) for message in chat for given in _arguments(message)):
        assert all(written(tokenizer, form, record) is None for form in forms(record) if _of_objects(form)), "as text"
    respond = responding(record, turns)
    others = written(tokenizer, changed(chat, lambda i, _: i not in respond), record)
    mine = written(tokenizer, changed(chat, lambda i, _: i in respond), record)
    assert others is not None and mine is not None
    apart, own = differing(text, others), differing(text, mine)
    assert apart is not None and not inside & {*apart}, "text of others responds"
    assert own is not None and {*own} <= inside, "part of an answer does not respond"


def chat_of(tokenizer: Any, record: Messages, found: RenderedText) -> Chat:
    """The messages in the form that gives this text."""
    text = found.text.replace(MARK, "")
    chat = next((form for form in forms(record) if written(tokenizer, form, record) == text), None)
    assert chat is not None, "a text that no trainer would have"
    return chat


def _arguments(message: dict[str, Any]) -> list[Any]:
    return [call["function"]["arguments"] for call in message.get("tool_calls", ())]


def _of_objects(chat: Chat) -> bool:
    return all(not isinstance(given, str) for message in chat for given in _arguments(message))


def _inside(found: RenderedText) -> set[int]:
    """The characters that respond, by their place in the text without our marks."""
    places, place = list[int](), 0
    for letter in found.text:
        places.append(place)
        place += letter != MARK
    return {places[i] for start, end in found.spans for i in range(start, end) if found.text[i] != MARK}


@cache
def why_refused(name: str, kind: str, turns: str, marks: bool = True) -> str:
    """What of a template is in the way of a cell; `ours` where nothing is."""
    tokenizer, record = family_tokenizer(name, marks), record_of(kind)
    texts = [(form, text) for form in forms(record) if (text := written(tokenizer, form, record)) is not None]
    texts = [(form, text) for form, text in texts if "'type': 'text'" not in text]
    if not texts:
        return "raises"
    found = [one for one in texts if _of_objects(one[0])]
    texts = found or texts
    for check, why in (
        *((_loses, "loses"), (_out_of_order, "out of order")),
        *((_opens_otherwise, "opens otherwise"), (_no_prompt, "no prompt")),
    ):
        if all(check(tokenizer, form, text, record, responding(record, turns)) for form, text in texts):
            return why
    return "ours"


def _loses(tokenizer: Any, chat: Chat, text: str, record: Messages, respond: list[int]) -> bool:
    """Whether some text of an answer, its thoughts apart, may be another without any change."""
    for i in respond:
        if isinstance(content := chat[i].get("content"), str | list) and _has_text(content):
            said_ = "".join(part["text"] for part in content) if isinstance(content, list) else content
            if written(tokenizer, changed(chat, lambda j, key, i=i: (j, key) == (i, "content")), record) == text:  # type: ignore[misc]
                return said_.rpartition("</think>")[2].strip() != ""
        for at in range(len(chat[i].get("tool_calls", ()))):
            other = copy.deepcopy(chat)
            other[i]["tool_calls"][at]["function"]["name"] = "another_name"
            if written(tokenizer, other, record) in (text, None):
                return True
    return False


def _has_text(content: Any) -> bool:
    return bool("".join(part["text"] for part in content).strip() if isinstance(content, list) else content.strip())


def _out_of_order(tokenizer: Any, chat: Chat, text: str, record: Messages, respond: list[int]) -> bool:
    """Whether another message stands between the texts of an answer."""
    for i in respond:
        mine = written(tokenizer, changed(chat, lambda j, _, i=i: j == i), record)  # type: ignore[misc]
        rest = written(tokenizer, changed(chat, lambda j, _, i=i: j != i), record)  # type: ignore[misc]
        places, others = (differing(text, one) if one is not None else None for one in (mine, rest))
        if places and others and any(min(places) < place < max(places) for place in others):
            return True
    return False


def _opens_otherwise(tokenizer: Any, chat: Chat, text: str, record: Messages, respond: list[int]) -> bool:
    """Whether some answer is written behind a header of which the generation prompt there has nothing."""
    for i in respond:
        before = written(tokenizer, chat[:i], record)
        head = written(tokenizer, chat[:i], record, prompt=True)
        if before is None or head is None or head == before or not head.startswith(before):
            continue
        agreed = next((at for at, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
        opening = head[len(before) :].strip()
        if not text[agreed:].lstrip().startswith(opening[:3]) and opening[:12] not in text[agreed - 12 : agreed + 40]:
            return True
    return False


def _no_prompt(tokenizer: Any, chat: Chat, text: str, record: Messages, respond: list[int]) -> bool:
    """Whether it writes nothing more where it is asked for a generation prompt, anywhere."""
    return all(
        written(tokenizer, chat[:i], record) == written(tokenizer, chat[:i], record, prompt=True)
        for i in range(1, len(chat) + 1)
    )
