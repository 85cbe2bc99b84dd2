"""What a trained model makes of rows that it never saw, row by row, so that rows can be resampled.

Of each row: its nll, the same at each of some temperatures (logits are divided by one before the softmax), and how many
digits of its answer are the likeliest token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from settings import Row, answer_digits
from training import likeliest, nll_of, predictions

Floats = NDArray[np.float64]

TEMPERATURES = (1.0, 0.7, 0.8, 0.9, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)
"""The first is the model as it is."""

_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Sums over the response tokens of R rows; (R,) each."""

    tokens: Floats
    nll: Floats
    """In nats."""
    tempered: Floats
    """The same at the one temperature at which all rows together are likeliest."""
    temperature: float
    digits: Floats
    """Digits of the answer."""
    digits_right: Floats
    """Those of them that are the likeliest token behind what stands before them."""

    def about(self) -> dict[str, Any]:
        """As a result line has it."""
        rows = {name: _rounded(getattr(self, name)) for name in ("tokens", "nll", "tempered", "digits", "digits_right")}
        return {"temperature": self.temperature, **rows}


def held_out(model: Any, rows: Sequence[Row]) -> HeldOut:
    """Measure a model."""
    sums = np.zeros((len(TEMPERATURES), len(rows)))
    tokens, digits, right = np.zeros((3, len(rows)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for first in range(0, len(order), _AT_ONCE):
        mine = order[first : first + _AT_ONCE]
        with torch.no_grad():
            logits, targets, which = predictions(model, [rows[i] for i in mine])
            nll = [nll_of(logits, targets, t).numpy() for t in TEMPERATURES]
            likely = likeliest(logits, targets).numpy()
        at = np.array(mine)[which.numpy()]
        answers = np.concatenate([answer_digits(rows[i])[rows[i].response] for i in mine])
        for own, each in zip(sums, nll, strict=True):
            np.add.at(own, at, each)
        for own, each in ((tokens, np.ones(len(at))), (digits, answers), (right, answers & likely)):
            np.add.at(own, at, each)
    best = int(sums.sum(axis=1).argmin())
    return HeldOut(
        tokens=tokens,
        nll=sums[0],
        tempered=sums[best],
        temperature=TEMPERATURES[best],
        digits=digits,
        digits_right=right,
    )


def _rounded(numbers: Floats) -> list[float]:
    return [int(x) if x == int(x) else round(float(x), 4) for x in numbers]
