"""What a job tells while it runs: a bar on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alphatoken_curate.rows.files import legible

from .lines import Lines


def listener() -> Lines:
    """What listens to a job here."""
    return Bars() if sys.stderr is not None and sys.stderr.isatty() else Lines()


class Bars(Lines):
    """A bar a stage, with rate and time left; without an end until tokens are told of: all may be one batch."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def finish(self) -> None:
        """End what is told of the stages so far, so that other text may follow."""
        super().finish()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def advance(self, tokens: int) -> None:
        """That many tokens more are done."""
        self._done += tokens
        if self._bars is not None and self._task is not None:
            rate = self._done / max(time.monotonic() - self._began, 1e-9)
            told = f"{rate:,.0f} tokens/s"
            self._bars.update(self._task, total=self._total or None, completed=self._done, rate=told)

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._tell(text, None)

    def warn(self, text: str) -> None:
        """Something that needs the user's attention."""
        self._tell(f"! {text}", "yellow")

    def _tell(self, text: str, style: str | None) -> None:
        console = Console(stderr=True) if self._bars is None else self._bars.console
        console.print(legible(text), style=style, markup=False, highlight=False, emoji=False)

    def _begin(self) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        self._task = self._bars.add_task(self._name, total=None, rate="")

    def _end(self) -> None:
        """The bar is full and moves no more."""
        if self._bars is not None and self._task is not None:
            whole = self._done or 1
            self._bars.update(self._task, total=whole, completed=whole)
            self._task = None


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]:>16}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
