"""The arithmetic of tests/benchmarks/pays/forgetting.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module


def line(arm: str, seed: int, loss: float, retention: float, **told: Any) -> dict[str, Any]:
    start = [{"retention_loss": 3.0}] if arm == "all tokens" else []
    rate, stage = told.get("rate", 2e-4), told.get("stage", "forgetting")
    config = {"model": "tiny", "stage": stage, "noise": "clean", "seed": seed, "arm": arm}
    found = {"held": {"nll": [loss, loss], "tokens": [1, 1]}, "curve": [*start, {"retention_loss": retention}]}
    return {"config": {**config, "about": {"learning_rate": rate}}, "found": found}


def test_what_is_forgotten_is_told_by_seed_and_beside_a_lower_rate(pays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetting = pays("forgetting")
    found = [line("DFT", 1, 1.25, 3.125), line("DFT", 2, 1.5, 3.25), line("DFT", 3, 9.0, 9.0)]
    monkeypatch.setattr(forgetting.lines, "read", lambda name: found)
    assert forgetting.report() == "", "all tokens are not there"
    found += [line("all tokens", 1, 1.0, 3.25), line("all tokens", 2, 1.0, 3.5)]
    found += [line("all tokens", 1, 0.75, 3.0, rate=1e-5), line("all tokens", 2, 5.0, 3.0, stage="test")]
    head, told = forgetting.report().split("\n\n")
    assert head == "### tiny"
    assert told.splitlines()[2:] == [
        "| all tokens, 1e-05 | 1 | 0.750 | 0.250 | 3.000 | 0.000 | 0.250 |",
        # By hand: gains -0.25 and -0.5, retention 0.125 and 0.25 less; Student's t of one degree is 12.706.
        "| DFT | 2 | 1.375 | -0.375 ± 1.588 | 3.188 | 0.188 | 0.188 ± 0.794 |",
        "| all tokens, 0.0002 | 2 | 1.000 | 0.000 ± 0.000 | 3.375 | 0.375 | 0.000 ± 0.000 |",
    ]
