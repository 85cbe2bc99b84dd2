"""What EK-FAC leaves of a solution, found by iterations: (H + lambda) x = v, H the Gauss-Newton matrix of the rows.

EK-FAC solves as if maps were independent of each other, and inputs of errors. ASTRA (arXiv 2507.14740) goes on from
there by a Neumann series, x <- x - alpha P^-1 ((H + lambda) x - v) over sampled batches, P the damped curvature of
EK-FAC. Here each product is over all of the same rows, so that steps can be those of conjugate gradients, which P
preconditions (Hestenes and Stiefel 1952): of all that as many products can make of P^-1 v, the x nearest to the
solution in the norm of H + lambda. No alpha is to be chosen, and nothing diverges. The first iterate is EK-FAC's own at
its best length. Each v is solved by itself: before it has converged, x is no linear function of v.

Units: what EK-FAC approximates are mean squares of a unit's gradient. A row's gradient is the mean of its n response
tokens', whose square is 1 / n of the mean of theirs where labels are the model's own draws; in H, the curvature of that
mean loss, n tokens count as one. So H is taken times the mean of 1 / n over rows, one number, and lambda is P's own:
--precondition-damping times the mean eigenvalue of EK-FAC's curvature, map by map. Of pairs H has these units.

An expert that no row reaches has no part in H, and keeps what P makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphatoken_curate.directions.precondition import mean_eigenvalues, precondition
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.errors import InputError, ModelError

KIND = "astra"

AGREEMENT = {torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Of |x| |H x|, how far <x, H x> by forward mode alone and with a backward may be apart, by dtype of the head; else
1e-3."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Iterate:
    """Where the solution for one v is; before the first iteration `x` is what EK-FAC gives.

    `left`: v - (H + lambda) x, as of conjugate gradients, which begin at 0. `along`: where they go next, of length 1.
    `norm`: |v|. `residuals`: |v - (H + lambda) x| / |v| of EK-FAC, then of each iterate.
    """

    x: Direction
    left: Direction
    along: Direction
    norm: float
    residuals: tuple[float, ...] = ()


class Solver:
    """The damped curvature of EK-FAC, and the steps of conjugate gradients by it."""

    def __init__(self, scoring: ScoringModel, stored: Mapping[str, Tensor], damping: float) -> None:
        self._scoring, self._stored, self._damping = scoring, scoring.near(stored), damping
        self._lambdas = [damping * mean for mean in mean_eigenvalues(KIND, self._stored, scoring)]

    def begin(self, v: Direction) -> Iterate:
        """What EK-FAC gives. Raises InputError where a map has no curvature but is part of v."""
        x = self._solved(v)
        return Iterate(x=x, left=v, along=_unit(x), norm=_norm(v))

    def step(self, at: Iterate, product: Direction, form: float) -> Iterate:
        """The next iterate, from H times what `at` goes along, and <x, H x> of that by forward mode alone.

        Raises ModelError where these two do not agree, InputError where numbers do not last.
        """
        self._check(at.along, product, form)
        if not at.residuals:
            at = self._from_nothing(at, product)
        applied = self._damped(at.along, product)
        bends = _dot(at.along, applied)
        if not (math.isfinite(bends) and bends >= 0):
            raise self._diverged(at)
        length = _dot(at.left, at.along) / bends if bends else 0.0
        left = _moved(at.left, applied, -length)
        solved = self._solved(left)
        residual = _norm(left) / at.norm if at.norm else 0.0
        if not math.isfinite(residual + _norm(solved)):
            raise self._diverged(at)
        return replace(
            at,
            x=_moved(at.x, at.along, length),
            left=left,
            along=_unit(_moved(solved, at.along, -_dot(solved, applied) / bends if bends else 0.0)),
            residuals=(*at.residuals, residual),
        )

    def _from_nothing(self, at: Iterate, product: Direction) -> Iterate:
        """From x = 0, but for experts that no row reaches: there from EK-FAC, and no further."""
        maps = self._scoring.maps
        alone = [m.expert is not None and not h.any() for m, h in zip(maps, product, strict=True)]

        def kept(found: Direction, which: bool) -> Direction:
            return [x if out == which else torch.zeros_like(x) for x, out in zip(found, alone, strict=True)]

        x, left, along = kept(at.x, False), kept(at.left, False), kept(at.along, False)
        norm = _norm(left)
        off = _norm(_moved(left, self._damped(along, product), -_norm(x) / (_norm(along) or 1.0)))
        residuals = (off / norm if norm else 0.0,)
        return Iterate(x=kept(at.x, True), left=left, along=along, norm=norm, residuals=residuals)

    def _damped(self, x: Direction, product: Direction) -> Direction:
        """(H + lambda) x; 0 in a map without curvature, where x is 0."""
        each = zip(x, product, self._lambdas, strict=True)
        return [h + by * own if by else torch.zeros_like(h) for own, h, by in each]

    def _solved(self, v: Direction) -> Direction:
        return precondition(KIND, self._stored, self._scoring, v, eps=0.0, damping=self._damping)

    def _check(self, x: Direction, product: Direction, form: float) -> None:
        found, size = _dot(x, product), _norm(x) * _norm(product)
        # Not `error > allowed`: NaN must not pass. What is not finite is told as that.
        if math.isfinite(size) and not abs(found - form) <= AGREEMENT.get(self._scoring.logits_dtype, 1e-3) * size:
            raise ModelError(
                f"{type(self._scoring.model).__name__}: --precondition {KIND} misses a part of it: the curvature along"
                f" a direction is {form:.6g} by forward mode, and {found:.6g} with a backward. Use --precondition"
                " ekfac."
            )

    def _diverged(self, at: Iterate) -> InputError:
        return InputError(
            f"--precondition {KIND}: iteration {len(at.residuals)} does not come to finite numbers. Raise"
            f" --precondition-damping, which is {self._damping:g}, or give --precondition ekfac."
        )


def _dot(one: Direction, other: Direction) -> float:
    """Summed in float64."""
    pairs = ((a.flatten().double(), b.flatten().double()) for a, b in zip(one, other, strict=True))
    return sum(float(torch.linalg.vecdot(a, b)) for a, b in pairs)


def _norm(x: Direction) -> float:
    return math.sqrt(_dot(x, x))


def _unit(x: Direction) -> Direction:
    """Of length 1: what is narrow in a model would overflow by the size of a solution."""
    norm = _norm(x)
    return [a / norm for a in x] if norm else x


def _moved(x: Direction, along: Direction, by: float) -> Direction:
    return [a.add(b, alpha=by) for a, b in zip(x, along, strict=True)]
