"""Rows as an exporter gets them: cut, made binary where asked, and those with nothing to train left out by name.

Trainers cut ids and not weights, and drop rows without labels in silence or divide by 0: so it is settled here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from alphatoken_curate.errors import UsageError
from alphatoken_curate.exports.form import Asked, Dropped, Form, Items, Kept
from alphatoken_curate.reading.trainset import TrainBranch, TrainRow, TrainSet
from alphatoken_curate.runs.schema import IGNORE_INDEX


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was written and what was not. Tokens are of all branches; `weight_sum` is summed in float64.

    `answers`, of which `answers_trained` are to train: messages, where text is written.
    """

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    weight_sum: float = 0.0
    longest: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    soft: bool = False
    answers: int = 0
    answers_trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def count(self, kept: Kept) -> None:
        """Add a row that is written."""
        self.rows += 1
        self.cut_rows += kept.cut > 0
        self.cut_tokens += kept.cut
        self.answers += kept.answers
        self.answers_trained += kept.answers_trained
        for branch in kept.row.branches:
            weight = branch.loss_weight
            self.tokens += len(weight)
            self.longest = max(self.longest, len(weight))
            self.trained_tokens += int(np.count_nonzero(weight))
            self.weight_sum += float(weight.sum(dtype=np.float64))
            self.soft = self.soft or _is_soft(branch)


def settled(opened: TrainSet, form: Form, asked: Asked, *, max_length: int | None, binarize: bool) -> Items:
    """Every row of the mask, in order: as it is to be written, or why it is not.

    Raises `UsageError` for weights that the trainer would destroy, `StoredDataError` for damaged shards.
    """
    floats = form.floats(asked)
    for row in opened.rows():
        item = _settled(row, max_length, cuts=form.cuts, binarize=binarize)
        if isinstance(item, Kept) and not floats:
            _refuse_soft(item.row, form)
        yield item


def _settled(row: TrainRow, max_length: int | None, *, cuts: bool, binarize: bool) -> Kept | Dropped:
    if not all(branch.loss_weight.any() for branch in row.branches):
        return Dropped(row_id=row.row_id, turn=row.turn, reason="nothing_trains")
    longer = [max(0, len(branch.input_ids) - (max_length or len(branch.input_ids))) for branch in row.branches]
    if any(longer) and not cuts:
        return Dropped(row_id=row.row_id, turn=row.turn, reason="too_long")
    branches = [_branch(branch, max_length, binarize) for branch in row.branches]
    if not all(branch.loss_weight.any() for branch in branches):
        return Dropped(row_id=row.row_id, turn=row.turn, reason="cut_away")
    # Of the same text each branch has a mask of its own.
    if len(branches) > 1 and np.array_equal(branches[0].input_ids, branches[1].input_ids):
        return Dropped(row_id=row.row_id, turn=row.turn, reason="same_branches")
    return Kept(row=replace(row, branches=tuple(branches)), cut=sum(longer))


def _branch(branch: TrainBranch, max_length: int | None, binarize: bool) -> TrainBranch:
    ids, weight = branch.input_ids[:max_length], branch.loss_weight[:max_length]
    if binarize:
        weight = (weight > 0).astype(np.float32)
    return TrainBranch(input_ids=ids, labels=branch.labels[:max_length], loss_weight=weight)


def _is_soft(branch: TrainBranch) -> bool:
    return bool(((branch.loss_weight != 0) & (branch.loss_weight != 1)).any())


def _refuse_soft(row: TrainRow, form: Form) -> None:
    for branch in row.branches:
        if _is_soft(branch):
            weight = branch.loss_weight[branch.labels != IGNORE_INDEX]
            raise UsageError(
                f"row {row.row_id} has loss weights such as {float(weight[weight != 1][0]):.3g}; --for {form.name}:"
                f" {form.destroys}. Give --binarize (all tokens that weigh something train alike), or make a mask with"
                " --weights binary."
            )


def counted(items: Items, tally: Tally, tell: Callable[[Dropped], None] | None = None) -> Iterator[Kept]:
    """The rows that are written; all of them are counted, and `tell` hears of those that are dropped."""
    for item in items:
        if isinstance(item, Kept):
            tally.count(item)
            yield item
        else:
            tally.dropped[item.reason] += 1
            if tell is not None:
                tell(item)
