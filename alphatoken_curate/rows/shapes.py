"""Normal forms of a row, and how rows of one answer become one of them.

Which keys are read is told in `rows`; preference rows are put together in `pairs` from what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.fields import (
    history_of,
    kwargs_of,
    messages_of,
    said,
    system_of,
    text_of,
    tools_of,
    unmarked,
    with_system,
)
from alphatoken_curate.rows.marks import OFF
from alphatoken_curate.rows.padding import MASKED, integers, masked_out, own_tokens
from alphatoken_curate.runs.schema import IGNORE_INDEX


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCompletion:
    """Raw text that continues raw text."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """A chat, told by a chat template; assistant turns from index `respond_from` on respond.

    `plain` stands in for it where the tokenizer has no chat template.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    respond_from: int = 0
    plain: PromptCompletion | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the row tells the chat template besides."""
    context: frozenset[int] = frozenset()
    """Assistant turns that the row marks off: they do not respond."""

    def responding(self, *, last_only: bool = False) -> list[int]:
        """The messages that respond; `last_only`: the last answer, unless it is marked off."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        asked = [i for i in answers if i >= self.respond_from][-1 if last_only else 0 :]
        return [i for i in asked if i not in self.context]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens as they are: `labels[i]` is `input_ids[i]` where token i responds, else -100."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Raw text of which every token responds that another one precedes."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A chat that waits for an answer; `plain` stands in for it where the tokenizer has no chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    plain: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


Record = Messages | PromptCompletion | Tokens | Passage | Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A preference row: the answer that is preferred and the one that is not, each with its prompt."""

    chosen: Record
    rejected: Record


AnyRecord = Record | Pair

Shapes = Mapping[tuple[str, ...], Callable[[dict[str, Any]], tuple[str, AnyRecord]]]
"""By the keys that a row must have: makes the name of the shape and the normal form of the row. Raises RowFault."""

Also = Literal["text", "prompt"]
"""Rows that are read only where they are asked for: plain passages; prompts without an answer."""


# --- normal forms ---


def chat(
    record: dict[str, Any],
    messages: list[dict[str, Any]],
    respond_from: int = 0,
    plain: PromptCompletion | None = None,
) -> Messages:
    """A chat of these messages. Raises RowFault where none from `respond_from` on responds, or one is empty."""
    made = Messages(
        messages=unmarked(messages),
        tools=tools_of(record),
        respond_from=respond_from,
        plain=plain,
        template_kwargs=kwargs_of(record),
        context=frozenset(i for i, message in enumerate(messages) if message.get(OFF) == 0),
    )
    answers = [made.messages[i] for i in made.responding()]
    if not answers and made.context:
        raise RowFault("marked_off", "every answer is marked off (weight, train, loss or trainable): nothing responds")
    if not answers:
        raise RowFault("no_response", "no message of the assistant: nothing responds")
    if any(not message.get("content", "").strip() and not message.get("tool_calls") for message in answers):
        raise RowFault("no_response", "a message of the assistant is empty: it has no content and no tool_calls")
    return made


def tokens_of(record: dict[str, Any], prefix: str = "") -> Tokens:
    """The tokens and labels under the keys of that prefix, without padding. Raises RowFault.

    Where there are no labels every token is its own; those do not respond that a mask leaves out.
    """
    names = f"{prefix}input_ids", f"{prefix}labels"
    tokens = integers(record, names[0])
    labels = tokens if record.get(names[1]) is None else integers(record, names[1])
    if len(tokens) != len(labels):
        message = f"{len(tokens)} {names[0]} and {len(labels)} {names[1]}; they must pair up"
        raise RowFault("length_mismatch", message)
    out, masks = masked_out(record, prefix, len(tokens))
    own = own_tokens(record, prefix, len(tokens))
    tokens, labels, first = tokens[own], labels[own], own.start
    if tokens and not (min(tokens) >= 0 and max(tokens) < 2**31):
        i = next(i for i, token in enumerate(tokens) if not 0 <= token < 2**31)
        raise RowFault("token_out_of_range", f"{names[0]}[{first + i}] is {tokens[i]}; it must be from 0 to 2^31 - 1")
    pairs = enumerate(zip(tokens, labels, strict=True))
    if mislabelled := [i for i, (token, label) in pairs if label not in (IGNORE_INDEX, token)]:
        i = mislabelled[0]
        found = f"{names[1]}[{first + i}] is {labels[i]}"
        must = f"it must be -100 or {names[0]}[{first + i}], {tokens[i]}, not shifted"
        raise RowFault("label_mismatch", f"{found}; {must}")
    labels = [IGNORE_INDEX if off else label for off, label in zip(out[own], labels, strict=True)] if out else labels
    if all(label == IGNORE_INDEX for label in labels[1:]):
        by = "".join(f", or left out by {name}" for name in masks)
        raise RowFault("no_response", f"all {names[1]} after the first are -100{by}: nothing responds")
    return Tokens(input_ids=tokens, labels=[IGNORE_INDEX, *labels[1:]])


# --- shapes ---


def _from_messages(record: dict[str, Any]) -> tuple[str, Record]:
    return "messages", chat(record, with_system(record, messages_of(record, "messages")))


def _from_conversations(record: dict[str, Any]) -> tuple[str, Record]:
    return "messages", chat(record, with_system(record, messages_of(record, "conversations")))


def _from_prompt_completion(record: dict[str, Any]) -> tuple[str, Record]:
    if isinstance(record["prompt"], list) or isinstance(record["completion"], list):
        return _from_turns(record, "completion")
    prompt, completion = text_of(record, "prompt"), text_of(record, "completion")
    if not completion.strip():
        raise RowFault("no_response", "completion is empty: nothing responds")
    if system_of(record).strip():
        message = (
            "a system text beside prompt + completion, text that continues text: put it into the prompt, or make a"
        )
        raise RowFault("ambiguous_shape", f"{message} chat of the row by --map completion=response")
    return "prompt_completion", PromptCompletion(prompt=prompt, completion=completion)


def _from_prompt_response(record: dict[str, Any]) -> tuple[str, Record]:
    if isinstance(record["prompt"], list) or isinstance(record["response"], list):
        return _from_turns(record, "response")
    return _from_texts(record, text_of(record, "prompt"), text_of(record, "response"))


def _from_instruction(record: dict[str, Any]) -> tuple[str, Record]:
    return _from_texts(record, instruction_of(record), text_of(record, "output"))


def instruction_of(record: dict[str, Any]) -> str:
    """The instruction of a row, and its `input` behind it. Raises RowFault."""
    extra = text_of(record, "input") if record.get("input") is not None else ""
    return "\n\n".join(part for part in (text_of(record, "instruction"), extra) if part)


def _from_texts(record: dict[str, Any], question: str, answer: str) -> tuple[str, Record]:
    return "messages", chat(record, [*asked(record, question), said("assistant", answer)])


def asked(record: dict[str, Any], question: str) -> list[dict[str, Any]]:
    """The row's system text, the turns of its `history`, and a question."""
    return with_system(record, [*history_of(record), said("user", question)])


