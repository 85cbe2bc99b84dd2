from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphatoken_curate import composite
from alphatoken_curate.composite import Scales

FINITE = st.floats(-1e6, 1e6, width=32)


def arrays(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in rows]


def test_value_is_equation_12_and_float32() -> None:
    parts = arrays([1, 2], [10, 20], [100, 200], [1000, 2000])
    got = composite.value(*parts, stability_weight=1.5)
    assert got.dtype == np.float32
    assert got.tolist() == [11 + 1.5 * 1100, 22 + 1.5 * 2200]


@given(st.lists(st.tuples(FINITE, FINITE, FINITE, FINITE), min_size=1, max_size=20), st.floats(-3, 3))
def test_value_is_rounded_once_from_exact_arithmetic(rows: list[tuple[float, ...]], weight: float) -> None:
    parts = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
    got = composite.value(*parts, stability_weight=weight)
    for row, value in zip(rows, got, strict=True):
        want = math.fsum(row[:2]) + weight * math.fsum(row[2:])
        assert value == pytest.approx(want, rel=2e-7, abs=1e-9 * sum(map(abs, row)))


def test_nulls_stay_null() -> None:
    parts = arrays([np.nan, 1], [np.nan, 1], [np.nan, 1], [np.nan, 1])
    assert np.isnan(composite.value(*parts, stability_weight=1.5)).tolist() == [True, False]


def test_rms_ignores_nulls_and_has_no_overflow() -> None:
    assert composite.rms(np.array([3, np.nan, 4], np.float32)) == pytest.approx(math.sqrt(12.5))
    assert composite.rms(np.array([np.nan], np.float32)) == 0.0
    assert composite.rms(np.array([], np.float32)) == 0.0
    assert composite.rms(np.array([1e300, 1e300])) == pytest.approx(1e300)


def test_objective_scales_make_both_objectives_rms_1() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(scale=s, size=500).astype(np.float32) for s in (1, 2, 1e-6, 3e-6)]
    scales = composite.objective_scales(*parts)
    zero = np.zeros(500, np.float32)
    adaptation = composite.value(parts[0], parts[1], zero, zero, stability_weight=1, scales=scales)
    stability = composite.value(zero, zero, parts[2], parts[3], stability_weight=1, scales=scales)
    assert composite.rms(adaptation) == pytest.approx(1, rel=1e-6)
    assert composite.rms(stability) == pytest.approx(1, rel=1e-6)


def test_an_objective_of_zeros_is_left_alone() -> None:
    parts = arrays([2, 2], [0, 0], [0, 0], [0, 0])
    assert composite.objective_scales(*parts) == Scales(adaptation=2.0, stability=1.0)
    cancelling = arrays([0, 0], [0, 0], [3, -3], [-3, 3])
    assert composite.objective_scales(*cancelling) == Scales()


def test_spreads_are_the_rms_of_each_component() -> None:
    names = ("adapt_direct", "adapt_causal", "stab_direct", "stab_causal")
    parts = dict(zip(names, arrays([1, -1], [2, 2], [0, 0], [np.nan, 5]), strict=True))
    assert composite.spreads(parts) == {"adapt_direct": 1, "adapt_causal": 2, "stab_direct": 0, "stab_causal": 5}
