"""Which numbers find what is bad: of each noise of split A, by token and by row, without a training on a mask.

    python tests/benchmarks/pays/detection.py --data ../shared/data

Beside the numbers that a run stores are two that it could: how far the prediction is from the one of a
reference (`KL`, over the whole vocabulary), and a token's loss before an epoch of training on these rows less
that after it (`nll@0 - nll`). The reference is the model after an epoch on the 244 target rows. Each is turned so
that the higher is meant to be the better: an area under 0.5 says that it is the other way round. Rows are ranked by the
mean over their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lines
import numpy as np
import torch
from fidelity import area
from numpy.typing import NDArray
from selections import tuned
from settings import NOISES, Row, Setting, about_of, setting
from torch.nn.functional import cross_entropy
from training import load, predictions, train

from alphatoken_curate.models.load import find_model, load_model

Floats = NDArray[np.float64]

SETTINGS = tuple(f"A {noise}" for noise in NOISES if noise != "clean")
_AT_ONCE = 8


def one(data: str, work: Path, config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each number the areas under its curves, by token and by row."""
    where = setting(config["setting"], Path(data))
    good = np.concatenate([row.good[row.response] for row in where.train])
    row = np.repeat(np.arange(len(where.train)), [int(one.response.sum()) for one in where.train])
    row_good = _row_means(good.astype(np.float64), row) > 0
    found = {}
    for name, number in numbers(where, work).items():
        found[name] = {"area": area(number, good)}
        if not row_good.all():
            found[name]["row_area"] = area(_row_means(number, row), row_good)
    return found


def numbers(where: Setting, work: Path) -> dict[str, Floats]:
    """One for each response token of the training rows, (N,) each."""
    after, cpu = load(), torch.device("cpu")
    train(after, where, [row.response.astype(np.float32) for row in where.train], seed=0, measure_every=10**9)
    reference = load_model(find_model(str(tuned(where, "target", work))), dtype=torch.float32, device=cpu)
    found = of_models(load(), reference, after, where.train)
    nll, entropy = found["nll"], found["entropy"]
    return {
        "-nll": -nll,
        "-surprise": -nll / (entropy + 0.1),
        "entropy": entropy,
        "reference_nll - nll": found["reference_nll"] - nll,
        "-KL(model, reference)": -found["forward"],
        "-KL(reference, model)": -found["backward"],
        "nll@0 - nll": nll - found["after"],
        "-nll after an epoch": -found["after"],
    }


def of_models(model: Any, reference: Any, after: Any, rows: Sequence[Row]) -> dict[str, Floats]:
    """What the three make of the response tokens of some rows, (N,) each, in nats."""
    parts: dict[str, list[Floats]] = {}
    for first in range(0, len(rows), _AT_ONCE):
        with torch.no_grad():
            each = [predictions(one, rows[first : first + _AT_ONCE]) for one in (model, reference, after)]
            own, other, later = (logits.float().log_softmax(-1) for logits, _, _ in each)
            targets = each[0][1]
            told = {
                "nll": cross_entropy(own, targets, reduction="none"),
                "entropy": -(own.exp() * own).sum(-1),
                "reference_nll": cross_entropy(other, targets, reduction="none"),
                "after": cross_entropy(later, targets, reduction="none"),
                "forward": (own.exp() * (own - other)).sum(-1),
                "backward": (other.exp() * (other - own)).sum(-1),
            }
        for name, one in told.items():
            parts.setdefault(name, []).append(one.double().numpy())
    return {name: np.concatenate(some) for name, some in parts.items()}


def _row_means(number: Floats, row: NDArray[np.int64]) -> Floats:
    return np.bincount(row, number) / np.bincount(row)


def main() -> None:
    """Run what has no line yet."""
    args = lines.parser(__doc__).parse_args()
    configs = [
        {"setting": name, "about": about_of(setting(name, Path(args.data)))}
        for name in SETTINGS
        if not args.only or name in args.only
    ]
    lines.run("detection", configs, partial(one, args.data, args.work.resolve()), args.jobs)


if __name__ == "__main__":
    main()
