"""What the fields of a row hold: text, messages, tools, settings of the template; but for text, also as JSON text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from alphatoken_curate.rows.containers import RowFault, parse_json
from alphatoken_curate.rows.files import visible
from alphatoken_curate.rows.marks import OFF, without_marks

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have."""

TEMPLATE_RESERVED = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
    *("sanitize_control_tokens", "conversations", "self"),
}
"""What a chat template is told by the rows, and transformers by us, and no setting of a template may name."""

_OTHER_ROLES = {
    **{"human": "user", "gpt": "assistant", "model": "assistant"},
    **dict.fromkeys(("function", "observation", "tool_response"), "tool"),
}
"""Roles by the names that ShareGPT, Gemini, OpenAI's functions and ms-swift have for them."""

_CALLERS = ("function_call", "tool_call")
"""Roles of an answer that is nothing but calls, as JSON (LLaMA-Factory, ms-swift)."""

_MESSAGE = (("role", "content"), ("from", "value"), ("role", "tool_calls"))
"""Keys of which a message has those of one entry."""

BRANCHES = ("chosen", "rejected")
"""Names of the branches of a pair, in the order of the fields of Pair."""

REJECTED = "rejected_response"
"""The key of what stands in for a row's answer in the other branch (ms-swift)."""

SYSTEM = ("system", "system_prompt")
"""Keys of a row that hold the text of its system message."""

Message = dict[str, Any]


class _Call(Message):
    """A message that is nothing but calls, by its role."""


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


def said(role: str, content: str) -> Message:
    """A message."""
    return {"role": role, "content": content}


def messages_of(record: dict[str, Any], key: str) -> list[Message]:
    """The messages under a key, at least one; `OFF` is 0 in one that is marked off. Raises RowFault."""
    value = record[key]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = unpacked(key, value, "no JSON")
    value = _of_columns(value)
    if not isinstance(value, list):
        raise wrong(key, "a list of messages", value)
    if not value:
        raise RowFault("no_response", f"{key} is an empty list")
    return _joined(_message(f"{key}[{i}]", entry) for i, entry in enumerate(value))


def _of_columns(value: Any) -> Any:
    """Messages that stand as a list for each of their keys, as `datasets` stores a sequence of objects; else as is."""
    if not _has_keys(value):
        return value
    columns = {key: column for key, column in value.items() if column is not None}
    if not all(isinstance(column, list) for column in columns.values()) or len({*map(len, columns.values())}) != 1:
        return value
    return [dict(zip(columns, entry, strict=True)) for entry in zip(*columns.values(), strict=True)]


def is_message(value: Any) -> bool:
    """Whether it is one message, and no list of them in whatever form."""
    return _has_keys(value) and _of_columns(value) is value


def _has_keys(value: Any) -> bool:
    """Whether it is an object with the keys of a message."""
    return isinstance(value, dict) and any({*keys} <= value.keys() for keys in _MESSAGE)


def with_chats(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The record of a shape, where what may be text or messages is messages, if it is those as JSON text.

    An answer beside a prompt that is text is text, whatever it looks like; both of a pair are messages, or none is.
    """
    asked = "prompt" in keys or keys == BRANCHES
    made = record | ({"prompt": chat} if asked and (chat := chat_of(record.get("prompt"))) is not None else {})
    answers = {key: chat_of(record[key]) for key in keys if key in (*BRANCHES, "completion", "response", REJECTED)}
    is_pair = "prompt" not in keys
    if any(chat is None for chat in answers.values()) or not (is_pair or isinstance(made["prompt"], list)):
        return made
    return made | answers


def chat_of(value: Any) -> list[Any] | None:
    """A list as it is, or the messages that JSON text, or a list for each key of them, is; None for what is neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value.strip().encode())
        except RowFault:
            return None
        if not all(map(_has_keys, value)):
            return None
        return value or None
    value = _of_columns(value)
    return value if isinstance(value, list) else None


