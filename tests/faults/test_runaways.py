"""Chat templates that never end, or write gigabytes: the row is refused by name, and soon the run if all are such."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, answer, chat, run, user
from runaways import BREAKING, RUNAWAYS
from templates import tokenizer_of
from tiny import tiny_model
from tiny_files import command, quiet, write_jsonl

from alphatoken_curate.errors import ModelError

RUNS = "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}"
AT_X = "{% if messages[0].content == 'run' %}" + RUNS + "{% endif %}" + CHATML


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A tiny model with a tokenizer, whose template a test may write anew."""
    tokenizer = tokenizer_of(CHATML)
    with quiet():
        tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def records(*texts: str) -> list[dict[str, Any]]:
    return [{"messages": [user(text), answer("yes")]} for text in texts]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["nested loops", "text times a number", "sum", "tree as JSON"])
def test_a_row_at_which_a_template_runs_away_is_a_bad_row(name: str) -> None:
    tokenizer = tokenizer_of("x")
    tokenizer.chat_template = RUNAWAYS[name] + CHATML
    good, bad = run(tokenizer, *[chat(user("a"), answer("b"))] * 3)
    assert not good and [row.reason for row in bad] == ["template_runs_away"] * 3
    assert all("runs away" in row.message and "--chat-template" in row.message for row in bad)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", BREAKING)
def test_a_row_at_which_a_template_breaks_is_a_bad_row(name: str) -> None:
    tokenizer = tokenizer_of("x")
    tokenizer.chat_template = BREAKING[name] + CHATML
    good, (bad,) = run(tokenizer, chat(user("a"), answer("b")))
    assert not good and bad.reason == "template_error"


def test_other_rows_are_kept() -> None:
    good, (bad,) = run(tokenizer_of(AT_X), *(chat(user(text), answer("b")) for text in ("a", "run", "c")))
    assert [row.row_id for row in good] == [0, 2] and (bad.row_id, bad.reason) == (1, "template_runs_away")


def test_a_template_that_runs_away_at_all_rows_ends_the_run() -> None:
    tokenizer, began = tokenizer_of("{{ 'x' * 10**10 }}" + CHATML), time.thread_time()
    with pytest.raises(
        ModelError, match=r"^a\.jsonl:20: the chat template runs away: .* It ran away at 19 rows before"
    ):
        run(tokenizer, *[chat(user("a"), answer("b"))] * 500)
    assert time.thread_time() - began < 20


@pytest.mark.one_in(2)
@pytest.mark.parametrize("verb", ["check", "score"])
@pytest.mark.parametrize("given", ["folder", "flag"])
def test_it_is_told_by_either_command_wherever_the_template_is_from(
    verb: str, given: str, model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja" if given == "flag" else model / "chat_template.jinja"
    flag = ("--chat-template", template) if given == "flag" else ()
    before = (model / "chat_template.jinja").read_text()
    template.write_text(AT_X)
    try:
        data = write_jsonl(tmp_path / "rows.jsonl", records("a", "run", "c"))
        out = ("-o", tmp_path / "run") if verb == "score" else ()
        ended = command(verb, data, "--model", model, *flag, *out)
    finally:
        (model / "chat_template.jinja").write_text(before)
    assert ended.code == 3 and "Traceback" not in ended.err, ended.err
    assert "rows.jsonl:2" in ended.err and "runs away" in " ".join(ended.err.split()), ended.err


def test_rows_aside_it_is_scored(model: Path, tmp_path: Path) -> None:
    (template := tmp_path / "own.jinja").write_text(AT_X)
    data = write_jsonl(tmp_path / "rows.jsonl", records("a", "run", "c", "d"))
    about = ("--model", model, "--chat-template", template, "--layers", 1, "--bad-rows", "quarantine")
    ended = command("score", data, *about, "-o", tmp_path / "run", "--device", "cpu")
    assert ended.code == 0, ended.err
    rejects = (tmp_path / "run" / "rejects.jsonl").read_text()
    assert rejects.count("\n") == 1 and "template_runs_away" in rejects
