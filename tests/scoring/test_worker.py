"""Tasks that run out of memory, whose batches are halved, each for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_files import Notes, token_records, write_jsonl

from alphatoken_curate import CurateError, ScoreConfig, score
from alphatoken_curate.progress import Silent
from alphatoken_curate.runs.manifest import Plan
from alphatoken_curate.scoring import scorer, spec
from alphatoken_curate.scoring.budget import LEAST
from alphatoken_curate.scoring.worker import Task, Worker


class Model:
    """Stands for `ShardScorer`: work that runs out of memory so many times, then gives the budget it was given."""

    def __init__(self, times: int, error: BaseException) -> None:
        self.times, self.error = times, error

    def work(self, _: Any, batch_tokens: int) -> int:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return batch_tokens


def done(
    times: int, error: BaseException, notes: Any = None, tokens: int = 1000, halves: bool = True
) -> tuple[int, Plan]:
    worker: Any = Worker.__new__(Worker)
    worker._of = lambda _: model
    model = Model(times, error)
    task = Task(what="shard 3", call=Model.work, arguments=(), plan=Plan(batch_tokens=tokens), halves=halves)
    found = worker.do("model", task, notes or Silent())
    return found.result, found.plan


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_halves_and_says_so(error: BaseException) -> None:
    notes = Notes()
    assert done(2, error, notes) == (250, Plan(batch_tokens=250, halvings=2))
    assert notes.warnings == [
        f"Memory ran out: --batch-tokens is halved to {tokens} for shard 3." for tokens in (500, 250)
    ]


def test_other_errors_pass() -> None:
    for error in (RuntimeError("shapes"), ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            done(1, error)


def test_there_is_an_end_to_halving() -> None:
    with pytest.raises(CurateError, match=r"Memory ran out with 125 tokens in a batch \(shard 3\).*--layers"):
        done(99, MemoryError())
    assert LEAST > 125 // 2
    assert done(0, MemoryError(), tokens=1) == (1, Plan(batch_tokens=1))


def test_what_is_not_of_batches_is_not_tried_again() -> None:
    """What it was given may be used up, as sums are that were divided."""
    with pytest.raises(CurateError, match=r"Memory ran out .*shard 3"):
        done(1, MemoryError(), halves=False)


@pytest.mark.parametrize("what", ["load_placed", "ScoringModel", "drift_direction"])
def test_memory_that_runs_out_before_any_batch_is_no_matter_of_batches(
    what: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker in another process loads its model when it does its first task."""

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Worker, "ready", lambda *_: None)
    monkeypatch.setattr(scorer if what == "drift_direction" else spec, what, fails)
    data, notes = write_jsonl(tmp_path / "rows.jsonl", token_records(12)), Notes()
    with pytest.raises(CurateError, match=r"Memory ran out while .*, before any batch\. Use fewer --workers"):
        score(ScoreConfig(data=data, model=models["tuned"], reference=models["base"]), tmp_path / "run", notes)
    assert not notes.warnings
