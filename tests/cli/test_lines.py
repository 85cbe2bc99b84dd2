"""What a job tells on stderr where there is no terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from alphatoken_curate.cli import lines
from alphatoken_curate.cli.lines import Lines, tell_json
from alphatoken_curate.rows.files import legible


def test_a_stage_is_told_where_it_begins_and_where_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as told:
        told.stage("reading rows", 0)
        assert capsys.readouterr().err == "reading rows\n"
        told.stage("scoring", 1200)
        assert capsys.readouterr().err == "scoring: 1,200 tokens\n"
        told.advance(1200)
        assert capsys.readouterr().err == ""
    last = capsys.readouterr().err
    assert last.startswith("scoring: 100% of 1,200 tokens, ") and last.endswith("tokens/s\n")


def test_a_long_stage_is_told_of_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(lines.time, "monotonic", lambda: now)
    told = Lines()
    told.stage("scoring", 400)
    capsys.readouterr()
    for now, share in ((104.0, None), (110.0, "50%"), (115.0, None), (120.0, "100%")):  # noqa: B007
        told.advance(100)
        said = capsys.readouterr().err
        assert said == "" if share is None else said.startswith(f"scoring: {share} of 400 tokens, 20 tokens/s")
    told.finish()
    assert capsys.readouterr().err == ""  # that it is done was just told


def test_what_needs_attention_is_marked_and_nothing_commands_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    told = Lines()
    told.note("8 rows are held out\x1b[2J")
    told.warn("Memory ran out")
    assert capsys.readouterr().err == "8 rows are held out\\u001b[2J\n! Memory ran out\n"


def test_json_is_legible_and_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Found:
        text: str
        number: float

    text = "é\x9b\x7f\u202e\u2028\x1b[2J\\u202e \U000e0001"
    tell_json(Found(text, 0.5))
    printed = capsys.readouterr().out
    assert printed == legible(printed) and "é" in printed
    assert json.loads(printed) == {"text": text, "number": 0.5}
