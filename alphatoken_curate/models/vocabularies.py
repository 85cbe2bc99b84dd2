"""A `tokenizer.json` that would spell text otherwise than it says, at random, or without end, is refused.

The library that reads it takes ids that are not those in the file, drops merges at random where it is told to, and
writes as much as its rules say.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from alphatoken_curate.errors import ModelError

_LARGEST_GROWTH = 100
_LONGEST_TOKEN = 10_000


def refuse_odd(name: str, folder: Path, tokenizer: Any) -> None:
    """Raise ModelError for what a folder's tokenizer.json says and `tokenizer`, read from it, does not; see above."""
    path = folder / "tokenizer.json"
    if not path.is_file() or not tokenizer.is_fast:
        return
    told = orjson.loads(path.read_bytes())
    for why in (*_rules(told), *_tokens(told, tokenizer)):
        raise ModelError(f"{name}: in its {path.name} {why}. Put back the one that the model was trained with.")


def refuse_endless(name: str, folder: Path) -> None:
    """Raise ModelError, before it is read, for a tokenizer.json with a token or a rule that takes all memory."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        told = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        return  # its reader says so
    for why in _sizes(told) if isinstance(told, dict) else ():
        raise ModelError(f"{name}: in its {path.name} {why}. Put back the one that the model was trained with.")


def _sizes(told: dict[str, Any]) -> Iterator[str]:
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1
        for content in _replacements(told.get(part)):
            growth *= max(1, len(content))
        if growth > _LARGEST_GROWTH:
            yield f"the rules of its {part} make {growth:,} characters of one"
    added = told.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        text = token.get("content") if isinstance(token, dict) else None
        if isinstance(text, str) and len(text) > _LONGEST_TOKEN:
            yield f"a token is {len(text):,} characters long"


def _replacements(rule: Any) -> Iterator[str]:
    """What is put in the place of other text, by this rule or one within it."""
    if isinstance(rule, list):
        for one in rule:
            yield from _replacements(one)
    elif isinstance(rule, dict):
        if rule.get("type") == "Replace" and isinstance(rule.get("content"), str):
            yield rule["content"]
        for value in rule.values():
            if isinstance(value, list | dict):
                yield from _replacements(value)


def _rules(told: dict[str, Any]) -> Iterator[str]:
    model = told.get("model") or {}
    if model.get("dropout"):
        yield f"merges are dropped at random (dropout {model['dropout']}): text would be other tokens each time"
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict) and len(set(vocabulary.values())) != len(vocabulary):
        first: dict[Any, str] = {}
        for token, number in vocabulary.items():
            if number in first:
                yield f"two tokens have the id {number} ({first[number]!r:.40}, {token!r:.40})"
                return
            first[number] = token


def _tokens(told: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    for token in told.get("added_tokens") or ():
        read = tokenizer.convert_tokens_to_ids(token["content"])
        if read != token["id"]:
            yield f"{token['content']!r:.40} has the id {token['id']}, another token's or none's, and is read as {read}"
            return
