"""Progress on a terminal, and a plain line every few seconds where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alphatoken_curate.rows.files import legible

_SECONDS_BETWEEN_LINES = 10.0


class Listener:
    """Listens to a job: a bar with rate and time left on a terminal, lines elsewhere. All of it on stderr."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._done, self._told = "", 0, 0, 0
        self._began = self._last = 0.0

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None or kind is None:
            self.finish()

    def finish(self) -> None:
        """End what is told of the stages so far, so that other text may follow."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._line()
        self._name = ""

    def stage(self, name: str, tokens: int) -> None:
        """A stage of `tokens` tokens begins."""
        if self._bar is None and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
        self._line()
        self._name, self._total, self._done, self._told = name, tokens, 0, -1
        self._began = self._last = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=tokens, rate="")

    def advance(self, tokens: int) -> None:
        """That many tokens more are done."""
        self._done += tokens
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{self._rate(now):,.0f} tokens/s")
        elif now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self._line()

    def note(self, text: str) -> None:
        """Something the user should know."""
        told = f"! {legible(text)}"
        if self._bar is not None:
            self._bar.console.print(told, style="yellow", markup=False, highlight=False, emoji=False)
        else:
            click.echo(told, err=True)

    def _rate(self, now: float) -> float:
        return self._done / max(now - self._began, 1e-9)

    def _line(self) -> None:
        """How far the stage is, where there is no bar, unless that was just told."""
        if sys.stderr.isatty() or not self._name or self._told == self._done:
            return
        self._told = self._done
        rate = self._rate(time.monotonic())
        left = (self._total - self._done) / rate if rate else 0.0
        share = self._done / max(1, self._total)
        tail = f", {left:.0f} s left" if self._done < self._total else ""
        click.echo(f"{self._name}: {share:.0%} of {self._total:,} tokens, {rate:,.0f} tokens/s{tail}", err=True)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]:>16}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