def _from_turns(record: dict[str, Any], key: str) -> tuple[str, Record]:
    """Messages that answer messages; one of both may be text, the user's or the assistant's."""
    both = {
        name: [said(role, record[name])] if isinstance(record[name], str) else messages_of(record, name)
        for name, role in (("prompt", "user"), (key, "assistant"))
    }
    before = with_system(record, both["prompt"])
    return "messages", chat(record, before + both[key], respond_from=len(before))


def _from_tokens(record: dict[str, Any]) -> tuple[str, Record]:
    return "tokens", tokens_of(record)


def _from_text(record: dict[str, Any]) -> tuple[str, Record]:
    if not text_of(record, "text").strip():
        raise RowFault("no_response", "text is empty: nothing responds")
    return "text", Passage(text=record["text"])


def _from_prompt(record: dict[str, Any]) -> tuple[str, Record]:
    if isinstance(record["prompt"], list):
        return _open_chat(record, with_system(record, messages_of(record, "prompt")))
    text = text_of(record, "prompt")
    if not text.strip():
        raise RowFault("no_prompt", "prompt is empty")
    plain = None if system_of(record) else text
    messages = with_system(record, [said("user", text)])
    return "prompt", Prompt(messages=messages, tools=tools_of(record), plain=plain, template_kwargs=kwargs_of(record))


def _from_open_messages(record: dict[str, Any]) -> tuple[str, Record]:
    messages = messages_of(record, "messages")
    is_answered = messages[-1]["role"] == "assistant"
    return _from_messages(record) if is_answered else _open_chat(record, with_system(record, messages))


def _from_open_conversations(record: dict[str, Any]) -> tuple[str, Record]:
    messages = messages_of(record, "conversations")
    is_answered = messages[-1]["role"] == "assistant"
    return _from_conversations(record) if is_answered else _open_chat(record, with_system(record, messages))


def _open_chat(record: dict[str, Any], messages: list[dict[str, Any]]) -> tuple[str, Record]:
    if messages[-1]["role"] == "assistant":
        raise RowFault("no_prompt", "the last message is the assistant's; a prompt ends with what it is to answer")
    open_chat = unmarked(messages)
    return "prompt", Prompt(messages=open_chat, tools=tools_of(record), template_kwargs=kwargs_of(record))


SFT: Shapes = {
    ("messages",): _from_messages,
    ("conversations",): _from_conversations,
    ("prompt", "completion"): _from_prompt_completion,
    ("prompt", "response"): _from_prompt_response,
    ("instruction", "output"): _from_instruction,
    ("input_ids", "labels"): _from_tokens,
    **{("input_ids", mask): _from_tokens for mask in MASKED},
}
"""Rows with one answer."""

OPEN: Shapes = {("messages",): _from_open_messages, ("conversations",): _from_open_conversations}
"""Of these shapes those that are read otherwise where prompts are asked for: chats that wait for an answer."""

SIDE: Mapping[Also, Shapes] = {"text": {("text",): _from_text}, "prompt": {("prompt",): _from_prompt}}
"""Rows that are read where they are asked for and are of no other shape."""
