"""The columns of a run folder: names, Arrow types, units and meanings, in one place.

Every list column is aligned with its `input_ids`: index i speaks of *predicting* token i, index 0 never does.
A run holds SFT rows or preference rows. Preference rows carry each list twice, prefixed `chosen_` and `rejected_`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 1

STATUSES = ("scored", "target", "failed", "rejected")
"""What became of a row. Rows read == scored + target + failed + rejected."""

VOCABULARY = "artifacts/vocab.parquet"
"""In a run: token_id int32, text string, so that tokens are read without the tokenizer."""

COMPONENTS = ("adapt_direct", "adapt_causal", "stab_direct", "stab_causal")
"""The four components of a token's value (paper Eq. 8-11), in the order they are stored."""

OPTIONAL = ("reference_nll", "drift_direct", "drift_causal")
"""Signals that are null everywhere in runs that did not compute them."""

PAIR_COLUMNS = ("omega", "margin")
"""One number for each preference row (paper Eq. 14)."""

IGNORE_INDEX = -100
"""The label that every trainer leaves out of the loss."""

_floats = pa.list_(pa.field("item", pa.float32(), nullable=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """The columns of a run of one kind of rows."""

    kind: str
    """`sft` or `preference`."""
    branches: tuple[str, ...]
    """What stands before the name of each list column: nothing, or one prefix for each branch of a pair."""
    values: pa.Schema
    """values/generation=G/part-NNNNN.parquet: one row per row read; signal lists are empty unless `scored`."""
    train: pa.Schema
    """train/mask=MMMM/part-NNNNN.parquet: one row per scored row, read by trainers as it is."""


def _field(name: str, kind: pa.DataType, *, units: str, doc: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"units": units, "doc": doc})


def _signal(name: str, doc: str, units: str = "nats per unit step") -> pa.Field:
    return _field(name, _floats, units=units, doc=doc)


_ROW = [
    _field("row_id", pa.int64(), units="row", doc="position of the row among all rows read, from 0"),
    _field("source", pa.string(), units="name", doc="input file, relative to the DATA argument"),
    _field("line", pa.int64(), units="line", doc="line (JSONL) or row (Parquet) in the source, from 1"),
    _field("id", pa.string(), units="name", doc="the row's own `id`, as text", nullable=True),
    _field("status", pa.string(), units="name", doc="scored | target (held out) | failed | rejected"),
]

_VALUE_LISTS = [
    _field("input_ids", pa.list_(pa.int32()), units="token", doc="the whole sequence"),
    _field("response", pa.list_(pa.bool_()), units="bool", doc="true at the tokens that would train"),
    _signal("nll", "-log p(token | what precedes it) under the scored model", "nats"),
    _signal("entropy", "entropy of the scored model's prediction of this token", "nats"),
    _signal("reference_nll", "nll under the reference; null where the reference is the same model", "nats"),
    _signal("adapt_direct", "adaptation by the direct path: its own position (Eq. 8)"),
    _signal("adapt_causal", "adaptation by the causal path: later tokens it conditions (Eq. 9)"),
    _signal("stab_direct", "stability by the direct path (Eq. 10)"),
    _signal("stab_causal", "stability by the causal path (Eq. 11)"),
    _signal("drift_direct", "stab_direct by the drift, where stab_direct is by retention rows and both were asked for"),
    _signal("drift_causal", "stab_causal by the drift, where stab_causal is by retention rows and both were asked for"),
    _signal("value", "adapt_direct + adapt_causal + stability_weight (stab_direct + stab_causal) (Eq. 12)"),
]

_PAIR = [
    _field(
        "omega",
        pa.float32(),
        units="ratio",
        doc="beta sigmoid(-margin): the weight of the pair (Eq. 14)",
        nullable=True,
    ),
    _field(
        "margin",
        pa.float32(),
        units="beta x nats",
        doc="beta ((log pi - log ref of chosen) - (log pi - log ref of rejected)); null unless `scored`",
        nullable=True,
    ),
]

_TRAIN_ROW = [_field("row_id", pa.int64(), units="row", doc="the same row_id as in values/")]

_TRAIN_LISTS = [
    _field("input_ids", pa.list_(pa.int32()), units="token", doc="the whole sequence"),
    _field("attention_mask", pa.list_(pa.int8()), units="0 or 1", doc="1 everywhere: rows are not padded"),
    _field("labels", pa.list_(pa.int64()), units="token", doc="the token where loss_weight > 0, else -100"),
    _field("loss_mask", pa.list_(pa.int8()), units="0 or 1", doc="1 where loss_weight > 0"),
    _field("loss_weight", pa.list_(pa.float32()), units="ratio", doc="mean 1 over the trainable tokens"),
    _signal("value", "the number the mask was made from, null off the response"),
]


def _layout(kind: str, branches: tuple[str, ...], extra: list[pa.Field]) -> Layout:
    def lists(columns: list[pa.Field]) -> list[pa.Field]:
        return [column.with_name(prefix + column.name) for prefix in branches for column in columns]

    return Layout(
        kind=kind,
        branches=branches,
        values=pa.schema([*_ROW, *lists(_VALUE_LISTS), *extra]),
        train=pa.schema([*_TRAIN_ROW, *lists(_TRAIN_LISTS)]),
    )


SFT = _layout("sft", ("",), [])
PREFERENCE = _layout("preference", ("chosen_", "rejected_"), _PAIR)

LAYOUTS = {layout.kind: layout for layout in (SFT, PREFERENCE)}
"""By `kind`, which footers and the manifest hold among their settings."""

SIGNALS = tuple(field.name for field in _VALUE_LISTS if field.type == _floats)
"""Names of the per-token float columns of values/, in stored order, without the prefix of a branch."""
