"""Columns of JSON, whole or within others, are the values they hold; nulls that columns fill in are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from alphatoken_curate.rows.batches import batch_records
from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.read import RowStream, read_rows, rows_of
from alphatoken_curate.rows.shapes import Messages

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "w", "parameters": {"properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "f", "parameters": {"required": ["n"]}}},
]


def chat(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        {"role": "user", "content": "W?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": "5"},
        {"role": "assistant", "content": "It is 5."},
    ]
    return {"messages": messages, "tools": TOOLS}


ROWS = [chat("w", {"city": "Oslo"}), chat("f", {"n": 3})]
JSON = pa.json_()


datasets: Any = pytest.importorskip("datasets")
TEXT, ANY = datasets.Value("string"), datasets.Json()


def message(calls: Any) -> Any:
    return datasets.List({"role": TEXT, "content": TEXT, "name": TEXT, "tool_calls": calls})


CALL = {"type": TEXT, "function": {"name": TEXT, "arguments": ANY}}
PLACES: dict[str, tuple[Any, Any]] = {
    "whole columns": (ANY, ANY),
    "lists": (datasets.List(ANY), datasets.List(ANY)),
    "large lists": (datasets.LargeList(ANY), ANY),
    "calls": (message(datasets.List(ANY)), datasets.List(ANY)),
    "arguments": (message(datasets.List(CALL)), datasets.List({"type": TEXT, "function": ANY})),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_column_of_json_is_parsed_wherever_it_stands(tmp_path: Path, place: str) -> None:
    kinds = dict(zip(("messages", "tools"), PLACES[place], strict=True))
    made = datasets.Dataset.from_list(ROWS, features=datasets.Features(kinds))
    made.to_parquet(tmp_path / "rows.parquet")
    assert "arrow.json" in str(parquet.read_schema(tmp_path / "rows.parquet").to_string(truncate_metadata=False))
    result = read_rows([str(tmp_path / "rows.parquet")])
    assert [row.record for row in result.rows] == [Messages(**row) for row in ROWS] and not result.bad


def test_what_is_null_within_json_is_meant_and_within_columns_is_not() -> None:
    value = {"a": None, "b": [{"c": None}]}
    table = pa.table(
        {"json": pa.array([json.dumps(value)], JSON), "columns": pa.array([value, {"a": 1, "b": [{"c": 2}]}])[:1]}
    )
    assert list(batch_records(table.to_batches()[0])) == [{"json": value, "columns": {"b": [{}]}}]
    assert list(batch_records(pa.table({"json": pa.array([None], JSON)}).to_batches()[0])) == [{"json": None}]


def test_json_that_is_none_is_a_fault_of_its_row() -> None:
    column = pa.array(['{"a": 1}', "{", '{"a": 1, "a": 2}', "NaN"], JSON)
    found = list(batch_records(pa.table({"tools": column}).to_batches()[0]))
    assert found[0] == {"tools": {"a": 1}}
    faults = [one for one in found[1:] if isinstance(one, RowFault)]
    assert [fault.reason for fault in faults] == ["invalid_json", "duplicate_key", "not_a_number"]
    assert faults[0].message.startswith("tools is a column of JSON, and holds: ")


def test_nulls_that_datasets_writes_into_lines_are_left_out(tmp_path: Path) -> None:
    """`Dataset.to_json` gives every object the keys of all others, as its columns have them."""
    made = datasets.Dataset.from_list(ROWS)
    made.to_json(tmp_path / "rows.jsonl")
    made.to_parquet(tmp_path / "rows.parquet")
    assert "null" in (tmp_path / "rows.jsonl").read_text()
    by_lines, by_columns = (read_rows([str(tmp_path / f"rows.{kind}")]) for kind in ("jsonl", "parquet"))
    records = [row.record for row in by_lines.rows]
    assert records == [row.record for row in by_columns.rows] == [Messages(**row) for row in ROWS]
    assert [row.record for row in rows_of(list(made), "memory").rows] == records


def test_nulls_that_are_left_out_of_lines_are_told_where_they_say_something(tmp_path: Path) -> None:
    told = "keys that are null within tools or calls are left out"
    plain = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "tool_calls": None}]
    called = chat("w", {"city": "Oslo", "n": None})
    cases = [
        ({"messages": plain}, {}),
        ({"messages": plain, "tools": None, "system": None}, {}),
        (called, {told: 1}),
        (chat("w", {}) | {"tools": [{"function": {"default": None}}]}, {told: 1}),
        ({"prompt": "null", "completion": "null"}, {}),
    ]
    for record, notes in cases:
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
        stream = RowStream([str(tmp_path / "a.jsonl")])
        assert len(list(stream)) == 1 and stream.told == notes, record
