"""What `--parameters all` adds to the linear maps of S: biases and norms, embeddings, final norm and head.

These parameters hold no matrix that multiplies one vector for each position, so their gradients are autograd's own, on
the parameters themselves. A tied weight is one parameter, whose gradient holds both its uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from alphatoken_curate.directions.fisher import drawn_uniforms
from alphatoken_curate.directions.losses import Weigh, at, loss_gradient, positions, token_losses
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.precision import wide_zeros
from alphatoken_curate.tokens.plan import Batch, collate
from alphatoken_curate.tokens.tokenise import TokenRow


def rest_zeros(scoring: ScoringModel) -> Direction:
    """A tensor of zeros for each parameter of `ScoringModel.rest`, as `ScoringModel.zeros` has them for linear maps."""
    return [wide_zeros(p) for p in scoring.rest.values()]


def rest_gradient(scoring: ScoringModel, batches: Iterable[Batch], weigh: Weigh | None = None) -> Direction:
    """Gradient of the mean response loss in each parameter of `ScoringModel.rest`, in nats per unit of it.

    With `weigh` each token's gradient is multiplied by its weight first; the sum is still divided by their number.
    """
    sums, tokens = rest_sums(scoring, batches, weigh)
    return [s.div_(tokens) for s in sums]


def rest_sums(scoring: ScoringModel, batches: Iterable[Batch], weigh: Weigh | None = None) -> tuple[Direction, int]:
    """The same, summed over response tokens in place of their mean, and how many they are."""
    sums, tokens = rest_zeros(scoring), 0
    for batch in batches:
        for total, grad in zip(sums, rest_of_batch(scoring, batch, weigh), strict=True):
            total.add_(grad)
        tokens += len(batch.target)
    return sums, tokens


def rest_fisher(
    scoring: ScoringModel,
    rows: Sequence[TokenRow],
    *,
    sampled: bool,
    seed: int,
    done: Callable[[int], None] = lambda _: None,
) -> Direction:
    """Fisher diagonal of each parameter of `ScoringModel.rest`: the square of a row's gradient, mean over rows.

    Labels are drawn as `fisher.fisher_diagonal` draws them. Given the row's prefixes their gradients are independent
    and of mean zero, so that the square of their sum has the expectation of the sum of their squares. `done` is told
    the tokens of each row.
    """
    sums = rest_fisher_sums(scoring, rows, sampled=sampled, seed=seed, done=done)
    return [s.div_(len(rows)) for s in sums]


def rest_fisher_sums(
    scoring: ScoringModel,
    rows: Sequence[TokenRow],
    *,
    sampled: bool,
    seed: int,
    done: Callable[[int], None] = lambda _: None,
) -> Direction:
    """The same, summed over rows in place of their mean."""
    sums = rest_zeros(scoring)
    for index in range(len(rows)):
        batch = collate(rows, [index])
        uniforms = drawn_uniforms(rows, batch, seed) if sampled else None
        for total, grad in zip(sums, rest_of_batch(scoring, batch, uniforms=uniforms), strict=True):
            total.add_(grad.square())
        done(len(rows[index].input_ids))
    return sums


def rest_of_batch(
    scoring: ScoringModel, batch: Batch, weigh: Weigh | None = None, uniforms: Tensor | None = None
) -> Direction:
    """Gradient of the (weighed) sum of a batch's response losses in each parameter of `ScoringModel.rest`."""
    planned = replace(batch, start=0, pairs=False)
    rest = list(scoring.rest.values())
    ids = torch.from_numpy(planned.input_ids).to(scoring.device)
    with _trained(rest), scoring.graph(ids) as hidden:
        losses, grad = loss_gradient(scoring, hidden, planned, uniforms, weigh)
        weights = torch.ones_like(losses.nll) if weigh is None else weigh(planned, losses.nll)
        through_trunk = torch.autograd.grad(hidden, rest, grad, allow_unused=True)
        in_head = _head_gradient(scoring, hidden.detach(), planned, weights, rest, uniforms)
    return [
        own if trunk is None else own.add_(trunk.to(own.dtype))
        for own, trunk in zip(in_head, through_trunk, strict=True)
    ]


def _head_gradient(
    scoring: ScoringModel,
    hidden: Tensor,
    batch: Batch,
    weights: Tensor,
    rest: Sequence[nn.Parameter],
    uniforms: Tensor | None,
) -> Direction:
    """Gradient of sum(weights * nll) in the parameters that the head itself uses, zero for the others."""
    chosen = at(hidden, positions(batch, hidden.device))
    found = [wide_zeros(p) for p in rest]

    def add(part: slice, error: Tensor) -> None:
        with torch.enable_grad():
            logits = scoring.head(chosen[part])
        weighed = (error * weights[part, None]).to(logits.dtype)
        for total, grad in zip(found, torch.autograd.grad(logits, rest, weighed, allow_unused=True), strict=True):
            if grad is not None:
                total.add_(grad.to(total.dtype))

    targets = torch.from_numpy(batch.target).to(hidden.device)
    token_losses(
        scoring.head,
        chosen,
        targets,
        vocabulary=scoring.vocabulary,
        gradient=False,
        uniforms=uniforms,
        on_error=add,
    )
    return found


@contextmanager
def _trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters ask for a gradient inside this block."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
