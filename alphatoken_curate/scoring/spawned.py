"""Processes of this machine that end with the one that began them, and leave Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

from alphatoken_curate.errors import CurateError


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle() -> None:
    """First of all in such a process: no answer to Ctrl-C, and an end when the other one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the other one does, even in the middle of a task."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """A process begun in this block ignores Ctrl-C from its first moment; this one answers it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Variables that processes begun in this block have from the start: torch reads its cards once."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def portable(error: Exception) -> Exception:
    """An error that can be pickled, with where it came from."""
    where = "".join(traceback.format_exception(error))
    plain = all(isinstance(part, str | int | float | bytes | None) for part in error.args)
    if not isinstance(error, CurateError) and (type(error).__module__ != "builtins" or not plain):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a worker:\n{where}")
    error.__cause__ = error.__context__ = None
    return error
