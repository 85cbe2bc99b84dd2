"""What a mean over target rows leaves uncertain: the rows are dealt into groups, each an outcome of its own.

J is the mean loss over all target tokens, so it is the mean of the groups' weighed by their tokens, and a token's value
is that mean of its values by group. How far these lie apart is its standard error: a value that a few target rows alone
make is one that other target rows would not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.tokens.draws import keyed_uniform, of_turn
from alphatoken_curate.tokens.plan import response_tokens
from alphatoken_curate.tokens.tokenise import TokenRow

GROUPS = 8
"""By default, where there are rows enough."""

GROUP_DRAW = -(1 << 32)
"""The position under which a row's place among the groups is drawn; below those of all epochs."""


def deal(rows: Sequence[TokenRow], groups: int, seed: int) -> list[list[TokenRow]]:
    """Rows in at most so many groups of about equal response tokens, none of them empty.

    The longest row goes first, each to the group that has the fewest tokens by then; among equals (seed, row) decides.
    """
    turns = [-row.turn for row in rows]
    draws = keyed_uniform(seed, [row.row_id for row in rows], of_turn(GROUP_DRAW, turns))
    tokens = [response_tokens([row]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-tokens[i], draws[i]))
    dealt: list[list[int]] = [[] for _ in range(min(groups, len(rows)))]
    held = np.zeros(len(dealt), np.int64)
    for i in order:
        least = int(held.argmin())
        dealt[least].append(i)
        held[least] += tokens[i]
    return [[rows[i] for i in sorted(group)] for group in dealt]


def mean_and_error(
    values: NDArray[np.float64], tokens: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of values (G, N) by group: the mean weighed by each group's tokens, and its standard error, (N,) each.

    The error is that of a ratio of sums over groups drawn alike: sqrt(G / (G - 1) sum_g (n_g (x_g - mean) / n)^2). Of
    one group it is NaN.
    """
    shares = np.asarray(tokens, np.float64)[:, None] / sum(tokens)
    mean: NDArray[np.float64] = (shares * values).sum(axis=0)
    if len(values) == 1:
        return mean, np.full_like(mean, np.nan)
    apart = (shares * (values - mean)) ** 2
    return mean, np.sqrt(apart.sum(axis=0) * len(values) / (len(values) - 1))
