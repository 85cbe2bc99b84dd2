"""Batches of weighted rows: alignment, padding, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hand import stored
from trainer_runs import tokenizer, train_run
from transformers import DataCollatorForSeq2Seq

from alphatoken_curate.errors import UsageError
from alphatoken_curate.trainers import PreferenceCollator, WeightedCollator

ROWS = [
    {"row_id": 4, "input_ids": [5, 6, 7], "labels": [-100, 6, -100], "loss_weight": [0.0, 0.5, 0.0]},
    {"row_id": 9, "input_ids": [8, 9, 1, 2, 3], "labels": [-100, -100, 1, 2, 3], "loss_weight": [0, 0, 1, 2, 1.5]},
]


def padded(name: str, fill: float, length: int = 5) -> list[list[float]]:
    return [row[name] + [fill] * (length - len(row[name])) for row in ROWS]  # type: ignore[operator,arg-type]


def test_rows_of_another_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="row 4 has no chosen_input_ids, but row_id, input_ids"):
        PreferenceCollator()(ROWS)
    pair = {f"{branch}_{name}": value for branch in ("chosen", "rejected") for name, value in ROWS[0].items()}
    with pytest.raises(UsageError, match="a row has no input_ids, but chosen_row_id, chosen_input_ids"):
        WeightedCollator()([pair])


def test_lists_are_padded_alike() -> None:
    found = WeightedCollator(pad_token_id=42)(ROWS)
    assert found["input_ids"].tolist() == padded("input_ids", 42)
    assert found["labels"].tolist() == padded("labels", -100)
    assert found["loss_weight"].tolist() == padded("loss_weight", 0)
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert {one.dtype for name, one in found.items() if name != "loss_weight"} == {torch.int64}
    assert found["loss_weight"].dtype == torch.float32
    wide = WeightedCollator(pad_to_multiple_of=4)(ROWS)
    assert {tuple(one.shape) for one in wide.values()} == {(2, 8)}
    assert wide["loss_weight"].tolist() == padded("loss_weight", 0, 8)


def test_what_is_missing_follows_from_the_other() -> None:
    bare = [{name: row[name] for name in ("input_ids", "loss_weight")} for row in ROWS]
    assert torch.equal(WeightedCollator()(bare)["labels"], WeightedCollator()(ROWS)["labels"])
    bare = [{name: row[name] for name in ("input_ids", "labels")} for row in ROWS]
    assert WeightedCollator()(bare)["loss_weight"].tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_another_collators_layout_is_followed(side: str) -> None:
    words = tokenizer()
    words.padding_side = side
    found = WeightedCollator(inner=DataCollatorForSeq2Seq(words, pad_to_multiple_of=8))(ROWS)
    whole = [[0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 2.0, 1.5]]
    wanted = [one + [0.0] * (8 - len(one)) if side == "right" else [0.0] * (8 - len(one)) + one for one in whole]
    assert found["loss_weight"].tolist() == wanted
    assert torch.equal(found["loss_weight"] > 0, found["labels"] != -100)


def test_packed_and_flattened_layouts_are_followed() -> None:
    def flattened(features: list[Any]) -> dict[str, torch.Tensor]:
        rows = [row for item in features for row in (item if isinstance(item, list) else [item])]
        return {
            name: torch.tensor([[x for row in rows for x in row[name]] + [-100]]) for name in ("input_ids", "labels")
        }

    wanted = [[0, 0.5, 0, 0, 0, 1, 2, 1.5, 0]]
    assert WeightedCollator(inner=flattened)(ROWS)["loss_weight"].tolist() == wanted
    assert WeightedCollator(inner=flattened)([ROWS])["loss_weight"].tolist() == wanted


def test_a_layout_that_weights_cannot_follow_is_refused() -> None:
    def cutting(features: list[Any]) -> dict[str, torch.Tensor]:
        return {"labels": torch.tensor([row["labels"][-3:] for row in features])}

    def shifting(features: list[Any]) -> dict[str, torch.Tensor]:
        return {"labels": torch.tensor([[*row["labels"][1:], -100] for row in features])}

    with pytest.raises(UsageError, match="laid out, cut or changed labels"):
        WeightedCollator(inner=cutting)(ROWS)
    with pytest.raises(UsageError, match="laid out, cut or changed labels"):
        WeightedCollator(inner=shifting)(ROWS[1:])


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_rows_that_disagree_are_refused(kind: str, tmp_path: Path) -> None:
    row = stored(train_run(tmp_path / "run", kind=kind, weights="rank"), 0)[2]
    prefix, collator = ("", WeightedCollator()) if kind == "sft" else ("rejected_", PreferenceCollator())
    collator([row])
    weight = row[f"{prefix}loss_weight"]
    for wrong in (
        [*weight[1:], 0.0],
        [0.0, *weight[:-1]],
        [-one for one in weight],
        [one * float("nan") for one in weight],
    ):
        with pytest.raises(UsageError, match=rf"row 2: {prefix}labels must be -100 exactly"):
            collator([{**row, f"{prefix}loss_weight": wrong}])
    with pytest.raises(UsageError, match=rf"row 2 has .* {prefix}loss_weight: something cut one of them"):
        collator([{**row, f"{prefix}input_ids": row[f"{prefix}input_ids"][:-1]}])
    with pytest.raises(UsageError, match=rf"neither {prefix}labels nor {prefix}loss_weight"):
        collator([{name: one for name, one in row.items() if name not in (f"{prefix}labels", f"{prefix}loss_weight")}])


def test_the_first_token_of_a_row_without_weights_trains_nothing() -> None:
    found = WeightedCollator()([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}, {"input_ids": [], "labels": []}])
    assert found["loss_weight"].tolist() == [[0, 1, 1], [0, 0, 0]]
    assert found["labels"].tolist() == [[-100, 4, 5], [-100, -100, -100]]


@pytest.mark.parametrize("empty", ["chosen_", "rejected_", "the same", "masked apart"])
def test_no_answer_of_a_pair_is_moved_against_nothing(empty: str) -> None:
    row: dict[str, Any] = {f"chosen_{name}": value for name, value in ROWS[0].items() if name != "row_id"}
    row |= {f"rejected_{name}": value for name, value in ROWS[1].items() if name != "row_id"}
    whole = PreferenceCollator()([row])
    assert whole["loss_weight"].sum(1).tolist() == [0.5, 4.5]
    lost: dict[str, Any] = dict(row)
    if empty in ("the same", "masked apart"):
        lost |= {f"rejected_{name}": value for name, value in ROWS[0].items() if name != "row_id"}
        if empty == "masked apart":
            ids = lost["rejected_input_ids"]
            weight = [0.0, *[1.0] * (len(ids) - 1)]
            lost |= {"rejected_labels": [-100, *ids[1:]], "rejected_loss_weight": weight}
            assert weight != lost["chosen_loss_weight"]
    else:
        length = len(row[f"{empty}input_ids"])
        lost |= {f"{empty}labels": [-100] * length, f"{empty}loss_weight": [0.0] * length}
    batch = PreferenceCollator()([lost, row])
    assert batch["loss_weight"].sum(1).tolist() == [0, 0.5, 0, 4.5]
    assert batch["completion_mask"].sum(1).tolist() == [0, 1, 0, 3]
    assert batch["input_ids"][:, :3].tolist()[1::2] == whole["input_ids"][:, :3].tolist()


def test_pairs_come_chosen_first(tmp_path: Path) -> None:
    rows = stored(train_run(tmp_path / "run", kind="preference", weights="rank"), 0)[:3]
    found = PreferenceCollator(pad_token_id=7, pad_to_multiple_of=16)(
        [{**row, "ref_chosen_logps": i + 0.5, "ref_rejected_logps": i + 0.25} for i, row in enumerate(rows)]
    )
    sequences = [(row, branch) for branch in ("chosen_", "rejected_") for row in rows]
    for i, (row, branch) in enumerate(sequences):
        ids, weight = row[branch + "input_ids"], row[branch + "loss_weight"]
        rest = 16 - len(ids)
        assert found["input_ids"][i].tolist() == ids + [7] * rest
        assert found["attention_mask"][i].tolist() == [1] * len(ids) + [0] * rest
        assert found["loss_weight"][i].tolist() == weight + [0.0] * rest
        assert found["completion_mask"][i].tolist() == [int(one > 0) for one in weight] + [0] * rest
    assert found["ref_chosen_logps"].tolist() == [0.5, 1.5, 2.5]
    assert found["ref_rejected_logps"].tolist() == [0.25, 1.25, 2.25]
    assert "labels" not in found
