"""Influence against one gradient per token, finite differences and torch.func.jvp, which share no code with it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from directed import assert_close, by_gradients, by_name, directions, ids_of, influence_of, places, random_direction
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.engine import tangents
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.errors import ModelError
from alphatoken_curate.signals.influence import InfluenceScorer, make_scorer
from alphatoken_curate.tokens.plan import collate
from alphatoken_curate.tokens.tokenise import TokenRow

EXACT = 1e-10


@pytest.mark.one_in(9)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("layers", [2, "all"])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen2",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "opt",
        "falcon",
        "phi",
        "mixtral",
        "gpt_oss",
        "granite",
    ],
)
def test_every_parameter(family: str, layers: Any) -> None:
    """Embeddings (tied and not), norms, biases, experts, routers and head, with blocks below that stand still."""
    plain, rows = tiny_model(family), tiny_rows()[:4]
    scoring = ScoringModel(tiny_model(family), layers, "all")
    both = directions(scoring)
    found = influence_of(InfluenceScorer(scoring, both), rows, 60)
    for n, direction in enumerate(both):
        named = by_name(scoring, direction)
        below = sum(p.numel() for p in plain.parameters()) - sum(m.numel() for m in named.values())
        assert (below == 0) == (layers == "all")
        assert_close(
            torch.cat([x[n] for x in found]), torch.cat([by_gradients(plain, named, row) for row in rows]), EXACT
        )


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("parameters", ["linear", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_finite_difference_of_the_loss_and_torchs_own_jvp(family: str, parameters: Any) -> None:
    plain, row = oracles.eager(tiny_model(family)).requires_grad_(False), tiny_rows()[3]
    scoring = ScoringModel(tiny_model(family), "all", parameters)
    both = directions(scoring)
    found = influence_of(InfluenceScorer(scoring, both), [row], 60)[0]
    named = by_name(scoring, both[1])
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}

    def losses_of(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(_Losses(plain, row), {f"model.{k}": v for k, v in weights.items()}, ())

    def slope(step: float) -> Tensor:
        up, down = ({name: start[name] + h * m for name, m in named.items()} for h in (step, -step))
        return (losses_of(up) - losses_of(down)) / (2 * step)

    # Richardson: three steps, errors of the second and fourth order taken off.
    one, two, three = (slope(h) for h in (1e-4, 5e-5, 2.5e-5))
    assert_close(found[1], (64 * three - 20 * two + one) / 45, 1e-8)
    _, moved = torch.func.jvp(losses_of, ({name: start[name] for name in named},), (named,))
    assert_close(found[1], moved, EXACT)


class _Losses(torch.nn.Module):
    """The losses of a row's response tokens as a function of the weights."""

    def __init__(self, model: Any, row: TokenRow) -> None:
        super().__init__()
        self.model, self.row = model, row

    def forward(self) -> Tensor:
        return oracles.losses(self.model, ids_of(self.row), places(self.row))


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_it_is_direct_plus_upstream_and_sums_over_slices_of_layers(family: str) -> None:
    rows = tiny_rows()
    batch = collate(rows, range(len(rows)))
    scoring = ScoringModel(tiny_model(family), "all")
    both = directions(scoring)
    signals = make_scorer(scoring, both, "exact+influence", 32).score(batch)
    named = {m.name: d for m, d in zip(scoring.maps, both[0], strict=True)}
    for i, row in enumerate(rows):
        matrix = oracles.contraction_by_backwards(tiny_model(family), 4, named, ids_of(row), places(row))
        upstream = torch.stack([matrix[: t - 1, j].sum() for j, t in enumerate(places(row))])
        mine = torch.from_numpy(batch.row == i)
        assert signals.influence is not None and signals.direct is not None
        found = (signals.influence - signals.direct)[0, mine]
        assert (found - upstream).abs().max() < EXACT * matrix.abs().max()
    top = ScoringModel(tiny_model(family), 1)
    still = [[d if m.name in {x.name for x in top.maps} else 0 * d for m, d in zip(scoring.maps, both[0], strict=True)]]
    sliced = InfluenceScorer(scoring, still).score(batch).influence
    kept = [[d for m, d in zip(scoring.maps, both[0], strict=True) if m.name in {x.name for x in top.maps}]]
    assert sliced is not None
    assert_close(sliced, InfluenceScorer(top, kept).score(batch).influence, EXACT)  # type: ignore[arg-type]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_batches_padding_and_order_do_not_matter(family: str) -> None:
    scoring = ScoringModel(tiny_model(family, dtype=torch.float32), "all")
    scorer = InfluenceScorer(scoring, directions(scoring))
    rows = tiny_rows()
    alone, together = influence_of(scorer, rows, 1), influence_of(scorer, rows, 10_000)
    turned = influence_of(scorer, rows[::-1], 50)[::-1]
    for other in (together, turned):
        assert_close(torch.cat(other, 1), torch.cat(alone, 1), 1e-5)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral"])
