"""The signals of every response token: direct and causal path, in each direction (paper Eq. 8-11).

For a direction M and a linear map with input h_s and error signal delta_s, delta_s^T M h_s is the part of
<gradient, M> that flows through position s. Token t is predicted at position p = t - 1.

* `published`: direct = delta_p^T M h_p over all maps; causal = sum over 0 < k - p <= window of
  A[k, p] delta_k^T M h_p over the value projections, A averaged over query heads.
* `exact`: a second backward carries only what attention sent to *other* positions, so that it yields
  causal = sum over k > t of C[p, k] itself, and direct = C[p, t] is what remains of the total.

Shapes: N response tokens of a batch, n directions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from alphatoken_curate.directions.losses import loss_gradient, positions
from alphatoken_curate.directions.selection import Selection
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.precision import wide
from alphatoken_curate.engine.value_rows import find_value_rows
from alphatoken_curate.errors import ModelError
from alphatoken_curate.tokens.plan import Batch

Estimator = Literal["published", "exact"]


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """nll and entropy (N,) in nats; the rest (n, N) in nats per unit step, for each direction, where it was asked for.

    influence is direct + upstream: what the token's own loss sends through its own and all earlier positions.
    """

    nll: Tensor
    entropy: Tensor
    direct: Tensor | None = None
    causal: Tensor | None = None
    influence: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """The directions of one map side by side, on the side where the product is smaller."""

    matrix: Tensor
    on_input: bool
    """True: (d_in, n d_out), applied to h. False: (d_out, n d_in), applied to delta."""

    def contract(self, h: Tensor, deltas: list[Tensor]) -> Tensor:
        """delta^T M h for each of k deltas: h (N, d_in), delta (N, d_out) -> (k, n, N)."""
        if self.on_input:
            return _row_dots(h @ self.matrix, torch.stack(deltas, dim=1))
        return torch.cat([_row_dots(delta @ self.matrix, h.unsqueeze(1)) for delta in deltas])


def _row_dots(stacked: Tensor, x: Tensor) -> Tensor:
    """Dot products, float32 at least: stacked (N, n d), x (N, k, d) -> (k, n, N), by batched products."""
    dots = wide(x.new_empty(len(x), x.shape[1], stacked.shape[1] // x.shape[2]))
    at_a_time = _WIDENED.get(x.device.type, _WIDENED["cpu"]) // stacked.shape[1]
    rows = max(1, len(x) if x.dtype == dots.dtype else at_a_time)
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        each = wide(stacked[part]).unflatten(1, (-1, x.shape[2])).transpose(1, 2)
        torch.bmm(wide(x[part]), each, out=dots[part])
    return dots.permute(1, 2, 0)


_WIDENED = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Numbers that are widened at a time: what stays in the cache of a core, or fills a card."""

PREFIX_PAYS = 0.18
"""Share of the blocks a backward passes through (twice, for `exact`) from which a prompt without gradient pays for the
second, smaller pass through the trunk that it takes. Measured on two CPU cores, half of each row prompt."""


