"""Who makes the tokens of rows changes nothing of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import CHATML, answer, user
from templates import tokenizer_of
from tiny import tiny_model
from tiny_files import contents, write_jsonl

from alphatoken_curate import ModelError, ScoreConfig, score
from alphatoken_curate.rows.read import RowStream
from alphatoken_curate.scoring import tokenising
from alphatoken_curate.scoring.engines import Here
from alphatoken_curate.scoring.prepare import Prepared, prepare
from alphatoken_curate.scoring.tokenising import Made, Recipe, Tokeniser, tokenised
from alphatoken_curate.tokens.chat import ChatSettings
from alphatoken_curate.tokens.packed import pack, unpack
from alphatoken_curate.tokens.tokenise import Runaways, tokenise

DATED = "{{ '' if messages|length > 2 else strftime_now('%d %b %Y') }}" + CHATML
"""Chats of one answer alone are told the day."""


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    tokenizer = tokenizer_of("<|im_start|><|im_end|>")
    tokenizer.chat_template = DATED
    tiny_model("llama", dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder / "chatty")
    tokenizer.save_pretrained(folder / "chatty")
    return str(folder / "chatty")


@pytest.fixture(scope="module")
def data(folder: Path) -> str:
    """Chats, plain text, tokens, and rows that are bad for whoever reads or tokenises them, in turn."""
    records: list[Any] = []
    for i in range(12):
        several = [m for n in range(i % 4) for m in (user(f"and {n}"), answer(f"so {i} {n} <|im_end|>"))]
        records += [
            {"messages": [user(f"row {i}"), answer(f"the answer {i}"), *several]},
            {"prompt": f"once {i}", "completion": " upon a time" * (1 + i % 3)},
            {"input_ids": [5, 6, 7 + i], "labels": [-100, 6, 7 + i]},
            {"messages": [user("asked"), answer(" ")]} if i % 3 else "{",
            {"messages": [user("x" * 400), answer("cut away")]},
            {"input_ids": [5, 10**6], "labels": [-100, 10**6]},
        ]
    return write_jsonl(folder / "mixed.jsonl", records)


@pytest.fixture
def settings(model: str, data: str) -> dict[str, Any]:
    return {"data": data, "model": model, "turns": "each", "max_length": 100, "bad_rows": "quarantine"}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are handed over by threes, and others help from the first of them on."""
    monkeypatch.setattr(tokenising, "_ROWS", 3)
    monkeypatch.setattr(tokenising, "ALONE", 0.0)


def told(found: Prepared) -> dict[str, Any]:
    names = ("tokens", "bad", "told", "read_as", "good", "rows_read", "kind", "config")
    return {name: getattr(found, name) for name in names} | {"columns": found.rows.columns.tolist()}


def recipe(model: str) -> tuple[Recipe, Any]:
    from alphatoken_curate.models.load import find_model

    made = Recipe(
        source=find_model(model),
        trust_remote_code=False,
        template=None,
        chats=ChatSettings(),
        turns="all",
        max_length=100,
        vocab_size=1000,
        stop_ids=frozenset(),
    )
    return made, made.tokenizer()


@pytest.mark.parametrize("each", [1, 3, 1000])
def test_any_number_of_rows_at_once_makes_the_same_tokens(
    each: int, model: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "_ROWS", each)
    made, tokenizer = recipe(model)
    parts = list(tokenised(RowStream([data]), made, tokenizer))
    counts = Counter[str]()
    good, bad = tokenise(
        RowStream([data]), tokenizer, max_length=100, turns="all", vocab_size=1000, chats=ChatSettings(), told=counts
    )
    assert [row for part in parts for row in map(_plain, unpack(part.table))] == [*map(_plain, good)]
    assert [one for part in parts for one in part.bad] == bad and len(bad) > 20
    assert sum((part.told for part in parts), Counter[str]()) == counts and counts


