"""Sums over rows, made of fixed parts of them and added in the order of parts: the same bits, whoever makes a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

R = TypeVar("R")
T = TypeVar("T", bound=np.generic)

PART_ROWS = 32
"""Rows of a part. Their batches are planned by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sums:
    """What some rows add up to: `arrays` by the name of a parameter, float32 at least, and `counts` of what was added.

    Of arrays, which numpy has, and not of tensors: they may come from another process.
    """

    arrays: dict[str, NDArray[np.floating]]
    counts: dict[str, int]

    def add(self, other: Sums) -> None:
        """Take in those of the part that comes next."""
        for name, array in other.arrays.items():
            self.arrays[name] = own = writable(self.arrays[name])
            own += array
        for name, count in other.counts.items():
            self.counts[name] += count

    def mean(self, over: str) -> dict[str, Tensor]:
        """By name, divided by one of the counts; they are summed no more after that."""
        for tensor in (found := self.tensors()).values():
            tensor.div_(self.counts[over])
        return found

    @property
    def is_finite(self) -> bool:
        """Whether every number is."""
        return all(bool(np.isfinite(array).all()) for array in self.arrays.values())

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are."""
        return tensors_of(self.arrays)


def sums_of(names: Sequence[str], found: Sequence[Tensor], counts: Mapping[str, int]) -> Sums:
    """Sums by name, wherever they were computed."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in zip(names, found, strict=True)}
    return Sums(arrays=arrays, counts=dict(counts))


def tensors_of(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Arrays by name as tensors, which may be written to."""
    return {name: torch.from_numpy(writable(array)) for name, array in arrays.items()}


def writable(array: NDArray[T]) -> NDArray[T]:
    """The array, or a copy of one that lies in another's memory and may only be read."""
    return np.require(array, requirements=["W"])


def in_parts(rows: Sequence[R]) -> list[Sequence[R]]:
    """Rows in their parts."""
    return [rows[first : first + PART_ROWS] for first in range(0, len(rows), PART_ROWS)]


def total(parts: Iterable[Sums]) -> Sums:
    """The sum of parts, of which there is one at least, in their order."""
    each = iter(parts)
    found = next(each)
    for part in each:
        found.add(part)
    return found
