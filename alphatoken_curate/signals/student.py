"""What the error of a value, told by a few groups of target rows, lets one say: quantiles of Student's distribution.

A mean over G groups divided by its standard error has Student's distribution with G - 1 degrees of freedom where the
groups are alike and what they measure is 0. Few groups know their own error badly, so their quantiles are larger than
the normal ones: 1.895 for eight groups, where the normal one is 1.645.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHANCE = 0.05
"""Share of values that are 0 and yet are found below 0 beyond their error."""


def cumulative(t: float, freedom: int) -> float:
    """Probability that Student's t with so many degrees of freedom (1 or more) is below `t`.

    Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even): finite sums of powers of cos(theta), theta = atan(t / sqrt n).
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom: there is 1 at least")
    sine = t / math.hypot(t, math.sqrt(freedom))
    squared = freedom / (freedom + t * t)  # cos^2 theta
    odd = freedom % 2
    term, total = 1.0, 0.0
    for k in range(1 + odd, freedom, 2):  # exponents of the cosine, less one where they are odd
        total += term
        term *= squared * k / (k + 1)
    if not odd:
        return 0.5 + 0.5 * sine * total
    theta = math.atan(t / math.sqrt(freedom))
    return 0.5 + (theta + sine * math.sqrt(squared) * total) / math.pi


def quantile(share: float, freedom: int) -> float:
    """What Student's t with so many degrees of freedom is below with probability `share`, between 0 and 1.

    By bisection of `cumulative`, to the last bits of a float. Raises `ValueError` for other shares or degrees.
    """
    if not 0 < share < 1:
        raise ValueError(f"{share} is no probability between 0 and 1")
    if share == 0.5:
        return 0.0
    if share < 0.5:
        return -quantile(1 - share, freedom)
    low, high = 0.0, 1.0
    while cumulative(high, freedom) < share:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if cumulative(middle, freedom) < share else (low, middle)
    return high


def beyond_error(value: NDArray[np.floating[Any]], error: NDArray[np.floating[Any]], groups: int) -> tuple[int, float]:
    """How many values (N,) lie below 0 beyond their error (N,), and how many would by chance alone were all of them 0.

    Beyond: value + q error < 0, with q the one-sided 95% quantile for groups - 1 degrees of freedom (`factor`).
    """
    found = value.astype(np.float64) + factor(groups) * error.astype(np.float64)
    return int(np.count_nonzero(found < 0)), CHANCE * len(value)


def factor(groups: int) -> float:
    """By how many errors a value of so many groups (2 or more) has to lie below 0; to the digits that are shown."""
    return round(quantile(1 - CHANCE, groups - 1), 3)
