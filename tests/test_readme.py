"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_run import small_run

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no block marked {mark}"
    return found[1]


def test_the_histogram_runs_as_printed_and_takes_six_lines_of_polars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block("test: histogram")
    assert sum(bool(line) for line in code.splitlines()) == 6
    small_run(tmp_path / "sft.alphatoken")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "histogram" in printed
    assert "kept" in printed


def test_the_two_commands_are_there() -> None:
    assert "python -m venv" in block("ci: score")
    assert "alphatoken-curate score sample_data/sft.jsonl" in block("ci: score")
    assert block("ci: test").strip().endswith("pytest")
