"""What must hold in the shards of values/ and train/, table by table: told in words where it does not.

Each function yields what is wrong with a table whose schema was checked when it was read (`shards.read`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.manifest import Mask
from alphatoken_curate.runs.schema import (
    IGNORE_INDEX,
    PAIR_COLUMNS,
    SIGNALS,
    STATUSES,
    Components,
    Layout,
    sequence_keys,
)
from alphatoken_curate.runs.shards import Shard, entries
from alphatoken_curate.wording import count

_MEAN = 1e-4
"""How far the mean of float32 loss weights may be from 1."""
_CLOSE = 1e-3
"""How far omega and margin, stored as float32, may be from what the losses say, relative to what was added up."""
_NOT_ALIGNED = "`{}` is not as long as `input_ids` for scored rows and empty for the others"


@dataclass(slots=True, kw_only=True)
class Total:
    """What the shards of a generation, or one branch of a mask, hold, added up as they are read."""

    read: int = 0
    tokens: int = 0
    response: int = 0
    kept: int = 0
    ends: int = 0
    ends_kept: int = 0
    weight: float = 0.0


# ------------------------------------------------------------------------------------------------------------ values


def values(
    table: pa.Table, layout: Layout, components: Components, shard: Shard, total: Total, *, beta: Json = None
) -> Iterator[str]:
    """What is wrong with a values shard, whose first row id is `total.read`, to which it is added.

    `components`: those of the run's estimator; `beta`: the setting of that name (Eq. 14), which only pairs need.
    """
    ids = table["row_id"].to_numpy()
    rows = np.unique(ids)
    if not np.array_equal(rows, np.arange(total.read, total.read + len(rows))) or np.any(np.diff(ids) < 0):
        yield f"row ids do not go on one by one from {total.read}"
    elif np.any(np.diff(sequence_keys(ids, table["turn"].to_numpy())) <= 0):
        yield "the turns of a row do not ascend, each once"
    status = np.array(table["status"].to_pylist(), dtype=object)
    if unknown := set(status) - set(STATUSES):
        yield f"status {sorted(unknown)[0]!r} is none of {', '.join(STATUSES)}"
    tokens = trains = 0
    for prefix in layout.branches:
        yield from _branch(table, prefix, components, status)
        response, _ = entries(table[prefix + "response"])
        tokens, trains = tokens + len(response), trains + int(response.sum())
    if (len(ids), tokens, trains) != (shard.rows, shard.tokens, shard.response_tokens):
        yield f"{count(len(ids), 'row')}, {count(tokens, 'token')}, {trains} in responses: not as in the manifest"
    if PAIR_COLUMNS[0] in layout.values.names:
        yield from _pairs(table, layout, status == "scored", beta)
    total.read += len(rows)
    total.tokens += tokens
    total.response += trains


def _branch(table: pa.Table, prefix: str, components: Components, status: NDArray[np.object_]) -> Iterator[str]:
    """What is wrong with the lists of one branch of a values shard; `status` (R,)."""
    response, lengths = entries(table[prefix + "response"])
    if not np.array_equal(entries(table[prefix + "input_ids"])[1], lengths):
        yield f"`{prefix}response` is not as long as `{prefix}input_ids`"
    starts = np.cumsum(lengths) - lengths
    if response[starts[lengths > 0]].any():
        yield f"`{prefix}response` is true at index 0"
    ends, found = entries(table[prefix + "end_of_turn"])
    if not np.array_equal(found, lengths):
        yield f"`{prefix}end_of_turn` is not as long as `{prefix}input_ids`"
    elif (ends.astype(np.bool_) & ~response).any():
        yield f"`{prefix}end_of_turn` is true off the response"
    if lengths[status == "rejected"].any():
        yield f"`{prefix}response` is not empty for rejected rows"
    scored = status == "scored"
    off = ~response[np.repeat(scored, lengths)]
    ends = np.where(scored, lengths, 0)
    for name in SIGNALS:
        if name in components.signals:
            yield from _signal(table, prefix + name, ends, off, optional=name not in components.always)
        else:
            yield from _nothing(table, prefix + name, ends)


def _nothing(table: pa.Table, name: str, lengths: NDArray[np.int64]) -> Iterator[str]:
    """What is wrong with a signal that the run's estimator does not compute."""
    if not np.array_equal(entries(table[name])[1], lengths):
        yield _NOT_ALIGNED.format(name)
    elif pc.list_flatten(table[name]).null_count < lengths.sum():
        yield f"`{name}` is not null everywhere, and the run's estimator does not compute it"


