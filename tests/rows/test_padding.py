"""Padded rows are what they are without padding; packed ones are refused, whatever tells that they are."""

from __future__ import annotations

from typing import Any

import pytest

from alphatoken_curate.rows.containers import RawRow
from alphatoken_curate.rows.padding import BESIDE, MASKED, MASKS
from alphatoken_curate.rows.read import RowStream, normalise, rows_of
from alphatoken_curate.rows.shapes import Pair, Tokens

IDS, LABELS = [5, 6, 7, 8], [-100, -100, 7, 8]
PLAIN = Tokens(input_ids=IDS, labels=LABELS)


def read(**record: Any) -> Any:
    """Its normal form, or the bad row."""
    found = rows_of([record], "a.jsonl")
    return found.rows[0].record if found.rows else found.bad[0]


def padded(left: int, right: int, **more: Any) -> dict[str, Any]:
    def around(values: list[int], filler: int) -> list[int]:
        return [filler] * left + values + [filler] * right

    mask = around([1] * 4, 0)
    return {"input_ids": around(IDS, 2), "labels": around(LABELS, -100), "attention_mask": mask, **more}


@pytest.mark.parametrize("left", [0, 1, 5])
@pytest.mark.parametrize("right", [0, 1, 5])
def test_padding_is_trimmed(left: int, right: int) -> None:
    assert read(**padded(left, right)) == PLAIN
    assert (
        read(**padded(left, right) | {"attention_mask": [bool(x) for x in padded(left, right)["attention_mask"]]})
        == PLAIN
    )
    # Labels go with it, though they be tokens: what fills a row is not to be learnt.
    assert read(**padded(left, right) | {"labels": [2] * left + LABELS + [2] * right}) == PLAIN


def test_it_is_told_and_only_where_it_was() -> None:
    stream = RowStream(())
    raws = [RawRow(i + 1, one, one) for i, one in enumerate([padded(2, 1), padded(0, 0), padded(0, 3)])]
    assert len(list(stream.sort(raws, "a.jsonl"))) == 3
    assert stream.told == {"padding that attention_mask leaves out is trimmed": 2}


def test_branches_of_a_pair_are_trimmed_each_by_itself() -> None:
    chosen = {f"chosen_{key}": value for key, value in padded(2, 0).items()}
    rejected = {"rejected_input_ids": [5, 6, 9], "rejected_labels": [-100, -100, 9]}
    pair = read(**chosen, **rejected)
    assert pair == Pair(chosen=PLAIN, rejected=Tokens(input_ids=[5, 6, 9], labels=[-100, -100, 9]))
    bad = read(**chosen, **rejected, rejected_attention_mask=[1, 0, 1])
    assert bad.reason == "masked_inside" and bad.message.startswith("rejected_attention_mask[1] is 0 between tokens")


def test_places_are_told_as_they_were_given() -> None:
    bad = read(**padded(3, 0) | {"labels": [-100] * 5 + [9, 8]})
    assert bad.reason == "label_mismatch" and "labels[5] is 9; it must be -100 or input_ids[5], 7" in bad.message
    assert "input_ids[3] is -1" in read(**padded(3, 0) | {"input_ids": [2, 2, 2, -1, 6, 7, 8]}).message


@pytest.mark.parametrize("left", [0, 3])
def test_positions_of_one_sequence_say_nothing(left: int) -> None:
    row = padded(left, 2)
    for positions in ([*range(left + 6)], [1] * left + [0, 1, 2, 3] + [1, 1]):
        assert read(**row, position_ids=positions) == PLAIN


ONE: dict[str, Any] = {
    "cu_seqlens": [0, 4],
    "cu_seq_lens_q": [0, 4],
    "seq_start_id": [0],
    "seq_lens": [4],
    "seq_lengths": [4],
    "segment_ids": [1, 1, 1, 1],
    "document_ids": [0, 0, 0, 0],
}


@pytest.mark.parametrize("key", ONE)
def test_one_sequence_may_say_that_it_is_one(key: str) -> None:
    assert key in BESIDE and read(input_ids=IDS, labels=LABELS, **{key: ONE[key]}) == PLAIN


PACKED: dict[str, Any] = {
    "attention_mask": [1, 1, 2, 2],
    "position_ids": [0, 1, 0, 1],
    "cu_seqlens": [0, 2, 4],
    "cu_seq_lens_q": [0, 2, 4],
    "cu_seq_lens_k": [2, 4],
    "seq_start_id": [0, 2],
    "seq_lens": [2, 2],
    "seq_lengths": [1, 3],
    "sequence_lengths": [2, 2, 0],
    "segment_ids": [1, 1, 2, 2],
    "sequence_ids": [0, 0, 1, 1],
    "document_ids": [7, 8, 8, 8],
}


