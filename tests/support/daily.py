"""Which of many cases are tested each time, and which with `pytest -m long` or with `pytest -m stress`."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def daily(
    cases: Iterable[Any], often: Collection[Any] | Callable[[Any], bool], seldom: Collection[Any] = ()
) -> list[Any]:
    """The cases for `parametrize`: `seldom` ones marked `stress`, others that are not `often` marked `long`."""
    is_often = often if callable(often) else lambda case: case in often

    def marked(case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=pytest.mark.stress if case in seldom else pytest.mark.long)

    return [case if is_often(case) else marked(case) for case in cases]


def mark_one_in(items: Iterable[pytest.Item]) -> None:
    """Of each test marked `one_in(n)`: its first case and every nth behind it stay, the others are marked `long`."""
    seen = Counter[str]()
    for item in items:
        asked = item.get_closest_marker("one_in")
        if asked is None or any(item.get_closest_marker(name) for name in ("long", "slow", "stress")):
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % asked.args[0]:
            item.add_marker(pytest.mark.long)
        seen[test] += 1


def shuffle_files(items: list[pytest.Item]) -> None:
    """Files in another order each run, the same in all its workers: a time that is too short leaves out others."""
    files = list(dict.fromkeys(item.path for item in items))
    random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).shuffle(files)
    at = {path: i for i, path in enumerate(files)}
    items.sort(key=lambda item: at[item.path])
