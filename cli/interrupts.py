"""What SIGINT and SIGTERM end with: a line that says how to go on, and exit code 130."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

_received: list[int] = []
"""The signals that asked us to stop."""


@contextmanager
def interruptible() -> Iterator[None]:
    """End with exit code 130 where a signal interrupts what runs inside."""
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _unraisable
    try:
        yield
    except BaseException as error:
        # A library may dress an interrupt that met it as an error of its own.
        if _received or isinstance(error, KeyboardInterrupt | click.Abort):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # one is enough
            click.echo("Interrupted. What is finished is kept; run the same command again to go on.", err=True)
            sys.exit(130)
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # In the middle of an import, C extensions crash, modules stay half made, and pyarrow, which imports
            # pandas from within, drops the interrupt: once it is over.
            _later()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _unraisable(found: Any) -> None:
    """Python drops an interrupt that falls into a finaliser; it is raised again a moment later."""
    if found.exc_type is KeyboardInterrupt:
        _later()
    else:
        sys.__unraisablehook__(found)


def _later() -> None:
    again = threading.Timer(0.05, _thread.interrupt_main)
    again.daemon = True
    again.start()
