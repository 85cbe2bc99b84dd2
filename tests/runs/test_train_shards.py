from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import FIELDS

from alphatoken_curate.runs import shards
from alphatoken_curate.runs.schema import LAYOUTS, PREFERENCE, SFT, sequence_keys
from alphatoken_curate.runs.shards import Footer
from alphatoken_curate.runs.train_shards import MaskFacts, TrainLists, write_train

METADATA = Footer(fields=FIELDS, facts={"note": "x"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train" / "mask=0000" / "part-00000.parquet"


KEYS = sequence_keys(np.array([4, 9]), np.array([0, 1], np.int32))

LISTS = TrainLists(
    lengths=np.array([3, 2]),
    input_ids=np.array([5, 6, 7, 8, 9], np.int32),
    weight=np.array([0, 2, 0, 0, 0.5], np.float32),
    value=np.array([np.nan, 3, 1, np.nan, 2], np.float32),
    end_of_turn=np.array([False, False, True, False, True]),
)
COLUMNS = {
    "input_ids": [[5, 6, 7], [8, 9]],
    "attention_mask": [[1, 1, 1], [1, 1]],
    "labels": [[-100, 6, -100], [-100, 9]],
    "loss_mask": [[0, 1, 0], [0, 1]],
    "loss_weight": [[0, 2, 0], [0, 0.5]],
    "value": [[None, 3, 1], [None, 2]],
}


def test_train_columns_follow_from_the_weights(path: Path) -> None:
    shard = write_train(path, KEYS, [LISTS], METADATA, SFT)
    assert shards.read(path, SFT.train).to_pydict() == {"row_id": [4, 9], "turn": [0, 1], **COLUMNS}
    assert (shard.rows, shard.tokens, shard.response_tokens) == (2, 5, 3)
    counts = shards.read_footer(path).counts
    assert (counts["kept_tokens"], counts["end_of_turn_tokens"], counts["end_of_turn_kept"]) == (2, 2, 1)


def test_train_columns_of_pairs_stand_side_by_side(path: Path) -> None:
    other = TrainLists(
        lengths=np.array([1, 2]),
        input_ids=np.array([1, 2, 3], np.int32),
        weight=np.array([0, 0, 1], np.float32),
        value=np.array([np.nan, np.nan, 4], np.float32),
        end_of_turn=np.array([False, False, True]),
    )
    shard = write_train(path, KEYS, [LISTS, other], METADATA, PREFERENCE)
    found = shards.read(path, PREFERENCE.train).to_pydict()
    assert {name: found[f"chosen_{name}"] for name in COLUMNS} == COLUMNS
    assert found["rejected_input_ids"] == [[1], [2, 3]] and found["rejected_labels"] == [[-100], [-100, 3]]
    assert found["rejected_value"] == [[None], [None, 4]]
    assert (shard.rows, shard.tokens, shard.response_tokens) == (2, 8, 4)
    counts = shards.read_footer(path).counts
    assert (counts["kept_tokens"], counts["end_of_turn_tokens"], counts["end_of_turn_kept"]) == (3, 3, 2)


def test_where_values_do_not_say_what_ends_an_answer_it_is_not_counted(path: Path) -> None:
    write_train(path, KEYS, [replace(LISTS, end_of_turn=None)], METADATA, SFT)
    assert shards.read_footer(path).counts.keys() == {"rows", "tokens", "response_tokens", "kept_tokens"}
    assert shards.read(path, SFT.train).to_pydict() == {"row_id": [4, 9], "turn": [0, 1], **COLUMNS}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_rows_are_a_shard_too(path: Path, layout: shards.Layout) -> None:
    nothing = TrainLists(
        lengths=np.empty(0, np.int64),
        input_ids=np.empty(0, np.int32),
        weight=np.empty(0, np.float32),
        value=np.empty(0, np.float32),
        end_of_turn=np.empty(0, np.bool_),
    )
    write_train(path, np.empty(0, np.int64), [nothing for _ in layout.branches], METADATA, layout)
    assert shards.read(path, layout.train).num_rows == 0


def test_what_a_mask_cannot_tell_is_left_out_of_its_footer() -> None:
    facts = MaskFacts(generations=(0,), settings={}, rows_given_back=1)
    assert facts.as_json() == {"generations": (0,), "settings": {}, "rows_given_back": 1}
    assert replace(facts, over_share=0).as_json()["over_share"] == 0
