"""Influence of every response token: direct + upstream, the exact first-order effect of leaving its own loss out.

For a direction M over the weights of S, the influence of token t is <gradient of l_t, M>: the derivative of its own
loss when the weights move along M (DESIGN 1.2). The model runs once, forward, its weights in S carrying M as tangents;
all directions share the primal values. There is no backward through the trunk and no graph: alive at a time are one
block's activations and their tangents. Where the head does not move, one backward through it, chunk by chunk, gives
d l_t / d hidden, whose product with the tangents of the last hidden states is the influence.

Shapes: N response tokens of a batch, n directions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from alphatoken_curate.directions.losses import Losses, at, loss_gradient, positions, token_losses
from alphatoken_curate.directions.parameters import rest_of_batch
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.moving import Moving
from alphatoken_curate.engine.precision import wide
from alphatoken_curate.engine.tangents import NoTangentError, dual, parts
from alphatoken_curate.errors import ModelError
from alphatoken_curate.signals.paths import PathScorer, Signals
from alphatoken_curate.tokens.plan import Batch

AGREEMENT = {torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Of the sum of magnitudes, how far forward and backward may be apart on the probe, by dtype of the head; else 1e-3."""


class InfluenceScorer:
    """Scores batches along fixed directions, in forward mode. Raises ModelError where the model has no such mode."""

    def __init__(self, scoring: ScoringModel, directions: Sequence[Direction]) -> None:
        self.scoring = scoring
        self.moving = Moving(scoring, directions)
        _check(self, directions)

    def settle(self) -> None:
        """Compute as the model does from here on (`ScoringModel.settle`)."""
        self.moving.settle()

    def score(self, batch: Batch) -> Signals:
        """nll, entropy and influence of the N response tokens of a batch."""
        # Tangents of a prompt move the response: it is no constant prefix, and branches of a pair run by themselves.
        batch = replace(batch, start=0, pairs=False)
        ids = torch.from_numpy(batch.input_ids).to(self.scoring.device)
        hidden, tangents = self.moving.hidden(ids)
        where, target = positions(batch, hidden.device), torch.from_numpy(batch.target).to(hidden.device)
        moved = [at(t, where) for t in tangents]
        of_head = self._moving_head if self.scoring.rest else self._fixed_head
        losses, influence = of_head(at(hidden, where), moved, target)
        return Signals(losses.nll, losses.entropy, influence=influence)

    def _fixed_head(self, hidden: Tensor, moved: list[Tensor], target: Tensor) -> tuple[Losses, Tensor]:
        """Hidden states (N, D) and their tangents -> losses and influence (n, N)."""
        scoring = self.scoring
        losses = token_losses(scoring.head, hidden, target, vocabulary=scoring.vocabulary, gradient=True)
        assert losses.grad is not None
        return losses, torch.stack([_dots(t, losses.grad) for t in moved])

    def _moving_head(self, hidden: Tensor, moved: list[Tensor], target: Tensor) -> tuple[Losses, Tensor]:
        """The same where the head's own weights carry tangents too."""
        scoring = self.scoring
        influence = wide(hidden.new_empty(len(moved), len(target)))

        def add(part: slice, error: Tensor) -> None:
            with torch.no_grad(), self.moving.swapped():
                _, logits = parts(scoring.head(dual(hidden[part], [t[part] for t in moved])))
            influence[:, part] = torch.stack([_dots(t, error) for t in logits])

        losses = token_losses(scoring.head, hidden, target, vocabulary=scoring.vocabulary, gradient=False, on_error=add)
        return losses, influence


@dataclass(frozen=True, slots=True)
class BothScorer:
    """The paths and the influence of the same tokens along the same directions."""

    paths: PathScorer
    influence: InfluenceScorer

    def settle(self) -> None:
        """Compute as the model does from here on (`ScoringModel.settle`)."""
        self.paths.settle()
        self.influence.settle()

    def score(self, batch: Batch) -> Signals:
        """All signals of the N response tokens of a batch; nll and entropy are those of the paths."""
        return replace(self.paths.score(batch), influence=self.influence.score(batch).influence)


def make_scorer(
    scoring: ScoringModel, directions: list[Direction], estimator: str, window: int, *, settle: bool = True
) -> PathScorer | InfluenceScorer | BothScorer:
    """What scores batches along fixed directions by an estimator of `config.ESTIMATORS`; `published` has the window.

    It settles, unless directions are still to be made of the same model.
    """
    scorer: PathScorer | InfluenceScorer | BothScorer
    if estimator == "influence":
        scorer = InfluenceScorer(scoring, directions)
    elif estimator == "exact+influence":
        scorer = BothScorer(PathScorer(scoring, directions, "exact", window), InfluenceScorer(scoring, directions))
    else:
        scorer = PathScorer(scoring, directions, "exact" if estimator == "exact" else "published", window)
    if settle:
        scorer.settle()
    return scorer


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """Dot products of rows, (N, d) each -> (N,), float32 at least."""
    kind = torch.promote_types(one.dtype, other.dtype)
    dots: Tensor = torch.linalg.vecdot(wide(one.to(kind)), wide(other.to(kind)))
    return dots


def _check(scorer: InfluenceScorer, directions: Sequence[Direction]) -> None:
    """Refuse a model whose forward mode and backward do not agree on a few tokens."""
    scoring, batch = scorer.scoring, _probe(scorer.scoring.vocabulary)
    name = type(scoring.model).__name__
    try:
        found = scorer.score(batch).influence
    except NoTangentError as error:
        raise ModelError(
            f"{name}: --estimator influence cannot score it: no forward-mode formula for {error}."
            " Use --estimator exact."
        ) from error
    assert found is not None
    each = found.double().cpu()
    wanted = _by_backward(scoring, directions, batch)
    allowed = AGREEMENT.get(scoring.model.get_output_embeddings().weight.dtype, 1e-3)
    # Not `error > allowed`: NaN must not pass.
    if not bool(((each.sum(1) - wanted).abs() <= allowed * each.abs().sum(1)).all()):
        raise ModelError(
            f"{name}: --estimator influence misses a part of it: over a few tokens forward mode finds"
            f" {each.sum(1).tolist()} along the directions, a backward {wanted.tolist()}. Use --estimator exact."
        )


def _by_backward(scoring: ScoringModel, directions: Sequence[Direction], batch: Batch) -> Tensor:
    """<gradient of the summed losses, M> for each direction, (n,) float64, by backwards alone."""
    total = torch.zeros(len(directions), dtype=torch.float64)

    def add(index: int, h: Tensor, delta: Tensor, _: Tensor | None) -> None:
        for n, direction in enumerate(directions):
            total[n] += float(_dots(h @ direction[index].t().to(h), delta).double().sum())

    with scoring.graph(torch.from_numpy(batch.input_ids).to(scoring.device)) as hidden:
        _, grad = loss_gradient(scoring, hidden, batch)
        scoring.backward([hidden], [grad], add)
    if scoring.rest:
        found = rest_of_batch(scoring, batch)
        for n, direction in enumerate(directions):
            rest = direction[len(scoring.maps) :]
            total[n] += sum(float((g.double() * m.to(g).double()).sum()) for g, m in zip(found, rest, strict=True))
    return total


def _probe(vocabulary: int) -> Batch:
    """Two rows of twelve tokens, all but the first of which respond."""
    ids = (np.arange(24).reshape(2, 12) * 7919 + 11) % vocabulary
    row, column = np.divmod(np.arange(22), 11)
    target = ids[row, column + 1]
    return Batch(rows=(0, 1), pairs=False, input_ids=ids[:, :-1], start=0, row=row, position=column, target=target)
