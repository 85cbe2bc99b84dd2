"""The real model on real text, against one backward per token. Run all of it with: pytest -m slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from alphatoken_curate.capture import ScoringModel
from alphatoken_curate.influence import make_scorer
from alphatoken_curate.models import find_model, load_model, load_tokenizer
from alphatoken_curate.paths import PathScorer
from alphatoken_curate.plan import collate
from alphatoken_curate.rows import rows_of
from alphatoken_curate.tokens import TokenRow, tokenise

pytestmark = pytest.mark.slow

CHATS = {
    "sample": [("Which planet is closest to the Sun?", "Mercury, then Venus.")],
    "two turns": [("What is 12 × 7?", "12 × 7 = 84."), ("And half of that?", "84 / 2 = 42, so the answer is 42.")],
}


@pytest.fixture(scope="module")
def source() -> Any:
    return find_model("smollm2-135m")


def tokens(source: Any, chat: str) -> TokenRow:
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS[chat]]
    rows = rows_of([{"messages": [message for turn in turns for message in turn]}], "chat").rows
    found, bad = tokenise(rows, load_tokenizer(source), max_length=512, turns="all", vocab_size=None)
    assert not bad
    return found[0]


@pytest.mark.parametrize("layers", [3, 30])
@pytest.mark.parametrize("chat", CHATS)
def test_exact_in_float32_equals_the_oracle_in_float64(source: Any, chat: str, layers: int) -> None:
    row = tokens(source, chat)
    places = np.flatnonzero(row.response).tolist()
    ids = torch.from_numpy(row.input_ids.astype(np.int64))
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    scoring = ScoringModel(model, layers)
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(m.weight.shape, generator=generator) for m in scoring.maps]
    named = {m.name: d.double() for m, d in zip(scoring.maps, direction, strict=True)}
    found = PathScorer(scoring, [direction], "exact", 32).score(collate([row], [0]))
    scoring.release_model()
    matrix = oracles.contraction_by_backwards(model.double(), layers, named, ids, places)
    direct = torch.stack([matrix[t - 1, i] for i, t in enumerate(places)])
    causal = torch.stack([matrix[t - 1, i + 1 :].sum() for i, t in enumerate(places)])
    # Both signals are sums of parts of one backward, so what float32 rounds off is a share of the larger one.
    largest = max(direct.abs().max(), causal.abs().max())
    for signal, wanted in ((found.direct[0], direct), (found.causal[0], causal)):
        assert ((signal.double() - wanted).abs().max() / largest).item() < 1e-4


@pytest.mark.parametrize("layers", [3, 30])
def test_bfloat16_errs_as_the_model_s_own_backward_does(source: Any, layers: int) -> None:
    """Against float32 of the same weights; `-s` prints by how much."""
    row = tokens(source, "two turns")
    ids, places = torch.from_numpy(row.input_ids.astype(np.int64)), np.flatnonzero(row.response).tolist()
    plain: list[list[Tensor]] = []
    ours: dict[str, list[list[Tensor]]] = {"exact": [], "influence": []}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(source, dtype=torch.bfloat16, device=torch.device("cpu"))
        model = torch.nn.Module.to(model, dtype)
        for estimator, found in ours.items():
            scoring = ScoringModel(model, layers)
            generator = torch.Generator().manual_seed(0)
            direction = [torch.randn(m.weight.shape, generator=generator) for m in scoring.maps]
            scorer = make_scorer(scoring, [direction], estimator, 32)
            scorer.settle()
            signals = scorer.score(collate([row], [0]))
            found.append([x[0] for x in (signals.direct, signals.causal, signals.influence) if x is not None])
            scoring.release_model()
        named = {m.name: d.to(dtype) for m, d in zip(scoring.maps, direction, strict=True)}
        matrix = oracles.contraction_by_backwards(model, layers, named, ids, places).double()
        direct = torch.stack([matrix[t - 1, i] for i, t in enumerate(places)])
        causal = torch.stack([matrix[t - 1, i + 1 :].sum() for i, t in enumerate(places)])
        plain.append([direct, causal, matrix.sum(0)])
    for name, one, other in zip(("direct", "causal", "influence"), plain[1], plain[0], strict=True):
        number = 0 if name != "causal" else 1
        mine = apart(*(x[number] for x in reversed(ours["influence" if name == "influence" else "exact"])))
        own = apart(one, other)
        print(f"\n{layers} layers, {name}: off by {mine:.3f} of the RMS, the model's own backward by {own:.3f}")
        assert mine < 2.5 * own


def apart(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, in parts of that of what is wanted."""
    return float(((found.double() - wanted.double()).square().mean() / wanted.double().square().mean()).sqrt())
