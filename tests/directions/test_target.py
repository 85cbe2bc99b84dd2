from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from tiny import make_row, tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.directions.losses import Weigh
from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow

FAMILIES = ["llama", "gpt2", "phi3", "gemma2", "mixtral", "gpt_oss"]
LAYERS = 3
BUDGETS = (1, 45, 10_000)

pytestmark = pytest.mark.usefixtures("all_float64")


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
    terms = []
    for row in rows:
        if isinstance(row, PairRow):
            chosen, rejected = token_losses(model, row.chosen), token_losses(model, row.rejected)
            omega = torch.sigmoid((chosen.sum() - rejected.sum()) / 10).detach()
            terms += [omega * chosen, -omega * rejected]
        else:
            terms.append(token_losses(model, row))
    return oracles.weight_gradients(model, LAYERS, torch.cat(terms).mean())


def assert_equal(scoring: ScoringModel, found: list[Tensor], wanted: dict[str, Tensor]) -> None:
    for m, g in zip(scoring.maps, found, strict=True):
        assert ((g - wanted[m.name]).abs().max() / wanted[m.name].abs().max()).item() < 1e-10


@pytest.mark.one_in(8)
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


@pytest.mark.one_in(7)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("weigh", [None, signed])
def test_published_sums_outer_products_over_response_positions(family: str, weigh: Weigh | None) -> None:
    """Position by position from plain hooks, on the error signals of each branch's weighted loss."""
    rows = pairs()
    model = oracles.eager(tiny_model(family)).requires_grad_(True)
    wanted = {name: torch.zeros_like(g) for name, g in by_autograd(family, rows[:1]).items()}
    tokens = 0
    for row in rows:
        assert isinstance(row, PairRow)
        margin = token_losses(model, row.chosen).sum() - token_losses(model, row.rejected).sum()
        omega = torch.sigmoid(margin / 10).item()
        for sequence, weight in ((row.chosen, omega), (row.rejected, -omega)):
            seen: list[oracles.Product] = []
            with oracles.products(model, LAYERS, lambda product, seen=seen: seen.append(product) or product.z):
                total = token_losses(model, sequence).sum() * (1 if weigh is None else weight)
            answers = torch.from_numpy(np.flatnonzero(sequence.response) - 1)
            for product, grad in zip(seen, torch.autograd.grad(total, [p.z for p in seen]), strict=True):
                for name, where, h, delta in product.rows(grad):
                    mine = torch.isin(where, answers)
                    wanted[name] += delta[mine].t() @ h[mine]
            tokens += int(sequence.response.sum())
    scoring = ScoringModel(tiny_model(family), LAYERS)
    for budget in BUDGETS:
        batches = [collate(rows, indices) for indices in plan_batches(rows, budget)]
        found = target_gradient(scoring, batches, all_positions=False, weigh=weigh)
        assert_equal(scoring, found, {name: total / tokens for name, total in wanted.items()})
