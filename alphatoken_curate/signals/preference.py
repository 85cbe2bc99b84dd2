"""How much a preference pair weighs, and with which sign its tokens count (paper arXiv 2606.01635, Eq. 14).

margin = beta ((log pi - log ref of chosen) - (log pi - log ref of rejected)), each a sum over the branch's response
tokens, and omega = beta sigmoid(-margin), held constant. The gradient of the pair's loss -log sigmoid(margin) is then
omega (sum of grad nll over chosen - sum of grad nll over rejected): signals of chosen tokens are multiplied by omega,
those of rejected tokens by -omega.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.tokens.plan import Batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairTerms:
    """Of P pairs: omega (P,) in (0, beta), margin (P,) in nats, both float64."""

    omega: NDArray[np.float64]
    margin: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """The pairs of some rows: S sequences, chosen and rejected in turn."""

    beta: float
    reference: NDArray[np.float64] | None
    """(S,) sum of the reference's nll over the response tokens of each; None where it is the model itself."""

    def terms(self, batch: Batch, nll: NDArray[np.floating[Any]]) -> PairTerms:
        """Eq. 14 for the B / 2 pairs of a batch, from the nll (N,) of its response tokens under the model."""
        if self.reference is None:
            return pair_terms(self.beta, np.zeros(len(batch.rows)))
        sums = np.bincount(batch.row, weights=nll, minlength=len(batch.rows))
        return pair_terms(self.beta, self.reference[list(batch.rows)] - sums)

    def signs(self, batch: Batch, terms: PairTerms) -> NDArray[np.float64]:
        """(N,) what the signals of each response token are multiplied by: omega for chosen, -omega for rejected."""
        each = np.stack([terms.omega, -terms.omega], axis=1).ravel()
        signs: NDArray[np.float64] = each[batch.row]
        return signs

    def weigh(self, batch: Batch, nll: Tensor) -> Tensor:
        """The same as weights of the token losses, (N,) of the dtype of `nll`."""
        signs = self.signs(batch, self.terms(batch, nll.detach().double().cpu().numpy()))
        return torch.from_numpy(signs).to(nll)

    def bend(self, batch: Batch, nll: Tensor) -> Tensor:
        """(N,): of each response token's nll, b so that the pair's loss bends by g g^T, g = sum of b * grad nll.

        As a function of its margin m the loss has the second derivative sigmoid(m) sigmoid(-m), and m moves by beta
        times the token's, upwards where it is rejected.
        """
        margin = self.terms(batch, nll.detach().double().cpu().numpy()).margin
        root = self.beta * np.sqrt(_sigmoid(margin) * _sigmoid(-margin))
        each = np.stack([root, -root], axis=1).ravel()
        return torch.from_numpy(each[batch.row]).to(nll)


def pair_terms(beta: float, gain: NDArray[np.float64]) -> PairTerms:
    """Eq. 14, from log pi - log ref (2 P,) of chosen and rejected in turn, in nats."""
    margin = beta * (gain[0::2] - gain[1::2])
    return PairTerms(omega=beta * _sigmoid(-margin), margin=margin)


def reference_sums(parts: Sequence[NDArray[np.float32]] | None) -> NDArray[np.float64] | None:
    """`Pairs.reference` from the reference's nll of each sequence's response tokens."""
    return None if parts is None else np.array([part.sum(dtype=np.float64) for part in parts])


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    result: NDArray[np.float64] = np.where(x >= 0, 1, small) / (1 + small)
    return result
