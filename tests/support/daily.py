"""Which of many cases are tested each time, and which with `pytest -m long` or with `pytest -m stress`."""

from __future__ import annotations

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
