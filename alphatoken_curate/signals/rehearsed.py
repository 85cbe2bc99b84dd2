"""Direct and causal path of the tokens of a rehearsed step, along the directions of that step.

The value of token t in step k is its influence along M_k = -a_k / D at the weights before the step
(`directions.rehearsal`), so its paths are those of the engine along M_k: one direction a step in place of one a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alphatoken_curate.directions.rehearsal import Paths
from alphatoken_curate.directions.trainee import Trainee, Weights
from alphatoken_curate.engine.capture import captured
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import Batch


def exact_paths(trainee: Trainee) -> Paths:
    """What gives direct and causal (`exact`) along the linear maps that train.

    A step moves the weights, so the model is captured anew for each, and given back.
    """

    def paths(batches: Sequence[Batch], along: Sequence[Weights]) -> list[Tensor]:
        with captured(trainee.model, trainee.layers) as scoring:
            directions = [trainee.as_direction(a)[: len(scoring.maps)] for a in along]
            scorer = PathScorer(scoring, directions, "exact", window=0)
            found = []
            for batch in batches:
                signals = scorer.score(replace(batch, pairs=False))
                assert signals.direct is not None and signals.causal is not None
                found.append(torch.stack([signals.direct, signals.causal]))
            return found

    return paths
