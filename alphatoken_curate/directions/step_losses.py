"""What the loss of a training's step is of the losses of its tokens, and how the weights of tokens enter it.

The gradient of a step is sum_t v_t (gradient of l_t) / D. Where rows are plain, v_t = w_t and D counts tokens. Where
they are preference pairs, D counts those, and with s_t = 1 for tokens of the chosen branch, -1 for the rejected one's,

    margin = beta sum_t s_t w_t (l_t of the reference - l_t),    loss = -log sigmoid(margin),
    v_t = s_t w_t omega,    omega = beta sigmoid(-margin):

DPO with weights of tokens in the policy's and the reference's log-probability alike (`trainers.dpo`), whose mean over
pairs no weight divides; or SimPO (arXiv 2405.14734, Eq. 6), which has no reference, means over branches and a target:

    margin = beta sum_t s_t w_t (-l_t) / n_t - gamma,    v_t = s_t w_t omega / n_t,

n_t the tokens of t's branch, or the sum of their weights. So a weight enters the gradient of a pair in two ways: by its
own token and, by the margin (and n), in omega, which weighs all tokens of the pair; and omega moves with the model, so
it is differentiated with it.
Shapes: N response tokens of a batch, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.tokens.plan import Batch, token_places


class StepLoss(Protocol):
    """The loss of a step by the losses of its tokens."""

    @property
    def ways(self) -> int:
        """In how many ways the weight of a token enters the gradient; the first is by its own loss."""
        ...

    def units(self, batch: Batch) -> int:
        """How many there are of what it is the mean over."""
        ...

    def total(self, batch: Batch, nll: Tensor) -> Tensor:
        """The sum over them, () in nats, where no token is weighed."""
        ...

    def weigh(self, batch: Batch, nll: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The derivative v (N,) of that sum by the nll (N,), with the graph of what it is made of.

        `weights`: those of the tokens, (N,) for each way, all of the same numbers.
        """
        ...


class TokenLoss:
    """The mean over response tokens."""

    ways = 1

    def units(self, batch: Batch) -> int:
        """Response tokens."""
        return len(batch.target)

    def total(self, batch: Batch, nll: Tensor) -> Tensor:
        """Their summed loss."""
        return nll.sum()

    def weigh(self, batch: Batch, nll: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The weights themselves."""
        return weights[0]


TOKENS = TokenLoss()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairLoss:
    """The mean over pairs. A batch holds pairs whole; margins are float64, whatever the nll is."""

    beta: float
    reference: NDArray[np.floating] | None
    """(N,) nll of the response tokens of all rows under the reference; None where none is in the loss, as in SimPO."""
    starts: NDArray[np.int64]
    """Where those of each sequence start (`token_starts`); a batch's `rows` are indices of these."""
    gamma: float = 0.0
    """What beta times the difference of branches is to exceed, nats: the margin is what it does by."""
    divided: Literal["not", "count", "sum"] = "not"
    """By what sums over branches are divided: by how many tokens they have, or by the sum of their weights (SimPO)."""

    @property
    def ways(self) -> int:
        """By the token's own loss with omega held, and by omega and what the branch's sum is divided by."""
        return 2

    def units(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.rows) // 2

    def total(self, batch: Batch, nll: Tensor) -> Tensor:
        """Their summed loss."""
        return -torch.nn.functional.logsigmoid(self.margin(batch, nll, torch.ones_like(nll))).sum()

    def margin(self, batch: Batch, nll: Tensor, weights: Tensor) -> Tensor:
        """(P,) float64, of tokens of these weights."""
        gain = (weights * (self._known(batch, nll) - nll.double())).split(batch.counts.tolist())
        sums = torch.stack([part.sum() for part in gain]) / self._divisors(batch, weights)
        return self.beta * (sums[0::2] - sums[1::2]) - self.gamma

    def weigh(self, batch: Batch, nll: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The signed omega of each token's pair, by the second of the weights, times the first."""
        own, of_omega = weights
        omega = self.beta * torch.sigmoid(-self.margin(batch, nll, of_omega))
        signed = torch.stack([omega, -omega], dim=1).flatten() / self._divisors(batch, of_omega)
        # Each laid out by itself: sums of the backward are in the same order on any device.
        each = zip(signed, batch.counts.tolist(), strict=True)
        return own * torch.cat([one.expand(tokens) for one, tokens in each]).to(nll.dtype)

    def _known(self, batch: Batch, nll: Tensor) -> Tensor:
        """(N,) float64: what losses of tokens are taken from."""
        if self.reference is None:
            return torch.zeros_like(nll, dtype=torch.float64)
        return torch.from_numpy(self.reference[token_places(batch, self.starts)]).to(nll.device, torch.float64)

    def _divisors(self, batch: Batch, weights: Tensor) -> Tensor:
        """(2 P,) float64, of each branch."""
        counts = torch.as_tensor(batch.counts, dtype=torch.float64, device=weights.device)
        if self.divided == "sum":
            return torch.stack([part.sum() for part in weights.double().split(batch.counts.tolist())])
        return counts if self.divided == "count" else torch.ones_like(counts)
