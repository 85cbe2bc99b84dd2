"""Chat templates rendered within bounds: one that loops for ever, or writes gigabytes, ends as a `RunawayError`.

transformers renders templates in a sandbox that bounds `range` alone. While `Bounded` lasts, it is given templates of
`sandbox` in place of its own, which count what they do and write the same to the byte.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any

from alphatoken_curate.tokens.meter import RunawayError

LONGEST = 500_000
"""Characters of a template. The longest that models carry have some 40,000."""

_lock = threading.Lock()
_here = threading.local()
_users: list[int] = []


class Bounded:
    """While it lasts, transformers renders templates within bounds, in this thread; `given` is what they are told."""

    __slots__ = ("_given",)

    def __init__(self, given: object) -> None:
        self._given = given

    def __enter__(self) -> None:
        home = _home()
        with _lock:
            if not _users:
                home._compile_jinja_template = _Compiler(home._compile_jinja_template)
            _users.append(0)
        _here.given = [self._given]

    def __exit__(self, *about: object) -> None:
        _here.given = None
        home = _home()
        with _lock:
            _users.pop()
            if not _users:
                home._compile_jinja_template = home._compile_jinja_template.theirs


@functools.cache
def _home() -> Any:
    return importlib.import_module("transformers.utils.chat_template_utils")


class _Compiler:
    """Stands in for transformers' own, `theirs`; for other threads it is that."""

    def __init__(self, theirs: Callable[[str], Any]) -> None:
        self.theirs = theirs

    def __call__(self, template: str) -> Any:
        given = getattr(_here, "given", None)
        if given is None:
            return self.theirs(template)
        counts = _counting(template, self.theirs, threading.get_ident())
        counts.environment.meter.begin(given[0])
        return counts


@functools.lru_cache(maxsize=32)
def _counting(template: str, theirs: Callable[[str], Any], thread: int) -> Any:
    """Each thread has its own, since a meter is of one rendering."""
    from alphatoken_curate.tokens.sandbox import counting

    if len(template) > LONGEST:
        raise RunawayError(f"it is {len(template):,} characters long")
    return counting(template, theirs("").environment)
