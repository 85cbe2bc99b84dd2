"""Batches of columns become raw rows: of values that are too large or no text each row alone is a bad one.

Columns of `datasets`' type `Json()` (Arrow's `arrow.json`), at any depth, are parsed; what is null there is as it was
written. Elsewhere the keys of objects that are null are left out: columns give every object the keys of all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from alphatoken_curate.rows.containers import MAX_LINE_BYTES, RowFault, parse_json, pruned, too_long
from alphatoken_curate.rows.files import visible

_JSON = "arrow.json"


def batch_records(batch: Any) -> Iterator[dict[str, Any] | RowFault]:
    """The rows of a `pyarrow.RecordBatch`, in order."""
    if batch.nbytes > MAX_LINE_BYTES:
        if batch.num_rows == 1:
            yield too_long()
            return
        for row in range(batch.num_rows):
            yield from batch_records(batch.slice(row, 1))
        return
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            is_text = isinstance(error, UnicodeDecodeError)
            reason = "invalid_utf8" if is_text else "unreadable_value"
            yield RowFault(reason, "a text column holds bytes that are not UTF-8" if is_text else visible(str(error)))
            return
        for row in range(batch.num_rows):
            yield from batch_records(batch.slice(row, 1))
        return
    kinds = {field.name: field.type for field in batch.schema if _has_json(field.type)}
    yield from (_record(record, kinds) for record in records)


def _record(record: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any] | RowFault:
    try:
        return {
            name: _parsed(name, value, kinds[name]) if name in kinds else pruned(value)
            for name, value in record.items()
        }
    except RowFault as fault:
        return fault


def _has_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == _JSON or any(
        _has_json(kind.field(i).type) for i in range(kind.num_fields)
    )


def _parsed(name: str, value: Any, kind: Any) -> Any:
    """A value of a type within which some are JSON. Raises RowFault."""
    import pyarrow as pa

    if value is None or not _has_json(kind):
        return pruned(value)
    if getattr(kind, "extension_name", None) == _JSON:
        try:
            return parse_json(value.encode())
        except RowFault as fault:
            raise RowFault(fault.reason, f"{name} is a column of JSON, and holds: {fault.message}") from None
    if pa.types.is_struct(kind):
        return {
            field.name: _parsed(f"{name}.{field.name}", value[field.name], field.type)
            for field in kind
            if value[field.name] is not None
        }
    if isinstance(value, list) and kind.num_fields == 1:
        return [_parsed(f"{name}[{i}]", item, kind.value_type) for i, item in enumerate(value)]
    return value
