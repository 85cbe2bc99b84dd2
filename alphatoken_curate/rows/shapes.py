"""Normal forms of a row, and how rows of one answer become one of them.

Which keys are read is told in `rows`; preference rows are put together in `pairs` from what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alphatoken_curate.rows.containers import RowFault, parse_json
from alphatoken_curate.rows.files import visible
from alphatoken_curate.runs.schema import IGNORE_INDEX

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have."""

TEMPLATE_RESERVED = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""What a chat template is told by the rows, and transformers by us, and no setting of a template may name."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}


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


# --- fields ---


def wrong(name: str, wanted: str, value: Any) -> RowFault:
    """The fault of a value that is of another type than `wanted`."""
    return RowFault("wrong_type", f"{name} is {_kind(value)}; it must be {wanted}")


def _kind(value: Any) -> str:
    names = {str: "text", bool: "a boolean", int: "an integer", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def text_of(record: dict[str, Any], key: str) -> str:
    """The text under a key. Raises RowFault."""
    value = record[key]
    if not isinstance(value, str):
        raise wrong(key, "text", value)
    return value


def said(role: str, content: str) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content}


def messages_of(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The messages under a key, at least one. Raises RowFault."""
    value = record[key]
    if not isinstance(value, list):
        raise wrong(key, "a list of messages", value)
    if not value:
        raise RowFault("no_response", f"{key} is an empty list")
    return [_message(f"{key}[{i}]", entry) for i, entry in enumerate(value)]


def _message(name: str, entry: Any) -> dict[str, Any]:
    """One message with the keys `role` and `content` first; other keys are kept for the template, null ones are not."""
    if not isinstance(entry, dict):
        raise wrong(name, "an object with role and content", entry)
    sharegpt = "from" in entry and "role" not in entry
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = entry.get(role_key)
    if sharegpt and isinstance(role, str):
        role = _SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:
        known = ", ".join(ROLES + tuple(_SHAREGPT_ROLES) if sharegpt else ROLES)
        raise RowFault("unknown_role", f"{name}.{role_key} is {visible(repr(role), 40)}; it must be one of {known}")
    others = {key: item for key, item in entry.items() if item is not None and key not in (role_key, content_key)}
    content = entry.get(content_key)
    if content is None and role == "assistant" and others.get("tool_calls"):
        return {"role": role, **others}
    return {"role": role, "content": _content(f"{name}.{content_key}", content), **others}


def _content(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(name, "text", value)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowFault("wrong_type", f"{name} has a part that is not text; only text is read")
    return "".join(part["text"] for part in value)


def with_system(record: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages behind the row's `system` text, where it has one and they do not begin with their own."""
    if not record.get("system") or messages[0]["role"] == "system":
        return messages
    return [said("system", text_of(record, "system")), *messages]


def _unpacked(record: dict[str, Any], name: str, unless: str) -> Any:
    """A value as it is, or of the JSON that it is as text, as columnar files hold it."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_json(value.encode())
    except RowFault as fault:
        raise RowFault("wrong_type", f"{name} is text that is {unless}: {fault.message}") from None


def tools_of(record: dict[str, Any]) -> list[Any] | None:
    """Tools for the template: a list of objects, or that list as JSON text, as columnar files hold it."""
    tools = _unpacked(record, "tools", "not a JSON list")
    if not tools and tools in (None, [], ""):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong("tools", "a list of objects", tools)
    return tools


def kwargs_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the row tells the chat template besides, as TRL reads it: an object, or that object as JSON text."""
    given = _unpacked(record, "chat_template_kwargs", "no JSON")
    if given is None or given == "":
        return {}
    if not isinstance(given, dict):
        raise wrong("chat_template_kwargs", "an object", given)
    if taken := sorted(TEMPLATE_RESERVED & set(given)):
        raise RowFault("wrong_type", f"chat_template_kwargs names {taken[0]}, which is not the row's to set")
    return {name: item for name, item in given.items() if item is not None}


def chat(
    record: dict[str, Any],
    messages: list[dict[str, Any]],
    respond_from: int = 0,
    plain: PromptCompletion | None = None,
) -> Messages:
    """A chat of these messages. Raises RowFault where none from `respond_from` on is an answer, or one is empty."""
    answers = [message for message in messages[respond_from:] if message["role"] == "assistant"]
    if not answers:
        raise RowFault("no_response", "no message of the assistant: nothing responds")
    if any(not message.get("content", "").strip() and not message.get("tool_calls") for message in answers):
        raise RowFault("no_response", "a message of the assistant is empty: it has no content and no tool_calls")
    return Messages(
        messages=messages,
        tools=tools_of(record),
        respond_from=respond_from,
        plain=plain,
        template_kwargs=kwargs_of(record),
    )


def tokens_of(record: dict[str, Any], prefix: str = "") -> Tokens:
    """The tokens and labels under the keys of that prefix. Raises RowFault."""
    names = f"{prefix}input_ids", f"{prefix}labels"
    tokens, labels = (_integers(record, name) for name in names)
    if len(tokens) != len(labels):
        message = f"{len(tokens)} {names[0]} and {len(labels)} {names[1]}; they must pair up"
        raise RowFault("length_mismatch", message)
    if tokens and not (min(tokens) >= 0 and max(tokens) < 2**31):
        i = next(i for i, token in enumerate(tokens) if not 0 <= token < 2**31)
        raise RowFault("token_out_of_range", f"{names[0]}[{i}] is {tokens[i]}; it must be from 0 to 2^31 - 1")
    pairs = enumerate(zip(tokens, labels, strict=True))
    if mislabelled := [i for i, (token, label) in pairs if label not in (IGNORE_INDEX, token)]:
        i = mislabelled[0]
        found = f"{names[1]}[{i}] is {labels[i]}"
        raise RowFault("label_mismatch", f"{found}; it must be -100 or {names[0]}[{i}], {tokens[i]}, not shifted")
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise RowFault("no_response", f"all {names[1]} after the first are -100: nothing responds")
    return Tokens(input_ids=tokens, labels=[IGNORE_INDEX, *labels[1:]])


def _integers(record: dict[str, Any], key: str) -> list[int]:
    value = record[key]
    if not isinstance(value, list):
        raise wrong(key, "a list of integers", value)
    if not set(map(type, value)) <= {int}:
        i = next(i for i, item in enumerate(value) if type(item) is not int)
        raise wrong(f"{key}[{i}]", "an integer", value[i])
    return value


# --- shapes ---


def _from_messages(record: dict[str, Any]) -> tuple[str, Record]:
    return "messages", chat(record, messages_of(record, "messages"))


def _from_conversations(record: dict[str, Any]) -> tuple[str, Record]:
    return "messages", chat(record, with_system(record, messages_of(record, "conversations")))


def _from_prompt_completion(record: dict[str, Any]) -> tuple[str, Record]:
    if isinstance(record["prompt"], list) or isinstance(record["completion"], list):
        return _from_two_lists(record, "completion")
    prompt, completion = text_of(record, "prompt"), text_of(record, "completion")
    if not completion.strip():
        raise RowFault("no_response", "completion is empty: nothing responds")
    return "prompt_completion", PromptCompletion(prompt=prompt, completion=completion)


def _from_prompt_response(record: dict[str, Any]) -> tuple[str, Record]:
    if isinstance(record["prompt"], list) or isinstance(record["response"], list):
        return _from_two_lists(record, "response")
    return _from_texts(record, text_of(record, "prompt"), text_of(record, "response"))


def _from_instruction(record: dict[str, Any]) -> tuple[str, Record]:
    instruction, answer = text_of(record, "instruction"), text_of(record, "output")
    extra = text_of(record, "input") if record.get("input") is not None else ""
    return _from_texts(record, f"{instruction}\n\n{extra}" if extra else instruction, answer)


def _from_texts(record: dict[str, Any], question: str, answer: str) -> tuple[str, Record]:
    return "messages", chat(record, with_system(record, [said("user", question), said("assistant", answer)]))


def _from_two_lists(record: dict[str, Any], key: str) -> tuple[str, Record]:
    for name in ("prompt", key):
        if not isinstance(record[name], list):
            raise wrong(name, "a list of messages, as the other one is", record[name])
    before, after = with_system(record, messages_of(record, "prompt")), messages_of(record, key)
    return "messages", chat(record, before + after, respond_from=len(before))


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
    plain = None if record.get("system") else text
    messages = with_system(record, [said("user", text)])
    return "prompt", Prompt(messages=messages, tools=tools_of(record), plain=plain, template_kwargs=kwargs_of(record))


def _from_open_messages(record: dict[str, Any]) -> tuple[str, Record]:
    messages = messages_of(record, "messages")
    is_answered = messages[-1]["role"] == "assistant"
    return _from_messages(record) if is_answered else _open_chat(record, messages)


def _from_open_conversations(record: dict[str, Any]) -> tuple[str, Record]:
    messages = messages_of(record, "conversations")
    is_answered = messages[-1]["role"] == "assistant"
    return _from_conversations(record) if is_answered else _open_chat(record, with_system(record, messages))


def _open_chat(record: dict[str, Any], messages: list[dict[str, Any]]) -> tuple[str, Record]:
    if messages[-1]["role"] == "assistant":
        raise RowFault("no_prompt", "the last message is the assistant's; a prompt ends with what it is to answer")
    return "prompt", Prompt(messages=messages, tools=tools_of(record), template_kwargs=kwargs_of(record))


SFT: Shapes = {
    ("messages",): _from_messages,
    ("conversations",): _from_conversations,
    ("prompt", "completion"): _from_prompt_completion,
    ("prompt", "response"): _from_prompt_response,
    ("instruction", "output"): _from_instruction,
    ("input_ids", "labels"): _from_tokens,
}
"""Rows with one answer."""

OPEN: Shapes = {("messages",): _from_open_messages, ("conversations",): _from_open_conversations}
"""Of these shapes those that are read otherwise where prompts are asked for: chats that wait for an answer."""

SIDE: Mapping[Also, Shapes] = {"text": {("text",): _from_text}, "prompt": {("prompt",): _from_prompt}}
"""Rows that are read where they are asked for and are of no other shape."""
