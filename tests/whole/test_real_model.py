"""The real model on real text, against one backward per token. Run all of it with: pytest -m slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.models.load import find_model, load_model, load_tokenizer
from alphatoken_curate.rows.read import rows_of
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import collate
from alphatoken_curate.tokens.tokenise import TokenRow, tokenise

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
    direct, causal = oracles.along_paths(matrix, places)
    # Both signals are sums of parts of one backward, so what float32 rounds off is a share of the larger one.
    largest = max(direct.abs().max(), causal.abs().max())
    for signal, wanted in ((found.direct[0], direct), (found.causal[0], causal)):
        assert ((signal.double() - wanted).abs().max() / largest).item() < 1e-4


@pytest.mark.parametrize("layers", [3, 30])
def test_bfloat16_errs_as_the_model_s_own_backward_does(source: Any, layers: int) -> None:
    """Against float32 of the same weights; `-s` prints by how much."""
    row = tokens(source, "two turns")
    ids, places = torch.from_numpy(row.input_ids.astype(np.int64)), np.flatnonzero(row.response).tolist()
    ours, plain = [], []
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(source, dtype=torch.bfloat16, device=torch.device("cpu"))
        scoring = ScoringModel(torch.nn.Module.to(model, dtype), layers)
        generator = torch.Generator().manual_seed(0)
        direction = [torch.randn(m.weight.shape, generator=generator) for m in scoring.maps]
        named = {m.name: d.to(dtype) for m, d in zip(scoring.maps, direction, strict=True)}
        found = make_scorer(scoring, [direction], "exact+influence", 32).score(collate([row], [0]))
        scoring.release_model()
        ours.append([found.direct[0], found.causal[0], found.influence[0]])
        c = oracles.contraction_by_backwards(model, layers, named, ids, places)
        plain.append([*oracles.along_paths(c.double(), places), c.double().sum(0)])
    for n, name in enumerate(("direct", "causal", "influence")):
        mine, own = (apart(low[n], high[n]) for low, high in (ours, plain))
        print(f"\n{layers} layers, {name}: off by {mine:.3f} of the RMS, the model's own backward by {own:.3f}")
        assert mine < 2.5 * own


def apart(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, in parts of that of what is wanted."""
    return float(((found.double() - wanted.double()).square().mean() / wanted.double().square().mean()).sqrt())
