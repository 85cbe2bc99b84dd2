"""Which of many cases are tested each time, and which with `pytest -m long`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def daily(cases: Iterable[Any], often: Collection[Any] | Callable[[Any], bool]) -> list[Any]:
    """The cases for `parametrize`, those that are not `often` marked `long`."""
    is_often = often if callable(often) else lambda case: case in often
    return [case if is_often(case) else pytest.param(case, marks=pytest.mark.long) for case in cases]
