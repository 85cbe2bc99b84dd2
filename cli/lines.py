"""What a job tells where there is no terminal: plain lines, on stderr."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from alphatoken_curate.rows.files import legible
from alphatoken_curate.wording import count

_SECONDS_BETWEEN_LINES = 10.0


class Lines:
    """A line where a stage begins, every ten seconds, and where it ends."""

    def __init__(self) -> None:
        self._name, self._total, self._done, self._told = "", 0, 0, 0
        self._began = self._last = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """End what is told of the stages so far, so that other text may follow."""
        self._end()
        self._name = ""

    def stage(self, name: str, tokens: int) -> None:
        """A stage of `tokens` tokens begins; of 0 tokens, one whose length is not known."""
        self._end()
        self._name, self._total, self._done, self._told = name, tokens, 0, 0
        self._began = self._last = time.monotonic()
        self._begin()

    def advance(self, tokens: int) -> None:
        """That many tokens more are done."""
        self._done += tokens
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self._end()

    def note(self, text: str) -> None:
        """Something the user should know."""
        click.echo(legible(text), err=True)

    def warn(self, text: str) -> None:
        """Something that needs the user's attention."""
        self.note(f"! {text}")

    def _begin(self) -> None:
        click.echo(f"{self._name}: {count(self._total, 'token')}" if self._total else self._name, err=True)

    def _end(self) -> None:
        """How far the stage is, unless that was just told."""
        if self._told == self._done:
            return
        self._told = self._done
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._done < self._total else ""
        share = self._done / max(1, self._total)
        click.echo(f"{self._name}: {share:.0%} of {count(self._total, 'token')}, {rate:,.0f} tokens/s{left}", err=True)


def tell_json(found: Any) -> None:
    """Print a dataclass as one JSON object with sorted keys, in which what a terminal would obey is escaped."""
    import orjson

    # As a dict: keys of a dataclass are not sorted.
    click.echo(legible(orjson.dumps(asdict(found), option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2).decode()))


def tell_version(run: Path) -> None:
    """Say on stderr what a run of an early schema version lacks."""
    from alphatoken_curate.errors import StoredDataError
    from alphatoken_curate.runs import manifest
    from alphatoken_curate.runs.schema import lacks

    try:
        absent = lacks(manifest.read(run).schema_version)
    except StoredDataError:
        return  # of which the command speaks itself
    if absent:
        click.echo(f"{run}: {absent}", err=True)
