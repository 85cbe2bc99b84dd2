"""The real model on real text, against one backward per token. Run all of it with: pytest -m slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch

from alphatoken_curate.capture import ScoringModel
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
