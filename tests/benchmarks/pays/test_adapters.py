"""That a LoRA trained by TRL in tests/benchmarks/pays/adapters.py is trained by the weights it is given."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_files import quiet, rows_of, token_records
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch, models: dict[str, str]) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    found = importlib.import_module("adapters")

    from trainer_runs import tokenizer

    def load() -> Any:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32)

    monkeypatch.setattr(found, "load", load)
    monkeypatch.setattr(found, "load_tokenizer", lambda _: tokenizer())
    return found


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_rows_without_weight_leave_the_model_as_it_was(adapters: Any) -> None:
    settings = importlib.import_module("settings")
    rows = [settings._row(row) for row in rows_of(token_records(6, seed=2))]
    where = settings.Setting(
        **{"name": "tiny", "train": rows, "held": rows, "retention": rows[:2], "target": [], "remember": []},
        **{"beside": [], "learning_rate": 1e-2, "epochs": 1, "batch": 3},
    )
    start = adapters.measure(adapters.load(), where)
    none, every = ([np.full(len(row.ids), weight, np.float32) * row.response for row in rows] for weight in (0, 1))
    assert adapters.trained(where, none, 0) == pytest.approx(start, rel=1e-6)
    assert adapters.trained(where, every, 0)["target_loss"] < start["target_loss"] - 1e-3
