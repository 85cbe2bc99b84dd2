"""Who does the tasks of a stage: this process alone, or an engine that has workers of its own."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch

from alphatoken_curate.models.devices import devices_of, free_memory, names_of
from alphatoken_curate.progress import Progress
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import ScorerSpec
from alphatoken_curate.scoring.worker import Done, Stage, Worker


class Engine(Protocol):
    """Has tasks done. Which engine it is changes no bit of what they give back."""

    def device(self, name: str) -> str:
        """The device that --device names, where tasks are done. Raises UsageError where there is none."""

    def readers(self) -> int:
        """Processes of this machine that make tokens of rows, where that takes long."""

    def begin(self, spec: ScorerSpec, threads: int | None) -> None:
        """Be ready for the stages of a generation; `threads` of each process on a CPU, None leaves them to torch."""

    @property
    def workers(self) -> int:
        """How many do tasks beside this process, once it has begun; 0 where this one does."""

    def sharing(self) -> int:
        """How many of them have the memory that one of them finds free."""

    def run(self, stage: Stage, progress: Progress) -> Generator[tuple[int, Done]]:
        """Have all tasks of a stage done; gives the number of each, from 0, and what came of it, as they are done.

        Raises what a task raises, and CurateError that names the tasks whose workers always ended, once all others
        are done.
        """

    def close(self) -> None:
        """Give back all that is held. It may begin again."""


class Here:
    """Tasks one after the other in this process. `scorer`: whose methods the tasks of the model are."""

    def __init__(self, scorer: ShardScorer | None = None) -> None:
        self._scorer = scorer
        self._worker: Worker | None = None
        self._threads: int | None = None

    def device(self, name: str) -> str:
        """As `Engine`."""
        return names_of(devices_of(name))

    def readers(self) -> int:
        """As `Engine`: this one."""
        return 1

    def begin(self, spec: ScorerSpec, threads: int | None) -> None:
        """As `Engine`."""
        self.close()
        if threads is not None:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(threads)
        self._worker = Worker(spec, self._scorer)

    @property
    def workers(self) -> int:
        """As `Engine`."""
        return 0

    def sharing(self) -> int:
        """As `Engine`."""
        return 1

    def run(self, stage: Stage, progress: Progress) -> Generator[tuple[int, Done]]:
        """As `Engine`."""
        assert self._worker is not None, "begin() comes first"
        self._worker.ready(stage.of, progress)
        if stage.tokens:
            progress.stage(stage.name, stage.tokens)
        for n, task in enumerate(stage.tasks):
            yield n, self._worker.do(stage.of, task, progress)

    def close(self) -> None:
        """As `Engine`."""
        if self._worker is not None:
            self._worker = None
            free_memory()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            self._threads = None
