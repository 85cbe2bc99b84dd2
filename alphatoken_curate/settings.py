"""How a setting is read, by its kind: from a command line, from YAML and from Python alike."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import Field
from pathlib import Path
from typing import Any

from alphatoken_curate.errors import UsageError
from alphatoken_curate.urls import FILE_ADVICE, check_local, is_url

_MOST_YAML_BYTES = 1 << 24
"""As many as a run's own config.yaml has that was given all the files a command line can name."""

_MOST_YAML_VALUES, _MOST_YAML_DEPTH = 1 << 20, 100
"""So that what is read of them takes neither all memory nor for ever."""

_SURROGATE = b"\\uD"  # as YAML escapes a byte of a name that is no text

_DAY = re.compile(r"\d{4}-\d\d-\d\d")

_DEVICE = re.compile(r"auto|cpu|(cuda|mps|xpu|hpu|npu)(:\d+)?|(?P<kind>cuda|xpu|hpu|npu):\d+(,(?P=kind):\d+)+")


def load_settings(path: Path) -> dict[str, Any]:
    """A YAML file of settings, read strictly: a mapping of names to plain values, no tags, aliases or repeated keys."""
    import yaml

    check_local(path, FILE_ADVICE)
    try:
        if path.stat().st_size > _MOST_YAML_BYTES:
            raise UsageError(f"--config {path}: larger than {_MOST_YAML_BYTES} bytes, so not a config.")
        content = path.read_bytes()
        strict = _strict(content)
        _check_events(yaml.parse(content, Loader=strict))
        settings = yaml.load(content, Loader=strict)
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"--config {path}: not a config: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UsageError(f"--config {path}: not a mapping of settings to values.")
    return settings


def _check_events(events: Iterable[Any]) -> None:
    """Raise YAMLError for aliases, and for more than a config holds, before any of it is built."""
    import yaml

    depth = 0
    for n, event in enumerate(events):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read here")
        if n > _MOST_YAML_VALUES or depth > _MOST_YAML_DEPTH:
            raise yaml.YAMLError(f"more than {_MOST_YAML_VALUES} values, or {_MOST_YAML_DEPTH} in one another")


def _strict(content: bytes) -> Any:
    """The class that reads such YAML: a safe loader that refuses repeated keys, in C where yaml has one."""
    import yaml
    from yaml.constructor import SafeConstructor

    class Keys(SafeConstructor):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = (self.construct_object(key, deep=True) for key, _ in node.value)
            met = Counter(key for key in keys if isinstance(key, Hashable))  # others are refused below
            if twice := [str(key) for key, n in met.items() if n > 1]:
                raise yaml.YAMLError(f"the key {twice[0]!r} stands there twice")
            return super().construct_mapping(node, deep)

    # The one in C refuses such escapes, and config.yaml has them where the name of a file is not UTF-8.
    in_c = None if _SURROGATE in content else getattr(yaml, "CSafeLoader", None)
    return type("Strict", (Keys, in_c or yaml.SafeLoader), {})


def read_setting(field_: Field[Any], value: Any) -> Any:
    """One setting, as its kind takes it; strings are read as a command line gives them."""
    kind, choices = field_.metadata["kind"], field_.metadata["choices"]
    if value is None and field_.default is None:
        return None
    if kind in _LOCAL and isinstance(value, str) and is_url(value):
        check_local(value, f"--{field_.name.replace('_', '-')} takes no URL. {FILE_ADVICE}")
    try:
        read = _KINDS[kind](value)
    except (TypeError, ValueError):
        read = None
    if read is None or (choices and read not in choices):
        takes = ", ".join(choices) if choices else _TAKES[kind]
        hint = _meant(value) if kind == "keep" else ""
        raise UsageError(f"--{field_.name.replace('_', '-')} {value!r}: it takes {takes}.{hint}")
    if (bounds := field_.metadata["bounds"]) and not bounds[0] <= read <= bounds[1]:
        raise UsageError(
            f"--{field_.name.replace('_', '-')} {value!r}: it takes a number from {bounds[0]:g} to {bounds[1]:g};"
            " beyond, it leaves no effect, or nothing beside it."
        )
    return read


def _integer(value: Any, least: int) -> int | None:
    number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    return number if number is not None and least <= number < 1 << 63 else None


def _finite(value: Any) -> float | None:
    number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    return number if number is not None and math.isfinite(number) else None


def _positive(value: Any) -> float | None:
    number = _finite(value)
    return number if number is not None and number > 0 else None