def _joined(messages: Iterable[Message]) -> list[Message]:
    """Messages, where calls that had one of their own stand in that of the answer before them: they are one turn."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else {}
        if isinstance(message, _Call) and before.get("role") == "assistant" and message.get(OFF) == before.get(OFF):
            calls: list[Any] = before.get("tool_calls", [])
            joined[-1] = {**before, "tool_calls": [*calls, *message["tool_calls"]]}
        else:
            joined.append(dict(message))
    return joined


def _message(name: str, entry: Any) -> Message:
    """One message with the keys `role` and `content` first; other keys are kept for the template, null ones are not."""
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        entry = unpacked(name, entry, "no JSON")
    if not isinstance(entry, dict):
        raise wrong(name, "an object with role and content", entry)
    sharegpt = "from" in entry and "role" not in entry
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = entry.get(role_key)
    calls = isinstance(role, str) and role in _CALLERS
    role = "assistant" if calls else _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        known = ", ".join((*ROLES, *_OTHER_ROLES, *_CALLERS))
        raise RowFault("unknown_role", f"{name}.{role_key} is {visible(repr(role), 40)}; it must be one of {known}")
    entry, off = without_marks(name, entry, role)
    others = {key: item for key, item in entry.items() if item is not None and key not in (role_key, content_key)}
    if "tool_calls" in others:
        others["tool_calls"] = _calls(f"{name}.tool_calls", others["tool_calls"])
    if role == "assistant" and "function_call" in others:
        others = _with_call(name, others)
    others |= {OFF: 0} if off and role == "assistant" else {}
    content = entry.get(content_key)
    if calls and others.get("tool_calls"):
        raise RowFault("wrong_type", f"{name} is a call by its {role_key} and has tool_calls too; leave one of them")
    if calls:
        return _Call({"role": role, **others, "tool_calls": _own_calls(f"{name}.{content_key}", content)})
    if content is None and role == "assistant" and others.get("tool_calls"):
        return {"role": role, **others}
    if content is None and role == "assistant" and others.get("refusal"):
        raise RowFault("wrong_type", f"{name}.{content_key} is null beside a refusal; give what was said as content")
    return {"role": role, "content": _content(f"{name}.{content_key}", content, role), **others}


def _own_calls(name: str, value: Any) -> list[dict[str, Any]]:
    """The calls that a message's content is: an object or a list of them, or that as JSON text. Raises RowFault."""
    found = unpacked(name, value, "no JSON, as calls are")
    calls = _calls(name, found if isinstance(found, list) else [found])
    for i, call in enumerate(calls):
        if not isinstance((call.get("function") or call).get("name"), str):
            raise RowFault("wrong_type", f"{name}: call {i} has no name; it must be an object with name and arguments")
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def _calls(name: str, value: Any) -> list[dict[str, Any]]:
    """Calls as objects, where they, or the list of them, are JSON as text. Raises RowFault for what is none."""
    calls = unpacked(name, value, "no JSON") or []
    if not isinstance(calls, list):
        raise wrong(name, "a list of calls", calls)
    calls = [unpacked(f"{name}[{i}]", call, "no JSON") for i, call in enumerate(calls)]
    for i, call in enumerate(calls):
        if not isinstance(call, dict):
            raise wrong(f"{name}[{i}]", "an object", call)
        if call.get("function") is not None and not isinstance(call["function"], dict):
            raise wrong(f"{name}[{i}].function", "an object", call["function"])
    return calls


def _with_call(name: str, others: Message) -> Message:
    """The keys of an answer with its `function_call`, OpenAI's before there were several, as its one call."""
    kept = {key: item for key, item in others.items() if key != "function_call"}
    call = unpacked(f"{name}.function_call", others["function_call"], "no JSON")
    if not call and call in ("", {}):
        return kept
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise wrong(f"{name}.function_call", "an object with a name", call)
    if not kept.get("tool_calls"):
        return kept | {"tool_calls": [{"type": "function", "function": call}]}
    if [one.get("function") for one in kept["tool_calls"]] != [call]:
        raise RowFault("wrong_type", f"{name} has function_call and tool_calls, which differ; leave one of them")
    return kept


