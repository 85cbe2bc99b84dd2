"""Which of many cases are tested each time, and which with `pytest -m long` or with `pytest -m stress`."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

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


def mark_one_in(cases: Iterable[pytest.Item]) -> None:
    """Of the cases of a test marked `one_in(n)` an nth stay, the others are marked `long`."""
    mine = [case for case in cases if not any(case.get_closest_marker(name) for name in ("long", "slow", "stress"))]
    asked = mine[0].get_closest_marker("one_in") if mine else None
    if asked is not None:
        chosen = spread([values(case) for case in mine], asked.args[0])
        for i, case in enumerate(mine):
            if i not in chosen:
                case.add_marker(pytest.mark.long)


def values(case: pytest.Item) -> list[tuple[str, Hashable]]:
    """What a case has as each parameter."""
    given = getattr(case, "callspec", None)
    return [] if given is None else [(name, _key(value)) for name, value in given.params.items()]


def _key(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return cast(Hashable, value)


def spread(cases: Sequence[Sequence[Hashable]], n: int) -> set[int]:
    """Which of some cases stay, one in n: the first, then those whose values stay least, else every nth."""
    used = Counter[Hashable]()
    chosen: list[int] = []
    for at in range(0, len(cases), n):
        left = sorted(set(range(len(cases))) - {*chosen}, key=lambda i: abs(i - at))
        best = min(left, key=lambda i: (-sum(not used[v] for v in cases[i]), sum(used[v] for v in cases[i])))
        chosen.append(best)
        used.update(cases[best])
    return {*chosen}


def shuffle_files(items: list[pytest.Item]) -> None:
    """Files in another order each run, each from another test on: a time that is too short leaves out others.

    The same in all workers of a run.
    """
    draw = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    items.clear()
    for mine in draw.sample(list(files.values()), len(files)):
        first = draw.randrange(len(mine))
        items += mine[first:] + mine[:first]
