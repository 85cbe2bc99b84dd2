"""How long sequences of a model may be, by its config: where its positions end, or depend on what stands beside them.

Frequencies that change with length (`longrope`, `dynamic`) go by the longest sequence of a batch, and `dynamic` ones by
those of batches before: only up to where they begin to is a row's number its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

TABLES = ("biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt")
"""Model types whose positions are rows of a table."""

_CHANGING = ("longrope", "su", "dynamic")
"""Kinds of rotary positions that depend on length; `su` is what Phi-3 first called longrope."""


class Reach(NamedTuple):
    """The longest sequence of a model in tokens, and what it is that ends there."""

    tokens: int
    rope_type: str | None
    """Rotary positions of this kind change there; None where a table of positions ends."""


def reach_of(config: Mapping[str, Any]) -> Reach | None:
    """That of a language model's config; None where sequences of any length are each by themselves."""
    most = config.get("n_positions", config.get("max_position_embeddings"))
    if config.get("model_type") in TABLES:
        return Reach(most, None) if isinstance(most, int) else None
    for rope in ropes_of(config):
        kind = str(rope.get("rope_type", rope.get("type")))
        if kind in _CHANGING:
            name = "original_max_position_embeddings"
            first = most if kind == "dynamic" else config.get(name, rope.get(name, most))
            return Reach(first, kind) if isinstance(first, int) else None
    return None


def ropes_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a config says of rotary positions: of all layers, or of each type of layer."""
    for told in (config.get("rope_parameters"), config.get("rope_scaling")):
        if isinstance(told, Mapping):
            of_types = [one for one in told.values() if isinstance(one, Mapping)]
            yield from of_types or [told]
