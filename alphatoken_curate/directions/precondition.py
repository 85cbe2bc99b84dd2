"""Directions scaled by the curvature of training: Adam's second moments, K-FAC and EK-FAC.

The curvature is of E[vec(g_u) vec(g_u)^T], u a unit (a row, or a pair of branches) and g_u (d_out, d_in) the gradient
of its loss, sum of weight * nll over its response tokens: g_u = sum over positions s of delta_s h_s^T.

* `adam`: its diagonal, v = E[g_u^2]; a direction G becomes G / (sqrt(v) + eps).
* `kfac` (Martens and Grosse 2015, arXiv 1503.05671; summed over positions as `expand` of Eschenhagen et al. 2023,
  arXiv 2311.00636): positions are taken as independent of each other, and h as independent of delta, so that with vec
  stacking columns
      E[vec(g_u) vec(g_u)^T] ~ E[sum_s (h_s h_s^T) (x) (delta_s delta_s^T)] ~ A (x) S,
      A = mean over all positions of all units of h h^T, S = mean over units of the sum over positions of delta delta^T
  (there are as many terms in a unit's sum as positions, so no further constant is left). Positions are those up to a
  sequence's last predicting one, the prompt's among them, and of an expert those it was given; padding never counts.
  G becomes (A (x) S + damping * mean eigenvalue * I)^-1 vec(G), solved in the eigenbases U_A and U_S.
* `ekfac` (George et al. 2018, arXiv 1806.03884): the same bases, with the exact second moments along them,
  E[(U_S^T g_u U_A)^2], in place of the products of eigenvalues. It takes a second pass. `astra` begins with it.

Of a mixture of experts some may get no gradient from any row, and be needed by the target all the same. Such an expert
takes the mean of those in its parameter that have one: v; A over all their positions, and the mean of their S, which
`ekfac` too goes by there.

Everything is summed in float32 at least; eigenvectors are found, and quotients taken, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from alphatoken_curate.directions.losses import Weigh, loss_gradient
from alphatoken_curate.directions.selection import Selection
from alphatoken_curate.engine.blocks import LinearMap
from alphatoken_curate.engine.capture import Direction, OnDelta, ScoringModel
from alphatoken_curate.errors import InputError
from alphatoken_curate.tokens.plan import Batch

Batches = Callable[[], Iterable[Batch]]
"""Gives the same batches each time it is called: `ekfac` goes over them twice."""

_EKFAC_PARTS = ("input_vectors", "output_vectors", "second_moment")

_PARTS: dict[str, tuple[str, ...]] = {
    "adam": ("second_moment",),
    "kfac": ("input_vectors", "input_values", "output_vectors", "output_values"),
    "ekfac": _EKFAC_PARTS,
    "astra": _EKFAC_PARTS,
}
"""What is stored for each linear map: second_moment (d_out, d_in), for `ekfac` in the eigenbases; eigenvectors as the
columns of input_vectors (d_in, d_in) and output_vectors (d_out, d_out); eigenvalues (d_in,) and (d_out,)."""


_LENT = "lent"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """Sums over `units`, of each linear map: h h^T (d_in, d_in) over `seen` positions, delta delta^T (d_out, d_out)."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    seen: list[int]
    units: int


@dataclass(frozen=True, slots=True, eq=False)
class _Basis:
    """Eigenvectors, as columns (d, d), and eigenvalues (d,) of one symmetric matrix."""

    vectors: Tensor
    values: Tensor


def estimate(
    kind: str,
    scoring: ScoringModel,
    batches: Batches,
    weigh: Weigh | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Tensor]:
    """The curvature of S over some rows, as tensors to be stored: `<parameter>.<part>`, float32 at least.

    `kind` is adam (part second_moment), kfac (input_vectors, input_values, output_vectors, output_values), ekfac or
    astra (input_vectors, output_vectors, second_moment). `weigh` makes a unit's loss of its token losses; None adds
    them up. `note` is told of experts without a gradient, which take the others' curvature.
    Raises InputError where the gradient of the rows is zero everywhere, or not finite.
    """
    if kind == "adam":
        return second_moments(kind, scoring, *moment_sums(scoring, batches(), weigh), note=note)
    found = factor_bases(kind, scoring, factor_sums(scoring, batches(), weigh), note)
    if kind == "kfac":
        return found
    return second_moments(kind, scoring, *moment_sums(scoring, batches(), weigh, found), bases=found)


