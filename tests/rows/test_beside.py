"""What stands beside a row's shape: marks of whole rows, other answers, more of the question, what is no text."""

from __future__ import annotations

from typing import Any

import pytest

from alphatoken_curate.rows.beside import BESIDE_SHAPES
from alphatoken_curate.rows.columns import NAMES
from alphatoken_curate.rows.containers import RawRow
from alphatoken_curate.rows.read import RowStream, rows_of

USER, ANSWER = {"role": "user", "content": "W?"}, {"role": "assistant", "content": "It is 5."}
NO = {"role": "assistant", "content": "No."}
IDS = [5, 6, 7, 8]

SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "conversations": {"conversations": [{"from": "human", "value": "W?"}, {"from": "gpt", "value": "It is 5."}]},
    "continued": {"prompt": "W?", "completion": " It is 5."},
    "texts": {"prompt": "W?", "response": "It is 5."},
    "lists": {"prompt": [USER], "completion": [ANSWER]},
    "instruction": {"instruction": "W?", "output": "It is 5."},
    "tokens": {"input_ids": IDS, "labels": IDS},
    "pair": {"prompt": "W?", "chosen": "It is 5.", "rejected": "No."},
    "whole pair": {"chosen": [USER, ANSWER], "rejected": [USER, NO]},
    "beside": {"messages": [USER, ANSWER], "rejected_response": "No."},
}
CHATS = {name: record for name, record in SHAPES.items() if name != "tokens"}


def read(record: dict[str, Any], also: Any = ()) -> Any:
    """Its normal form, or the bad row."""
    found = rows_of([record], "a.jsonl", also)
    return found.rows[0].record if found.rows else found.bad[0]


def test_every_key_is_read_of_columns_too() -> None:
    assert NAMES.issuperset(BESIDE_SHAPES)


# --- rows that do not train


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("key", ["weight", "train", "trainable", "loss_weight", "loss_scale", "loss"])
def test_a_row_that_is_marked_off_is_refused(name: str, key: str) -> None:
    record = SHAPES[name]
    for off in (False, *(() if key in ("train", "trainable", "loss") else (0, 0.0))):
        bad = read(record | {key: off})
        assert bad.reason == "marked_off" and bad.message.startswith(f"{key} is {str(off).lower()}: the whole row")
    says_nothing: tuple[Any, ...] = (True, 1, 1.0, None, float("nan"), "70 kg", {"a": 0})
    for on in says_nothing:
        assert read(record | {key: on}) == read(record)


def test_switches_are_no_numbers() -> None:
    """A column `loss` may hold what the row cost a model, and `train` the number of a fold."""
    for key, value in (("loss", 0.0), ("loss", 2.31), ("train", 0), ("loss", [0.1, 0.2])):
        assert read(SHAPES["messages"] | {key: value}) == read(SHAPES["messages"])


def test_weights_of_rows_are_told() -> None:
    rows = [SHAPES["messages"] | {"weight": weight} for weight in (0.25, 1, 1.0, 3)]
    stream = RowStream(())
    assert len(list(stream.sort([RawRow(i, row, row) for i, row in enumerate(rows, 1)], "a.jsonl"))) == 4
    told = "weights of rows (weight, loss_weight, loss_scale) are left aside: every row weighs as much as any"
    assert stream.told == {told: 2}


def test_a_weight_below_0_is_named() -> None:
    assert read(SHAPES["messages"] | {"weight": -1}).reason == "message_weight"
    assert read(SHAPES["messages"] | {"weight": float("inf")}) == read(SHAPES["messages"])  # left aside, as any is


@pytest.mark.parametrize("name", CHATS)
def test_a_list_of_weights_beside_a_chat_is_of_nothing_known(name: str) -> None:
    bad = read(CHATS[name] | {"loss_scale": [0, 1]})
    assert bad.reason == "message_weight" and bad.message.startswith("loss_scale is a list beside ")


def test_marks_of_rows_that_only_ask_say_nothing() -> None:
    for record, also in (({"prompt": "W?"}, "prompt"), ({"text": "W."}, "text")):
        assert read(record | {"weight": 0}, (also,)) == read(record, (also,))


