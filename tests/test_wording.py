from __future__ import annotations

from dataclasses import asdict

import pytest

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.wording import chosen_by, count, end_of_turn, nearest, over_share, pasted, ranges, sequences_are


def test_one_is_no_plural() -> None:
    assert [count(n, "row") for n in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]
    assert [count(n, "branch", "branches") for n in (1, 2)] == ["1 branch", "2 branches"]


def test_a_name_that_is_near_is_told() -> None:
    assert nearest("nul", ("nll", "entropy")) == " Did you mean nll?"
    assert nearest("xyz", ("nll", "entropy")) == ""


def test_a_path_can_be_pasted_into_a_shell() -> None:
    told = [pasted(name) for name in ("a/b.alphatoken", "dir \u00fc/my run", "-d.alphatoken", "-my run")]
    assert told == ["a/b.alphatoken", "'dir \u00fc/my run'", "./-d.alphatoken", "'./-my run'"]


@pytest.mark.parametrize(
    ("numbers", "most", "told"),
    [
        ([3], 10, "3"),
        ([3, 7, 9, 10, 11], 10, "3, 7, 9-11"),
        ([1, 2, 4, 6, 8, 9, 10], 3, "1-2, 4, 6 and 3 more"),
        (list(range(5, 2000)), 10, "5-1999"),
    ],
)
def test_lines_are_told_in_ranges(numbers: list[int], most: int, told: str) -> None:
    assert ranges(numbers, most) == told


def test_sequences_are_rows_unless_they_are_answers() -> None:
    assert count(1, *sequences_are(0)) == "1 row" and count(2, *sequences_are(None)) == "2 rows"
    assert count(1, *sequences_are(9)) == "1 answer" and count(2, *sequences_are(True)) == "2 answers"


def test_what_trains_of_the_ends_of_answers_is_told_where_it_is_known() -> None:
    assert end_of_turn(None, None) is None
    assert end_of_turn(0, 0) == "end of turn: no response token ends an answer"
    assert end_of_turn(1300, 0) == "end of turn: 0 of 1,300 train"
    assert over_share(1) == "what is always kept is more than the share by 1 token, and stays"


def test_masks_of_other_settings_are_told_otherwise() -> None:
    plain = asdict(MaskConfig(keep=0.5))
    assert chosen_by(plain) == "value; --keep 0.5, --scope global, --weights binary, --always-keep end-of-turn"
    told = [chosen_by(plain)]
    for name, value in (
        *(("scope", "row"), ("weights", "rank"), ("keep", 0.3), ("by", "random"), ("always_keep", "none")),
        *(("stability_weight", 0.5), ("stability_scale", "rms"), ("allow_empty_rows", True)),
    ):
        told.append(chosen_by(plain | {name: value}))
    told += [chosen_by(plain | {"by": "random", "seed": 7}), chosen_by(plain | {"by": "7 - surprise"})]
    assert len({*told}) == len(told)
    # What decides nothing is not told.
    assert chosen_by(plain | {"seed": 7}) == chosen_by(plain)
    assert "stability" not in chosen_by(plain | {"by": "nll", "stability_weight": 2.0, "stability_scale": "rms"})
    assert "--stability-weight 2.0" in chosen_by(plain | {"by": "nll - VALUE", "stability_weight": 2.0})