def precondition(
    kind: str, stored: Mapping[str, Tensor], scoring: ScoringModel, direction: Direction, *, eps: float, damping: float
) -> Direction:
    """A direction scaled by the curvature that `estimate` found; shapes, dtypes and devices stay as they are.

    `eps` (adam) is added to the root of second moments; `damping` (kfac, ekfac) to the curvature, in units of its mean
    eigenvalue in each linear map. Raises InputError where a map has no curvature at all but is part of the direction.
    """
    found = []
    for m, matrix in zip(scoring.maps, direction, strict=True):
        parts = {part: stored[f"{m.parameter}.{part}"].to(matrix.device) for part in _PARTS[kind]}
        curvature = _curvature(parts)
        if curvature.any():
            found.append(_scaled(kind, parts, curvature, matrix, eps if kind == "adam" else damping))
        elif matrix.any():
            raise InputError(
                f"--precondition {kind}: {m.parameter} has no gradient in any of the rows the curvature is estimated"
                " from. Raise --precondition-rows, or leave --precondition out."
            )
        else:
            found.append(torch.zeros_like(matrix))
    return found


def mean_eigenvalues(kind: str, stored: Mapping[str, Tensor], scoring: ScoringModel) -> list[float]:
    """Of the curvature of each linear map: what `damping` is in units of."""
    each = ({part: stored[f"{m.parameter}.{part}"] for part in _PARTS[kind]} for m in scoring.maps)
    return [float(_curvature(parts).mean()) for parts in each]


def _tell(kind: str, scoring: ScoringModel, lent: Sequence[int], note: Callable[[str], None]) -> None:
    """Say how many experts have the others' curvature, if any."""

    def experts(maps: Iterable[LinearMap]) -> int:
        return len({(m.module, m.expert) for m in maps if m.expert is not None})

    if lent:
        count = f"{experts(scoring.maps[i] for i in lent)} of {experts(scoring.maps)}"
        note(
            f"--precondition {kind}: {count} experts have no gradient in any of the rows the curvature is estimated"
            " from. They take the mean of the others of their block; a larger --precondition-rows may reach them."
        )


def _scaled(kind: str, parts: Mapping[str, Tensor], curvature: Tensor, matrix: Tensor, floor: float) -> Tensor:
    if kind == "adam":
        return (matrix / (curvature.sqrt() + floor)).to(matrix.dtype)
    inputs, outputs = parts["input_vectors"].to(matrix.dtype), parts["output_vectors"].to(matrix.dtype)
    solved = (outputs.t() @ matrix @ inputs) / (curvature + floor * curvature.mean())
    return outputs @ solved.to(matrix.dtype) @ inputs.t()


def _curvature(parts: Mapping[str, Tensor]) -> Tensor:
    """Second moments, or eigenvalues of A (x) S, as (d_out, d_in) float64."""
    if "second_moment" in parts:
        return parts["second_moment"].double()
    return torch.outer(parts["output_values"].double(), parts["input_values"].double())


