"""Student's distribution: against numeric integrals of its density, and against published tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alphatoken_curate.signals.student import beyond_error, cumulative, factor, quantile

TABLE = {  # Abramowitz and Stegun, table 26.10: one-sided 0.95, 0.975, 0.995
    1: (6.314, 12.706, 63.657),
    2: (2.920, 4.303, 9.925),
    3: (2.353, 3.182, 5.841),
    4: (2.132, 2.776, 4.604),
    7: (1.895, 2.365, 3.499),
    8: (1.860, 2.306, 3.355),
    15: (1.753, 2.131, 2.947),
    30: (1.697, 2.042, 2.750),
    120: (1.658, 1.980, 2.617),
}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_table(freedom: int) -> None:
    for share, wanted in zip((0.95, 0.975, 0.995), TABLE[freedom], strict=True):
        assert quantile(share, freedom) == pytest.approx(wanted, abs=5.1e-4)
        assert quantile(1 - share, freedom) == pytest.approx(-wanted, abs=5.1e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 10, 31, 64, 255])
def test_the_distribution_is_the_integral_of_its_density(freedom: int) -> None:
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    for t in (-7.5, -1.895, -0.1, 0.0, 0.3, 1.0, 2.5, 12.0):
        x = np.linspace(0, t, 20_001)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        simpson = (x[1] - x[0]) / 3 * (density[0] + density[-1] + 4 * density[1::2].sum() + 2 * density[2:-1:2].sum())
        assert cumulative(t, freedom) == pytest.approx(0.5 + simpson, abs=1e-9)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 20, 255, 1000])
def test_a_quantile_is_where_its_share_is_reached(freedom: int) -> None:
    for share in (1e-6, 0.01, 0.3, 0.5, 0.7, 0.95, 0.999, 1 - 1e-9):
        assert cumulative(quantile(share, freedom), freedom) == pytest.approx(share, abs=1e-13)
    assert quantile(0.95, 100_000) == pytest.approx(1.6448536, abs=2e-5)  # the normal one


@pytest.mark.parametrize(("share", "freedom"), [(0.0, 3), (1.0, 3), (-0.1, 3), (math.nan, 3), (0.9, 0), (0.9, -1)])
def test_what_is_no_share_or_no_freedom_is_an_error(share: float, freedom: int) -> None:
    with pytest.raises(ValueError, match=r"probability between 0 and 1|degrees of freedom"):
        quantile(share, freedom)


def test_beyond_its_error_is_what_a_plain_loop_counts() -> None:
    rng = np.random.default_rng(0)
    value, error = rng.normal(-0.5, 1, 500).astype(np.float32), rng.uniform(0, 1, 500).astype(np.float32)
    wanted = sum(float(v) + 1.895 * float(e) < 0 for v, e in zip(value, error, strict=True))
    assert 0 < wanted < 500
    assert beyond_error(value, error, 8) == (wanted, pytest.approx(25))
    assert beyond_error(value[:0], error[:0], 8) == (0, 0)
    assert [factor(groups) for groups in (2, 3, 8)] == [6.314, 2.92, 1.895]


@pytest.mark.parametrize("groups", [2, 3, 8, 16])
def test_of_values_that_are_nothing_one_in_twenty_is_beyond_its_error(groups: int) -> None:
    draws = np.random.default_rng(groups).normal(size=(groups, 200_000))
    error = draws.std(axis=0, ddof=1) / math.sqrt(groups)
    found, by_chance = beyond_error(draws.mean(axis=0), error, groups)
    assert by_chance == pytest.approx(10_000)
    assert found == pytest.approx(by_chance, rel=0.04)  # four standard deviations of that count
