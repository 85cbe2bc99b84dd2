"""What the README shows is what happens.

`pytest --rewrite tests/test_readme.py` writes what the code below `<!-- test: question N -->` prints into README.md.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_run import real_run
from small_run import small_run

PATH = Path(__file__).parent.parent / "README.md"
README = PATH.read_text(encoding="utf-8")
QUESTION = re.compile(r"(<!-- test: question (\d) -->\n```python\n)(.*?)(```\n\n```text\n)(.*?)(```\n)", re.DOTALL)


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
    assert "nll" in printed


def answered(text: str) -> str:
    """The README with the answers that its questions print, asked one after the other of the run of `real_run`."""
    import polars as pl

    known: dict[str, Any] = {}

    def run(found: re.Match[str]) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(found[3], "README.md", "exec"), known)
        return "".join((found[1], found[3], found[4], out.getvalue(), found[6]))

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), pl.Config(tbl_width_chars=100):
        real_run(Path("few.alphatoken"))
        return QUESTION.sub(run, text)


def test_six_questions_have_the_answers_that_are_printed(same_text: Callable[[Path, str], None]) -> None:
    assert [found[2] for found in QUESTION.finditer(README)] == list("123456")
    same_text(PATH, answered(README))


def test_an_answer_that_is_not_what_is_printed_is_seen() -> None:
    (first, *_) = QUESTION.finditer(README)
    wrong = README.replace(first[5], first[5].replace("│", "|", 1))
    assert wrong != README
    assert answered(wrong) == README


def test_the_two_commands_are_there() -> None:
    assert "python -m venv" in block("ci: score")
    assert "alphatoken-curate score sample_data/sft.jsonl" in block("ci: score")
    assert block("ci: test").strip().endswith("pytest")
