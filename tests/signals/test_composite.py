from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphatoken_curate.runs.schema import BY_ESTIMATOR, COMPONENTS, Components, components
from alphatoken_curate.signals import composite
from alphatoken_curate.signals.composite import Scales

PARTED, INFLUENCE = components("published"), components("influence")
FINITE = st.floats(-1e6, 1e6, width=32)


def arrays(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in rows]


def named(parts: list[np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(COMPONENTS, parts, strict=True))


def test_value_is_equation_12_and_float32() -> None:
    parts = arrays([1, 2], [10, 20], [100, 200], [1000, 2000])
    got = composite.value(named(parts), PARTED, stability_weight=1.5)
    assert got.dtype == np.float32
    assert got.tolist() == [11 + 1.5 * 1100, 22 + 1.5 * 2200]


@given(st.lists(st.tuples(FINITE, FINITE, FINITE, FINITE), min_size=1, max_size=20), st.floats(-3, 3))
def test_value_is_rounded_once_from_exact_arithmetic(rows: list[tuple[float, ...]], weight: float) -> None:
    parts = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
    got = composite.value(named(parts), PARTED, stability_weight=weight)
    for row, value in zip(rows, got, strict=True):
        want = math.fsum(row[:2]) + weight * math.fsum(row[2:])
        assert value == pytest.approx(want, rel=2e-7, abs=1e-9 * sum(map(abs, row)))


def test_nulls_stay_null() -> None:
    parts = arrays([np.nan, 1], [np.nan, 1], [np.nan, 1], [np.nan, 1])
    assert np.isnan(composite.value(named(parts), PARTED, stability_weight=1.5)).tolist() == [True, False]


def test_rms_ignores_nulls_and_has_no_overflow() -> None:
    assert composite.rms(np.array([3, np.nan, 4], np.float32)) == pytest.approx(math.sqrt(12.5))
    assert composite.rms(np.array([np.nan], np.float32)) == 0.0
    assert composite.rms(np.array([], np.float32)) == 0.0
    assert composite.rms(np.array([1e300, 1e300])) == pytest.approx(1e300)


@given(st.lists(st.lists(FINITE, max_size=8), max_size=4))
def test_rms_of_several_arrays_is_that_of_all_entries(parts: list[list[float]]) -> None:
    entries = [float(np.float32(x)) for part in parts for x in part]
    want = math.sqrt(math.fsum(x * x for x in entries) / len(entries)) if entries else 0.0
    assert composite.rms(*arrays(*parts)) == pytest.approx(want, rel=1e-9, abs=1e-150)


def test_objective_scales_make_both_objectives_rms_1() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(scale=s, size=500).astype(np.float32) for s in (1, 2, 1e-6, 3e-6)]
    scales = composite.sizes([named(parts)], PARTED).scales
    zero = np.zeros(500, np.float32)
    adaptation, stability = (
        composite.value(named(only), PARTED, stability_weight=1, scales=scales)
        for only in ([*parts[:2], zero, zero], [zero, zero, *parts[2:]])
    )
    assert composite.rms(adaptation) == pytest.approx(1, rel=1e-6)
    assert composite.rms(stability) == pytest.approx(1, rel=1e-6)


def test_an_objective_of_zeros_is_left_alone() -> None:
    parts = arrays([2, 2], [0, 0], [0, 0], [0, 0])
    assert composite.sizes([named(parts)], PARTED).scales == Scales(adaptation=2.0, stability=1.0)
    cancelling = arrays([0, 0], [0, 0], [3, -3], [-3, 3])
    assert composite.sizes([named(cancelling)], PARTED).scales == Scales()


