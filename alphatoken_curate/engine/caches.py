"""The key-value cache of a model's forward, by the name that the installed transformers has for it."""

from __future__ import annotations

import inspect
from typing import Any


def forward_with_cache(model: Any, cache: Any, **inputs: Any) -> Any:
    """The output of `model` on `inputs`, after the positions that `cache` holds; None: with one of its own."""
    return model(**inputs, **{_name(model): cache}, use_cache=True)


def cache_of(model: Any, output: Any) -> Any:
    """What `model` has cached in its `output`; None where it keeps nothing."""
    return getattr(output, _name(model), None)


def repeated(cache: Any, times: int) -> bool:
    """Repeat each row of a cache. False, and nothing is done, where a layer cannot: those of linear attention."""
    able = all(hasattr(one, "batch_repeat_interleave") for one in (cache, *getattr(cache, "layers", ())))
    if able:
        cache.batch_repeat_interleave(times)
    return able


def _name(model: Any) -> str:
    # Renamed in transformers 5.24; code that comes with a model may have the old name still.
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
