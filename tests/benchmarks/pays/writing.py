"""Tables as a page has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Student's t at 95% for so many seeds."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    out = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*out, *("| " + " | ".join(row) + " |" for row in rows)])


def with_interval(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and where there are seeds enough the half width of its 95% interval."""
    text = f"{mean(values):.{digits}f}"
    if len(values) not in T95:
        return text
    return f"{text} ± {T95[len(values)] * stdev(values) / math.sqrt(len(values)):.{digits}f}"
