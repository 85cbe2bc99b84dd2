"""Products with the Gauss-Newton matrix of training, over the linear maps of S: forward to the logits, bend, and back.

With J_t the derivative of the logits z_t of a response token by the weights of S, and p_t = softmax(z_t):

* of rows, each of which counts by its mean loss:     H x = mean over rows of mean over t of J_t^T B_t J_t x,
  B_t = diag(p_t) - p_t p_t^T, the second derivative of -log p_t by the logits, whatever the label;
* of pairs, whose loss is a function of one margin:   H x = mean over pairs of g <g, x>,
  g the gradient of the margin times the root of the loss's second derivative by it (`Weigh`: `Pairs.bend`).

It is the Hessian without what the curvature of the logits themselves adds, which vanishes where labels are as likely
as the model takes them to be. It is positive semidefinite, as the Hessian of a network is not: what solves by it
converges. J_t x comes of forward mode (`engine.moving`), of which J_t^T is a backward for each x; all x share both
forwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphatoken_curate.directions.losses import Weigh, at, chunk_rows, positions, row_means, token_losses
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.moving import Moving
from alphatoken_curate.engine.precision import narrow, wide
from alphatoken_curate.engine.tangents import dual, parts
from alphatoken_curate.tokens.plan import Batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Products:
    """Of some units, rows or pairs, and n directions x: sums over units.

    `along`: of H x, a Direction for each x, float32 at least. `forms`: of <x, H x> by forward mode alone, (n,) float64.
    `shares`: of 1 / (response tokens of a row); of a pair 1.
    """

    along: list[Direction]
    forms: Tensor
    units: int
    shares: float


def product_sums(
    scoring: ScoringModel, moving: Moving, count: int, batches: Iterable[Batch], bend: Weigh | None = None
) -> Products:
    """Products with the `count` directions that `moving` moves along; `bend` of pairs, None of rows.

    Raises NoTangentError where the model has no forward mode.
    """
    sums = [scoring.zeros() for _ in range(count)]
    forms = torch.zeros(count, dtype=torch.float64)
    units, shares = 0, 0.0
    for planned in batches:
        # Tangents of a prompt move the response, and branches of a pair run by themselves.
        batch = replace(planned, start=0, pairs=False)
        ids = torch.from_numpy(batch.input_ids).to(scoring.device)
        hidden, tangents = moving.hidden(ids)
        where = positions(batch, hidden.device)
        moved = [at(t, where) for t in tangents]
        if bend is None:
            back, found = _of_rows(scoring, batch, at(hidden, where), moved)
        else:
            back, found = _of_pairs(scoring, batch, at(hidden, where), moved, bend)
        del hidden, tangents, moved
        _backward(scoring, ids, where, back, sums)
        forms += found
        each = 2 if planned.pairs else 1
        units += len(batch.rows) // each
        shares += len(batch.rows) / 2 if planned.pairs else float((1 / batch.counts).sum())
    return Products(along=sums, forms=forms, units=units, shares=shares)


def _of_rows(
    scoring: ScoringModel, batch: Batch, hidden: Tensor, moved: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """What goes back into the last hidden states (N, D) of response tokens, for each tangent; <x, H x>, (n,)."""
    weights = row_means(batch, wide(hidden))[:, None]
    back, forms = [torch.empty_like(hidden) for _ in moved], torch.zeros(len(moved), dtype=torch.float64)
    # Logits, probabilities and what bends of one direction are held beside the tangents of all.
    size = max(1, chunk_rows(hidden.device, scoring.vocabulary, wide(hidden[:0]).dtype) // (3 + len(moved)))
    for first in range(0, len(hidden), size):
        part = slice(first, first + size)
        x = hidden[part].detach().requires_grad_()
        with torch.enable_grad():
            logits = scoring.head(x)
        with torch.no_grad():
            _, slopes = parts(scoring.head(dual(hidden[part], [t[part] for t in moved])))
        p = torch.softmax(wide(logits.detach()), dim=-1)
        for n, slope in enumerate(map(wide, slopes)):
            bent = (slope - torch.linalg.vecdot(p, slope)[:, None]).mul_(p).mul_(weights[part])
            forms[n] += float(torch.linalg.vecdot(bent, slope).double().sum())
            # What is narrow would lose small numbers.
            top = bent.abs().amax().clamp_min(1e-30) if narrow(logits.dtype) else 1.0
            sent = (bent / top).to(logits.dtype)
            back[n][part] = torch.autograd.grad(logits, x, sent, retain_graph=n + 1 < len(moved))[0] * top
    return back, forms


def _of_pairs(
    scoring: ScoringModel, batch: Batch, hidden: Tensor, moved: Sequence[Tensor], bend: Weigh
) -> tuple[list[Tensor], Tensor]:
    """The same of pairs."""
    target = torch.from_numpy(batch.target).to(hidden.device)
    losses = token_losses(
        scoring.head,
        hidden,
        target,
        vocabulary=scoring.vocabulary,
        gradient=True,
        logits_dtype=scoring.logits_dtype,
    )
    assert losses.grad is not None
    each = wide(losses.grad) * bend(batch, losses.nll)[:, None]
    pair = torch.from_numpy(batch.row // 2).to(hidden.device)
    of_pair = torch.arange(len(batch.rows) // 2, device=pair.device)[:, None] == pair  # a sum in a fixed order
    back, forms = [], []
    for t in moved:
        moves = of_pair.to(each.dtype) @ torch.linalg.vecdot(each, wide(t))
        forms.append(float(moves.double().square().sum()))
        back.append((each * moves[pair, None]).to(hidden.dtype))
    return back, torch.tensor(forms, dtype=torch.float64)


def _backward(
    scoring: ScoringModel, ids: Tensor, where: Tensor, back: Sequence[Tensor], sums: Sequence[Direction]
) -> None:
    """Add what goes back into each map of S, from the hidden states at some positions, to the sums of each."""
    with scoring.graph(ids) as hidden:
        for n, (each, into) in enumerate(zip(back, sums, strict=True)):
            last = n + 1 == len(back)

            def accumulate(
                index: int, h: Tensor, delta: Tensor, _: Tensor | None, into: Direction = into, last: bool = last
            ) -> None:
                into[index].addmm_(delta.t(), h)
                if last:
                    scoring.release(index)

            grad = torch.zeros_like(hidden)
            grad.flatten(0, 1)[where] = each
            scoring.backward([hidden], [grad], accumulate, again=not last)
