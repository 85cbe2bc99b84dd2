"""Random numbers that depend on what they are drawn for and on nothing else: keyed by (seed, row, position)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def keyed_uniform(seed: int, row: ArrayLike, position: ArrayLike) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), one for each (row, position) pair; row and position broadcast."""
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seed, dtype=np.int64).astype(np.uint64) + _GOLDEN)
        state = _mix(state + np.asarray(row, dtype=np.int64).astype(np.uint64) * _GOLDEN)
        state = _mix(state + np.asarray(position, dtype=np.int64).astype(np.uint64) * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def of_turn(position: ArrayLike, turn: ArrayLike) -> NDArray[np.int64]:
    """The position under which a token of that turn is drawn for: no sequence is longer than 2^32."""
    return np.asarray(position, dtype=np.int64) + (np.asarray(turn, dtype=np.int64) << 33)


def inverse_transform(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (n,) int64 drawn from (n, V): the first whose cumulative probability exceeds its uniform draw (n,).

    Sums in float64; probabilities need not add up to 1. A token of probability 0 is never drawn.
    """
    import torch

    cumulative = probabilities.double().cumsum(-1)
    wanted = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=probabilities.shape[-1] - 1)