def _signal(
    table: pa.Table, name: str, lengths: NDArray[np.int64], off: NDArray[np.bool_], *, optional: bool
) -> Iterator[str]:
    signal, found = entries(table[name])
    if not np.array_equal(found, lengths):
        yield _NOT_ALIGNED.format(name)
        return
    null = pc.is_null(pc.list_flatten(table[name])).to_numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    absent = np.bincount(row, weights=~null, minlength=len(lengths)) == 0
    if (null != off)[~absent[row] if optional else slice(None)].any():
        yield f"`{name}` is not null exactly off the response"
    elif not np.isfinite(signal[~null]).all():
        yield f"`{name}` is not finite everywhere on the response"


def _pairs(table: pa.Table, layout: Layout, scored: NDArray[np.bool_], beta: Json) -> Iterator[str]:
    """What is wrong with omega and margin (paper Eq. 14); `scored` (R,)."""
    numbers = {name: table[name].to_numpy()[scored].astype(np.float64) for name in PAIR_COLUMNS}
    wrong = [
        name
        for name, found in numbers.items()
        if not np.array_equal(pc.is_valid(table[name]).to_numpy(), scored) or not np.isfinite(found).all()
    ]
    yield from (f"`{name}` is not finite for scored rows and null for the others" for name in wrong)
    if not isinstance(beta, int | float):
        yield "`omega` and `margin` cannot be checked: the settings have no number `beta`"
    elif not wrong:
        yield from _wrong_omega(numbers["omega"], numbers["margin"], beta)
        yield from _wrong_margin(table, layout, scored, numbers["margin"] / beta)


def _wrong_omega(omega: NDArray[np.float64], margin: NDArray[np.float64], beta: float) -> Iterator[str]:
    wanted = beta * np.exp(-np.logaddexp(0.0, margin))
    # 0 is right where float32 holds nothing so small: such a pair has long been learnt.
    far = np.abs(omega - wanted) > _CLOSE * wanted + np.finfo(np.float32).tiny
    if (far | (omega > np.float32(beta)) | (omega < 0)).any():
        yield "`omega` is not beta sigmoid(-margin), which is above 0 and at most beta"


def _wrong_margin(
    table: pa.Table, layout: Layout, scored: NDArray[np.bool_], ratios: NDArray[np.float64]
) -> Iterator[str]:
    """Whether chosen and rejected are where the margin says; `ratios` (S,): margin / beta of scored rows, nats."""
    found, size, known = np.zeros(len(scored)), np.zeros(len(scored)), scored.copy()
    for prefix, signs in zip(layout.branches, ((-1, 1), (1, -1)), strict=True):
        for name, sign in zip(("nll", "reference_nll"), signs, strict=True):
            losses, lengths = entries(table[prefix + name])
            row = np.repeat(np.arange(len(lengths)), lengths)
            losses = np.where(np.isfinite(losses), losses, 0.0)
            found += sign * np.bincount(row, weights=losses, minlength=len(scored))
            size += np.bincount(row, weights=np.abs(losses), minlength=len(scored))
        # Without a reference of its own there is nothing to compare.
        known &= np.bincount(row, weights=losses != 0, minlength=len(scored)) > 0
    if (np.abs(found[scored] - ratios) > _CLOSE * (1 + size[scored]))[known[scored]].any():
        yield "`margin` is not what the losses of `chosen_` and `rejected_` make"


def other_rows(table: pa.Table, first: pa.Table, layout: Layout) -> Iterator[str]:
    """Where a values shard holds other rows or tokens than that of the run's first generation."""
    for name in ["row_id", "turn", "source", "line", "id", *_lists(layout, "input_ids", "response", "end_of_turn")]:
        if not table[name].equals(first[name]):
            yield f"its `{name}` is not that of the same shard of the first generation"


# ------------------------------------------------------------------------------------------------------------- train


def scored_in_all(tables: Sequence[pa.Table | None]) -> pa.Table | None:
    """Of the same values shard in several generations, the rows that each of them scored.

    None where one could not be read (None) or they differ in length.
    """
    whole = [table for table in tables if table is not None]
    if len(whole) < len(tables) or len({table.num_rows for table in whole}) != 1:
        return None
    return whole[0].filter(reduce(pc.and_, (pc.equal(table["status"], "scored") for table in whole)))


