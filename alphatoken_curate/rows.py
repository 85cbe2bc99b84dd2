"""Read every row into one of three normal forms, setting bad ones aside.

Shapes, found by their keys (others are left alone, except `id`, `tools` and, for chats not made of `messages`, a
`system` text that becomes the first message):

| keys | becomes |
|---|---|
| `messages` | Messages: every assistant turn responds |
| `conversations` (ShareGPT `from`/`value`, or `role`/`content`) | Messages |
| `prompt` + `completion`, both text | PromptCompletion: the completion continues the prompt, no chat template |
| `prompt` + `response`, both text | Messages: one user turn, one assistant turn |
| `prompt` + `completion` or `response`, both lists of messages | Messages; only the turns of the second list respond |
| `instruction` (+ `input`) + `output` | Messages; `input` follows the instruction after a blank line |
| `input_ids` + `labels` | Tokens |

`labels` are aligned with `input_ids`: each is -100 or the token at the same index. Nothing predicts token 0, so its
label is taken as -100. A row of no shape, or of two, is a bad row; so is one without an answer. Preference rows
(`chosen`, `rejected`) are not read by this version.

Bad rows are collected, never raised one by one, and take up a `row_id` like any other: nothing shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alphatoken_curate.containers import Meter, RawRow, RowFault, parse_json, raw_rows
from alphatoken_curate.errors import InputError
from alphatoken_curate.files import find_files, visible
from alphatoken_curate.schema import IGNORE_INDEX

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """A chat, told by a chat template; assistant turns from index `respond_from` on respond."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    respond_from: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCompletion:
    """Raw text that continues raw text."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens as they are: `labels[i]` is `input_ids[i]` where token i responds, else -100."""

    input_ids: list[int]
    labels: list[int]


