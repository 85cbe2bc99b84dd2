"""The numbers of tests/benchmarks/pays/detection.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_files import rows_of, token_records


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module


def test_numbers_are_of_each_response_token_and_its_own_prediction(pays: Any) -> None:
    settings = pays("settings")
    rows = rows_of(token_records(11, seed=3))
    mine = [settings.Row(ids=row.input_ids, response=row.response, good=row.response) for row in rows]
    models = [tiny_model("llama", dtype=torch.float32, seed=seed).eval() for seed in (0, 1, 2)]
    found = pays("detection").of_models(*models, mine)
    first = 0
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            each = [m(ids[None]).logits[0, :-1][torch.from_numpy(row.response[1:])] for m in models]
        p, q, r = (torch.softmax(one.double(), -1).numpy() for one in each)
        at = np.arange(len(p)), ids[torch.from_numpy(row.response)].numpy()
        by_hand = {
            "nll": -np.log(p[at]),
            "reference_nll": -np.log(q[at]),
            "after": -np.log(r[at]),
            "entropy": -(p * np.log(p)).sum(-1),
            "forward": (p * np.log(p / q)).sum(-1),
            "backward": (q * np.log(q / p)).sum(-1),
        }
        for name, expected in by_hand.items():
            np.testing.assert_allclose(found[name][first : first + len(p)], expected, rtol=2e-2, atol=2e-2)
        assert by_hand["forward"].min() > 0.01
        first += len(p)
    assert first == len(found["nll"])


def test_rows_rank_by_their_means(pays: Any) -> None:
    means = pays("detection")._row_means(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1]))
    assert means.tolist() == [2.0, 5.0]
