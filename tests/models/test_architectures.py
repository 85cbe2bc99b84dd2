"""Every family of decoders that the table in README.md beside this file names, against one backward per token.

`pytest --rewrite` of this file writes the table that these tests prove.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from daily import daily
from directed import assert_close, by_gradients, by_name, directions, influence_of
from tiny import CORE, FAMILIES, LAYERS_ALL, REFUSED, ROUNDING, SINCE, UNCAPTURED, tiny_model, tiny_rows
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.engine.value_rows import find_value_rows
from alphatoken_curate.errors import ModelError
from alphatoken_curate.signals.influence import InfluenceScorer
from alphatoken_curate.signals.paths import PathScorer, Signals
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches

PAGE = Path(__file__).parent / "README.md"
START, END = "<!-- architectures: written by tests/models/test_architectures.py -->", "<!-- end of architectures -->"
EXACT, LAYERS, WINDOW = 1e-10, 3, 4
ESTIMATORS = ("published", "exact", "influence")
ROWS = tiny_rows()[1:4]
"""A one-token prompt, a one-token answer, two turns; of three lengths, so that a batch of them is padded."""

pytestmark = pytest.mark.usefixtures("all_float64")


def layers_of(family: str) -> int:
    return 4 if family in LAYERS_ALL else LAYERS


def direction_of(scoring: ScoringModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(m.weight.shape, generator=generator, dtype=torch.float64) for m in scoring.maps]


@functools.lru_cache(maxsize=2)
def captured(family: str) -> tuple[ScoringModel, list[Tensor], Any]:
    """A captured model, a direction and the same model untouched."""
    scoring = ScoringModel(tiny_model(family), layers_of(family))
    return scoring, direction_of(scoring), tiny_model(family)


@functools.lru_cache(maxsize=2)
def contractions(family: str) -> list[Tensor]:
    """C[s, t] of each row."""
    scoring, direction, plain = captured(family)
    named = {m.name: d for m, d in zip(scoring.maps, direction, strict=True)}
    return [oracles.contraction_by_backwards(plain, layers_of(family), named, *ids_and_places(row)) for row in ROWS]


def ids_and_places(row: Any) -> tuple[Tensor, list[int]]:
    return torch.from_numpy(row.input_ids.astype(np.int64)), np.flatnonzero(row.response).tolist()


def wanted(family: str, estimator: str, row: int) -> Tensor:
    """The estimator's signals of a row's response tokens, (signals, tokens), the slow way."""
    scoring, direction, plain = captured(family)
    ids, places = ids_and_places(ROWS[row])
    if estimator == "published":
        kept = {scoring.maps[index].name: rows for index, rows in find_value_rows(scoring)}
        named = {m.name: d for m, d in zip(scoring.maps, direction, strict=True)}
        return torch.stack(
            oracles.published(plain, layers_of(family), named, ids, places, WINDOW, lambda name, _: kept.get(name))
        )
    matrix = contractions(family)[row]
    if estimator == "influence":
        return matrix.sum(0)[None]
    own = torch.stack([matrix[t - 1, j] for j, t in enumerate(places)])
    return torch.stack([own, torch.stack([matrix[t - 1, j + 1 :].sum() for j, t in enumerate(places)])])


def scorer_of(family: str, estimator: Any) -> Any:
    scoring, direction, _ = captured(family)
    if estimator == "influence":
        return InfluenceScorer(scoring, [direction])
    return PathScorer(scoring, [direction], estimator, WINDOW)


def signals_of(signals: Signals, batch: Batch, i: int) -> Tensor:
    found = (signals.direct, signals.causal, signals.influence)
    return torch.cat([x for x in found if x is not None])[:, torch.from_numpy(batch.row == i)]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", daily(FAMILIES, CORE))
def test_every_family_is_exact_or_refused(family: str, estimator: str) -> None:
    reason = REFUSED.get(family, {}).get(estimator)
    if reason is not None:
        with pytest.raises(ModelError, match=reason):
            scorer_of(family, estimator)
        return
    scorer = scorer_of(family, estimator)
    for budget in (1, 10_000):
        for indices in plan_batches(ROWS, budget):
            batch = collate(ROWS, indices)
            signals = scorer.score(batch)
            for i, row in enumerate(batch.rows):
                found, right = signals_of(signals, batch, i), wanted(family, estimator, row)
                assert torch.isfinite(found).all()
                assert right.abs().max() > 1e-6
                error = (found - right).abs().max() / right.abs().max()
                assert error.item() < ROUNDING.get(family, {}).get(estimator, EXACT)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("family", daily(FAMILIES, CORE))
def test_every_parameter_is_exact_with_blocks_below_that_only_pass_tangents_on(family: str) -> None:
    scoring, plain = ScoringModel(tiny_model(family), LAYERS, "all"), tiny_model(family)
    both = directions(scoring)
    found = torch.cat(influence_of(InfluenceScorer(scoring, both), ROWS, 10_000), dim=1)
    for influence, direction in zip(found, both, strict=True):
        named = by_name(scoring, direction)
        wanted = torch.cat([by_gradients(plain, named, row) for row in ROWS])
        assert_close(influence, wanted, ROUNDING.get(family, {}).get("influence", EXACT))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("family", daily(FAMILIES, CORE))
def test_the_oracle_sums_to_the_gradient_on_the_weights_and_agrees_with_eps(family: str) -> None:
    """Experts are a textbook's in the oracle, and transformers' own under the gradient."""
    scoring, direction, plain = captured(family)
    named = {m.name: d for m, d in zip(scoring.maps, direction, strict=True)}
    ids, places = ids_and_places(ROWS[0])
    matrix, tolerance = contractions(family)[0], ROUNDING.get(family, {}).get("exact", EXACT)
    other = oracles.contraction_by_eps(plain, layers_of(family), named, ids, places)
    assert ((other - matrix).abs().max() / matrix.abs().max()).item() < tolerance
    grads = oracles.mean_loss_gradient(plain, layers_of(family), [(ids, places)])
    assert grads.keys() == named.keys()
    whole = sum((grads[name] * matrix).sum() for name, matrix in named.items()) * len(places)
    assert (abs(matrix.sum() - whole) / matrix.abs().sum()).item() < tolerance


@pytest.mark.parametrize("family", UNCAPTURED)
def test_what_cannot_be_captured_is_refused_by_name_and_left_as_it_was(family: str) -> None:
    changes, message, _ = UNCAPTURED[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family.split(maxsplit=1)[0]](**changes)).eval()
    with pytest.raises(ModelError, match=f"{type(model).__name__}: .*{message}"):
        ScoringModel(model, 2)
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} <= {"sdpa", "eager", None}


def table() -> str:
    """What the tests above prove, as the page has it."""
    rounding = ", ".join(f"`{family}`" for family in sorted(ROUNDING))
    lines = [
        f"{len(FAMILIES)} families of decoders, by the `model_type` of their config.json; of mixtures of experts the"
        " weights of experts and",
        "routers too. Each is checked in float64, with padding, against one backward pass per token (`published`:",
        "the paper's equations by loops), to 1e-10 of the largest value, or 1e-6 where the model itself rounds",
        f"({rounding}). `all parameters` is `--estimator influence --parameters all` on three blocks of four; the last",
        "column is the first release of transformers that will do, where that is not the oldest we take.",
        "",
        "| family | published | exact | influence | all parameters | transformers |",
        "|---|---|---|---|---|---|",
    ]
    for family in sorted(FAMILIES):
        said = ("refused" if estimator in REFUSED.get(family, {}) else "yes" for estimator in ESTIMATORS)
        lines.append(f"| `{family}` | {' | '.join(said)} | yes | {SINCE.get(family, '')} |")
    lines += ["", "| refused by name | because it has |", "|---|---|"]
    lines += [f"| `{family}` | {why} |" for family, (_, _, why) in sorted(UNCAPTURED.items())]
    return "\n".join(lines)


def page_with(text: str) -> str:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{text}\n{END}{after}"


def test_the_page_has_the_table_these_tests_prove(same_text: Callable[[Path, str], None]) -> None:
    same_text(PAGE, page_with(table()))
