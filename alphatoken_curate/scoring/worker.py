"""What is done where the models are: a task of a stage, again in smaller batches where memory runs out.

Nothing is written here, but for what a portion of a rehearsal goes on from. A stage's tasks go to one worker or to
several, in this process or in others; what they give back is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from alphatoken_curate.errors import CurateError
from alphatoken_curate.models.devices import free_memory
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.manifest import Plan
from alphatoken_curate.scoring.budget import LEAST, halved, out_of_memory
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.rehearse import RehearsalScorer
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import ScorerSpec

Which: TypeAlias = Literal["reference", "model"]
"""Whose methods the tasks of a stage are: `ReferencePass` or `ShardScorer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A piece of a stage that one worker does whole; picklable.

    `call` is a method, called as `call(self, *arguments, progress, batch_tokens)`. `what` names the task in errors.
    `halves`: whether it goes over batches, so that it may be tried again with smaller ones.
    """

    what: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    plan: Plan
    halves: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Tasks to be done in any order, or at the same time, and the tokens they are told in: of 0 none is told of.

    `in_order`: what comes of them is wanted in their order, and is held until then.
    """

    name: str
    tokens: int
    of: Which
    tasks: Iterable[Task]
    in_order: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What came of a task, and the plan it was done by in the end."""

    result: Any
    plan: Plan


class Worker:
    """The models of a generation, of which one is in memory at a time."""

    def __init__(self, spec: ScorerSpec, scorer: ShardScorer | None = None) -> None:
        self._reference = ReferencePass(spec)
        self._scorer = scorer or (RehearsalScorer if spec.config.rehearses else ShardScorer)(spec)

    def ready(self, which: Which, progress: Progress) -> None:
        """Load what a stage needs, unless it is there; that it is being loaded is said."""
        of = self._of(which)
        if which == "reference" or not self._scorer.loads_itself:
            of.ready(progress)

    def do(self, which: Which, task: Task, progress: Progress) -> Done:
        """A task, whole. When memory runs out its batches are halved, for this task alone.

        Raises CurateError where that does not help, and what the task raises.
        """
        plan = task.plan
        while True:
            try:
                return Done(result=task.call(self._of(which), *task.arguments, progress, plan.batch_tokens), plan=plan)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if not task.halves or plan.batch_tokens // 2 < LEAST:
                    raise CurateError(
                        f"Memory ran out with {plan.batch_tokens} tokens in a batch ({task.what}). Use fewer --layers,"
                        " a shorter --max-length or a device with more memory; what is finished is kept."
                    ) from error
            # Not above: there the error still holds what was computed.
            free_memory()
            plan = halved(plan)
            progress.warn(f"Memory ran out: --batch-tokens is halved to {plan.batch_tokens} for {task.what}.")

    def _of(self, which: Which) -> ReferencePass | ShardScorer:
        if which == "reference":
            return self._reference
        self._reference.close()
        return self._scorer
