"""Batches of weighted rows. Labels and weights must say the same of every token, or the batch is refused.

A row is a mapping with `input_ids` and `labels`, `loss_weight` or both (the missing one follows: weight 1 where there
is a label; a label where the weight is above 0), lists or tensors as long as `input_ids`; pairs have them twice,
prefixed `chosen_` and `rejected_`. Other columns are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from alphatoken_curate.errors import UsageError
from alphatoken_curate.runs.schema import IGNORE_INDEX, PREFERENCE

Feature: TypeAlias = Mapping[str, Any]

WEIGHT = "loss_weight"
_NOT_FOR_MODELS = ("row_id", "turn", "row_ids", "loss_mask", "value", "assistant_masks")
"""Columns of train/ and of exports that no model reads."""


class Tokens(NamedTuple):
    """`ids` (T,) int64, `labels` (T,) int64 and `weight` (T,) float32 of a sequence, token-aligned."""

    ids: Tensor
    labels: Tensor
    weight: Tensor


def tokens_of(feature: Feature, prefix: str = "") -> Tokens:
    """The tokens of a row, or of a branch of it. Raises `UsageError` where its lists do not fit each other.

    Without weights of its own the first token has none: nothing predicts it, whatever its label.
    """
    name = f"row {feature['row_id']}" if "row_id" in feature else "a row"
    if prefix + "input_ids" not in feature:
        raise UsageError(
            f"{name} has no {prefix}input_ids, but {', '.join(feature)}: PreferenceCollator and WeightedDPOTrainer are"
            " for pairs, the others for SFT rows"
        )
    ids = torch.as_tensor(feature[prefix + "input_ids"], dtype=torch.int64)
    told, weighs = feature.get(prefix + "labels"), feature.get(prefix + WEIGHT)
    if told is None and weighs is None:
        raise UsageError(f"{name} has neither {prefix}labels nor {prefix}{WEIGHT}; {_HINT}")
    if weighs is None:
        told = torch.as_tensor(told, dtype=torch.int64).clone()
        told[:1] = IGNORE_INDEX
        weighs = told != IGNORE_INDEX
    weight = torch.as_tensor(weighs, dtype=torch.float32)
    if told is None:
        told = ids.where(weight > 0, torch.tensor(IGNORE_INDEX))
    labels = torch.as_tensor(told, dtype=torch.int64)
    if not len(ids) == len(labels) == len(weight):
        raise UsageError(
            f"{name} has {len(ids)} {prefix}input_ids, {len(labels)} {prefix}labels and {len(weight)} {prefix}{WEIGHT}:"
            f" something cut one of them alone; {_HINT}"
        )
    if not torch.equal(weight > 0, labels != IGNORE_INDEX) or not bool(torch.isfinite(weight).all()):
        raise UsageError(
            f"{name}: {prefix}labels must be -100 exactly where {prefix}{WEIGHT} is 0, and weights finite and not"
            f" negative; {_HINT}"
        )
    return Tokens(ids=ids, labels=labels, weight=weight)


_HINT = "take rows from `as_dataset(RUN)`, whose `max_length` cuts all lists alike"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedCollator:
    """SFT rows as a batch: input_ids, attention_mask and labels int64 and loss_weight float32, (B, T), padded right.

    `inner`: a trainer's own collator, which then lays out ids and labels in its way (padded, flattened or packed); the
    weights are laid out as it lays out the labels, and what it makes beside is kept.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    inner: Callable[[list[Any]], Any] | None = None

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor]:
        """Raises `UsageError` where labels and weights of a row do not fit each other, or the batch's do not."""
        if self.inner is None:
            rows = [tokens_of(feature) for feature in features]
            return _padded(rows, self.pad_token_id, self.pad_to_multiple_of)
        weights = [torch.cat([tokens_of(one).weight for one in _pack(item)]) for item in features]
        bare = [[_bare(one) for one in item] if isinstance(item, list) else _bare(item) for item in features]
        batch = dict(self.inner(bare))
        side = getattr(getattr(self.inner, "tokenizer", None), "padding_side", "right")
        batch[WEIGHT] = _laid_out(weights, batch["labels"], left=side == "left")
        return batch


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceCollator:
    """Pairs as a batch of 2B sequences, the chosen ones first, as TRL's DPO takes them, padded right.

    input_ids, attention_mask and completion_mask int64 and loss_weight float32, (2B, T); completion_mask is 1 where the
    weight is above 0. `ref_chosen_logps` and `ref_rejected_logps` (B,) float32 where the rows have them. A pair trains
    nothing where one of its branches has nothing to train, or where both are the same tokens, as a cut may leave them:
    no answer is moved against nothing.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """Raises `UsageError` where labels and weights of a row do not fit each other."""
        pairs = [_whole(*(tokens_of(feature, prefix) for prefix in PREFERENCE.branches)) for feature in features]
        rows = [pair[n] for n in range(len(PREFERENCE.branches)) for pair in pairs]
        batch = _padded(rows, self.pad_token_id, self.pad_to_multiple_of)
        batch["completion_mask"] = (batch.pop("labels") != IGNORE_INDEX).long()
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in features[0]:
                batch[name] = torch.tensor([feature[name] for feature in features])
        return batch


def _whole(one: Tokens, other: Tokens) -> tuple[Tokens, Tokens]:
    """Both branches of a pair, as they are or without anything to train."""
    trains = bool(one.weight.any()) and bool(other.weight.any())
    if trains and not torch.equal(one.ids, other.ids):  # masks of the same text may differ
        return one, other
    return _blank(one), _blank(other)


def _blank(tokens: Tokens) -> Tokens:
    return Tokens(tokens.ids, torch.full_like(tokens.labels, IGNORE_INDEX), torch.zeros_like(tokens.weight))


def _bare(feature: Feature) -> dict[str, Any]:
    """What another collator is given of a row."""
    found = {name: value for name, value in feature.items() if name not in (*_NOT_FOR_MODELS, WEIGHT)}
    return found | {"labels": tokens_of(feature).labels.tolist()}


def _padded(rows: Sequence[Tokens], pad_token_id: int, multiple: int | None) -> dict[str, Tensor]:
    longest = max(len(row.ids) for row in rows)
    longest = -(-longest // (multiple or 1)) * (multiple or 1)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE_INDEX),
        WEIGHT: torch.zeros(shape),
    }
    for i, row in enumerate(rows):
        n = len(row.ids)
        batch["input_ids"][i, :n], batch["labels"][i, :n], batch[WEIGHT][i, :n] = row
        batch["attention_mask"][i, :n] = 1
    return batch


def _pack(item: Any) -> list[Feature]:
    """The rows of a sequence: samplers that pack hand over several."""
    return item if isinstance(item, list) else [item]


def _laid_out(lines: Sequence[Tensor], labels: Tensor, *, left: bool) -> Tensor:
    """The weights (B, T) of sequences as another collator laid out their labels: each by itself, or all in one."""
    if len(labels) == 1:
        lines = [torch.cat(list(lines))]
    found = torch.zeros(labels.shape, dtype=torch.float32)
    if len(lines) == len(labels) and max(map(len, lines)) <= labels.shape[1]:
        for place, line in zip(found, lines, strict=True):
            place[len(place) - len(line) if left else 0 :][: len(line)] = line
    # Where a sequence begins there is neither label nor weight: collators that blank the label there agree too.
    if not torch.equal(found > 0, labels.cpu() != IGNORE_INDEX):
        raise UsageError(
            "the trainer's collator laid out, cut or changed labels in a way that the weights cannot follow; turn off"
            " its truncation, and see README.md for what is supported"
        )
    return found
