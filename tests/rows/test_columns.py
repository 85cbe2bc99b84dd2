"""`--map`: columns under the names that rows are read by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from alphatoken_curate.errors import UsageError
from alphatoken_curate.rows.columns import NAMES, mapped, named_columns
from alphatoken_curate.rows.read import Reading, RowStream
from alphatoken_curate.rows.shapes import PromptCompletion

ROWS = [{"question": f"{i}?", "answer": f"{i}.", "prompt": "other", "uuid": i} for i in range(5)]
MAP = "question=prompt,answer=completion,uuid=id"


@pytest.fixture(params=["jsonl", "json", "parquet"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / f"rows.{request.param}"
    if request.param == "parquet":
        parquet.write_table(pa.Table.from_pylist([{**row, "unread": [1]} for row in ROWS]), path)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)) if request.param == "jsonl" else json.dumps(ROWS, indent=1))
    return str(path)


def test_columns_are_read_by_other_names(data: str) -> None:
    stream = RowStream([data], reading=Reading(columns=named_columns(MAP), all_there=True))
    rows = list(stream)
    assert [(row.id, row.record) for row in rows] == [
        (str(i), PromptCompletion(prompt=f"{i}?", completion=f"{i}.")) for i in range(5)
    ]
    assert stream.told == {
        "question is read as prompt (--map)": 5,
        "answer is read as completion (--map)": 5,
        "uuid is read as id (--map)": 5,
    }


def test_a_column_that_no_row_has_is_named_with_one_that_is_near(data: str) -> None:
    def read(columns: str, **more: Any) -> int:
        return len(list(RowStream([data], reading=Reading(columns=named_columns(columns), **more))))

    with pytest.raises(
        UsageError, match=r"--map quesion=prompt: no row has a column 'quesion'\. Did you mean question\?"
    ):
        read("quesion=prompt,answer=completion", all_there=True)
    with pytest.raises(UsageError, match=r"no row has a column 'text'\. The first row has answer, "):
        read("text=prompt", all_there=True)
    assert read("answer=completion,absent=id") == 5  # of a file beside DATA


def test_names_change_places() -> None:
    assert mapped({"a": 1, "b": 2, "c": 3}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1, "c": 3}
    assert mapped({"a": 1, "prompt": 2}, {"a": "prompt"}) == {"prompt": 1}
    assert mapped({"prompt": 2}, {"a": "prompt"}) == {"prompt": 2}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("question=promt", "--map question=promt: rows are not read by 'promt'. Did you mean prompt?"),
        ("question=zzz", "rows are not read by 'zzz'. Rows are read by prompt, completion"),
        ("a=prompt,b=prompt", "--map a=prompt,b=prompt: 'prompt' is what two columns are mapped to"),
        ("a=prompt,a=completion", "'a' is mapped twice"),
    ],
)
def test_a_mapping_that_cannot_be_is_named(given: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        named_columns(given)
    assert told in str(caught.value)


def test_every_key_of_a_shape_is_a_name() -> None:
    assert {
        "messages",
        "prompt",
        "rejected_input_ids",
        "history",
        "id",
        "attention_mask",
        "chosen_position_ids",
    } <= NAMES
    assert named_columns(None) == {} and named_columns("a=b=prompt") == {"a=b": "prompt"}
