"""Messages that say whether they train: those marked off are context, and what cannot be done is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from alphatoken_curate.rows.marks import MARKS
from alphatoken_curate.rows.read import RowStream, normalise, rows_of
from alphatoken_curate.rows.shapes import Messages, Pair, Prompt

USER = {"role": "user", "content": "Say it."}
TOLD = "answers that are marked off (weight, train, loss or trainable) are context"


def answer(text: str, **marks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **marks}


def read(record: dict[str, Any], also: Any = ()) -> Any:
    """Its normal form, or the bad row."""
    found = rows_of([record], "a.jsonl", also)
    return found.rows[0].record if found.rows else found.bad[0]


def chat(*messages: dict[str, Any]) -> Any:
    return read({"messages": list(messages)})


@pytest.mark.parametrize("key", MARKS)
@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, 1.0)])
def test_an_answer_that_is_marked_off_is_context(key: str, off: Any, on: Any) -> None:
    made = chat(USER, answer("wrong", **{key: off}), USER, answer("right", **{key: on}), USER, answer("so"))
    # The template is told nothing of it.
    assert made.messages == [USER, answer("wrong"), USER, answer("right"), USER, answer("so")]
    assert made.context == {1} and made.responding() == [3, 5] and made.responding(last_only=True) == [5]


def test_a_mark_that_is_null_or_on_says_nothing() -> None:
    plain = chat(USER, answer("a"))
    assert chat({**USER, "weight": None}, answer("a", weight=1, train=None)) == plain
    assert chat({**USER, "weight": 0.0, "train": False}, answer("a", train=True)) == plain


def test_the_last_answer_is_the_last_though_it_is_marked_off() -> None:
    assert chat(USER, answer("a"), USER, answer("b", weight=0)).responding(last_only=True) == []


REFUSED = {
    "a fraction": (answer("a", weight=0.5), "messages[1].weight is 0.5; it must be 0 or 1"),
    "a larger number": (answer("a", loss=2), "messages[1].loss is 2; it must be 0 or 1"),
    "text": (answer("a", train="no"), "messages[1].train is 'no'; it must be 0 or 1"),
    "a list": (answer("a", step_loss_mask=[0, 1]), "messages[1].step_loss_mask is [0, 1]; it must be 0 or 1"),
    "both": (answer("a", weight=0, train=True), "messages[1]: weight and train say different things"),
    "parts by place": (
        answer("a", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]),
        "messages[1].train_detail tells parts of a message apart; a message trains whole here",
    ),
    "a part of the content": (
        {"role": "assistant", "content": [{"type": "text", "text": "a", "train": False}]},
        "messages[1].content[0] is marked off; an answer trains whole here: mark the message, or split it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_named(name: str) -> None:
    message, told = REFUSED[name]
    bad = chat(USER, message)
    assert bad.reason == "message_weight" and bad.message.startswith(told)


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"loss": 1.0}])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_a_users_text_does_not_train(role: str, mark: dict[str, Any]) -> None:
    bad = chat({"role": role, "content": "a"} | mark, USER, answer("b"))
    assert bad.reason == "message_weight"
    assert f"asks that a message of role {role} trains; only answers respond here. Set 0" in bad.message


def test_a_row_of_which_every_answer_is_off() -> None:
    bad = chat(USER, answer("a", weight=0), USER, answer("", train=False))
    assert bad.reason == "marked_off" and bad.message.startswith("every answer is marked off")
    # One that does not respond may be empty.
    assert chat(USER, answer("", weight=0), USER, answer("b")).responding() == [3]


def test_every_shape_of_messages_has_marks() -> None:
    sharegpt = [{"from": "human", "value": "q", "weight": 0.0}, {"from": "gpt", "value": "a", "weight": 0}]
    more = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b", "weight": 1}]
    assert read({"conversations": sharegpt + more, "system": "s"}).responding() == [4]
    two = read(
        {"prompt": [USER, answer("a", weight=1)], "completion": [USER, answer("b", weight=0), USER, answer("c")]}
    )
    assert two.responding() == [5]
    waiting = read({"messages": [USER, answer("a", weight=0), USER]}, ("prompt",))
    assert isinstance(waiting, Prompt) and waiting.messages == [USER, answer("a"), USER]


def test_pairs_have_marks() -> None:
    marked, plain = [USER, answer("x", weight=0), USER], [USER, answer("x"), USER]
    whole = read({"chosen": [*marked, answer("a")], "rejected": [*plain, answer("b")]})
    assert isinstance(whole, Pair) and isinstance(whole.chosen, Messages)
    assert whole.chosen.respond_from == 3 and whole.chosen.messages == [*plain, answer("a")]
    two = [answer("a", weight=0), USER, answer("b")]
    behind = read({"prompt": [USER], "chosen": two, "rejected": [answer("c")]})
    assert behind.chosen.responding() == [3] and behind.rejected.responding() == [1]
    off = read({"prompt": [USER], "chosen": [answer("a")], "rejected": [answer("b", loss=False)]})
    assert off.reason == "marked_off" and off.message.startswith("rejected: every answer is marked off")
    # A prompt that the branches repeat is one, marked or not.
    again = read({"prompt": plain, "chosen": [*marked, answer("a")], "rejected": [*plain, answer("b")]})
    assert again == whole


def test_columns_hold_marks_as_floats(tmp_path: Path) -> None:
    records = [
        {
            "messages": [
                USER | {"weight": None},
                answer("a", weight=0.0),
                USER | {"weight": None},
                answer("b", weight=1.0),
            ]
        }
    ]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(records[0]))
    for name in ("a.parquet", "a.jsonl"):
        stream = RowStream([str(tmp_path / name)])
        record: Any = next(iter(stream)).record
        assert record.responding() == [3] and stream.told == {TOLD: 1}


def test_the_mark_itself_is_left_out_where_it_is_on() -> None:
    assert normalise({"messages": [USER, answer("a", weight=1)]}) == normalise({"messages": [USER, answer("a")]})
