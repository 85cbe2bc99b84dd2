"""Tasks dealt out to workers, wherever they are.

A worker that dies costs what it was doing: that is given to another, and named once `TRIES` have died of it. Nothing is
written by workers but what a portion of a rehearsal goes on from.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch

from alphatoken_curate.errors import CurateError, UsageError
from alphatoken_curate.models.devices import free_memory
from alphatoken_curate.progress import Progress
from alphatoken_curate.scoring.identity import versions
from alphatoken_curate.scoring.spawned import cores, portable
from alphatoken_curate.scoring.spec import ScorerSpec
from alphatoken_curate.scoring.worker import Done, Stage, Task, Worker
from alphatoken_curate.wording import count

TRIES = 3
"""Workers that may die of a task before it is given up."""

AHEAD = 3
"""Tasks for each worker that may be begun beyond the first that is not done, where they are wanted in order."""

_WORTH_TELLING = 10.0
"""Seconds of a stage after which it is said how busy workers were."""

H = TypeVar("H")
_Numbered = tuple[int, Task]


@dataclass(slots=True, eq=False)
class Member(Generic[H]):
    """A worker by its `handle`: whether it is ready for tasks, and the one it is at."""

    handle: H
    ready: bool = False
    task: _Numbered | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What a worker is told once for all tasks of a generation."""

    spec: ScorerSpec
    threads: int
    """Of a process on a CPU."""
    folder: str
    """What relative paths are relative to."""
    versions: dict[str, str]
    """Of what computes, where whoever leads is."""


class Pool(ABC, Generic[H]):
    """Workers, of which each does a task at a time. `workers`: how many at most, or what the machines have."""

    def __init__(self, workers: int | Literal["auto"]) -> None:
        if workers != "auto" and not 1 <= workers <= 4096:
            raise UsageError(f"--workers {workers}: it takes a number of workers from 1 to 4096, or auto.")
        self._asked = workers
        self._workers = 0
        self._members: list[Member[H]] = []
        self._beginning: Beginning | None = None
        self._told: set[str] = set()
        self._stillborn = 0  # in turn

    @abstractmethod
    def device(self, name: str) -> str:
        """As `Engine`."""

    @abstractmethod
    def sharing(self) -> int:
        """As `Engine`."""

    @abstractmethod
    def _most(self, beginning: Beginning) -> int:
        """Workers that `auto` is."""

    @abstractmethod
    def _start(self, beginning: Beginning) -> H:
        """One worker more, which will say that it is ready."""

    @abstractmethod
    def _hand(self, member: Member[H], message: Beginning | tuple[str, Task]) -> None:
        """Tell a worker to begin with another generation, or to do a task."""

    @abstractmethod
    def _hear(self) -> Iterator[tuple[Member[H], str, Any]]:
        """What workers say, once one says something: ready, done, failed, died, advance, note or warn, and what."""

    @abstractmethod
    def _stop(self, members: Sequence[Member[H]]) -> None:
        """End some workers, whatever they are at."""

    def readers(self) -> int:
        """As `Engine`: as many as workers, on the cores of this machine; `auto` is one for each."""
        return cores() if self._asked == "auto" else min(cores(), self._asked)

    @property
    def workers(self) -> int:
        """As `Engine`."""
        return self._workers

    def begin(self, spec: ScorerSpec, threads: int | None) -> None:
        """As `Engine`. Workers that are there stay, and drop their models."""
        self._beginning = Beginning(
            spec=spec,
            threads=threads or torch.get_num_threads(),
            folder=os.getcwd(),
            versions=versions(spec.device),
        )
        self._told.clear()
        self._workers = self._most(self._beginning) if self._asked == "auto" else self._asked
        for member in self._members:
            member.ready = False
            self._hand(member, self._beginning)

    def run(self, stage: Stage, progress: Progress) -> Generator[tuple[int, Done]]:
        """As `Engine`."""
        todo, clock = _Todo(enumerate(stage.tasks), AHEAD * self._workers if stage.in_order else None), _Clock()
        if stage.tokens:
            progress.stage(stage.name, stage.tokens)
        if todo.more():
            self._grow(self._workers)  # all of them: a stage of few tasks is followed by one of many
        try:
            # Where one is lost of tasks that are wanted in order, what comes of the others is of no use.
            while not (stage.in_order and todo.lost) and self._deal(stage, todo):
                clock.goes_on(sum(member.task is not None for member in self._members))
                for member, what, told in self._hear():
                    if what == "ready":
                        member.ready, self._stillborn = True, 0
                    elif what == "done" and member.task is not None:
                        (n, _), member.task = member.task, None
                        todo.done(n)
                        self._deal(stage, todo)  # before what came is written
                        yield n, told
                    elif what == "failed":
                        raise told
                    elif what == "died":
                        self._bury(member, told, todo)
                    else:
                        self._tell(what, told, progress)
        finally:
            self._end([member for member in self._members if member.task is not None])
        clock.tell(stage.name, self._workers, progress)
        if todo.lost:
            raise CurateError(
                f"{'; '.join(todo.lost)}. All else is kept. Where memory ran out (the system kills then), use fewer"
                " --workers and run the same command again, or a smaller --batch-tokens and another folder with -o."
            )

    def close(self) -> None:
        """As `Engine`."""
        self._end(list(self._members))

    def _deal(self, stage: Stage, todo: _Todo) -> bool:
        """Give each worker that is ready a task, and start more while there are tasks; whether any is to be done."""
        for member in self._members:
            if member.ready and member.task is None and (task := todo.next()) is not None:
                member.task = task
                self._hand(member, (stage.of, task[1]))
        busy = sum(member.task is not None for member in self._members)
        self._grow(min(self._workers, busy + todo.more()))
        return busy > 0 or todo.more() > 0

    def _grow(self, workers: int) -> None:
        """Have so many at least."""
        assert self._beginning is not None, "begin() comes first"
        for _ in range(workers - len(self._members)):
            self._members.append(Member(self._start(self._beginning)))

    def _bury(self, member: Member[H], how: str, todo: _Todo) -> None:
        """Take a worker that died out, and have another do what it was at, unless too many died of it."""
        self._members.remove(member)
        if member.task is not None:
            todo.died(member.task, how)
        elif not member.ready:
            self._stillborn += 1
            if self._stillborn >= TRIES:
                raise CurateError(
                    f"{count(TRIES, 'worker')} in turn came to nothing before they were ready: the last {how}"
                )

    def _end(self, members: Sequence[Member[H]]) -> None:
        self._stop(members)
        self._members = [member for member in self._members if member not in members]

    def _tell(self, what: str, told: Any, progress: Progress) -> None:
        """Tell what a worker tells; what several say is said once."""
        if what == "advance":
            progress.advance(told)
        elif what in ("note", "warn") and told not in self._told:
            self._told.add(told)
            getattr(progress, what)(told)


