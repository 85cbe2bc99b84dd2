"""What workers of another process do in tests: their tasks are functions of this module, which they can import.

`MARKS` in the environment names a folder in which such a function leaves a mark the first time.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.runs.atomic import KILL_AT
from alphatoken_curate.scoring.portions import Portion
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.rehearse import RehearsalScorer
from alphatoken_curate.scoring.scorer import ShardScorer

MARKS = "TEST_MARKS"

_PLAIN = {
    "losses": ReferencePass.losses,
    "fisher": ReferencePass.fisher,
    "gradient": ShardScorer.gradient,
    "moments": ShardScorer.moments,
    "score": ShardScorer.score,
    "rehearsal_losses": RehearsalScorer.losses,
    "rehearse": RehearsalScorer.rehearse,
}


def first_time(name: str) -> bool:
    """Whether nobody left this mark before."""
    try:
        (Path(os.environ[MARKS]) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _die_once(name: str, *arguments: Any) -> Any:
    if first_time(name):
        os.kill(os.getpid(), signal.SIGKILL)
    return _PLAIN[name](*arguments)  # type: ignore[operator]


def losses(*arguments: Any) -> Any:
    return _die_once("losses", *arguments)


def fisher(*arguments: Any) -> Any:
    return _die_once("fisher", *arguments)


def gradient(*arguments: Any) -> Any:
    return _die_once("gradient", *arguments)


def moments(*arguments: Any) -> Any:
    return _die_once("moments", *arguments)


def score(*arguments: Any) -> Any:
    return _die_once("score", *arguments)


def scored_short_of_memory(self: ShardScorer, shard: int, rows: Any, progress: Any, batch_tokens: int) -> Any:
    """Shard 1 has no memory for more than 100 tokens in a batch."""
    if shard == 1 and batch_tokens > 100:
        raise MemoryError
    return _PLAIN["score"](self, shard, rows, progress, batch_tokens)  # type: ignore[operator]


def gradient_short_of_memory(self: ShardScorer, kind: str, rows: Any, *rest: Any) -> Any:
    """A part of fewer rows than 32 has no memory for more than 100 tokens in a batch."""
    if len(rows) < 32 and rest[-1] > 100:
        raise MemoryError
    return _PLAIN["gradient"](self, kind, rows, *rest)  # type: ignore[operator]


def scored_but_one(self: ShardScorer, shard: int, *arguments: Any) -> Any:
    """Shard 1 kills whoever scores it."""
    if shard == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return _PLAIN["score"](self, shard, *arguments)  # type: ignore[operator]


def scored_with_threads_told(self: ShardScorer, *arguments: Any) -> Any:
    """Leaves a mark named after the threads of torch."""
    first_time(str(torch.get_num_threads()))
    return _PLAIN["score"](self, *arguments)  # type: ignore[operator]


def scored_by_one_model(self: ShardScorer, *arguments: Any) -> Any:
    """As it is, where no other model is in memory; leaves a mark named after the model."""
    found = _PLAIN["score"](self, *arguments)  # type: ignore[operator]
    first_time(Path(self.spec.model.name).name)
    others = [one for one in gc.get_objects() if isinstance(one, ScoringModel)]
    if len(others) != 1:
        raise AssertionError(f"{len(others)} models are in memory")
    return found


def scored_but_kept(self: ShardScorer, *_: Any) -> Any:
    """What no process can hand to another."""
    return threading.Lock()


def scored_never(self: ShardScorer, *_: Any) -> Any:
    """Never done."""
    first_time(str(os.getpid()))
    time.sleep(600)


def rehearsal_losses(*arguments: Any) -> Any:
    """Whoever is the first to make losses before a rehearsal dies."""
    return _die_once("rehearsal_losses", *arguments)


def rehearse(self: RehearsalScorer, portion: Portion, *arguments: Any) -> Any:
    """Whoever is the first at an order dies when all but one step are gone back through."""
    if first_time(f"rehearse {portion.order}"):
        os.environ[KILL_AT] = f"after-rename@rehearsal-00000-{portion.name}-adjoint-0-1.safetensors"
    return _PLAIN["rehearse"](self, portion, *arguments)  # type: ignore[operator]


def rehearsed_but_one(self: RehearsalScorer, portion: Portion, *arguments: Any) -> Any:
    """The second order kills whoever rehearses it."""
    if portion.order:
        os.kill(os.getpid(), signal.SIGKILL)
    return _PLAIN["rehearse"](self, portion, *arguments)  # type: ignore[operator]


def rehearsed_short_of_memory(self: RehearsalScorer, portion: Portion, *arguments: Any) -> Any:
    """The first outcome has no memory for more than 100 tokens in a batch."""
    if not portion.first and arguments[-1] > 100:
        raise MemoryError
    return _PLAIN["rehearse"](self, portion, *arguments)  # type: ignore[operator]
