"""The columns of a run folder: names, Arrow types, units and meanings, in one place.

Every list column is aligned with its `input_ids`: index i speaks of *predicting* token i, index 0 never does.
A run holds SFT rows or preference rows. Preference rows carry each list twice, prefixed `chosen_` and `rejected_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alphatoken_curate.errors import UsageError

SCHEMA_VERSION = 4
"""Of what is written."""

_ADDED = {
    2: (
        *("adapt_upstream", "adapt_influence", "stab_upstream", "stab_influence", "drift_influence"),
        *("piece", "special"),
    ),
    3: ("turn", "end_of_turn", "adapt_error", "stab_error", "value_error"),
    4: (),  # sums over rows are made of parts, and round otherwise
}
"""By schema version, the columns that it brought, without the prefix of a branch."""

VERSIONS = (1, *_ADDED)
"""What is read: every schema version there ever was."""

STATUSES = ("scored", "target", "failed", "rejected")
"""What became of a row. Rows read == scored + target + failed + rejected."""

VOCABULARY = "artifacts/vocab.parquet"
"""In a run: its tokens, so that they are read without the tokenizer."""

COMPONENTS = ("adapt_direct", "adapt_causal", "stab_direct", "stab_causal")
"""The four components of a token's value (paper Eq. 8-11) by the estimators that part direct and causal path."""

PER_STEP = "nats per unit step"
"""Of values along a gradient: what a step along a token's own gradient does, for its length."""

PER_WEIGHT = "nats per unit weight"
"""Of values of a rehearsed training: what its outcome loses, for each unit more of a token's loss weight."""

_BY_PATH = "--estimator influence does not compute it; score with --estimator published, exact or exact+influence"
_UPSTREAM = "score with --estimator exact+influence, which alone computes it"
_INFLUENCE = "score with --estimator influence, which alone stores it; by exact+influence it is direct + upstream"
_DRIFT = "it is the drift beside retention rows; score with --retention FILE and --drift together, and --estimator "
_DRIFT_BY_PATH = f"{_DRIFT}published, exact or exact+influence"
_ERROR = "score with --target-groups 8 and some rows in each group"

NOT_COMPUTED: Mapping[str, str] = {
    "reference_nll": "model and reference are the same; score with a --reference of its own",
    **dict.fromkeys(COMPONENTS, _BY_PATH),
    **dict.fromkeys(("adapt_upstream", "stab_upstream"), _UPSTREAM),
    **dict.fromkeys(("adapt_influence", "stab_influence"), _INFLUENCE),
    **dict.fromkeys(("drift_direct", "drift_causal"), _DRIFT_BY_PATH),
    "drift_influence": f"{_DRIFT}influence",
    **dict.fromkeys(("adapt_error", "value_error"), _ERROR),
    "stab_error": f"{_ERROR}, and --retention FILE",
}
"""Why a signal is null everywhere in runs that did not compute it, and what to do."""

ERRORS = ("adapt_error", "stab_error", "value_error")
"""Standard errors, by groups of the rows that a direction is made of; no estimator gives or lacks them."""

PAIR_COLUMNS = ("omega", "margin")
"""One number for each preference row (paper Eq. 14)."""

IGNORE_INDEX = -100
"""The label that every trainer leaves out of the loss."""

