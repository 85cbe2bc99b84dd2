"""The signals of a rehearsal: its values as columns, their errors, and their paths along the directions of each step.

The value of token t in step k is its influence along M_k = -a_k / D at the weights before the step
(`directions.rehearsal`), so its paths are those of the engine along M_k: one direction a step in place of one a run.
Those of tokens of pairs count by omega of that step (of SimPO over the tokens of their branch), with its sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.directions.groups import mean_and_error
from alphatoken_curate.directions.rehearsal import Paths, Values
from alphatoken_curate.directions.step_losses import TOKENS, StepLoss
from alphatoken_curate.directions.trainee import Trainee, Weights
from alphatoken_curate.runs.schema import Components
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import Batch

BESIDE = ("denominator", "omega")
"""What is in `influence`, and in none of the paths."""


def exact_paths(trainee: Trainee, loss: StepLoss = TOKENS) -> Paths:
    """What gives direct and causal (`exact`) along the linear maps that train.

    A step moves the weights, so the model is captured anew for each, and given back. Along each direction the bits are
    those that it gives alone, whichever outcomes go back with it.
    """

    def paths(batches: Sequence[Batch], along: Sequence[Weights]) -> list[Tensor]:
        with trainee.captured() as scoring:
            directions = [trainee.as_direction(a)[: len(scoring.maps)] for a in along]
            scorer = PathScorer(scoring, directions, "exact", window=0, apart=True)
            found = []
            for batch in batches:
                signals = scorer.score(batch)
                assert signals.direct is not None and signals.causal is not None
                weighed = loss.weigh(batch, signals.nll, [torch.ones_like(signals.nll)] * loss.ways)
                found.append(torch.stack([signals.direct, signals.causal]) * weighed)
            return found

    return paths


def columns(
    orders: Sequence[Values], objectives: Mapping[str, Sequence[int]], components: Components
) -> dict[str, NDArray[np.float64]]:
    """Signals of N tokens from rehearsals in several orders of the rows, (N,) each in nats: their mean over orders.

    `objectives`: by prefix ("adapt", "stab", "drift"), in the order of the outcomes, the tokens of each of its groups,
    which count by them. Gives the signals of an estimator; `{prefix}_error`, the standard error of what the value is
    made of; and those `BESIDE`: `{prefix}_denominator`, 0 where rows are counted, and of pairs `{prefix}_omega`.
    """
    found: dict[str, NDArray[np.float64]] = {}
    first = 0
    for prefix, tokens in objectives.items():
        mine = slice(first, first := first + len(tokens))
        each = {path: np.mean([part[mine] for part in parts], axis=0) for path, parts in _by_path(orders).items()}
        for path, parts in each.items():
            if path in BESIDE or f"{prefix}_{path}" in components.signals:
                found[f"{prefix}_{path}"] = mean_and_error(parts, tokens)[0]
        made_of = [path for path in each if f"{prefix}_{path}" in (*components.of_value, *components.drift)]
        found[f"{prefix}_error"] = mean_and_error(sum(each[path] for path in made_of), tokens)[1]
    return found


def _by_path(orders: Sequence[Values]) -> dict[str, list[NDArray[np.float64]]]:
    """Of each order (n, N), by the name that columns end with."""
    found = {"influence": [one.value for one in orders], "denominator": [one.denominator for one in orders]}
    moved = [one.omega for one in orders if one.omega is not None]
    found |= {"omega": moved} if moved else {}
    parted = [one for one in orders if one.direct is not None and one.causal is not None]
    if parted:
        found |= {name: [getattr(one, name) for one in parted] for name in ("direct", "causal")}
        found["upstream"] = [one.own - one.direct for one in parted if one.direct is not None]
    return found
