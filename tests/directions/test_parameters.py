"""Gradients and Fisher of what is no linear map, against autograd on a whole model, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from directed import ids_of, places
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.directions.parameters import rest_fisher, rest_gradient
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.tokens.draws import inverse_transform, keyed_uniform
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches

pytestmark = pytest.mark.usefixtures("all_float64")
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_oss"])


def gradient(model: Any, names: list[str], ids: Tensor, at: list[int], weights: Tensor | None = None) -> list[Tensor]:
    """Of the (weighed) sum of a row's losses, in each parameter."""
    held = dict(model.named_parameters())
    losses = oracles.losses(model, ids, at)
    total = losses.sum() if weights is None else (losses * weights).sum()
    found = torch.autograd.grad(total, [held[name] for name in names], allow_unused=True)
    return [torch.zeros_like(held[name]) if g is None else g for name, g in zip(names, found, strict=True)]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    largest = max(float(w.abs().max()) for w in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < 1e-10 * largest


@pytest.mark.one_in(6)
@FAMILIES
@pytest.mark.parametrize("layers", [2, "all"])
def test_the_gradient_of_the_mean_loss(family: str, layers: Any) -> None:
    plain, rows = oracles.eager(tiny_model(family)).requires_grad_(True), tiny_rows()
    scoring = ScoringModel(tiny_model(family), layers, "all")
    tokens = sum(len(places(row)) for row in rows)
    wanted = [torch.zeros_like(p) for p in scoring.rest.values()]
    for row in rows:
        for total, g in zip(wanted, gradient(plain, list(scoring.rest), ids_of(row), places(row)), strict=True):
            total.add_(g, alpha=1 / tokens)
    for budget in (1, 60):
        close(rest_gradient(scoring, [collate(rows, each) for each in plan_batches(rows, budget)]), wanted)


def test_weights_multiply_each_tokens_gradient() -> None:
    plain, rows = oracles.eager(tiny_model("qwen2")).requires_grad_(True), tiny_rows()[:2]
    scoring = ScoringModel(tiny_model("qwen2"), "all", "all")

    def weigh(batch: Batch, nll: Tensor) -> Tensor:
        return nll.square() * (1 + torch.from_numpy(batch.row))

    batch = collate(rows, [0, 1])
    found = rest_gradient(scoring, [batch], weigh)
    wanted = [torch.zeros_like(p) for p in scoring.rest.values()]
    for i, row in enumerate(rows):
        weights = oracles.losses(plain, ids_of(row), places(row)).detach().square() * (1 + i)
        for total, g in zip(
            wanted, gradient(plain, list(scoring.rest), ids_of(row), places(row), weights), strict=True
        ):
            total.add_(g, alpha=1 / len(batch.target))
    close(found, wanted)


@pytest.mark.one_in(5)
@FAMILIES
def test_the_fisher_is_the_mean_square_of_a_rows_gradient(family: str) -> None:
    plain, rows = oracles.eager(tiny_model(family)).requires_grad_(True), tiny_rows()
    scoring, told = ScoringModel(tiny_model(family), 2, "all"), []
    for sampled in (False, True):
        wanted = [torch.zeros_like(p) for p in scoring.rest.values()]
        for row in rows:
            ids, at = ids_of(row), places(row)
            drawn = ids.clone()
            if sampled:
                logits = plain(input_ids=ids[None], use_cache=False).logits[0, [t - 1 for t in at]].detach()
                uniforms = torch.from_numpy(keyed_uniform(7, np.full(len(at), row.row_id), np.array(at)))
                drawn[at] = inverse_transform(torch.softmax(logits, -1), uniforms)
            logits = plain(input_ids=ids[None], use_cache=False).logits[0]
            loss = -torch.stack([torch.log_softmax(logits[t - 1], -1)[drawn[t]] for t in at]).sum()
            held = dict(plain.named_parameters())
            grads = torch.autograd.grad(loss, [held[n] for n in scoring.rest], allow_unused=True)
            for total, g in zip(wanted, grads, strict=True):
                total.add_(0 if g is None else g.square(), alpha=1 / len(rows))
        close(rest_fisher(scoring, rows, sampled=sampled, seed=7, done=told.append), wanted)
    assert told == 2 * [len(row.input_ids) for row in rows]


def test_what_is_left_is_every_parameter_once_but_for_the_blocks_below() -> None:
    model = tiny_model("qwen2")
    scoring = ScoringModel(model, 2, "all")
    assert not ScoringModel(tiny_model("qwen2"), 2).rest
    mapped = {f"{m.owner}.{m.slot}" for m in scoring.maps}
    everything = {name for name, _ in model.named_parameters()}
    below = {name for name in everything if name.startswith(("model.layers.0.", "model.layers.1."))}
    assert set(scoring.rest) == everything - mapped - below and len(scoring.names) == len(set(scoring.names))
    assert "model.embed_tokens.weight" in scoring.rest and "lm_head.weight" not in scoring.rest
