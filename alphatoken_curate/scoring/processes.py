"""Workers that are processes on this machine, each on a card of its own where there are cards.

They are spawned, and end with this process, however it ends.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import torch
from tqdm import tqdm

from alphatoken_curate.models.devices import devices_of, names_of
from alphatoken_curate.scoring.named import check_shared
from alphatoken_curate.scoring.pool import Beginning, Member, Pool, Told, answer, begun, unsent
from alphatoken_curate.scoring.spawned import cores, environment, interrupts_ignored, settle
from alphatoken_curate.scoring.worker import Task, Worker

CARDS = "CUDA_VISIBLE_DEVICES"

_PATIENCE = 5.0
"""Seconds that a process has to end when it is told to."""


@dataclass(slots=True, eq=False)
class _Process:
    process: BaseProcess
    pipe: Connection
    card: str | None
    spoke: bool = False


class Local(Pool[_Process]):
    """`workers` processes on this machine; `auto` is one for each card, or as many as its cores have threads for."""

    def __init__(self, workers: int | Literal["auto"] = "auto") -> None:
        super().__init__(workers)
        self._started = 0

    def device(self, name: str) -> str:
        """As `Engine`."""
        check_shared(name)
        return names_of(devices_of(name))

    def sharing(self) -> int:
        """As `Engine`: those on one card, or all of this machine."""
        assert self._beginning is not None, "begin() comes first"
        return math.ceil(self.workers / max(1, len(cards_of(self._beginning.spec.device))))

    def _most(self, beginning: Beginning) -> int:
        return len(cards_of(beginning.spec.device)) or max(1, cores() // beginning.threads)

    def _start(self, beginning: Beginning) -> _Process:
        used = Counter(member.handle.card for member in self._members)
        card = min(cards_of(beginning.spec.device), key=lambda one: used[one], default=None)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with environment({} if card is None else {CARDS: card}), interrupts_ignored():
            process = context.Process(target=serve, args=(theirs,), name=f"worker {self._started}", daemon=True)
            process.start()
        theirs.close()
        self._started += 1
        with suppress(OSError):  # it died: its end of the pipe tells
            ours.send(beginning)
        return _Process(process, ours, card)

    def _hand(self, member: Member[_Process], message: Beginning | tuple[str, Task]) -> None:
        with suppress(OSError):
            member.handle.pipe.send(message)

    def _hear(self) -> Iterator[tuple[Member[_Process], str, Any]]:
        pipes = {member.handle.pipe: member for member in self._members}
        for pipe in wait(list(pipes)):
            assert isinstance(pipe, Connection)
            member = pipes[pipe]
            try:
                what, told = pipe.recv()
            except (EOFError, OSError):
                yield member, "died", self._how(member.handle)
            else:
                member.handle.spoke = True
                yield member, what, told

    def _how(self, handle: _Process) -> str:
        """How a process ended."""
        handle.process.join(_PATIENCE)
        handle.pipe.close()
        code = handle.process.exitcode
        how = (
            f"ended with exit code {code}" if (code or 0) >= 0 else f"was killed by {signal.Signals(-(code or 0)).name}"
        )
        if handle.spoke or code != 1:
            return how
        guard = 'must stand below `if __name__ == "__main__":`, since each of them imports the script anew'
        return f"{how}. In a script of Python, what calls with workers {guard}."

    def _stop(self, members: Sequence[Member[_Process]]) -> None:
        for member in members:
            member.handle.pipe.close()
            if member.task is not None or not member.ready:
                member.handle.process.terminate()
        for member in members:
            member.handle.process.join(_PATIENCE)
            if member.handle.process.is_alive():
                member.handle.process.kill()
                member.handle.process.join()


def serve(pipe: Connection) -> None:
    """What a process does: as it is told, until the other end is gone."""
    settle()
    tqdm.set_lock(threading.RLock())  # its own lock would be a semaphore of the system, which stays when this is ended
    told = Told(lambda what, about: pipe.send((what, about)))
    worker: Worker | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = pipe.recv()
            if isinstance(message, Beginning):
                worker = None
                worker = begun(message)
                pipe.send(("ready", None))
            elif worker is not None:
                which, task = message
                _say(pipe, answer(worker, which, task, told), task)


def _say(pipe: Connection, said: tuple[str, Any], task: Task) -> None:
    """Hand over what a task came to, or why that cannot be handed over. Raises OSError where the other end is gone."""
    try:
        pipe.send(said)
    except OSError:
        raise
    except Exception as error:  # nothing was sent: what is said is made into bytes first
        return pipe.send(("failed", unsent(task, str(error))))


def cards_of(device: str) -> list[str]:
    """The cards there are, as their processes are told of them; none on a CPU."""
    if device != "cuda":
        return []
    named = os.environ.get(CARDS)
    return named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
