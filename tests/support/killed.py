"""Work that is killed where a file is written: a fork of this process, which knows all that was patched in it."""

from __future__ import annotations

import os
from collections.abc import Callable

from alphatoken_curate.runs.atomic import KILL_AT


def ended_by(at: str, work: Callable[[], object]) -> int:
    """The signal that ends some work that dies at a point, in a process of its own; 0 where it comes to its end."""
    child = os.fork()
    if child == 0:
        os.environ[KILL_AT] = at
        try:
            work()
        finally:
            os._exit(0)
    return -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(at: str, work: Callable[[], object]) -> None:
    """Begin some work, which must die at that point."""
    assert ended_by(at, work) == 9, "the point was not reached"
