"""JSON documents of a run: sealed when they are written; when read, every byte, each key and type is checked."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import orjson

from alphatoken_curate.runs.fingerprint import Json, fingerprint

T = TypeVar("T")

SEAL = "seal"
"""The key that holds the fingerprint of all others. Documents of early releases have none."""


class Unreadable(ValueError):
    """A document that is not as it was written, or no document of its kind; it says where and what."""


def sealed(document: Mapping[str, Json]) -> bytes:
    """The document with its seal: sorted keys, indented, a newline at the end."""
    return _written({**document, SEAL: fingerprint(document)})


def unsealed(content: bytes) -> dict[str, Json]:
    """What `sealed` was given. Raises `Unreadable` where a byte is not as it was written, if it has a seal."""
    try:
        found = orjson.loads(content)
        if not isinstance(found, dict):
            raise Unreadable("it is not an object")
        document = {name: value for name, value in found.items() if name != SEAL}
        # Bytes are compared too: the same JSON can be written in others.
        if SEAL in found and (found[SEAL] != fingerprint(document) or _written(found) != content):
            raise Unreadable("it is not as it was written")
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        raise Unreadable(str(error)) from error
    return document


def _written(document: Mapping[str, Json]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def decode(kind: type[T], value: object) -> T:
    """JSON as orjson reads it -> a dataclass, each key and type checked. Raises `Unreadable`."""
    return typing.cast("T", _decode(kind, value, ""))


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _decode_object(typing.cast("type[Any]", kind), value, where)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return value if value is None else _decode(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if type(value) is kind and (kind is not int or 0 <= value < 1 << 63):
        return value
    raise Unreadable(f"{where or 'it'} is {str(value)[:80]!r}, not {getattr(kind, '__name__', kind)}")


def _decode_object(kind: type[Any], value: Any, where: str) -> Any:
    hints = _hints(kind)
    if not isinstance(value, dict):
        raise Unreadable(f"{where or 'it'} is not an object")
    # What earlier releases did not write has a field that is None by default.
    value = {item.name: None for item in fields(kind) if item.default is None} | value
    if odd := sorted(value.keys() ^ hints.keys()):
        verb = "has an unknown" if odd[0] in value else "lacks the"
        raise Unreadable(f"{where or 'it'} {verb} key {odd[0][:80]!r}")
    return kind(**{name: _decode(hint, value[name], f"{where}.{name}".lstrip(".")) for name, hint in hints.items()})


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Field -> type; `Json` stands for anything, which `Any` says here."""
    found = typing.get_type_hints(kind, localns={"Json": Any})
    return {item.name: found[item.name] for item in fields(kind)}
