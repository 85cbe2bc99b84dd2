"""Preference rows: a chosen and a rejected answer to one prompt, which may be implied by what both begin with."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.fields import (
    BRANCHES,
    REJECTED,
    SYSTEM,
    history_of,
    is_message,
    messages_of,
    said,
    text_of,
    unmarked,
    with_system,
    wrong,
)
from alphatoken_curate.rows.shapes import (
    Messages,
    Pair,
    PromptCompletion,
    Record,
    Shapes,
    asked,
    chat,
    instruction_of,
    tokens_of,
)

PROMPT_LIKE = ("instruction", "question", "query", "input", "context", *SYSTEM)
"""Keys that hold what belongs to the prompt in some data sets: a prompt is never guessed beside one of them."""

_SAME = "chosen and rejected are the same: neither is preferred"
_ANSWERS, _ASKS = "\n\nAssistant:", "\n\nHuman:"
_LAST = re.compile(r"\S+\s*\Z")
_WORD = re.compile(r"\w+(?:[.,'’-]\w+)*[.,'’-]?\Z")


def _from_branches(record: dict[str, Any]) -> tuple[str, Pair]:
    texts = [isinstance(record[name], str) for name in BRANCHES]
    lists = [isinstance(record[name], list) for name in BRANCHES]
    if record.get("prompt") is not None:
        if isinstance(record["prompt"], str) and not record["prompt"].strip():
            message = "prompt is empty; leave the key out where chosen and rejected begin with the prompt"
            raise RowFault("no_prompt", message)
        if all(texts) and isinstance(record["prompt"], str):
            return "preference", _answers(record, record["prompt"])
        return "preference", _turns(record)
    if all(texts):
        return "preference", _continuations(record)
    if all(lists):
        return "preference", _whole_chats(record, *(messages_of(record, name) for name in BRANCHES))
    odd = BRANCHES[texts[0] or lists[0]]
    raise wrong(odd, "text or a list of messages, as the other branch is", record[odd])


def _from_token_branches(record: dict[str, Any]) -> tuple[str, Pair]:
    both = {name: tokens_of(record, f"{name}_") for name in BRANCHES}
    if both["chosen"].input_ids == both["rejected"].input_ids:  # whatever their labels
        raise RowFault("same_branches", _SAME)
    return "preference_tokens", Pair(**both)


def _pair(branch: Callable[[str], Record]) -> Pair:
    """The pair of both branches, made by name. Raises RowFault where they are the same."""
    pair = Pair(chosen=branch("chosen"), rejected=branch("rejected"))
    if pair.chosen == pair.rejected:
        raise RowFault("same_branches", _SAME)
    return pair


def _chat(name: str, record: dict[str, Any], messages: list[dict[str, Any]], start: int) -> Messages:
    try:
        return chat(record, messages, respond_from=start)
    except RowFault as fault:
        raise fault.within(name) from None


def _answers(record: dict[str, Any], prompt: str) -> Pair:
    """Texts that answer a text."""

    def branch(name: str) -> Messages:
        before = asked(record, prompt)
        plain = PromptCompletion(prompt=prompt, completion=record[name]) if len(before) == 1 else None
        start = len(before) if record.get("history") else 0
        return chat(record, [*before, said("assistant", _filled(record, name))], respond_from=start, plain=plain)

    return _pair(branch)


def _filled(record: dict[str, Any], name: str) -> str:
    text = text_of(record, name)
    if not text.strip():
        raise RowFault("no_response", f"{name} is empty: nothing responds")
    return text


def _turns(record: dict[str, Any]) -> Pair:
    """Answers that follow a prompt of messages or text, or repeat it first."""
    is_text = isinstance(record["prompt"], str)
    return _following(record, [said("user", record["prompt"])] if is_text else messages_of(record, "prompt"))


def _following(record: dict[str, Any], prompt: list[dict[str, Any]]) -> Pair:
    """Branches behind a prompt: messages, one message, or text as the assistant's."""
    after = {name: _branch(record, name) for name in BRANCHES}
    if all(_repeats(turns, prompt) for turns in after.values()):
        return _whole_chats(record, after["chosen"], after["rejected"])
    asked_on = [unmarked(list(takewhile(lambda turn: turn["role"] != "assistant", turns))) for turns in after.values()]
    for name, own in zip(BRANCHES, asked_on, strict=True):
        if own and (isinstance(record.get("prompt"), str) or asked_on[0] != asked_on[1]):
            found = f"{name} begins with a message of role {own[0]['role']}"
            raise RowFault("prompt_mismatch", f"{found}, but prompt is none of the messages that both branches share")
    before = with_system(record, prompt)
    return _pair(lambda name: _chat(name, record, before + after[name], len(before)))


def _branch(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    if isinstance(record[name], str):
        return [said("assistant", _filled(record, name))]
    return messages_of({name: [record[name]]} if is_message(record[name]) else record, name)


def _repeats(turns: list[dict[str, Any]], prompt: list[dict[str, Any]]) -> bool:
    """Do the turns begin with the prompt, a system message in front of it aside?"""
    own = turns if prompt[0]["role"] == "system" else _but_system(turns)
    return unmarked(own[: len(prompt)]) == unmarked(prompt)


def _but_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["role"] not in ("system", "developer")]