def _plain(row: Any) -> tuple[Any, ...]:
    arrays = (row.input_ids, row.response, row.end_of_turn)
    return row.row_id, row.turn, row.source, row.line, row.id, row.truncated, *(one.tobytes() for one in arrays)


def test_runaways_are_counted_over_all_rows(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tokenizer = recipe(model)

    def parts(*_: Any) -> Iterator[Made]:
        for first in (0, 12, 24):
            yield Made(table=pack([]), bad=[], runaways=[f"a.jsonl:{first + n}: it runs" for n in range(12)])

    monkeypatch.setattr(tokenising, "_in_turn", parts)
    found = tokenised([], made, tokenizer)
    next(found)
    with pytest.raises(ModelError, match=r"^a\.jsonl:19: it runs\. It ran away at 19 rows before it"):
        next(found)


def test_a_piece_ends_at_one_runaway_too_many(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tokenizer = recipe(model)

    def running(*_: Any, runaways: Runaways, **__: Any) -> Any:
        for n in range(100):
            runaways.note(str(n))

    monkeypatch.setattr(tokenising, "tokenise", running)
    found = Tokeniser(made, tokenizer)([])
    assert found.runaways == [str(n) for n in range(20)] and not found.bad and not found.table.num_rows


@pytest.fixture
def helped(short: None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """All but the first three rows are made by others, of which the first is killed where it is `wanted`."""
    seen, made, heard = Counter[str](), tokenising._Helpers.made, tokenising._Helpers._heard

    def waited(self: Any, *arguments: Any) -> Iterator[Made]:
        while not all(one.ready for one in self._helpers):
            heard(self, deque())
        return made(self, *arguments)

    def counted(self: Any, *arguments: Any, **more: Any) -> dict[int, Made]:
        busy = [one.process.pid for one in self._helpers if one.task is not None]
        if busy and seen["wanted"] > seen["killed"]:
            seen["killed"] += 1
            os.kill(busy[0], signal.SIGKILL)
        done = heard(self, *arguments, **more)
        seen["made"] += len(done)
        return done

    monkeypatch.setattr(tokenising._Helpers, "made", waited)
    monkeypatch.setattr(tokenising._Helpers, "_heard", counted)
    return seen


@pytest.mark.long
@pytest.mark.parametrize("wanted", [0, 1])
def test_two_processes_make_the_tokens_of_one(wanted: int, settings: dict[str, Any], helped: Counter[str]) -> None:
    helped["wanted"] = wanted
    config = ScoreConfig(**settings | {"template_date": "2026-11-29"})
    found = prepare(config, processes=2)
    assert not multiprocessing.active_children() and helped["killed"] == wanted and helped["made"] >= 15
    assert told(found) == told(prepare(config))
    assert found.config.template_date == "2026-11-29" and len(found.bad) > 30 and found.told and found.read_as
    assert [one.row_id for one in found.bad] == sorted(one.row_id for one in found.bad)
    undated = write_jsonl(Path(settings["data"]).with_name("undated.jsonl"), [{"prompt": "a", "completion": "b"}] * 20)
    alone = replace(config, data=(undated,))
    assert prepare(alone, processes=2).config.template_date is None  # no chat asked for it


@pytest.mark.long
def test_a_run_whose_tokens_two_processes_made(settings: dict[str, Any], helped: Counter[str], tmp_path: Path) -> None:
    class Two(Here):
        def readers(self) -> int:
            return 2

    config = ScoreConfig(**settings | {"rows_per_shard": 7, "layers": 1, "batch_tokens": 400})
    score(config, tmp_path / "one")
    score(config, tmp_path / "two", engine=Two())
    assert helped["made"] >= 15
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.long
@pytest.mark.usefixtures("short")
def test_what_is_raised_ends_the_processes(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenising._Helpers, "_heard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(ScoreConfig(**settings), processes=2)
    assert not multiprocessing.active_children()
