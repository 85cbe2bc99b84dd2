"""Bars on a terminal."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from alphatoken_curate.cli import terminal
from alphatoken_curate.cli.lines import Lines
from alphatoken_curate.cli.terminal import Bars, listener


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    plain = {"file": made, "force_terminal": True, "width": 100, "color_system": None}
    monkeypatch.setattr(terminal, "Console", lambda **_: Console(**plain))
    return made


def test_what_listens_depends_on_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, kind in ((Terminal(), Bars), (io.StringIO(), Lines)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert type(listener()) is kind


def test_a_bar_has_no_end_until_tokens_are_told_of(screen: Terminal) -> None:
    with Bars() as told:
        told.stage("target gradient", 900)
        assert told._bars is not None
        (task,) = told._bars.tasks
        assert task.total is None and "target gradient" in screen.getvalue()
        told.advance(300)
        assert (task.total, task.completed) == (900, 300)
        told.stage("scoring", 50)  # what a stage did not tell of is over too
        assert task.finished and len(told._bars.tasks) == 2
    assert told._bars is None and "scoring" in screen.getvalue()


def test_a_stage_of_unknown_length_ends_full(screen: Terminal) -> None:
    told = Bars()
    told.stage("reading rows", 0)
    assert told._bars is not None
    (task,) = told._bars.tasks
    assert task.total is None
    told.finish()
    assert task.finished


def test_notes_stand_above_the_bars(screen: Terminal) -> None:
    with Bars() as told:
        told.note("before")
        told.stage("scoring", 50)
        told.warn("[bold]Memory[/] ran out\x1b[2J")
    assert "before" in screen.getvalue() and "! [bold]Memory[/] ran out\\u001b[2J" in screen.getvalue()
