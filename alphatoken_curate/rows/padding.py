"""Rows of tokens as trainers store them: padded ones are trimmed, packed ones refused.

A row is one sequence. What `attention_mask` leaves out at either end is padding, and goes, with its labels; what is
left is what the row would be without it. Of several sequences in one row none could be named, held out or masked by
itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.fields import wrong
from alphatoken_curate.rows.files import visible

MASK, POSITIONS = "attention_mask", "position_ids"
BORDERS = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_start_id")
"""Keys that hold where sequences begin, and may hold where the last one ends."""
LENGTHS = ("seq_lens", "seq_lengths", "seqlens", "sequence_lengths")
"""Keys that hold how long sequences are."""
SEGMENTS = ("segment_ids", "sequence_ids", "document_ids")
"""Keys that hold of each token the sequence it is of."""

MASKED = ("assistant_masks", "completion_mask")
"""Masks that say by themselves which tokens respond (TRL); where there are several, those that all leave in."""
MASKS = (*MASKED, "assistant_mask", "loss_mask", "loss_weight", "loss_weights", "loss_scale")
"""Keys that hold of each token whether it trains, or its weight, which is 0 where it does not."""

BESIDE = (MASK, POSITIONS, *BORDERS, *LENGTHS, *SEGMENTS)
"""Keys that are looked at beside `input_ids`."""


def integers(record: dict[str, Any], key: str) -> list[int]:
    """The integers under a key. Raises RowFault."""
    value = record[key]
    if not isinstance(value, list):
        raise wrong(key, "a list of integers", value)
    if not set(map(type, value)) <= {int}:
        i = next(i for i, item in enumerate(value) if type(item) is not int)
        raise wrong(f"{key}[{i}]", "an integer", value[i])
    return value


def own_tokens(record: dict[str, Any], prefix: str, length: int) -> slice:
    """Which of the `length` tokens under the keys of that prefix are the row's own. Raises RowFault."""
    given = {name: record.get(f"{prefix}{name}") for name in BESIDE}
    if all(value is None for value in given.values()):
        return slice(0, length)
    own = _attended(record, f"{prefix}{MASK}", length) if given[MASK] is not None else slice(0, length)
    if given[POSITIONS] is not None:
        _check_positions(record, f"{prefix}{POSITIONS}", length, own)
    for name in BESIDE[2:]:
        if given[name] is not None:
            _check_single(name, f"{prefix}{name}", integers(record, f"{prefix}{name}"), length, own)
    return own


def masked_out(record: dict[str, Any], prefix: str, length: int) -> tuple[list[bool], list[str]]:
    """Which of the `length` tokens some mask leaves out, empty where there is no mask, and its keys. Raises RowFault.

    One number under `loss_weight` or `loss_scale` is the whole row's.
    """
    names = [prefix + name for name in MASKS]
    given = {name: record[name] for name in names if record.get(name) is not None}
    given = {name: value for name, value in given.items() if "mask" in name or isinstance(value, list)}
    for name, value in given.items():
        if not isinstance(value, list):
            raise wrong(name, "a list of 0 and 1, or of weights", value)
        _check_length(name, value, length)
        for i, one in enumerate(value):
            if not isinstance(one, int | float) or not 0 <= one < math.inf:
                found = visible(repr(one), 40)
                raise RowFault(
                    "wrong_type", f"{name}[{i}] is {found}; it must be 0, where a token does not train, or 1"
                )
    out = [not all(ones) for ones in zip(*given.values(), strict=True)]
    return out, list(given)


def _attended(record: dict[str, Any], name: str, length: int) -> slice:
    value = record[name]
    mask = [int(one) for one in value] if isinstance(value, list) and set(map(type, value)) <= {bool} else None
    mask = integers(record, name) if mask is None else mask
    _check_length(name, mask, length)
    if any(one not in (0, 1) for one in mask):
        numbers = sorted(set(mask))
        if numbers[0] >= 0:
            raise _packed(name, f"numbers {numbers[-1]} sequences")
        raise RowFault("wrong_type", f"{name} holds {numbers[0]}; it must hold 0 and 1")
    if 1 not in mask:
        raise RowFault("no_response", f"{name} leaves every token out: nothing responds")
    own = slice(mask.index(1), length - mask[::-1].index(1))
    if 0 in mask[own]:
        i = own.start + mask[own].index(0)
        message = f"{name}[{i}] is 0 between tokens that are attended to; only padding at either end is left out"
        raise RowFault("masked_inside", message)
    return own


def _check_positions(record: dict[str, Any], name: str, length: int, own: slice) -> None:
    positions = integers(record, name)
    _check_length(name, positions, length)
    found, count = positions[own], own.stop - own.start
    if found in (list(range(count)), list(range(own.start, own.stop))):
        return
    if again := [i for i, place in enumerate(found) if place == 0 and i]:
        raise _packed(name, f"starts again from 0 at token {own.start + again[0]}")
    i = next((i for i, place in enumerate(found) if place != i), 0)
    message = f"{name}[{own.start + i}] is {found[i]}; positions count 0, 1, 2 and so on here, whatever they were"
    raise RowFault("odd_positions", message)


def _check_single(kind: str, name: str, found: Sequence[int], length: int, own: slice) -> None:
    """Raise RowFault unless the ids speak of one sequence."""
    if kind in SEGMENTS:
        _check_length(name, found, length)
        several = len(set(found[own])) > 1
    elif kind in LENGTHS:
        several = len([size for size in found if size]) > 1
    else:
        several = bool(set(found) - {0, own.start, own.stop, length})
    if several:
        raise _packed(name, "tells several sequences apart")
    if kind in LENGTHS and sum(found) not in (length, own.stop - own.start):
        raise RowFault("length_mismatch", f"{name} says {sum(found)} tokens, and the row has {own.stop - own.start}")


def _check_length(name: str, found: Sequence[Any], length: int) -> None:
    if len(found) != length:
        raise RowFault("length_mismatch", f"{len(found)} {name} and {length} tokens; they must pair up")


def _packed(name: str, found: str) -> RowFault:
    return RowFault(
        "packed_row",
        f"{name} {found}: several sequences are packed into this row. Give each a row of its own, unpacked (packing off"
        " where the rows were made); trainers pack the rows of a mask again",
    )