@pytest.mark.parametrize("key", PACKED)
def test_a_packed_row_is_refused_with_advice(key: str) -> None:
    bad = read(input_ids=IDS, labels=LABELS, **{key: PACKED[key]})
    assert bad.reason == "packed_row" and bad.message.startswith(key)
    assert "several sequences are packed into this row. Give each a row of its own" in bad.message


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "a hole": ({"attention_mask": [1, 0, 1, 1]}, "masked_inside", "attention_mask[1] is 0 between tokens"),
    "a hole behind padding": ({"attention_mask": [0, 1, 0, 1]}, "masked_inside", "attention_mask[2] is 0"),
    "nothing left": ({"attention_mask": [0] * 4}, "no_response", "attention_mask leaves every token out"),
    "too short": ({"attention_mask": [1]}, "length_mismatch", "1 attention_mask and 4 tokens"),
    "below 0": ({"attention_mask": [1, 1, 1, -1]}, "wrong_type", "attention_mask holds -1; it must hold 0 and 1"),
    "floats": ({"attention_mask": [1.0] * 4}, "wrong_type", "attention_mask[0] is a number"),
    "a square": ({"attention_mask": [[1]] * 4}, "wrong_type", "attention_mask[0] is a list"),
    "text": ({"attention_mask": "1111"}, "wrong_type", "attention_mask is text"),
    "the answer is left out": ({"attention_mask": [1, 1, 0, 0]}, "no_response", "all labels after the first"),
    "few positions": ({"position_ids": [0]}, "length_mismatch", "1 position_ids and 4 tokens"),
    "other positions": ({"position_ids": [3, 4, 5, 6]}, "odd_positions", "position_ids[0] is 3; positions count 0"),
    "a gap": ({"position_ids": [0, 1, 3, 4]}, "odd_positions", "position_ids[2] is 3"),
    "another length": ({"seq_lens": [3]}, "length_mismatch", "seq_lens says 3 tokens, and the row has 4"),
    "few segments": ({"segment_ids": [1]}, "length_mismatch", "1 segment_ids and 4 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_neither_is_named(name: str) -> None:
    given, reason, told = BAD[name]
    bad = read(input_ids=IDS, labels=LABELS, **given)
    assert bad.reason == reason and bad.message.startswith(told)


def test_a_chat_may_have_such_a_column() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert normalise({"messages": messages, "attention_mask": [0, 1]}) == normalise({"messages": messages})


# --- masks


@pytest.mark.parametrize("key", MASKS)
@pytest.mark.parametrize("on", [1, True, 1.0, 0.25])
def test_a_mask_takes_away_from_labels(key: str, on: Any) -> None:
    mask = [on, on, type(on)(0), on]
    assert read(input_ids=IDS, labels=LABELS, **{key: mask}).labels == [-100, -100, -100, 8]
    assert read(input_ids=IDS, labels=IDS, **{key: mask}).labels == [-100, 6, -100, 8]
    both = {key: mask} | ({"loss_mask": [0, 0, 1, 1]} if key != "loss_mask" else {"completion_mask": [0, 0, 1, 1]})
    assert read(input_ids=IDS, labels=IDS, **both).labels == [-100, -100, -100, 8]
    # Padding goes with its mask.
    row = padded(2, 1) | {"labels": [2, 2, *IDS, 2], key: [on, on, *mask, on]}
    assert read(**row).labels == [-100, 6, -100, 8]


def test_masks_stand_in_for_labels() -> None:
    for key in MASKED:
        assert read(input_ids=IDS, **{key: [0, 0, 1, 1]}) == PLAIN
        assert read(input_ids=IDS, labels=None, **{key: [0, 0, 1, 1]}) == PLAIN
    two = read(input_ids=IDS, assistant_masks=[0, 1, 0, 1], completion_mask=[0, 0, 1, 1])
    assert two.labels == [-100, -100, -100, 8]


def test_branches_have_masks_of_their_own() -> None:
    other = [*IDS[:-1], 9]
    texts = {"chosen_input_ids": IDS, "chosen_labels": IDS, "rejected_input_ids": other, "rejected_labels": other}
    pair = read(**texts, chosen_completion_mask=[0, 0, 1, 1], rejected_loss_mask=[0, 0, 0, 1])
    assert (pair.chosen.labels, pair.rejected.labels) == (LABELS, [-100, -100, -100, 9])


BAD_MASKS: dict[str, tuple[Any, str, str]] = {
    "too short": ([1, 1], "length_mismatch", "2 loss_mask and 4 tokens"),
    "no list": (1, "wrong_type", "loss_mask is an integer; it must be a list of 0 and 1"),
    "text": ([1, 1, 1, "1"], "wrong_type", "loss_mask[3] is '1'"),
    "below 0": ([1, 1, 1, -1], "wrong_type", "loss_mask[3] is -1"),
    "null": ([1, 1, 1, None], "wrong_type", "loss_mask[3] is None"),
    "nothing left": ([1, 0, 0, 0], "no_response", "all labels after the first are -100, or left out by loss_mask"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_mask_that_is_none_is_named(name: str) -> None:
    mask, reason, told = BAD_MASKS[name]
    bad = read(input_ids=IDS, labels=LABELS, loss_mask=mask)
    assert bad.reason == reason and bad.message.startswith(told)


def test_two_ways_to_say_one_row_are_two_shapes() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read(messages=messages, input_ids=IDS, assistant_masks=[0, 0, 1, 1]).reason == "ambiguous_shape"
    assert read(messages=messages, input_ids=IDS) == read(messages=messages)
