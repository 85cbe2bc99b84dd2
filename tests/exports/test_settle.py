"""What becomes of rows before they are written: cut, made binary, dropped by name, and counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_run import small_run

from alphatoken_curate.errors import UsageError
from alphatoken_curate.exports import hf, messages, unshifted
from alphatoken_curate.exports.form import REASONS, Asked, Dropped, Form, Kept
from alphatoken_curate.exports.settle import Tally, counted, settled
from alphatoken_curate.reading.trainset import TrainBranch, TrainRow, TrainSet, open_train
from alphatoken_curate.runs.schema import LAYOUTS


def branch(weights: list[float], first: int = 10) -> TrainBranch:
    ids = np.arange(first, first + len(weights), dtype=np.int32)
    weight = np.array(weights, np.float32)
    labels = np.where(weight > 0, ids, -100).astype(np.int64)
    return TrainBranch(input_ids=ids, labels=labels, loss_weight=weight)


class Given(TrainSet):
    """A set of rows that are in memory."""

    given: list[TrainRow]

    def rows(self):  # type: ignore[no-untyped-def]
        yield from self.given


@pytest.fixture
def opened(tmp_path: Path) -> Given:
    found = open_train(small_run(tmp_path / "run"))
    return Given(run=found.run, stored=found.stored, mask=found.mask, layout=found.layout)


def items(
    opened: Given,
    *rows: tuple[TrainBranch, ...],
    form: Form = hf.FORM,
    max_length: int | None = None,
    binarize: bool = False,
    strict: bool = False,
) -> list[Kept | Dropped]:
    object.__setattr__(opened, "given", [TrainRow(row_id=i, branches=parts) for i, parts in enumerate(rows)])
    asked = Asked(layout=LAYOUTS["sft"], strict=strict)
    return list(settled(opened, form, asked, max_length=max_length, binarize=binarize))


def shown(item: Kept | Dropped) -> object:
    if isinstance(item, Dropped):
        assert item.reason in REASONS
        return item.reason
    return [part.loss_weight.tolist() for part in item.row.branches], item.cut


def test_rows_are_cut_at_the_end_and_dropped_where_nothing_is_left(opened: Given) -> None:
    rows = [(branch([0, 2, 0, 1]),), (branch([0, 0, 0, 1]),), (branch([0, 0, 0, 0]),), (branch([0, 1]),)]
    assert [shown(item) for item in items(opened, *rows, max_length=3)] == [
        ([[0, 2, 0]], 1),
        "cut_away",
        "nothing_trains",
        ([[0, 1]], 0),
    ]
    (first, *_) = items(opened, *rows, max_length=3)
    assert isinstance(first, Kept) and first.row.branches[0].input_ids.tolist() == [10, 11, 12]
    assert [shown(item) for item in items(opened, *rows)][:2] == [([[0, 2, 0, 1]], 0), ([[0, 0, 0, 1]], 0)]


def test_a_pair_needs_both_its_branches(opened: Given) -> None:
    whole, late, none = branch([0, 1, 1]), branch([0, 0, 0, 1], first=30), branch([0, 0], first=50)
    found = items(opened, (whole, late), (whole, none), (none, whole), max_length=3)
    assert [shown(item) for item in found] == ["cut_away", "nothing_trains", "nothing_trains"]
    found = items(opened, (whole, branch([0, 1, 0], first=30)), (whole, branch([0, 1, 1, 1])))
    assert all(isinstance(item, Kept) for item in found)


def test_a_pair_that_a_cut_makes_equal_is_dropped(opened: Given) -> None:
    same = (branch([0, 1, 1, 0]), branch([0, 1, 1, 1, 1]))
    assert [shown(item) for item in items(opened, same, max_length=3)] == ["same_branches"]
    assert [shown(item) for item in items(opened, same, max_length=4)] == ["same_branches"]
    assert [shown(item) for item in items(opened, same)] == [([[0, 1, 1, 0], [0, 1, 1, 1, 1]], 0)]
    # As `PreferenceCollator` has it: of the same tokens whatever they are cut to, masked apart or not.
    alike = (branch([0, 1, 1, 0]), branch([0, 0, 1, 1]))
    assert [shown(item) for item in items(opened, alike)] == ["same_branches"]
    masked_apart = (branch([0, 1, 0, 0]), branch([0, 0, 1, 1, 1]))
    assert [shown(item) for item in items(opened, masked_apart, max_length=3)] == ["same_branches"]
    other = (branch([0, 1, 1, 0]), branch([0, 1, 1, 1, 1], first=11))
    assert [shown(item) for item in items(opened, other, max_length=3)] == [([[0, 1, 1], [0, 1, 1]], 3)]


def test_text_is_not_cut_but_dropped(opened: Given) -> None:
    found = items(opened, (branch([0, 1, 1]),), (branch([0, 1]),), form=messages.FORM, max_length=2)
    assert [shown(item) for item in found] == ["too_long", ([[0, 1]], 0)]


def test_weights_become_binary_or_are_refused(opened: Given) -> None:
    rows = [(branch([0, 1, 0]),), (branch([0, 0.25, 1e-30]),)]
    found = items(opened, *rows, form=unshifted.SKYRL, binarize=True)
    assert [shown(item) for item in found] == [([[0, 1, 0]], 0), ([[0, 1, 1]], 0)]
    with pytest.raises(UsageError, match=r"row 1 has loss weights such as 0\.25; --for skyrl: SkyRL makes integers"):
        items(opened, *rows, form=unshifted.SKYRL)
    with pytest.raises(UsageError, match=r"1e-30; .*mask with --weights binary"):
        items(opened, (branch([0, 1, 1e-30]),), strict=True)
    assert len(items(opened, *rows)) == 2
    # What is dropped is not refused, nor is what a cut takes away.
    assert [shown(item) for item in items(opened, rows[0], form=unshifted.SKYRL)] == [([[0, 1, 0]], 0)]
    assert [shown(item) for item in items(opened, (branch([0, 1, 0.5]),), form=unshifted.SKYRL, max_length=2)]


def test_a_tally_counts_every_branch(opened: Given) -> None:
    told: list[Dropped] = []
    rows = [
        (branch([0, 2, 0, 1]), branch([0, 0.5])),
        (branch([0]), branch([0, 1])),
        (branch([0, 1]), branch([0, 1], first=30)),
    ]
    tally = Tally()
    kept = list(counted(iter(items(opened, *rows, max_length=3)), tally, told.append))
    assert [one.row.row_id for one in kept] == [0, 2] and told == [Dropped(row_id=1, turn=0, reason="nothing_trains")]
    assert (tally.rows, tally.tokens, tally.trained_tokens, tally.longest) == (2, 9, 4, 3)
    assert (tally.cut_rows, tally.cut_tokens, tally.weight_sum, tally.soft) == (1, 1, 4.5, True)
    assert tally.dropped == {"nothing_trains": 1}
    binary = Tally()
    list(counted(iter(items(opened, *rows, binarize=True)), binary))
    assert not binary.soft and binary.weight_sum == binary.trained_tokens == 5