_floats = pa.list_(pa.field("item", pa.float32(), nullable=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What an estimator gives along its directions: names of signals, in stored order.

    `adaptation`, `stability`: the parts whose sum is the objective, of which the value is made (Eq. 12); `upstream`:
    stored beside them; `drift`: what stability would be by the drift, only where retention rows take its place.
    """

    adaptation: tuple[str, ...]
    stability: tuple[str, ...]
    drift: tuple[str, ...]
    upstream: tuple[str, ...] = ()

    @property
    def of_value(self) -> tuple[str, ...]:
        """What the value is made of."""
        return (*self.adaptation, *self.stability)

    @property
    def always(self) -> tuple[str, ...]:
        """The signals that each response token of a scored row has, in stored order."""
        there = {"nll", "entropy", *self.of_value, *self.upstream, "value"}
        return tuple(name for name in SIGNALS if name in there)

    @property
    def signals(self) -> tuple[str, ...]:
        """These, and those that depend on the inputs of the run, in stored order. All others are null."""
        there = {*self.always, "reference_nll", *self.drift, *ERRORS}
        return tuple(name for name in SIGNALS if name in there)


_PARTED = Components(adaptation=COMPONENTS[:2], stability=COMPONENTS[2:], drift=("drift_direct", "drift_causal"))

BY_ESTIMATOR: Mapping[str, Components] = {
    "published": _PARTED,
    "exact": _PARTED,
    "influence": Components(adaptation=("adapt_influence",), stability=("stab_influence",), drift=("drift_influence",)),
    "exact+influence": replace(_PARTED, upstream=("adapt_upstream", "stab_upstream")),
}
"""By `--estimator`, which footers and the manifest hold among their settings."""


def components(estimator: str) -> Components:
    """The signals that `--estimator` gives. Raises `UsageError` where there is none of this name."""
    if estimator not in BY_ESTIMATOR:
        raise UsageError(f"estimator: found {estimator!r}; give one of {', '.join(BY_ESTIMATOR)}")
    return BY_ESTIMATOR[estimator]


def absent(version: int) -> frozenset[str]:
    """The columns that files of a schema version lack, without the prefix of a branch: their readers give nulls."""
    return frozenset(name for later, names in _ADDED.items() if later > version for name in names)


def lacking(columns: pa.Schema, version: int) -> dict[str, str]:
    """The columns of a layout that files of a schema version lack, each with one whose lists are as long.

    `turn`, a number of a row, with `row_id`.
    """
    lacks, found = absent(version), {}
    for name in columns.names:
        prefix = next((one for one in PREFERENCE.branches if name.startswith(one)), "")
        if name.removeprefix(prefix) in lacks:
            beside = "value" if name.removeprefix(prefix) in SIGNALS else "response"
            found[name] = "row_id" if name == "turn" else f"{prefix}{beside}"
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """The columns of a run of one kind of rows."""

    kind: str
    """`sft` or `preference`."""
    branches: tuple[str, ...]
    """What stands before the name of each list column: nothing, or one prefix for each branch of a pair."""
    values: pa.Schema
    """values/generation=G/part-NNNNN.parquet: one row per row read, or per turn; signal lists are empty unless
    `scored`."""
    train: pa.Schema
    """train/mask=MMMM/part-NNNNN.parquet: one row per scored row, or turn, read by trainers as it is."""
    unit: str = PER_STEP
    """Of values, their parts and errors."""

    def along(self, direction: object) -> Layout:
        """The same columns in the units of `--direction`."""
        if direction != "rehearsal":
            return self
        return replace(self, values=_by_weight(self.values), train=_by_weight(self.train), unit=PER_WEIGHT)


VOCABULARY_COLUMNS = pa.schema(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("piece", pa.binary(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("special", pa.bool_(), nullable=False),
    ]
)
"""Of the vocabulary: `piece` is the bytes of a token, `text` those alone, with U+FFFD where they cut a character."""


def _field(name: str, kind: pa.DataType, *, units: str, doc: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"units": units, "doc": doc})


def _signal(name: str, doc: str, units: str = PER_STEP) -> pa.Field:
    return _field(name, _floats, units=units, doc=doc)


_TURN = "which of the chat's responding answers the sequence ends with, from 0, by --turns each; else 0"

_ROW = [
    _field("row_id", pa.int64(), units="row", doc="position of the row among all rows read, from 0"),
    _field("turn", pa.int32(), units="turn", doc=_TURN),
    _field("source", pa.string(), units="name", doc="input file, relative to the DATA argument"),
    _field("line", pa.int64(), units="line", doc="line (JSONL) or row (Parquet) in the source, from 1"),
    _field("id", pa.string(), units="name", doc="the row's own `id`, as text", nullable=True),
    _field("status", pa.string(), units="name", doc="scored | target (held out) | failed | rejected"),
]

_VALUE_LISTS = [
    _field("input_ids", pa.list_(pa.int32()), units="token", doc="the whole sequence"),
    _field("response", pa.list_(pa.bool_()), units="bool", doc="true at the tokens that would train"),
    _field(
        "end_of_turn",
        pa.list_(pa.bool_()),
        units="bool",
        doc="true at those of them that end an answer, its run of stop tokens",
    ),
    _signal("nll", "-log p(token | what precedes it) under the scored model", "nats"),
    _signal("entropy", "entropy of the scored model's prediction of this token", "nats"),
    _signal("reference_nll", "nll under the reference; null where the reference is the same model", "nats"),
    _signal("adapt_direct", "adaptation by the direct path: its own position (Eq. 8)"),
    _signal("adapt_causal", "adaptation by the causal path: later tokens it conditions (Eq. 9)"),
    _signal("adapt_upstream", "adaptation by its own loss, reached through earlier positions"),
    _signal("adapt_influence", "adapt_direct + adapt_upstream: adaptation lost, to first order, without its own loss"),
    _signal("stab_direct", "stability by the direct path (Eq. 10)"),
    _signal("stab_causal", "stability by the causal path (Eq. 11)"),
    _signal("stab_upstream", "stability by its own loss, reached through earlier positions"),
    _signal("stab_influence", "stab_direct + stab_upstream: stability lost, to first order, without its own loss"),
    _signal("drift_direct", "stab_direct by the drift, where stab_direct is by retention rows and both were asked for"),
    _signal("drift_causal", "stab_causal by the drift, where stab_causal is by retention rows and both were asked for"),
    _signal(
        "drift_influence",
        "stab_influence by the drift, where stab_influence is by retention rows and both were asked for",
    ),
    _signal(
        "value",
        "adapt_direct + adapt_causal + stability_weight (stab_direct + stab_causal) (Eq. 12);"
        " by --estimator influence adapt_influence + stability_weight stab_influence",
    ),
    _signal("adapt_error", "standard error of adaptation, by groups of target rows"),
    _signal("stab_error", "standard error of stability, by groups of retention rows"),
    _signal("value_error", "standard error of value: sqrt(adapt_error^2 + (stability_weight stab_error)^2)"),
]

_PAIR = [
    _field(
        "omega",
        pa.float32(),
        units="ratio",
        doc="beta sigmoid(-margin): the weight of the pair in DPO (Eq. 14)",
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

_TRAIN_ROW = [
    _field("row_id", pa.int64(), units="row", doc="the same row_id as in values/"),
    _field("turn", pa.int32(), units="turn", doc=_TURN),
]

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


def _in_units(column: pa.Field, units: str) -> pa.Field:
    return column.with_metadata({**column.metadata, b"units": units.encode()})


def _by_weight(columns: pa.Schema) -> pa.Schema:
    """Columns whose values are per unit weight."""
    per_step = PER_STEP.encode()
    return pa.schema([_in_units(one, PER_WEIGHT) if one.metadata[b"units"] == per_step else one for one in columns])


def with_units(train: pa.Schema, units: str) -> pa.Schema:
    """The columns of a mask whose `value`, the number it was made from, has these units."""
    return pa.schema(
        [_in_units(one, units) if one.name.endswith("value") and one.type == _floats else one for one in train]
    )


SFT = _layout("sft", ("",), [])
PREFERENCE = _layout("preference", ("chosen_", "rejected_"), _PAIR)

LAYOUTS = {layout.kind: layout for layout in (SFT, PREFERENCE)}
"""By `kind`, which footers and the manifest hold among their settings."""

SIGNALS = tuple(field.name for field in _VALUE_LISTS if field.type == _floats)
"""Names of the per-token float columns of values/, in stored order, without the prefix of a branch."""


def lacks(version: int) -> str | None:
    """What a run of an early schema version lacks, to be told; None where it lacks nothing."""
    names = [name for name in (*SIGNALS, *VOCABULARY_COLUMNS.names, "end_of_turn") if name in absent(version)]
    return f"Schema version {version}, which had no columns {', '.join(names)}: they are null." if names else None


INDEX_COLUMNS = ("row_id", "turn", "position", "token_id")
"""Columns that an expression may name besides those of values/; int64, int32, int32, int32."""

MOST_TURNS = 1 << 16


def sequence_keys(row_id: NDArray[np.int64], turn: NDArray[np.int32]) -> NDArray[np.int64]:
    """One number for each sequence, (N,), that ascends with (row_id, turn), of (N,) each."""
    return row_id.astype(np.int64) * MOST_TURNS + turn


def rows_and_turns(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """What `sequence_keys` was given."""
    return keys // MOST_TURNS, (keys % MOST_TURNS).astype(np.int32)


EXPRESSIONS = {
    "surprise": "(nll / (entropy + 0.1))",
    "reference_ratio": "LEAST(1.0, EXP(nll - reference_nll))",
}
"""Names that `by` may use for an expression.

`surprise` is what a token cost over what the model expected any to cost: about 1 on average, high where the model was
sure of another token, as it is at a wrong label. The 0.1 nats keep a token that the model was sure of from being judged
by the rounding of its entropy.

`reference_ratio` is a token's probability under the reference over that under the model, at most 1: a loss weight that
spares what a reference trained on clean rows thinks less likely than the model does.
"""


def units_of(by: str, stability_scale: str, unit: str = PER_STEP) -> str:
    """Units of the number that tokens are selected by, of `--by` and `--stability-scale`; `unit`: of values."""
    if by in ("value", "value_error") and stability_scale == "rms":
        return "multiples of the RMS of an objective"
    if by == "random":
        return "0 to 1"
    if by.removeprefix("-") in EXPRESSIONS:
        return "ratio"
    schema = PREFERENCE.values if by in PAIR_COLUMNS else SFT.values
    if by in (*PAIR_COLUMNS, *SIGNALS):
        units = str(schema.field(by).metadata[b"units"].decode())
        return unit if units == PER_STEP else units
    return by.removesuffix("_id") if by in INDEX_COLUMNS else "those of the --by expression"