class PathScorer:
    """Scores batches along fixed directions.

    `apart`: each by products of its own, with the bits that it has alone, whichever are beside it.
    """

    def __init__(
        self,
        scoring: ScoringModel,
        directions: list[Direction],
        estimator: Estimator,
        window: int,
        *,
        apart: bool = False,
    ) -> None:
        self.scoring, self.estimator, self.window = scoring, estimator, window
        self.count = len(directions)
        passes = 2 if estimator == "exact" else 1
        self.splits_prompt = passes * scoring.layers / scoring.depth >= PREFIX_PAYS
        self.values: dict[int, tuple[int, Tensor]] = {}
        if estimator == "published":
            self.values = _value_maps(scoring)
        self.stacks = [
            [
                _stack([d[i] for d in group], estimator == "exact" or i in self.values)
                for group in ([[d] for d in directions] if apart else [directions])
            ]
            for i in range(len(scoring.maps))
        ]

    def settle(self) -> None:
        """Compute as the model does from here on (`ScoringModel.settle`)."""
        self.scoring.settle()
        self.stacks = [
            [replace(stack, matrix=stack.matrix.to(m.bare.dtype)) for stack in stacks]
            for m, stacks in zip(self.scoring.maps, self.stacks, strict=True)
        ]

    def score(self, batch: Batch) -> Signals:
        """Signals of the N response tokens of a batch."""
        scoring = self.scoring
        if not (self.splits_prompt or batch.pairs):
            batch = replace(batch, start=0)
        ids = torch.from_numpy(batch.input_ids).to(scoring.device)
        scoring.tape.window = self.window if self.estimator == "published" else 0
        scoring.tape.keep_cross = self.estimator == "exact"
        with scoring.graph(ids, batch.start, pairs=batch.pairs) as hidden:
            losses, grad = loss_gradient(scoring, hidden, batch)
            chosen = Selection(positions(batch, hidden.device), hidden.shape[:2].numel())
            total = losses.nll.new_zeros(self.count, len(chosen.positions))
            causal = torch.zeros_like(total)
            if self.estimator == "published":
                self._published(hidden, grad, chosen, total, causal)
            else:
                self._exact(hidden, grad, chosen, total, causal)
                total -= causal
        return Signals(losses.nll, losses.entropy, total, causal)

    def _contract(self, index: int, h: Tensor, deltas: list[Tensor]) -> Tensor:
        """As `_Stack.contract`, along all directions."""
        found = [stack.contract(h, deltas) for stack in self.stacks[index]]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _published(self, hidden: Tensor, grad: Tensor, chosen: Selection, total: Tensor, causal: Tensor) -> None:
        def contract(index: int, h: Tensor, delta: Tensor, where: Tensor | None) -> None:
            if index not in self.values:
                places, (own, error) = chosen.rows(where, h, delta)
                _add(total, places, self._contract(index, own, [error])[0])
            else:
                block, rows = self.values[index]
                received = torch.zeros_like(delta)
                received[:, rows] = self._propagate(block, delta[:, rows].unflatten(0, hidden.shape[:2])).flatten(0, 1)
                _, (own, error, passed) = chosen.rows(where, h, delta, received)
                both = self._contract(index, own, [error, passed])
                _add(total, None, both[0])
                _add(causal, None, both[1])
            self.scoring.release(index)

        self.scoring.backward([hidden], [grad], contract)

    def _propagate(self, block: int, delta: Tensor) -> Tensor:
        """Sum over k of A[k, p] delta_k within the window (Eq. 9): delta (B, T, d) -> (B, T, d)."""
        received = torch.zeros_like(delta)
        for first, last, start, attention in self.scoring.tape.calls[block].band:
            received[:, start:last] += attention.transpose(1, 2) @ delta[:, first:last]
        return received

    def _exact(self, hidden: Tensor, grad: Tensor, chosen: Selection, total: Tensor, causal: Tensor) -> None:
        totals: dict[int, Tensor] = {}

        def keep(index: int, _: Tensor, delta: Tensor, where: Tensor | None) -> None:
            totals[index] = chosen.rows(where, delta)[1][0]

        def contract(index: int, h: Tensor, delta: Tensor, where: Tensor | None) -> None:
            places, (own, crossed) = chosen.rows(where, h, delta)
            both = self._contract(index, own, [totals.pop(index), crossed])
            _add(total, places, both[0])
            _add(causal, places, both[1])
            self.scoring.release(index)

        scoring = self.scoring
        scoring.backward([hidden], [grad], keep, again=True)
        scoring.tape.mode = "own"
        pairs = [
            (x, crossed)
            for call in scoring.tape.calls
            for x, crossed in ((call.key, call.cross_key), (call.value, call.cross_value))
            if crossed is not None and x.requires_grad
        ]
        scoring.backward([x for x, _ in pairs], [crossed for _, crossed in pairs], contract)
        for index, delta in totals.items():
            # Above the last attention nothing crosses positions: these maps have a total alone.
            h, where = scoring.input(index)
            places, (own,) = chosen.rows(where, h)
            _add(total, places, self._contract(index, own, [delta])[0])


def _add(sums: Tensor, places: Tensor | None, parts: Tensor) -> None:
    """Add parts (n, k), of whatever device, to sums (n, N) at k of the N tokens, or at all of them."""
    parts = parts.to(sums.device)
    if places is None:
        sums.add_(parts)
    else:
        sums.index_add_(1, places.to(sums.device), parts)


def _stack(matrices: list[Tensor], on_input: bool) -> _Stack:
    if on_input or matrices[0].shape[0] <= matrices[0].shape[1]:
        return _Stack(torch.cat([m.t() for m in matrices], dim=1).contiguous(), True)
    return _Stack(torch.cat(matrices, dim=1).contiguous(), False)


def _value_maps(scoring: ScoringModel) -> dict[int, tuple[int, Tensor]]:
    found = {}
    for block, rows in enumerate(find_value_rows(scoring)):
        if isinstance(rows, str):
            raise ModelError(
                f"--estimator published needs each block's value projection: {rows}. Use --estimator exact."
            )
        found[rows[0]] = (block, rows[1])
    return found