def sums(mask: Mask, layout: Layout, totals: Sequence[Total]) -> Iterator[str]:
    """Where the branches of a mask, added up, are not as the manifest has it, or the mean weight of one is not 1."""
    kept, response = sum(total.kept for total in totals), sum(total.response for total in totals)
    if (kept, response) != (mask.kept_tokens, mask.response_tokens):
        yield f"{kept} of {count(response, 'token')} kept, not {mask.kept_tokens} of {mask.response_tokens}"
    told = mask.end_of_turn_kept, mask.end_of_turn_tokens
    ends = sum(total.ends_kept for total in totals), sum(total.ends for total in totals)
    if told[1] is not None and ends != told:
        yield f"{ends[0]} of {count(ends[1], 'end-of-turn token')} kept, not {told[0]} of {told[1]}"
    for prefix, total in zip(layout.branches, totals, strict=True):
        if total.kept and abs(total.weight / total.kept - 1) > _MEAN:
            yield f"mean of `{prefix}loss_weight` over the tokens that train is {total.weight / total.kept}, not 1"


def train(table: pa.Table, scored: pa.Table, shard: Shard, layout: Layout, totals: Sequence[Total]) -> Iterator[str]:
    """What is wrong with a train shard, beside the rows of its values shards that every generation scored.

    `totals`: one for each branch, to which it is added.
    """
    for name in ["row_id", "turn", *_lists(layout, "input_ids")]:
        if not table[name].equals(scored[name]):
            yield f"its rows are not those that are scored in values/: `{name}` differs"
            return
    tokens = response = 0
    for prefix, total in zip(layout.branches, totals, strict=True):
        before = total.response
        yield from _train_branch(table, scored, prefix, total)
        tokens += len(entries(table[prefix + "input_ids"])[0])
        response += total.response - before
    if (table.num_rows, tokens, response) != (shard.rows, shard.tokens, shard.response_tokens):
        found = f"{count(table.num_rows, 'row')}, {count(tokens, 'token')}, {response} in responses"
        yield f"{found}: not as the manifest has it"


def _train_branch(table: pa.Table, scored: pa.Table, prefix: str, total: Total) -> Iterator[str]:
    ids, lengths = entries(table[prefix + "input_ids"])
    flat = {}
    for name in ("attention_mask", "labels", "loss_mask", "loss_weight", "value"):
        flat[name], found = entries(table[prefix + name])
        if not np.array_equal(found, lengths):
            yield f"`{prefix}{name}` is not as long as `{prefix}input_ids`"
            return
    response, found = entries(scored[prefix + "response"])
    if not np.array_equal(found, lengths):
        return  # reported for the values shard
    yield from (what for what, holds in _train_rules(flat, ids, response, prefix).items() if not holds.all())
    yield from _signal(table, prefix + "value", lengths, ~response, optional=False)
    trains = flat["loss_weight"] > 0
    ends = entries(scored[prefix + "end_of_turn"])[0].astype(np.bool_)
    if len(ends) == len(trains):
        total.ends, total.ends_kept = total.ends + int(ends.sum()), total.ends_kept + int((ends & trains).sum())
    total.kept += int(trains.sum())
    total.response += int(response.sum())
    total.weight += float(flat["loss_weight"][trains].sum(dtype=np.float64))


def _train_rules(
    flat: Mapping[str, NDArray[Any]], ids: NDArray[np.int32], response: NDArray[np.bool_], prefix: str
) -> dict[str, NDArray[np.bool_]]:
    """What is wrong -> where it is not (N,), for the entries of one branch."""
    weight, weights = flat["loss_weight"], f"`{prefix}loss_weight`"
    trains = weight > 0
    return {
        f"`{prefix}attention_mask` is not 1 everywhere": flat["attention_mask"] == 1,
        f"{weights} is not finite and >= 0 everywhere": np.isfinite(weight) & (weight >= 0),
        f"{weights} is above 0 off the response": response | ~trains,
        f"`{prefix}loss_mask` is not 1 exactly where {weights} > 0": flat["loss_mask"] == trains,
        f"`{prefix}labels` are not the tokens where {weights} > 0 and -100 elsewhere": (
            flat["labels"] == np.where(trains, ids, IGNORE_INDEX)
        ),
    }


def _lists(layout: Layout, *names: str) -> list[str]:
    return [prefix + name for prefix in layout.branches for name in names]
