"""Whole small runs of random rows, flags, expressions, masks and exports (`fuzz_runs`); its oracle sees faults."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus import corpus_tokenizer
from fuzz_flags import by, expression
from fuzz_oracle import Fell, Stored, answers_of, check_answers, check_counts, check_mask, said, stored
from fuzz_rows_made import Rows
from small_run import published, small_run

from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks import criteria
from alphatoken_curate.runs.schema import SFT, components

ROOT = Path(__file__).parents[2]


def campaign(*arguments: object, timeout: float) -> dict[str, Any]:
    """What the fuzzer tells at its end, in a process of its own, where warnings of others are none of ours."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/fuzz_runs.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long
def test_some_whole_runs() -> None:
    found = campaign("--seed", 0, "--rounds", 8, timeout=300)
    assert found["rounds"] == 8 and found["codes"]["verify 0"] > 5 and found["codes"]["score 0"] > 1


@pytest.mark.stress
def test_ten_minutes_of_whole_runs() -> None:
    found = campaign("--seed", int(time.time()), "--seconds", 600, timeout=1500)
    assert found["rounds"] > 100 and found["fell"] == 0
    assert {"check", "score", "mask", "refresh", "show", "stats", "compare", "report", "export", "verify"} == {
        name.split()[0] for name in found["codes"] if name.endswith(" 0")
    }


# --- the oracle can fail


@pytest.fixture(params=["sft", "preference"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Stored:
    return stored(small_run(tmp_path / "run", kind=request.param, config=published(keep=0.5)))


def _list(found: Stored, where: str, name: str, row: int = 0) -> list[Any]:
    rows = (found.values if where == "values" else found.train)[0]
    part: list[Any] = rows[row][found.branches[-1] + name]
    return part


def _swap_kept(found: Stored) -> None:
    """Keep another token for one that is kept; all of a row that belongs together goes along."""
    row = next(row for row in found.train[0] if _droppable(found, row))
    prefix = found.branches[-1]
    on = row[prefix + "loss_mask"].index(1)
    off = next(i for i, one in enumerate(row[prefix + "value"]) if one is not None and not row[prefix + "loss_mask"][i])
    for name in ("loss_mask", "loss_weight"):
        row[prefix + name][on], row[prefix + name][off] = row[prefix + name][off], row[prefix + name][on]
    row[prefix + "labels"][on], row[prefix + "labels"][off] = -100, row[prefix + "input_ids"][off]


def _droppable(found: Stored, row: dict[str, Any]) -> bool:
    prefix = found.branches[-1]
    responds = [one is not None for one in row[prefix + "value"]]
    return 0 < sum(row[prefix + "loss_mask"]) < sum(responds)


def _set(where: str, name: str, index: int, value: Any) -> Callable[[Stored], None]:
    return lambda found: _list(found, where, name).__setitem__(index, value)


FAULTS: dict[str, tuple[Callable[[Stored], None], str]] = {
    "a row less": (lambda found: found.values[0].pop(), "counts|not those read"),
    "a row twice": (lambda found: found.values[0].append(found.values[0][0]), "twice"),
    "a count": (lambda found: found.manifest["counts"].update(scored=99), "counts"),
    "the first token": (_set("values", "response", 0, True), "the first token responds"),
    "no number": (_set("values", "nll", -1, float("nan")), "nll is not finite"),
    "no signal": (_set("values", "nll", -1, None), "nll is not of the response"),
    "another token": (_set("train", "input_ids", 0, 7**5), "other tokens"),
    "no weight": (_set("train", "loss_weight", -1, float("inf")), "a weight is no weight"),
    "off the response": (_set("train", "loss_weight", 0, 1.0), "kept off a response"),
    "a label": (_set("train", "labels", 0, 3), "labels are not where weights are"),
    "a row of a mask less": (lambda found: found.train[0].pop(), "rows of train"),
    "a choice": (_swap_kept, "keeps"),
    "kept tokens": (lambda found: found.manifest["masks"][0].update(kept_tokens=1), "other tokens"),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", FAULTS)
def test_the_oracle_sees(name: str, run: Stored) -> None:
    (run.run / "rejects.jsonl").write_text('{"row_id": 3}\n')
    check_counts(run)
    check_mask(run, 0)
    spoil, told = FAULTS[name]
    spoil(run)
    with pytest.raises(Fell, match=told):
        check_counts(run)
        check_mask(run, 0)


CHAT = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "é d"}]}
TOKENS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