def _whole_chats(record: dict[str, Any], *chats: list[dict[str, Any]]) -> Pair:
    """Chats whose longest common beginning is the prompt."""
    alike = zip(*(unmarked(messages) for messages in chats), strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], alike)))
    if len(chats[0]) == len(chats[1]) == shared:
        raise RowFault("same_branches", _SAME)
    for name, messages in zip(BRANCHES, chats, strict=True):
        if len(messages) == shared:
            raise RowFault("no_response", f"{name} is no more than the beginning of the other: it answers nothing")
    if not _but_system(chats[0][:shared]):
        message = "chosen and rejected begin with different messages; give the prompt, or let both begin with it"
        raise RowFault("no_prompt", message)
    before = with_system(record, chats[0][:shared])
    after = {name: messages[shared:] for name, messages in zip(BRANCHES, chats, strict=True)}
    return _pair(lambda name: _chat(name, record, before + after[name], len(before)))


def _continuations(record: dict[str, Any]) -> Pair:
    """Texts whose common beginning is the prompt, of a row that gives none."""
    if "prompt" in record:
        raise RowFault("null_field", "prompt is null; give it a value, or leave it out where both texts begin with it")
    if beside := [key for key in PROMPT_LIKE if record.get(key) not in (None, "")]:
        message = f"{' and '.join(beside)} beside chosen and rejected but no prompt; put the whole prompt under prompt"
        asks = [key for key in beside if key not in SYSTEM]
        raise RowFault("no_prompt", message + (f", as --map {asks[0]}=prompt does" if len(asks) == 1 else ""))
    texts = {name: _filled(record, name) for name in BRANCHES}
    if texts["chosen"] == texts["rejected"]:
        raise RowFault("same_branches", _SAME)
    prompt = _common_prompt(*texts.values())
    if not prompt.strip():
        message = "chosen and rejected do not begin with the same words, and no prompt is given"
        raise RowFault("no_prompt", message)

    def branch(name: str) -> PromptCompletion:
        completion = texts[name][len(prompt) :]
        if not completion.strip():
            raise RowFault("no_response", f"{name} is no more than the prompt: nothing responds")
        if prompt.endswith(_ANSWERS) and _ASKS in completion:
            message = f"{name} goes on with a turn of the human behind the answer; give both as lists of messages"
            raise RowFault("several_turns", message)
        return PromptCompletion(prompt=prompt, completion=completion)

    return _pair(branch)


def _common_prompt(one: str, other: str) -> str:
    """What both texts begin with, up to the last `Assistant:` of a dialogue, else to where a word begins.

    A space before the first word that differs is left to that word, as tokenizers have it.
    """
    pairs = enumerate(zip(one, other, strict=False))
    length = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    shared = one[:length]
    if _ANSWERS in shared:
        return shared[: shared.rindex(_ANSWERS) + len(_ANSWERS)]
    following = one[length : length + 1], other[length : length + 1]
    if not all(following):  # one is the beginning of the other: its last word differs by where it ends
        shared = _LAST.sub("", shared)
    elif any(c.isalnum() or c == "_" or unicodedata.combining(c) for c in following):
        shared = _WORD.sub("", shared)
    return shared[:-1] if shared.endswith(" ") else shared


# --- a prompt under another name (LLaMA-Factory) ---


def _from_conversations_and_branches(record: dict[str, Any]) -> tuple[str, Pair]:
    prompt = messages_of(record, "conversations")
    if prompt[-1]["role"] == "assistant":
        message = "conversations end with an answer beside chosen and rejected; leave it out, or the conversations"
        raise RowFault("ambiguous_shape", message)
    return "preference", _following(record, prompt)


def _from_instruction_and_branches(record: dict[str, Any]) -> tuple[str, Pair]:
    question = instruction_of(record)
    if all(isinstance(record[name], str) for name in BRANCHES):
        return "preference", _answers(record, question)
    return "preference", _following(record, [*history_of(record), said("user", question)])


# --- one answer, and another beside it (ms-swift) ---


def _from_messages_and_rejected(record: dict[str, Any]) -> tuple[str, Pair]:
    """A chat, and what stands in for its last answer in the other branch."""
    *before, last = messages_of(record, "messages")
    if last["role"] != "assistant" or not before:
        raise RowFault("no_response", "messages beside rejected_response must end with the answer that is preferred")
    return "preference", _beside(record, with_system(record, before), [last])


def _from_texts_and_rejected(record: dict[str, Any]) -> tuple[str, Pair]:
    answer = said("assistant", _filled(record, "response"))
    return "preference", _beside(record, asked(record, text_of(record, "prompt")), [answer])


def _beside(record: dict[str, Any], before: list[dict[str, Any]], preferred: list[dict[str, Any]]) -> Pair:
    is_text = isinstance(record[REJECTED], str)
    other = [said("assistant", _filled(record, REJECTED))] if is_text else messages_of(record, REJECTED)
    after = {"chosen": preferred, "rejected": other}
    return _pair(lambda name: _chat(name, record, before + after[name], len(before)))


def _from_two_chats(record: dict[str, Any]) -> tuple[str, Pair]:
    return "preference", _whole_chats(record, messages_of(record, "messages"), messages_of(record, "rejected_messages"))


PREFERENCE: Shapes = {
    BRANCHES: _from_branches,
    ("conversations", *BRANCHES): _from_conversations_and_branches,
    ("instruction", *BRANCHES): _from_instruction_and_branches,
    ("messages", REJECTED): _from_messages_and_rejected,
    ("messages", "rejected_messages"): _from_two_chats,
    ("prompt", "response", REJECTED): _from_texts_and_rejected,
    ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"): _from_token_branches,
}
"""Rows with two answers."""