class _Clock:
    """How busy workers were in a stage."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._at_work, self._spent = 0, 0.0

    def goes_on(self, at_work: int) -> None:
        """So many are at work from now on."""
        now = time.monotonic()
        self._spent += self._at_work * (now - self._last)
        self._at_work, self._last = at_work, now

    def tell(self, name: str, workers: int, progress: Progress) -> None:
        """Say so, of a stage that took some time."""
        self.goes_on(0)
        if (seconds := self._last - self._began) >= _WORTH_TELLING:
            share = self._spent / (workers * seconds)
            progress.note(f"{name}: {count(workers, 'worker')}, at work for {share:.0%} of {seconds:,.0f} s")


class _Todo:
    """The tasks of a stage that nobody has, and those that were given up.

    None is given further than `ahead` of the first that is not done: what comes of those between is held in memory.
    """

    def __init__(self, tasks: Iterator[_Numbered], ahead: int | None) -> None:
        self._tasks, self._ahead, self._deaths = tasks, ahead, Counter[int]()
        self._known, self._under_way = dict[int, Task](), set[int]()
        self.lost: list[str] = []

    def more(self) -> int:
        """How many there are still, as far as that is known: 0 where there is none."""
        if not self._known and (found := next(self._tasks, None)) is not None:
            self._known[found[0]] = found[1]
        return len(self._known)

    def next(self) -> _Numbered | None:
        """The first that is to be done; None where there is none now."""
        if not self.more():
            return None
        number = min(self._known)
        if self._ahead is not None and number > min(self._under_way, default=number) + self._ahead:
            return None
        self._under_way.add(number)
        return number, self._known.pop(number)

    def done(self, number: int) -> None:
        """Nobody is at it any more."""
        self._under_way.discard(number)

    def died(self, task: _Numbered, how: str) -> None:
        """Whoever had it is no more."""
        number, about = task
        self.done(number)
        self._deaths[number] += 1
        if self._deaths[number] < TRIES:
            self._known[number] = about
        else:
            self.lost.append(f"{about.what}: its worker {how}, {count(TRIES, 'time')}")


class Told:
    """Hands on to whoever leads what a worker would tell a user, by `say(what, told)`."""

    def __init__(self, say: Callable[[str, Any], object]) -> None:
        self._say = say

    def stage(self, name: str, tokens: int) -> None:
        """Nothing: the stage is the same for all workers."""

    def advance(self, tokens: int) -> None:
        """As `Progress`."""
        self._say("advance", tokens)

    def note(self, text: str) -> None:
        """As `Progress`."""
        self._say("note", text)

    def warn(self, text: str) -> None:
        """As `Progress`."""
        self._say("warn", text)


def begun(beginning: Beginning) -> Worker:
    """What does the tasks of a generation, where it is called; the models of another, which nobody holds, are gone."""
    free_memory()
    torch.set_num_threads(beginning.threads)
    os.chdir(beginning.folder)
    return Worker(beginning.spec)


def answer(worker: Worker, which: Any, task: Task, told: Told) -> tuple[str, Any]:
    """`done` and what came of a task, or `failed` and the error as whoever leads can raise it."""
    try:
        return "done", worker.do(which, task, told)
    except Exception as error:
        return "failed", portable(error)


def unsent(task: Task, why: str) -> CurateError:
    """The error where a worker cannot hand over what a task came to."""
    return CurateError(f"{task.what}: a worker cannot hand over what came of it ({why}).")