def _answered(record: dict[str, Any], text: str, responding: str, **more: Any) -> tuple[Stored, list[Rows], Any]:
    """A run of one row, of which a part of the text responds."""
    tokenizer = corpus_tokenizer()
    ids, start = tokenizer(text).input_ids, len(tokenizer(text.partition(responding)[0]).input_ids)
    end = start + len(tokenizer(responding).input_ids)
    row = {"row_id": 0, "turn": 0, "source": "rows.jsonl", "line": 2, "status": "scored", "input_ids": ids}
    row |= {"response": [start <= i < end for i in range(len(ids))], **more}
    found = Stored(Path(), {}, ("",), {0: [row]}, {})
    return found, [Rows(Path("data/rows.jsonl"), 1, {2: record})], tokenizer


def test_the_oracle_sees_what_responds_for_an_answer() -> None:
    text = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\né d<|im_end|>\n"
    assert check_answers(*_answered(CHAT, text, "é d<|im_end|>"), []) == 1
    for wrong in ("é d", "é d<|im_end|>\n", " d<|im_end|>", "ab<|im_end|>"):
        with pytest.raises(Fell, match="responds for"):
            check_answers(*_answered(CHAT, text, wrong), [])
    assert check_answers(*_answered(CHAT, text, "ab"), ["--chat-template", "x"]) == 0
    cut = text.partition("d<|im_end|>")[0]
    length = len(corpus_tokenizer()(cut).input_ids)
    assert check_answers(*_answered(CHAT, cut, "é "), ["--max-length", str(length)]) == 1
    with pytest.raises(Fell, match="at most 5"):
        check_answers(*_answered(CHAT, cut, "é "), ["--max-length", "5"])
    assert check_answers(*_answered(TOKENS, "a", "a", input_ids=[5, 6, 7], response=[False, True, True]), []) == 1
    with pytest.raises(Fell, match="row 0"):
        check_answers(*_answered(TOKENS, "a", "a", input_ids=[5, 6, 7], response=[False, False, True]), [])


def test_the_oracle_sees_rows_that_are_refused_for_nothing() -> None:
    def refused(record: dict[str, Any], *flags: str) -> int:
        return check_answers(*_answered(record, "a", "a", status="rejected"), flags)

    odd = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "<|im_end|>"}]}
    same = {"instruction": "a", "input": "\n", "output": "\n"}
    assert refused(same) == refused(same | {"input": "\ufdd0", "output": "b"}) == 1
    assert refused(odd) == refused(CHAT, "--max-length", "8") == refused(CHAT, "--assistant-specials", "refuse") == 1
    for record in (CHAT, TOKENS, {"prompt": "a", "response": "b"}):
        with pytest.raises(Fell, match="is refused"):
            refused(record)


def test_the_answers_of_a_row() -> None:
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))]
    off = [*messages, {"role": "assistant", "content": "c", "weight": 0}, {"role": "assistant", "content": "d"}]
    assert answers_of({"messages": off}, "", "all", 0) == ["b", "d"]
    assert answers_of({"messages": off}, "", "last", 0) == answers_of({"messages": off}, "", "each", 1) == ["d"]
    assert answers_of({"prompt": "a", "response": "b"}, "", "all", 0) == ["b"]
    assert answers_of({"chosen": "Human: a\n\nAssistant: b", "rejected": "x"}, "chosen", "all", 0) == [" b"]
    assert answers_of({"messages": messages, "rejected_response": "c"}, "rejected", "all", 0) == ["c"]


def test_what_was_not_said_is_a_fault() -> None:
    assert said(r"^rows (\d+) of ([\d,]+)(?:, (\d+) bad)?", "a\nrows 3 of 1,234\n") == (3, 1234, 0)
    with pytest.raises(Fell, match="nothing like"):
        said(r"^rows (\d+)", "no rows")


# --- what is drawn


def test_expressions_of_the_grammar_are_read_and_all_of_them_are_drawn() -> None:
    known, read = components("published"), 0
    draw = random.Random(1)
    for _ in range(300):
        try:
            criteria.columns_needed("nll + 0 * " + expression(draw), known, SFT)
            read += 1
        except UsageError as error:
            assert str(error).startswith("by: ")
    assert read > 100
    texts = " ".join(by(draw) for _ in range(3000))
    assert all(word in texts for word in ("CASE WHEN", "OVER (", "random", "LAG(", "QUANTILE_CONT", "read_csv"))