# --- what is no text


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("key", ["images", "videos", "audios", "image", "video", "audio"])
def test_what_is_no_text_is_refused(name: str, key: str) -> None:
    record = SHAPES[name]
    for value in (["x.png"], [{"path": "x.png"}], {"bytes": None, "path": "x.png"}, b"\x89PNG"):
        bad = read(record | {key: value})
        assert bad.reason == "not_text" and bad.message.startswith(f"{key} beside the text: only text is read")
    empty: tuple[Any, ...] = (None, [], "", "[]", 0, False, 3)
    for nothing in empty:
        assert read(record | {key: nothing}) == read(record)


def test_a_link_is_no_picture_unless_the_text_has_a_place_for_it() -> None:
    asked = {"role": "user", "content": "<image>\nWhat is it?"}
    assert read({"messages": [asked, ANSWER], "image": "coco/1.jpg"}).reason == "not_text"
    assert read({"messages": [USER, ANSWER], "image": "https://example.org/a.png"}) == read(SHAPES["messages"])
    assert read({"messages": [asked, ANSWER], "images": []}).messages == [asked, ANSWER]


# --- other answers


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *[("messages", key) for key in ("response", "output", "completion", "chosen")],
        *[("conversations", key) for key in ("response", "output", "completion", "chosen")],
        *[("instruction", key) for key in ("response", "completion", "chosen")],
        *[("texts", key) for key in ("output", "chosen")],
        *[("continued", key) for key in ("output", "chosen")],
        *[("lists", key) for key in ("output", "chosen")],
        *[("pair", "output"), ("whole pair", "response"), ("beside", "response")],
    ],
)
def test_another_answer_is_refused_and_the_same_is_not(name: str, key: str) -> None:
    record = SHAPES[name]
    for other in ("z", ["z"], [USER, {"role": "assistant", "content": "z"}], [{"from": "gpt", "value": "z"}]):
        bad = read(record | {key: other})
        assert bad.reason == "ambiguous_shape" and f"{key} beside " in bad.message, bad.message
    for same in ("It is 5.", " It is\n5. ", "5", [USER, ANSWER], "", None, [], 5, {"score": 1}):
        assert read(record | {key: same}) == read(record), same


def test_sets_that_people_have_are_read() -> None:
    chat = SHAPES["messages"]
    for beside in (
        {"prompt": "W?", "prompt_id": "x"},  # UltraChat, No Robots
        {"source": "s", "dataset": "d", "answer": "5", "problem": "W?", "solution": "So 5."},  # Tulu, OpenR1-Math
        {"text": "W? It is 5.", "output_format": "x", "input": [USER]},
    ):
        assert read(chat | beside) == read(chat)
    alpaca = SHAPES["instruction"] | {"input": "Now."}
    assert read(alpaca | {"text": "W? Now. It is 5.", "prompt": "W? Now. It is 5."}) == read(alpaca)
    magpie = SHAPES["conversations"] | {"instruction": "W?", "response": "It is 5."}
    assert read(magpie) == read(SHAPES["conversations"])
    infinity = SHAPES["conversations"] | {"label": {"ability_en": ["maths"]}, "reward": 0.0}
    assert read(infinity) == read(SHAPES["conversations"])


# --- more of the question


@pytest.mark.parametrize("name", ["texts", "continued", "lists", "pair"])
def test_input_beside_a_prompt_is_a_part_of_it_or_refused(name: str) -> None:
    record = SHAPES[name]
    bad = read(record | {"input": "Now."})
    assert bad.reason == "ambiguous_shape" and bad.message.startswith("input beside ")
    assert ("--map prompt=instruction,response=output" in bad.message) == (name == "texts")
    for nothing in ("", " ", None, "W?", ["x"], {"a": 1}):
        assert read(record | {"input": nothing}) == read(record)


# --- more of the question


def test_the_context_of_an_instruction_is_not_lost() -> None:
    """As Dolly has it."""
    row = {"instruction": "W?", "context": "It is said to be 5.", "output": "It is 5."}
    bad = read(row)
    assert bad.reason == "ambiguous_shape" and bad.message.endswith("by --map context=input")
    assert read(row | {"context": " "}) == read(row | {"context": {"a": 1}}) == read(SHAPES["instruction"])
    both = read({"instruction": "W?", "input": "It is said to be 5.", "output": "It is 5."})
    assert read(row | {"input": "It is said to be 5."}) == both


def test_a_question_is_its_parts_that_are_not_empty() -> None:
    texts = {"instruction": "", "input": "W?", "output": "It is 5."}
    assert read(texts) == read(texts | {"instruction": "W?", "input": ""}) == read(SHAPES["texts"])