def test_scales_are_those_of_all_branches_together() -> None:
    rng = np.random.default_rng(1)
    whole = [rng.normal(scale=s, size=90).astype(np.float32) for s in (1, 2, 3, 4)]
    whole = [part * np.where(np.arange(90) < 20, 1, 7).astype(np.float32) for part in whole]
    halves = named([part[:20] for part in whole]), named([part[20:] for part in whole])
    got, want = (composite.sizes(parts, PARTED).scales for parts in (halves, [named(whole)]))
    assert got.adaptation == pytest.approx(want.adaptation, rel=1e-12)
    assert got.stability == pytest.approx(want.stability, rel=1e-12)
    assert got != composite.sizes(halves[:1], PARTED).scales
    assert composite.sizes(halves, PARTED).spreads == pytest.approx(
        composite.sizes([named(whole)], PARTED).spreads, rel=1e-12
    )


def test_spreads_are_the_rms_of_each_component() -> None:
    parts = named(arrays([1, -1], [2, 2], [0, 0], [np.nan, 5]))
    assert list(composite.sizes([parts], PARTED).spreads.items()) == list(zip(COMPONENTS, (1, 2, 0, 5), strict=True))


def test_the_value_of_influence_is_that_of_its_own_components() -> None:
    signals = dict(zip(("adapt_influence", "stab_influence"), arrays([1, 3], [10, -30]), strict=True))
    assert composite.value(signals, INFLUENCE, stability_weight=0.5).tolist() == [6, -12]
    scales = composite.sizes([signals], INFLUENCE).scales
    assert scales == Scales(adaptation=math.sqrt(5), stability=math.sqrt(500))
    got = composite.value(signals, INFLUENCE, stability_weight=2, scales=scales)
    assert got.tolist() == pytest.approx([1 / 5**0.5 + 20 / 500**0.5, 3 / 5**0.5 - 60 / 500**0.5], rel=1e-6)
    assert composite.sizes([signals], INFLUENCE).spreads == pytest.approx(
        {"adapt_influence": 5**0.5, "stab_influence": 500**0.5}
    )


@pytest.mark.parametrize("found", BY_ESTIMATOR.values(), ids=list(BY_ESTIMATOR))
def test_what_is_stored_beside_the_components_is_no_part_of_the_value(found: Components) -> None:
    signals = {name: np.full(2, np.nan, np.float32) for name in (*found.upstream, *found.drift)}
    signals |= {name: np.ones(2, np.float32) for name in found.of_value}
    each = len(found.adaptation)
    assert composite.value(signals, found, stability_weight=10).tolist() == [11 * each, 11 * each]
    assert set(composite.sizes([signals], found).spreads) == set(found.of_value)


def test_errors_of_objectives_add_up_as_those_of_rows_of_their_own() -> None:
    (three, four, nan) = arrays([3.0], [4.0], [np.nan])
    both = {"adapt_error": three, "stab_error": four}
    assert composite.value_error(both, 2.0).tolist() == [pytest.approx(math.sqrt(9 + 64))]
    assert composite.value_error(both, -2.0).tolist() == [pytest.approx(math.sqrt(9 + 64))]
    assert composite.value_error({"adapt_error": three, "stab_error": nan}, 2.0).tolist() == [3.0]
    assert composite.value_error({"adapt_error": nan, "stab_error": four}, 2.0).tolist() == [8.0]
    assert composite.value_error({"adapt_error": three}, 2.0).tolist() == [3.0]
    assert np.isnan(composite.value_error({"adapt_error": nan, "stab_error": nan}, 2.0)[0])
    scaled = composite.value_error(both, 2.0, scales=Scales(adaptation=10.0, stability=0.5))
    assert scaled.tolist() == [pytest.approx(math.hypot(0.3, 16))] and scaled.dtype == np.float32


@given(st.integers(0, 99), st.floats(-3, 3))
def test_the_error_of_a_value_is_its_spread_over_draws(seed: int, weight: float) -> None:
    """Independent draws of adaptation and stability: the variance of a weighed sum is that of its parts."""
    rng = np.random.default_rng(seed)
    adaptation, stability = rng.uniform(0.1, 3, 2)
    draws = rng.normal(0, adaptation, 100_000) + weight * rng.normal(0, stability, 100_000)
    told = {"adapt_error": np.array([adaptation]), "stab_error": np.array([stability])}
    assert composite.value_error(told, weight)[0] == pytest.approx(draws.std(), rel=0.02)
