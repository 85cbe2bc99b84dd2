"""What messages say of themselves: whether they are to train (`weight` of OpenAI and Mistral, Axolotl's `train`, ...).

A mark can only take away: an answer marked off is context, and does not respond. One marked on responds where it would
without the mark. Trainers that know `weight` on a user's message train its text; here only answers respond, so a mark
that asks for that is refused.
"""

from __future__ import annotations

from typing import Any

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.files import visible

MARKS = ("weight", "train", "loss", "trainable", "loss_weight", "loss_scale", "step_loss_mask")
"""Keys of a message that tell whether it trains: 0 or 1, false or true."""

OFF = "weight"
"""The key that a message has, as 0, where it is marked off; until `shapes` makes a chat of it."""

_IN_PART = ("train_detail", "training_detail")
"""Keys that tell which part of a message trains."""

_ANY = frozenset({*MARKS, *_IN_PART})


def without_marks(name: str, entry: dict[str, Any], role: object) -> tuple[dict[str, Any], bool]:
    """A message, or a part of its content, without its marks, and whether it is marked off. Raises RowFault."""
    if _ANY.isdisjoint(entry):
        return entry, False
    given = {key: entry[key] for key in MARKS if entry.get(key) is not None}
    for key in _IN_PART:
        if entry.get(key):
            raise RowFault(
                "message_weight", f"{name}.{key} tells parts of a message apart; a message trains whole here"
            )
    if not given:
        return entry, False
    for key, value in given.items():
        if isinstance(value, str | list | dict) or value not in (0, 1):
            found = visible(repr(value), 40)
            message = f"{name}.{key} is {found}; it must be 0 or 1: an answer trains whole or not at all"
            raise RowFault("message_weight", message)
    if len({bool(value) for value in given.values()}) > 1:
        raise RowFault("message_weight", f"{name}: {' and '.join(given)} say different things; leave one of them")
    off = not any(given.values())
    if role != "assistant" and not off:
        key, value = next(iter(given.items()))
        message = f"{name}.{key} is {value}, which asks that a message of role {role} trains; only answers respond here"
        raise RowFault("message_weight", f"{message}. Set 0, or leave it out")
    return {key: value for key, value in entry.items() if key not in MARKS}, off