def _named(scoring: ScoringModel, **parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Everything under the name it is stored by."""
    return {
        f"{m.parameter}.{part}": tensors[i].contiguous()
        for part, tensors in parts.items()
        for i, m in enumerate(scoring.maps)
    }


def _checked(kind: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Curvature that is finite, and not zero everywhere."""
    _finite(t for name, t in found.items() if name.endswith(".second_moment"))
    if not any(t.any() for name, t in found.items() if name.endswith((".second_moment", ".output_values"))):
        raise InputError(
            f"--precondition {kind}: the loss of the rows the curvature is estimated from has a gradient of zero"
            " everywhere. Raise --precondition-rows, or leave --precondition out."
        )
    return found


def _finite(tensors: Iterable[Tensor]) -> None:
    if not all(torch.isfinite(t).all() for t in tensors):
        raise InputError(
            "--precondition: the loss of the rows the curvature is estimated from has no finite gradient."
            " Leave --precondition out, or the rows that have none."
        )


def _backward(scoring: ScoringModel, batch: Batch, weigh: Weigh | None, on_delta: OnDelta) -> None:
    """Error signals of the weighted loss of a batch at every position, prompts included."""
    ids = torch.from_numpy(batch.input_ids).to(scoring.device)
    with scoring.graph(ids) as hidden:
        _, grad = loss_gradient(scoring, hidden, batch, weigh=weigh)
        scoring.backward([hidden], [grad], on_delta)


def moment_sums(
    scoring: ScoringModel,
    batches: Iterable[Batch],
    weigh: Weigh | None = None,
    bases: Mapping[str, Tensor] | None = None,
) -> tuple[list[Tensor], int]:
    """Sum over units of g_u^2, or of (U_S^T g_u U_A)^2 in the bases of `factor_bases`, and how many units they are.

    (d_out, d_in) for each linear map.
    """
    sums, units = scoring.zeros(), 0
    for planned in batches:
        batch = replace(planned, start=0)
        each = 2 if batch.pairs else 1
        size = each * batch.input_ids.shape[1]

        def accumulate(index: int, h: Tensor, delta: Tensor, where: Tensor | None, size: int = size) -> None:
            if bases is not None:
                name = scoring.maps[index].parameter
                h, delta = h @ bases[f"{name}.input_vectors"], delta @ bases[f"{name}.output_vectors"]
            # Rows come in the order of their positions, so that those of a unit stand together.
            counts: int | list[int] = size if where is None else torch.bincount(where // size).tolist()
            for own, error in zip(h.split(counts), delta.split(counts), strict=True):
                gradient = error.t() @ own
                sums[index].addcmul_(gradient, gradient)
            scoring.release(index)

        _backward(scoring, batch, weigh, accumulate)
        units += len(batch.rows) // each
    return sums, units


def second_moments(
    kind: str,
    scoring: ScoringModel,
    sums: Sequence[Tensor],
    units: int,
    bases: Mapping[str, Tensor] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Tensor]:
    """The curvature that is stored, of `moment_sums` over all units: of `adam`, or in the `bases` of `ekfac`."""
    moments = [s.div_(max(units, 1)) for s in sums]
    if bases is None:
        _tell(kind, scoring, _lend_moments(scoring, moments), note)
        return _checked(kind, _named(scoring, second_moment=moments))
    for i in bases[_LENT].tolist():
        name = scoring.maps[i].parameter
        torch.outer(bases[f"{name}.output_values"], bases[f"{name}.input_values"], out=moments[i])
    kept = {name: tensor for name, tensor in bases.items() if name.endswith("_vectors")}
    return _checked(kind, kept | _named(scoring, second_moment=moments))


def factor_sums(scoring: ScoringModel, batches: Iterable[Batch], weigh: Weigh | None = None) -> Factors:
    """Sums of h h^T and of delta delta^T over the positions of some units."""
    inputs, outputs = _squares(scoring, 1), _squares(scoring, 0)
    seen, units = [0] * len(scoring.maps), 0
    for planned in batches:
        batch = replace(planned, start=0)
        real = Selection(_real_positions(batch, scoring.device), batch.input_ids.size)

        def accumulate(index: int, h: Tensor, delta: Tensor, where: Tensor | None, real: Selection = real) -> None:
            _, (own, error) = real.rows(where, h, delta)
            inputs[index].addmm_(own.t(), own)
            outputs[index].addmm_(error.t(), error)
            seen[index] += len(own)
            scoring.release(index)

        _backward(scoring, batch, weigh, accumulate)
        units += len(batch.rows) // (2 if batch.pairs else 1)
    return Factors(inputs=inputs, outputs=outputs, seen=seen, units=units)


def factor_bases(
    kind: str, scoring: ScoringModel, sums: Factors, note: Callable[[str], None] = lambda _: None
) -> dict[str, Tensor]:
    """Eigenvectors and eigenvalues of A and of S for each linear map, of sums over all units.

    For `kfac` they are the curvature that is stored. For the others it says besides, as `lent`, the indices of those
    maps that have the others' (int64). The lists of `sums` are emptied.
    """
    lent = _lend_factors(scoring, sums.inputs, sums.seen, sums.outputs)
    _tell(kind, scoring, lent, note)
    inputs, outputs = _eigen(sums.inputs, sums.seen), _eigen(sums.outputs, [sums.units] * len(sums.outputs))
    found = _named(
        scoring,
        input_vectors=[b.vectors for b in inputs],
        input_values=[b.values for b in inputs],
        output_vectors=[b.vectors for b in outputs],
        output_values=[b.values for b in outputs],
    )
    return _checked(kind, found) if kind == "kfac" else found | {_LENT: torch.tensor(lent, dtype=torch.int64)}


def _experts(scoring: ScoringModel, sums: Sequence[Tensor]) -> Iterator[tuple[list[int], list[int]]]:
    """Of each parameter of experts some of which have a gradient: those that have none, and those that have one."""
    alike: dict[tuple[nn.Module, str], list[int]] = {}
    for i, m in enumerate(scoring.maps):
        if m.expert is not None:
            alike.setdefault((m.module, m.slot), []).append(i)
    for indices in alike.values():
        without, others = ([i for i in indices if bool(sums[i].any()) == has] for has in (False, True))
        if without and others:
            yield without, others


def _lend_moments(scoring: ScoringModel, moments: Sequence[Tensor]) -> list[int]:
    """Give experts without a gradient the mean of the others' second moments; returns which those are."""
    lent = []
    for without, others in _experts(scoring, moments):
        mean = _total(moments, others).div_(len(others))
        for i in without:
            moments[i].copy_(mean)
        lent += without
    return lent


def _lend_factors(
    scoring: ScoringModel, inputs: Sequence[Tensor], seen: list[int], outputs: Sequence[Tensor]
) -> list[int]:
    """Likewise of sums of h h^T over `seen` positions, and of sums of delta delta^T."""
    lent = []
    for without, others in _experts(scoring, outputs):
        squares, errors = _total(inputs, others), _total(outputs, others).div_(len(others))
        for i in without:
            inputs[i].copy_(squares)
            outputs[i].copy_(errors)
            seen[i] = sum(seen[j] for j in others)
        lent += without
    return lent


def _total(tensors: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    total = torch.zeros_like(tensors[indices[0]])
    for i in indices:
        total += tensors[i]
    return total


def _squares(scoring: ScoringModel, side: int) -> list[Tensor]:
    """Zeros (d, d) for each linear map, d its d_out (side 0) or d_in (side 1)."""
    return [
        torch.zeros(w.shape[side], w.shape[side], dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
        for w in (m.weight for m in scoring.maps)
    ]


def _real_positions(batch: Batch, device: torch.device) -> Tensor:
    """Flat positions in (B, T) up to the last predicting one of each sequence: what follows has h, but no delta."""
    rows, width = batch.input_ids.shape
    last = np.full(rows, -1)
    np.maximum.at(last, batch.row, batch.position)
    return torch.from_numpy(np.flatnonzero(np.arange(width) <= last[:, None])).to(device)


def _eigen(sums: list[Tensor], counts: Sequence[int]) -> list[_Basis]:
    """Eigenbases of sums / counts. The list is emptied on the way, so that memory holds each matrix once."""
    _finite(sums)
    found = []
    for count in counts:
        matrix = sums.pop(0)
        values, vectors = torch.linalg.eigh(matrix.double() / max(count, 1))
        # Rounding leaves eigenvalues along directions in which nothing was seen a little below 0.
        found.append(_Basis(vectors.to(matrix.dtype), values.clamp_(min=0).to(matrix.dtype)))
    return found