def _content(name: str, value: Any, role: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and "token_ids" in value:
        raise RowFault("wrong_type", f"{name} holds token_ids, as an export for ms-swift does; only text is read")
    if not isinstance(value, list):
        raise wrong(name, "text", value)
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowFault("wrong_type", f"{name} has a part that is not text; only text is read")
        if without_marks(f"{name}[{i}]", part, role)[1] and role == "assistant":
            message = f"{name}[{i}] is marked off; an answer trains whole here: mark the message, or split it"
            raise RowFault("message_weight", message)
    return "".join(part["text"] for part in value)


def unmarked(messages: list[Message]) -> list[Message]:
    """The messages without what says which are marked off."""
    if not any(OFF in message for message in messages):
        return messages
    return [{key: item for key, item in message.items() if key != OFF} for message in messages]


def system_of(record: dict[str, Any]) -> str:
    """The system text of the row itself, empty where it has none. Raises RowFault."""
    given = {key: text_of(record, key) for key in SYSTEM if record.get(key)}
    if len({" ".join(text.split()) for text in given.values()}) > 1:
        raise RowFault("ambiguous_shape", f"{' and '.join(given)} are different texts; leave one of them")
    return next(iter(given.values()), "")


def with_system(record: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The messages behind the row's system text, where it has one. Raises RowFault where they begin with another."""
    text = system_of(record)
    if not text:
        return messages
    if messages[0]["role"] != "system":
        return [said("system", text), *messages]
    if " ".join(text.split()) not in " ".join(messages[0]["content"].split()):
        message = "the row's system text is not that of the system message it begins with; leave one of them"
        raise RowFault("ambiguous_shape", message)
    return messages


def history_of(record: dict[str, Any]) -> list[Message]:
    """The earlier turns under `history`, as Alpaca has them: pairs of what was asked and answered. Raises RowFault."""
    found = unpacked("history", record.get("history"), "no JSON list")
    if found is None or found in ([], ""):
        return []
    pairs = found if isinstance(found, list) else [found]
    if not all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs):
        raise wrong("history", "a list of pairs of text, what was asked and what was answered", found)
    return [message for asked, answer in pairs for message in (said("user", asked), said("assistant", answer))]


def unpacked(name: str, value: Any, unless: str) -> Any:
    """A value as it is, or of the JSON that it is as text, as columnar files hold it. Raises RowFault."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_json(value.encode())
    except RowFault as fault:
        raise RowFault("wrong_type", f"{name} is text that is {unless}: {fault.message}") from None


def tools_of(record: dict[str, Any]) -> list[Any] | None:
    """Tools for the template: a list of objects; it, or each of them, may be JSON as text. Raises RowFault."""
    tools, functions = _tools(record), _functions(record.get("functions"))
    if tools and functions and tools not in (functions, [one["function"] for one in functions]):
        raise RowFault("wrong_type", "the row has tools and functions, which differ; leave one of them")
    return tools or functions or None


def _tools(record: dict[str, Any]) -> list[Any] | None:
    tools = unpacked("tools", record.get("tools"), "not a JSON list")
    if not tools and tools in (None, [], ""):
        return None
    if isinstance(tools, list):
        tools = [unpacked(f"tools[{i}]", tool, "no JSON") for i, tool in enumerate(tools)]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong("tools", "a list of objects", tools)
    return tools


def _functions(value: Any) -> list[Any]:
    """OpenAI's `functions` as tools, where they are such: other columns may have that name."""
    try:
        found = unpacked("functions", value, "no JSON")
        found = [unpacked("functions", one, "no JSON") for one in found] if isinstance(found, list) else []
    except RowFault:
        return []
    named = all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found)
    return [{"type": "function", "function": one} for one in found] if named else []


def kwargs_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the row tells the chat template besides, as TRL reads it: an object, or that object as JSON text."""
    given = unpacked("chat_template_kwargs", record.get("chat_template_kwargs"), "no JSON")
    if given is None or given == "":
        return {}
    if not isinstance(given, dict):
        raise wrong("chat_template_kwargs", "an object", given)
    if taken := sorted(TEMPLATE_RESERVED & set(given)):
        raise RowFault("wrong_type", f"chat_template_kwargs names {taken[0]}, which is not the row's to set")
    return {name: item for name, item in given.items() if item is not None}
