from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from alphatoken_curate.page import chart
from alphatoken_curate.page.chart import Axis, Line
from alphatoken_curate.page.numbers import bands, density, overlaid, symmetric_edges


def parsed(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing)


def found(drawing: str, kind: str) -> list[ElementTree.Element]:
    return [one for one in parsed(drawing).iter() if kind in (one.get("class") or "").split()]


@pytest.mark.parametrize("unit", [None, 0.1])
def test_an_axis_rises_from_0_to_1(unit: float | None) -> None:
    axis = Axis(low=-2, high=4, name="x", unit=unit)
    places = [axis.place(value) for value in (-3, -2, -1, 0, 1, 4, 5)]
    assert places == sorted(places) and places[:2] == [0, 0] and places[-2:] == [1, 1]
    assert Axis(low=1, high=1, name="x").place(1) == 0.5


@pytest.mark.parametrize("low,high", [(0, 1), (-4.2, 4.2), (0, 1234), (-3e-8, 2e-8), (-1, 0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    for unit in (None, high * 0.01 if high else 0.01):
        ticks = Axis(low=low, high=high, name="x", unit=unit).ticks()
        assert 2 <= len(ticks) <= 8
        assert all(low <= value <= high for value, _ in ticks)
        assert len({text for _, text in ticks}) == len(ticks)
        assert any(value == 0 for value, _ in ticks)


def test_ticks_of_counts_are_whole() -> None:
    assert [value for value, _ in Axis(low=0, high=2.1, name="n", whole=True).ticks()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (-0.5, "−0.5"), (20_000, "20k"), (3e-6, "3e−6"), (-2.5e6, "−2.5M"), (1e-4, "1e−4")]
)
def test_tick_texts(value: float, text: str) -> None:
    assert chart.tick_text(value) == text


def test_a_histogram_draws_each_bin_as_high_as_its_count() -> None:
    values = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    counts = overlaid(values, values > 0.3, symmetric_edges(values))
    drawing = chart.histogram("h", counts, "value", masked=True)
    (other,), (kept,) = found(drawing, "other"), found(drawing, "kept")
    base = max(float(y) for y in re.findall(r"V([\d.]+)", kept.get("d") or ""))
    scale = None
    for path, count in ((other, counts.other), (kept, counts.kept)):
        heights = [base - float(y) for y in re.findall(r"V([\d.]+)H", path.get("d") or "")]
        assert len(heights) == len(count)
        scale = scale or max(heights) / count.max()
        assert heights == pytest.approx((count * scale).tolist(), abs=0.2)
    titles = [one.find("title").text or "" for one in found(drawing, "hover")]  # type: ignore[union-attr]
    assert sum(int(re.findall(r": ([\d,]+) tokens?\b", title)[0]) for title in titles) == 500
    assert parsed(drawing).get("aria-labelledby") == "q-h" and parsed(drawing).get("role") == "img"


def test_names_of_bins() -> None:
    edges = np.array([-1.0, 0.0, 1.0])
    assert [chart.bin_name(edges, i) for i in range(4)] == ["below −1", "−1 to 0", "0 to 1", "from 1"]


def test_a_density_has_a_cell_for_each_count() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 300))
    edges = np.linspace(-3, 3, 11)
    counts = density(x, y, edges, edges)
    axis = Axis(low=-3, high=3, name="x")
    cells = [
        path.count("M")
        for path in (one.get("d") or "" for one in found(chart.density("d", counts, axis, axis), "cell"))
    ]
    assert sum(cells) == (counts.count > 0).sum()


def test_shades_grow_with_the_count() -> None:
    levels = chart.shades(np.array([[0, 1, 2], [10, 100, 1000]])).ravel().tolist()
    assert levels == sorted(levels) and levels[0] == 0 and levels[1] >= 1 and levels[-1] == chart.SHADES
    assert chart.shades(np.array([[0]])).tolist() == [[0]] and chart.shades(np.array([[1]])).tolist() == [
        [chart.SHADES]
    ]


@pytest.mark.parametrize("masked", [True, False])
def test_bands_have_a_box_a_median_and_a_share_for_each_bin(masked: bool) -> None:
    x = np.repeat(np.arange(4.0), 5)
    kept = np.arange(20) % 2 == 0 if masked else None
    counts = bands(x, x * 2 - 1, kept, np.array([0.0, 1, 2, 3, 4]))
    drawing = chart.bands("b", counts, ["a", "b", "c", "d"], "x", "y", masked=masked)
    assert len(found(drawing, "half")) == len(found(drawing, "median")) == 4
    assert len(found(drawing, "keptbar")) == (4 if masked else 0)
    heights = [float(one.get("y1") or 0) for one in found(drawing, "median")]
    assert heights == sorted(heights, reverse=True)


def test_lines_are_told_apart_without_colour() -> None:
    lines = [Line(name="a", values=[1.0, 0.5]), Line(name="b", values=[None, 0.2])]
    drawing = chart.lines("l", lines, ["0", "1"], "generation", Axis(low=0, high=1, name="y"))
    assert len(found(drawing, "dot")) == 3 and len(found(drawing, "line")) == 1
    shapes = {one.get("class"): re.sub(r"^M[\d. ]+", "", one.get("d") or "") for one in found(drawing, "dot")}
    assert len(set(shapes.values())) == len(shapes) == 2
    assert re.findall(r"</svg>(\w)</li>", chart.line_key(lines)) == ["a", "b"]


def test_labels_stay_inside_and_apart() -> None:
    x = np.arange(30.0)
    counts = bands(x, x, None, np.arange(31.0))
    drawing = chart.bands("b", counts, [f"{i}00–{i}99" for i in range(30)], "x", "y", masked=False)
    texts = [one for one in found(drawing, "tick") if "–" in (one.text or "")]
    places = [float(one.get("x") or 0) for one in texts]
    wide = max(len(one.text or "") for one in texts) * 5.5
    assert all(b - a > wide for a, b in pairwise(places))
    assert max(places) + wide / 2 < chart.WIDTH + 2