def _generation(value: Any) -> str | None:
    """`latest`, `all`, or ascending numbers; a single one may be an integer, as YAML reads it."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if text in ("latest", "all"):
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        return None
    return ",".join(str(number) for number in sorted({int(part) for part in parts}))


def _keep(value: Any) -> float | str | None:
    if value == "positive":
        return "positive"
    share = _finite(value)
    return share if share is not None and 0 < share <= 1 else None


def _meant(value: Any) -> str:
    """What a share may have been meant by that was given in percent."""
    try:
        percent = _finite(str(value).removesuffix("%"))
    except ValueError:
        percent = None
    return f" Did you mean {percent / 100:g}?" if percent is not None and 1 < percent <= 100 else ""


def _scope(value: Any) -> str | None:
    if value in ("global", "row"):
        return str(value)
    word, _, rows = str(value).partition(":")
    return str(value) if word == "batch" and rows.isdecimal() and int(rows) > 0 else None


WEIGHTS = ("binary", "rank", "sigmoid", "relu")
"""`--weights` by their name alone; besides there is tilt:C."""

MOST_TILT = 100.0


def parse_weights(value: str) -> tuple[str, float | None] | None:
    """`relu` and None, or `tilt` and its number C above 0 and up to 100; None where it is neither."""
    if value in WEIGHTS:
        return value, None
    kind, _, text = value.partition(":")
    try:
        strength = _positive(text) if kind == "tilt" and text.isascii() else None
    except ValueError:
        strength = None
    return (kind, strength) if strength is not None and strength <= MOST_TILT else None


def _weights(value: Any) -> str | None:
    """In one form, so that tilt:.250 is the mask of tilt:0.25."""
    found = parse_weights(value) if isinstance(value, str) else None
    return found and (found[0] if found[1] is None else f"tilt:{str(found[1]).removesuffix('.0')}")


def _data(value: Any) -> tuple[str, ...] | None:
    found = (value,) if isinstance(value, str) else tuple(value)
    return found if found and all(isinstance(name, str) and name for name in found) else None


def _object(value: Any) -> str | None:
    """A JSON object, as text in one form; YAML may hold it as a mapping."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return json.dumps(found, sort_keys=True, ensure_ascii=False) if isinstance(found, dict) else None


def _pairs(value: Any) -> str | None:
    """`question=prompt,answer=completion` in one form; YAML may hold it as a mapping."""
    if isinstance(value, dict):
        both = [pair for pair in value.items() if all(isinstance(part, str) for part in pair)]
        found = [(source, name) for source, name in both if "," not in source]
        value = ",".join(f"{source}={name}" for source, name in found) if len(found) == len(value) else None
    items = [item.strip() for item in value.split(",")] if isinstance(value, str) else [""]
    pairs = [item.rpartition("=")[::2] for item in items]
    return ",".join(sorted(items)) if all(source and name for source, name in pairs) else None


def _date(value: Any) -> str | None:
    """A day as YYYY-MM-DD; YAML reads it as a date."""
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    is_form = isinstance(value, str) and _DAY.fullmatch(value)
    return datetime.date.fromisoformat(value).isoformat() if is_form else None


def _betas(value: Any) -> str | None:
    """Two numbers from 0 to below 1, as `0.9,0.999`; YAML may hold them as a list."""
    given = value.split(",") if isinstance(value, str) else list(value)
    found = [_finite(one) for one in given]
    if len(found) != 2 or not all(one is not None and 0 <= one < 1 for one in found):
        return None
    return ",".join(f"{one!r}" for one in found)


def _device(value: Any) -> str | None:
    """A device by torch's name for it; whether this machine has it is asked when it is used."""
    return value if isinstance(value, str) and _DEVICE.fullmatch(value) else None


_LOCAL = frozenset({"str", "file"})
"""Kinds of settings that no URL is read for: a new one is among them unless it is said to name `rows`."""

_KINDS: dict[str, Callable[[Any], Any]] = {
    "rows": lambda value: value if isinstance(value, str) and value else None,
    "str": lambda value: value if isinstance(value, str) and value else None,
    "bool": lambda value: value if isinstance(value, bool) else None,
    "int": lambda value: _integer(value, 0),
    "count": lambda value: _integer(value, 1),
    "float": _finite,
    "positive": _positive,
    "generation": _generation,
    "keep": _keep,
    "scope": _scope,
    "weights": _weights,
    "data": _data,
    "device": _device,
    "file": lambda value: value if isinstance(value, str) and value else None,
    "object": _object,
    "pairs": _pairs,
    "date": _date,
    "betas": _betas,
    "all_count": lambda value: "all" if value == "all" else _integer(value, 1),
    "auto_count": lambda value: "auto" if value == "auto" else _integer(value, 1),
}

_TAKES = {
    "rows": "a file, folder, glob, URL or dataset name",
    "str": "a word",
    "bool": "true or false",
    "int": "a whole number from 0",
    "count": "a whole number from 1",
    "float": "a finite number",
    "positive": "a finite number above 0",
    "generation": "latest, all, or numbers separated by commas",
    "keep": "a share above 0 and up to 1, or positive",
    "scope": "global, row, or batch:N with N rows",
    "weights": f"{', '.join(WEIGHTS)}, or tilt:C with C above 0 and up to {MOST_TILT:g}, such as tilt:0.25",
    "data": "files, folders, globs or a dataset name",
    "device": "auto, cpu, cuda, cuda:N, or several: cuda:0,cuda:1",
    "file": "a file",
    "object": 'a JSON object, such as {"enable_thinking": false}',
    "pairs": "columns and what they are read as, such as question=prompt,answer=completion",
    "date": "a day as YYYY-MM-DD",
    "betas": "two numbers from 0 to below 1, such as 0.9,0.999",
    "all_count": "a whole number from 1, or all",
    "auto_count": "a whole number from 1, or auto",
}
