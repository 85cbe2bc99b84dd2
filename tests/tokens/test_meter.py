"""What is counted of a rendering, and where that ends it."""

from __future__ import annotations

from typing import Any

import pytest

from alphatoken_curate.tokens import meter as module
from alphatoken_curate.tokens.meter import GROWING, ROOM, ROOM_EACH, STEPS, STEPS_EACH, Meter, RunawayError


def test_steps_end_and_begin_anew() -> None:
    meter = Meter()
    for _ in range(2):
        meter.begin([])
        meter.step(STEPS - 1000)
        assert meter.step(1)
        with pytest.raises(RunawayError, match="steps"):
            meter.step(STEPS)


def test_what_is_given_sets_the_bounds() -> None:
    given = [{"role": "user", "content": "x" * 10_000}]
    meter = Meter()
    meter.begin(given)
    meter.step(STEPS + STEPS_EACH * 10_000)
    meter.make(ROOM + ROOM_EACH * 10_000)
    with pytest.raises(RunawayError, match="characters"):
        meter.make(ROOM)
    meter.begin([])
    with pytest.raises(RunawayError):
        meter.make(ROOM + 1)


def test_a_value_counts_as_often_as_it_would_be_written() -> None:
    meter, value = Meter(), ["x" * 100]
    whole = meter.size(value)
    assert whole > 100 and meter.size([value, value]) > 2 * whole
    with pytest.raises(RunawayError, match="a value of"):
        for _ in range(40):
            value = [value, value]  # type: ignore[list-item]
            meter.size(value)


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("ljust", ("x", 10**9), {}),
        ("center", ("x",), {"width": 10**9}),
        ("%", ("%999999999d", 1), {}),
        ("%", ("%*d", (10**9, 1)), {}),
        ("format", ("{:{}}", "x", 10**9), {}),
        ("format", ("{0}" * 1000, "x" * 10_000), {}),
        ("replace", ("x" * 10_000, "x", "y" * 1000), {}),
        ("join", ("y" * 1000, ["x"] * 10_000), {}),
        ("join", (["x"] * 10_000,), {"d": "y" * 1000}),
        ("tojson", (["x"] * 1000, False, 10_000), {}),
        ("indent", ("x\n" * 10_000, 1000), {}),
        ("translate", ("x" * 10_000, {120: "y" * 1000}), {}),
        ("expandtabs", ("\t" * 10_000, 1000), {}),
        ("wordwrap", ("x" * 10_000, 1, True, "y" * 1000), {}),
        ("sum", ([[1]] * 10_000,), {"start": []}),
        ("rfind", ("x" * 100_000, "x" * 10_000), {}),
        ("striptags", ("<" * 1_000_000,), {}),
    ],
)
def test_growth_is_seen_before_it_comes(name: str, values: tuple[Any, ...], named: dict[str, Any]) -> None:
    assert name in GROWING
    meter = Meter()
    with pytest.raises(RunawayError):
        meter.grow(name, values, named)
    meter.begin([])
    meter.grow(name, tuple(type(one)() if isinstance(one, (str, list)) else one and 1 for one in values), {})


def test_the_clock_is_behind_all_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, module.SECONDS, module.SECONDS + 1])
    monkeypatch.setattr("time.thread_time", lambda: next(times))
    meter = Meter()
    meter.begin([])
    meter.step(1000)
    meter.step(1000)
    with pytest.raises(RunawayError, match=r" s$"):
        meter.step(1000)