Record = Messages | PromptCompletion | Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A usable row. `row_id`: its place among all rows read, bad ones counted, from 0. `line`: from 1."""

    row_id: int
    source: str
    line: int
    id: str | None
    shape: str
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be used: where it is, a short `reason` code, a sentence, and its first characters."""

    row_id: int
    source: str
    line: int
    reason: str
    message: str
    excerpt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file as read. `digest`: sha256 of its bytes as stored (of a Hub dataset: of its rows as JSON lines)."""

    path: str
    source: str
    digest: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRows:
    """All that was read, in reading order; `len(rows) + len(bad)` rows were read."""

    rows: list[Row]
    bad: list[BadRow]
    files: list[InputFile]


def read_rows(data: Sequence[str]) -> ReadRows:
    """Read every row that `data` names (see `find_files`).

    Raises InputError where nothing is found, a file is torn or is not what it should be, or there is no row at all.
    """
    result = ReadRows(rows=[], bad=[], files=[])
    for file in find_files(data):
        meter = Meter(file)
        _sort(raw_rows(file, meter, _KEYS), file.source, result)
        digest, size = meter.digest, meter.stored_bytes
        result.files.append(InputFile(path=file.path, source=file.source, digest=digest, bytes=size))
    if not result.rows and not result.bad:
        raise InputError(f"No row in {', '.join(visible(file.path) for file in result.files[:20])}. Name other data.")
    return result


def rows_of(records: Sequence[Mapping[str, Any]], source: str) -> ReadRows:
    """Rows that are in memory already, read as those of a file `source` would be, one a line."""
    result = ReadRows(rows=[], bad=[], files=[])
    _sort((RawRow(line, dict(record), record) for line, record in enumerate(records, 1)), source, result)
    return result


def _sort(raws: Iterable[RawRow], source: str, result: ReadRows) -> None:
    """Put each row with the good or the bad ones of `result`."""
    for raw in raws:
        row_id = len(result.rows) + len(result.bad)
        try:
            if isinstance(raw.record, RowFault):
                raise raw.record
            shape, record = normalise(raw.record)
            name = _id(raw.record)
            result.rows.append(Row(row_id=row_id, source=source, line=raw.line, id=name, shape=shape, record=record))
        except RowFault as fault:
            result.bad.append(
                BadRow(
                    row_id=row_id,
                    source=source,
                    line=raw.line,
                    reason=fault.reason,
                    message=fault.message,
                    excerpt=raw.excerpt,
                )
            )


def refuse(bad: Sequence[BadRow], limit: int = 20, *, can_quarantine: bool = True) -> InputError:
    """The error that names the first `limit` bad rows and counts the others; target rows cannot be set aside."""
    count = "1 row" if len(bad) == 1 else f"{len(bad)} rows"
    lines = [f"  {visible(row.source)}:{row.line}: {row.reason}: {row.message}" for row in bad[:limit]]
    if len(bad) > limit:
        lines.append(f"  and {len(bad) - limit} more")
    advice = "Correct them, or set them aside with --bad-rows quarantine, which lists them in rejects.jsonl."
    if not can_quarantine:
        advice = "Correct them. Rows of DATA can be set aside with --bad-rows quarantine, those of --target cannot."
    return InputError("\n".join([f"{count} cannot be used:", *lines, advice]))


# --- shapes ---


def normalise(record: dict[str, Any]) -> tuple[str, Record]:
    """The shape and normal form of one row as read. Raises RowFault."""
    given = {key for key, value in record.items() if value is not None}
    if {"chosen", "rejected"} <= given or {"chosen_input_ids", "rejected_input_ids"} <= given:
        raise RowFault("preference_row", "preference rows (chosen, rejected) are not read by this version")
    shapes = [keys for keys in _SHAPES if given.issuperset(keys)]
    if len(shapes) == 1:
        return _SHAPES[shapes[0]](record)
    found = visible(", ".join(record) or "none")
    known = "; ".join(" + ".join(keys) for keys in _SHAPES)
    if shapes:
        both = " and ".join(" + ".join(keys) for keys in shapes)
        raise RowFault("ambiguous_shape", f"the row has {both} at once (keys: {found}); leave one of them")
    for keys in _SHAPES:
        if record.keys() >= set(keys):
            empty = ", ".join(key for key in keys if record[key] is None)
            raise RowFault("null_field", f"{empty} is null; give it a value or drop the row")
    raise RowFault("unknown_shape", f"keys found: {found}; a row has one of: {known}")


def _id(record: dict[str, Any]) -> str | None:
    value = record.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _wrong("id", "text or an integer", value)
    return str(value)


def _wrong(name: str, wanted: str, value: Any) -> RowFault:
    return RowFault("wrong_type", f"{name} is {_kind(value)}; it must be {wanted}")


def _kind(value: Any) -> str:
    names = {str: "text", bool: "a boolean", int: "an integer", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _text(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise _wrong(key, "text", value)
    return value


def _from_messages(record: dict[str, Any]) -> tuple[str, Record]:
    return _chat(record, _messages("messages", record["messages"]))


def _from_conversations(record: dict[str, Any]) -> tuple[str, Record]:
    return _chat(record, _with_system(record, _messages("conversations", record["conversations"])))


def _from_prompt_completion(record: dict[str, Any]) -> tuple[str, Record]:
    if isinstance(record["prompt"], list) or isinstance(record["completion"], list):
        return _from_two_lists(record, "completion")
    prompt, completion = _text(record, "prompt"), _text(record, "completion")
    if not completion.strip():
        raise RowFault("no_response", "completion is empty: nothing responds")
    return "prompt_completion", PromptCompletion(prompt=prompt, completion=completion)


def _from_prompt_response(record: dict[str, Any]) -> tuple[str, Record]:
    if isinstance(record["prompt"], list) or isinstance(record["response"], list):
        return _from_two_lists(record, "response")
    return _from_texts(record, _text(record, "prompt"), _text(record, "response"))


def _from_instruction(record: dict[str, Any]) -> tuple[str, Record]:
    instruction, answer = _text(record, "instruction"), _text(record, "output")
    extra = _text(record, "input") if record.get("input") is not None else ""
    return _from_texts(record, f"{instruction}\n\n{extra}" if extra else instruction, answer)


def _from_texts(record: dict[str, Any], question: str, answer: str) -> tuple[str, Record]:
    turns: list[dict[str, Any]] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _chat(record, _with_system(record, turns))


def _from_two_lists(record: dict[str, Any], key: str) -> tuple[str, Record]:
    for name in ("prompt", key):
        if not isinstance(record[name], list):
            raise _wrong(name, "a list of messages, as the other one is", record[name])
    before, after = _with_system(record, _messages("prompt", record["prompt"])), _messages(key, record[key])
    return _chat(record, before + after, respond_from=len(before))


def _chat(record: dict[str, Any], messages: list[dict[str, Any]], respond_from: int = 0) -> tuple[str, Record]:
    answers = [message for message in messages[respond_from:] if message["role"] == "assistant"]
    if not answers:
        raise RowFault("no_response", "no message of the assistant: nothing responds")
    if any(not message.get("content", "").strip() and not message.get("tool_calls") for message in answers):
        raise RowFault("no_response", "a message of the assistant is empty: it has no content and no tool_calls")
    return "messages", Messages(messages=messages, tools=_tools(record.get("tools")), respond_from=respond_from)


def _tools(value: Any) -> list[Any] | None:
    """Tools for the template: a list of objects, or that list as JSON text, as columnar files hold it."""
    tools = value
    if isinstance(value, str) and value.strip():
        try:
            tools = parse_json(value.encode())
        except RowFault as fault:
            raise RowFault("wrong_type", f"tools is text that is not a JSON list: {fault.message}") from None
    if not tools and tools in (None, [], ""):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _wrong("tools", "a list of objects", tools)
    return tools


def _with_system(record: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not record.get("system") or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": _text(record, "system")}, *messages]


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _wrong(name, "a list of messages", value)
    if not value:
        raise RowFault("no_response", f"{name} is an empty list")
    return [_message(f"{name}[{i}]", entry) for i, entry in enumerate(value)]


def _message(name: str, entry: Any) -> dict[str, Any]:
    """One message with the keys `role` and `content` first; other keys are kept for the template, null ones are not."""
    if not isinstance(entry, dict):
        raise _wrong(name, "an object with role and content", entry)
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
        raise _wrong(name, "text", value)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowFault("wrong_type", f"{name} has a part that is not text; only text is read")
    return "".join(part["text"] for part in value)


def _from_tokens(record: dict[str, Any]) -> tuple[str, Record]:
    tokens, labels = _integers(record, "input_ids"), _integers(record, "labels")
    if len(tokens) != len(labels):
        raise RowFault("length_mismatch", f"{len(tokens)} input_ids and {len(labels)} labels; they must pair up")
    if tokens and not (min(tokens) >= 0 and max(tokens) < 2**31):
        i = next(i for i, token in enumerate(tokens) if not 0 <= token < 2**31)
        raise RowFault("token_out_of_range", f"input_ids[{i}] is {tokens[i]}; it must be from 0 to 2^31 - 1")
    pairs = enumerate(zip(tokens, labels, strict=True))
    if wrong := [i for i, (token, label) in pairs if label not in (IGNORE_INDEX, token)]:
        i = wrong[0]
        found = f"labels[{i}] is {labels[i]}"
        raise RowFault("label_mismatch", f"{found}; it must be -100 or input_ids[{i}], {tokens[i]}, not shifted")
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise RowFault("no_response", "every label after the first is -100: nothing responds")
    return "tokens", Tokens(input_ids=tokens, labels=[IGNORE_INDEX, *labels[1:]])


def _integers(record: dict[str, Any], key: str) -> list[int]:
    value = record[key]
    if not isinstance(value, list):
        raise _wrong(key, "a list of integers", value)
    if not set(map(type, value)) <= {int}:
        i = next(i for i, item in enumerate(value) if type(item) is not int)
        raise _wrong(f"{key}[{i}]", "an integer", value[i])
    return value


_SHAPES: dict[tuple[str, ...], Callable[[dict[str, Any]], tuple[str, Record]]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_conversations,
    ("prompt", "completion"): _from_prompt_completion,
    ("prompt", "response"): _from_prompt_response,
    ("instruction", "output"): _from_instruction,
    ("input_ids", "labels"): _from_tokens,
}

_KEYS = frozenset(key for keys in _SHAPES for key in keys) | {
    *("id", "tools", "system", "input", "chosen", "rejected", "chosen_input_ids", "rejected_input_ids")
}
