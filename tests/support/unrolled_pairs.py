"""A training on preference pairs as one formula that autograd goes through: DPO or SimPO, a weight for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import oracles
import torch
from torch import Tensor
from unrolled import J, Step, cotangents_of, token_losses, trained

from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.tokens.tokenise import PairRow, TokenRow


def flat(pairs: Sequence[PairRow]) -> list[TokenRow]:
    """Chosen and rejected in turn."""
    return [one for pair in pairs for one in (pair.chosen, pair.rejected)]


def own_losses(model: Any, pairs: Sequence[PairRow]) -> list[Tensor]:
    """-log p of the response tokens of each branch under a model as it is."""
    model = oracles.eager(model).requires_grad_(False)
    return [token_losses(model, dict(model.named_parameters()), row) for row in flat(pairs)]


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """A training on pairs, from a model: what `reference` (of each branch) says of their tokens never moves."""

    model: Callable[[], Any]
    names: Sequence[str]
    pairs: Sequence[PairRow]
    steps: Sequence[Sequence[int]]
    optimiser: Optimiser
    reference: Sequence[Tensor]
    beta: float
    gamma: float = 0.0

    def reward(self, i: int, weights: Tensor, losses: Tensor) -> Tensor:
        """Of a branch, by the weights and losses of its tokens, less beta."""
        return (weights * (self.reference[i] - losses)).sum()

    @property
    def count(self) -> int:
        """Response tokens."""
        return sum(int(row.response.sum()) for row in flat(self.pairs))

    def trained(self, model: Any, weights: Tensor, **how: Any) -> dict[str, Tensor]:
        """The weights it ends with, where tokens weigh `weights` (N,)."""
        rows = flat(self.pairs)
        each = weights.split([int(row.response.sum()) for row in rows])

        def loss_of(held: dict[str, Tensor], step: Sequence[int]) -> Tensor:
            def reward(i: int) -> Tensor:
                return self.reward(i, each[i], token_losses(model, held, rows[i]))

            margins = [self.beta * (reward(2 * n) - reward(2 * n + 1)) - self.gamma for n in step]
            return torch.stack([torch.log1p(torch.exp(-m)) for m in margins]).mean()

        how = {"summed": False, "graph": False, **how}
        return trained(model, self.names, rows, self.steps, self.optimiser, weights, loss_of=loss_of, **how)

    def values(self, outcomes: Sequence[J]) -> Tensor:
        """-dJ / dw at w = 1 through the whole unrolled training, (n, N)."""
        model = oracles.eager(self.model()).requires_grad_(False)
        weights = torch.ones(self.count, dtype=torch.float64, requires_grad=True)
        held = self.trained(model, weights, graph=True)
        return torch.stack([-torch.autograd.grad(J(model, held), weights, retain_graph=True)[0] for J in outcomes])

    def cotangents(self, outcome: J) -> list[Step]:
        """a_k of each step: the derivative by something added to its gradient."""
        model = oracles.eager(self.model()).requires_grad_(False)
        weights = torch.ones(self.count, dtype=torch.float64)
        return cotangents_of(
            lambda seen: self.trained(model, weights, graph=True, seen=seen), lambda held: outcome(model, held)
        )

    def by_retraining(self, outcome: J, tokens: Sequence[int], by: float) -> Tensor:
        """The same of some tokens, from trainings with the token's weight moved: central differences, Richardson's."""
        model = oracles.eager(self.model()).requires_grad_(False)

        def after(token: int, moved: float) -> float:
            weights = torch.ones(self.count, dtype=torch.float64)
            weights[token] += moved
            return float(outcome(model, self.trained(model, weights)).detach())

        def slope(token: int, moved: float) -> float:
            return (after(token, moved) - after(token, -moved)) / (2 * moved)

        return -torch.tensor([(4 * slope(t, by / 2) - slope(t, by)) / 3 for t in tokens], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Simpo(Dpo):
    """The same by SimPO: without a reference, by the mean over a branch's tokens, or over those by their weights."""

    by_weights: bool = False

    def reward(self, i: int, weights: Tensor, losses: Tensor) -> Tensor:
        """A mean log-probability."""
        return -(weights * losses).sum() / (weights.sum() if self.by_weights else len(losses))
