from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from alphatoken_curate.tokens.draws import _mix, inverse_transform, keyed_uniform


def test_the_draws_are_what_they_have_always_been() -> None:
    """Masks and Fishers of published runs depend on these numbers."""
    found = keyed_uniform(0, [0, 0, 1, 123456789], [0, 1, 0, -1])
    assert found.tolist() == [0.20310281705476096, 0.33805245419550545, 0.7054856102290845, 0.13784417266973503]
    assert keyed_uniform(2**63 - 1, 5, 7).item() == 0.20982161925186738


def test_the_mixing_is_splitmix64() -> None:
    """The first outputs of Vigna's splitmix64.c from the state 0."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = np.arange(1, 4).astype(np.uint64) * golden
    assert [hex(x) for x in _mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(-2, 2**31))
def test_a_draw_is_in_the_unit_interval(seed: int, row: int, position: int) -> None:
    assert 0 <= keyed_uniform(seed, row, position).item() < 1


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_a_draw_depends_on_its_key_and_on_nothing_else(seed: int) -> None:
    rows, positions = np.divmod(np.arange(2000), 50)
    whole = keyed_uniform(seed, rows, positions)
    order = np.random.default_rng(0).permutation(2000)
    assert np.array_equal(keyed_uniform(seed, rows[order], positions[order]), whole[order])
    assert np.array_equal(np.concatenate([keyed_uniform(seed, r, np.arange(50)) for r in range(40)]), whole)
    assert np.array_equal(keyed_uniform(seed, np.arange(40)[:, None], np.arange(50)).ravel(), whole)
    assert len(np.unique(whole)) == 2000


@pytest.mark.parametrize("axis", ["seed", "row", "position"])
def test_draws_are_uniform_along_each_part_of_the_key(axis: str) -> None:
    """Kolmogorov's distance of 20,000 draws: above 0.0138 once in a thousand times, and the draws are fixed."""
    count = 20_000
    index = np.arange(count)
    draws = {
        "seed": lambda: np.array([keyed_uniform(seed, 3, 4).item() for seed in range(count)]),
        "row": lambda: keyed_uniform(7, index, 4),
        "position": lambda: keyed_uniform(7, 3, index),
    }[axis]()
    ordered = np.sort(draws)
    distance = max(np.abs(ordered - index / count).max(), np.abs(ordered - (index + 1) / count).max())
    assert distance < 0.0138
    neighbours = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    assert abs(neighbours) < 0.024  # 3.4 standard deviations


def test_streams_of_other_seeds_and_keys_are_unrelated() -> None:
    index = np.arange(20_000)
    streams = [
        keyed_uniform(0, index, 0),
        keyed_uniform(1, index, 0),
        keyed_uniform(0, index, 1),
        keyed_uniform(0, 0, index),
    ]
    table = np.corrcoef(streams)
    assert np.abs(table[~np.eye(4, dtype=bool)]).max() < 0.03
    for shift in (1, 2, 3):  # a seed is no offset of the rows, nor a row of the positions
        assert np.abs(keyed_uniform(0, index + shift, 0) - keyed_uniform(shift, index, 0)).min() > 0
        assert not np.intersect1d(keyed_uniform(0, index, shift), keyed_uniform(0, index, 0)).size


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_draw() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25, 0.0], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    wanted = [1, 1, 2, 2, 4, 4]
    found = inverse_transform(probabilities.expand(6, 6), uniforms)
    assert found.tolist() == wanted and found.dtype is torch.int64
    scaled = inverse_transform(probabilities.expand(6, 6) * 3, uniforms)
    assert scaled.tolist() == wanted, "they need not add up to 1"
    assert inverse_transform(probabilities.float().expand(6, 6), uniforms).tolist() == wanted


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_a_token_that_cannot_be_is_never_drawn(weights: list[float], uniform: float) -> None:
    assume(sum(weights))
    drawn = inverse_transform(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64)).item()
    assert weights[int(drawn)] > 0