def test_bfloat16_weights_do_not_drown_the_tangent(family: str) -> None:
    """Against float64 of the same weights: what rounds is embeddings, head and the operands of products."""
    model = tiny_model(family, dtype=torch.float64, initializer_range=0.15).to(torch.bfloat16)
    exact = copy.deepcopy(model).to(torch.float64)
    scoring, rows = ScoringModel(model, "all"), tiny_rows()
    both = directions(scoring)
    found = torch.cat(influence_of(InfluenceScorer(scoring, both), rows, 60), 1)
    wide = ScoringModel(exact, "all")
    wanted = torch.cat(influence_of(InfluenceScorer(wide, [[d.double() for d in each] for each in both]), rows, 60), 1)
    assert_close(found.double(), wanted, 0.04)
    ranks = [np.argsort(np.argsort(x[0].numpy())) for x in (found, wanted)]
    assert np.corrcoef(*ranks)[0, 1] > 0.995


def test_no_graph_is_kept_and_the_model_is_as_it_was() -> None:
    scoring = ScoringModel(tiny_model("qwen2"), "all", "all")
    held = {name: id(p) for name, p in scoring.model.named_parameters()}
    scorer = InfluenceScorer(scoring, directions(scoring))
    rows = tiny_rows()
    signals = scorer.score(collate(rows, [0, 1]))
    assert not any(x.requires_grad for x in (signals.nll, signals.influence) if x is not None)
    assert {name: id(p) for name, p in scoring.model.named_parameters()} == held
    assert not any(p.requires_grad for p in scoring.model.parameters())


@pytest.mark.usefixtures("all_float64")
def test_a_model_whose_forward_mode_misses_a_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scoring = ScoringModel(tiny_model("llama"), 2)
    silu = tangents._RULES["silu"]
    monkeypatch.setitem(tangents._RULES, "silu", lambda f, args, kwargs: f(*args, **kwargs))
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM: --estimator influence misses a part .* Use --estimator exact"
    ):
        InfluenceScorer(scoring, directions(scoring))
    monkeypatch.setitem(tangents._RULES, "silu", silu)
    InfluenceScorer(scoring, directions(scoring))


def test_a_model_without_a_formula_is_refused_by_the_name_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    scoring = ScoringModel(tiny_model("llama"), 2)

    def lacking(*_: Any) -> Any:
        raise tangents.NoTangentError("silu: no forward AD")

    monkeypatch.setitem(tangents._RULES, "silu", lacking)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: .* no forward-mode formula for silu: no forward AD\."):
        InfluenceScorer(scoring, directions(scoring))


@pytest.mark.usefixtures("all_float64")
def test_scaling_a_direction_scales_the_influence() -> None:
    scoring, rows = ScoringModel(tiny_model("llama"), 2), tiny_rows()
    one = random_direction(scoring, 1)
    found = InfluenceScorer(scoring, [one, [3 * d for d in one]]).score(collate(rows, [0, 1])).influence
    assert found is not None
    assert_close(found[1], 3 * found[0], 1e-12)
