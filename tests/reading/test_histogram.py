from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphatoken_curate.errors import CurateError
from alphatoken_curate.reading.histogram import BINS_EACH_SIDE, edges_for, empty_histogram, histogram


@given(st.lists(st.tuples(st.floats(-3, 3, width=32), st.booleans()), max_size=40), st.integers(0, 40))
def test_counts_are_those_of_a_loop_and_add_up_over_parts(tokens: list[tuple[float, bool]], cut: int) -> None:
    edges = (-1.0, 0.0, 1.0)
    expected = [
        sum(sum(edge <= x for edge in edges) == place for x, kept in tokens if kept or not only)
        for only in (False, True)
        for place in range(4)
    ]
    total = empty_histogram(edges, has_mask=True)
    for part in (tokens[:cut], tokens[cut:]):
        values, kept = np.array([x for x, _ in part], np.float32), np.array([k for _, k in part], np.bool_)
        total += histogram(values, kept, edges)
    assert [*total.count, *(total.kept or ())] == expected


@pytest.mark.parametrize("x", [-1.0, -0.5, 0.0, 0.25, 0.5, 9.0])
def test_a_value_at_an_edge_belongs_to_the_bin_above(x: float) -> None:
    found = histogram(np.array([x], np.float32), None, (-0.5, 0.0, 0.5))
    assert found.count.index(1) == sum(edge <= x for edge in found.edges)


@given(st.floats(1e-30, 1e30))
def test_edges_reach_as_far_as_asked_with_round_steps(reach: float) -> None:
    edges = edges_for(reach)
    assert len(edges) == 2 * BINS_EACH_SIDE + 1
    assert edges[BINS_EACH_SIDE] == 0
    assert np.all(np.diff(edges) > 0)
    assert edges == tuple(-edge for edge in reversed(edges))
    assert reach * (1 - 1e-9) <= edges[-1] <= 2.5 * reach * (1 + 1e-9)
    assert f"{edges[BINS_EACH_SIDE + 1]:.0e}"[0] in "125"


@given(st.floats(1e-30, 1e30))
def test_edges_of_what_is_never_below_zero_begin_there(reach: float) -> None:
    edges = edges_for(reach, signed=False)
    assert len(edges) == 2 * BINS_EACH_SIDE + 1
    assert edges[0] == 0
    assert np.all(np.diff(edges) > 0)
    assert reach * (1 - 1e-9) <= edges[-1] <= 2.5 * reach * (1 + 1e-9)


def test_histograms_of_other_kinds_are_not_added() -> None:
    values = np.zeros(1, np.float32)
    one = histogram(values, None, (0.0, 1.0))
    assert (one + one).count == (0, 2, 0)
    for other in (histogram(values, None, (0.0, 2.0)), histogram(values, np.ones(1, np.bool_), (0.0, 1.0))):
        with pytest.raises(CurateError):
            one + other
