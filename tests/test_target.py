from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from tiny import make_row, tiny_model, tiny_rows
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from alphatoken_curate.capture import ScoringModel
from alphatoken_curate.losses import Weigh
from alphatoken_curate.plan import Batch, collate, plan_batches
from alphatoken_curate.target import target_gradient
from alphatoken_curate.tokens import AnyRow, PairRow, TokenRow

FAMILIES = ["llama", "gpt2", "phi3", "gemma2"]
LAYERS = 3
BUDGETS = (1, 45, 10_000)

pytestmark = pytest.mark.usefixtures("one_thread", "all_float64")


def pairs() -> list[AnyRow]:
    """Branches that share a long prompt, a prompt of one token, and nothing."""
    rows = tiny_rows()
    ids = rows[0].input_ids.tolist()
    return [
        PairRow(chosen=rows[0], rejected=make_row(0, [*ids[:11], 5, 7, 9], [(11, 14)])),
        PairRow(chosen=rows[1], rejected=make_row(1, [int(rows[1].input_ids[0]), 30], [(1, 2)])),
        PairRow(chosen=rows[2], rejected=rows[4]),
    ]


def signed(batch: Batch, nll: Tensor) -> Tensor:
    """As preference data weigh: above 0 for chosen and below for rejected, by a factor that depends on the losses."""
    totals = torch.bincount(torch.from_numpy(batch.row), nll)
    omega = torch.sigmoid((totals[0::2] - totals[1::2]) / 10)
    return torch.stack([omega, -omega], dim=1).flatten()[torch.from_numpy(batch.row)]


def token_losses(model: object, row: TokenRow) -> Tensor:
    return oracles.losses(
        model, torch.from_numpy(row.input_ids.astype(np.int64)), np.flatnonzero(row.response).tolist()
    )


def by_autograd(family: str, rows: list[AnyRow]) -> dict[str, Tensor]:
    """The gradient on the weights of the same loss, written down row by row."""
    model = oracles.eager(tiny_model(family)).requires_grad_(True)
    maps = oracles.linear_maps(model, LAYERS)
    terms = []
    for row in rows:
        if isinstance(row, PairRow):
            chosen, rejected = token_losses(model, row.chosen), token_losses(model, row.rejected)
            omega = torch.sigmoid((chosen.sum() - rejected.sum()) / 10).detach()
            terms += [omega * chosen, -omega * rejected]
        else:
            terms.append(token_losses(model, row))
    grads = torch.autograd.grad(torch.cat(terms).mean(), [m.weight for m in maps.values()])
    return {n: g.t() if isinstance(m, Conv1D) else g for (n, m), g in zip(maps.items(), grads, strict=True)}


def assert_equal(scoring: ScoringModel, found: list[Tensor], wanted: dict[str, Tensor]) -> None:
    for m, g in zip(scoring.maps, found, strict=True):
        assert ((g - wanted[m.name]).abs().max() / wanted[m.name].abs().max()).item() < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "weigh"), [(tiny_rows(), None), (pairs(), signed)])
def test_over_all_positions_it_is_the_gradient_of_the_weighted_mean_loss(
    family: str, rows: list[AnyRow], weigh: Weigh | None
) -> None:
    scoring, wanted = ScoringModel(tiny_model(family), LAYERS), by_autograd(family, rows)
    for budget in BUDGETS:
        batches = [collate(rows, indices) for indices in plan_batches(rows, budget)]
        assert budget > 1 or any(batch.start for batch in batches)
        assert_equal(scoring, target_gradient(scoring, batches, all_positions=True, weigh=weigh), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weigh", [None, signed])
def test_published_sums_outer_products_over_response_positions(family: str, weigh: Weigh | None) -> None:
    """Position by position from plain hooks, on the error signals of each branch's weighted loss."""
    rows = pairs()
    model = oracles.eager(tiny_model(family)).requires_grad_(True)
    maps = oracles.linear_maps(model, LAYERS)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in maps.items():
        module.register_forward_hook(lambda _, x, z, n=name: seen.__setitem__(n, (x[0].detach()[0], z)))
    wanted = {name: torch.zeros_like(oracles.weight_of(module)) for name, module in maps.items()}
    tokens = 0
    for row in rows:
        assert isinstance(row, PairRow)
        margin = token_losses(model, row.chosen).sum() - token_losses(model, row.rejected).sum()
        omega = torch.sigmoid(margin / 10).item()
        for sequence, weight in ((row.chosen, omega), (row.rejected, -omega)):
            total = token_losses(model, sequence).sum() * (1 if weigh is None else weight)
            grads = torch.autograd.grad(total, [seen[name][1] for name in maps])
            for name, delta in zip(maps, grads, strict=True):
                for t in np.flatnonzero(sequence.response):
                    wanted[name] += torch.outer(delta[0, t - 1], seen[name][0][t - 1])
            tokens += int(sequence.response.sum())
    scoring = ScoringModel(tiny_model(family), LAYERS)
    for budget in BUDGETS:
        batches = [collate(rows, indices) for indices in plan_batches(rows, budget)]
        found = target_gradient(scoring, batches, all_positions=False, weigh=weigh)
        assert_equal(scoring, found, {name: total / tokens for name, total in wanted.items()})
