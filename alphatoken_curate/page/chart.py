"""Charts as inline SVG: no script, colours by class so that they follow the page's theme, a title on what is drawn.

Every chart is 380 wide in its own units, so that its text is legible at the width of a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.page.markup import MINUS, Html, joined, number, share, tag
from alphatoken_curate.page.numbers import Bands, Density, Overlaid
from alphatoken_curate.wording import count

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 380.0, 58.0, 8.0, 8.0, 38.0

SHADES = 6
"""Steps of the colour of a density."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A scale from `low` to `high`, named with its unit. `unit`: asinh(x / unit), linear only within a unit of 0."""

    low: float
    high: float
    name: str
    unit: float | None = None
    whole: bool = False
    """Whether ticks are whole numbers."""

    def place(self, value: float) -> float:
        """Where a value is, 0 at the low end and 1 at the high one; beyond them at the end."""
        low, high, at = (self._bent(x) for x in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5

    def _bent(self, value: float) -> float:
        return value if self.unit is None else math.asinh(value / self.unit)

    def ticks(self) -> list[tuple[float, str]]:
        """Values to be marked, and how they are written."""
        found = self._linear() if self.unit is None else self._powers(self.unit)
        return [(value, tick_text(value)) for value in found if self.low <= value <= self.high]

    def _linear(self) -> list[float]:
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(m for m in (1, 2, 5, 10, 20) if m * power >= span / 5) * power
        if self.whole:
            step = max(1.0, round(step))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.6e}") for i in range(first, last + 1)]

    def _powers(self, unit: float) -> list[float]:
        largest = max(abs(self.low), abs(self.high))
        top, bottom = math.floor(math.log10(largest)), math.ceil(math.log10(unit))
        powers = [10.0**i for i in range(top, bottom - 1, -max(1, -(-(top - bottom + 1) // 3)))] or [10.0**top]
        return sorted({0.0, *powers, *(-power for power in powers)})


def tick_text(value: float) -> str:
    """As short as it can be: `-0.5`, `20k`, `3e-6`."""
    if value == 0:
        return "0"
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:g}{letter}".replace("-", MINUS)
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", MINUS)
    return f"{value:g}".replace("-", MINUS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A place to draw in, from `top` to `bottom` and from LEFT to WIDTH - RIGHT, with its two axes."""

    x: Axis
    y: Axis
    top: float = TOP
    bottom: float

    def at(self, value: float) -> float:
        """Across, of a value of x."""
        return LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        """Down the page, of a value of y."""
        return self.bottom - self.y.place(value) * (self.bottom - self.top)

    def y_axis(self) -> Html:
        """Grid lines, their numbers, and the name of the axis along them."""
        parts: list[Html] = []
        for value, text in self.y.ticks():
            height = self.up(value)
            kind = "grid zero" if value == 0 else "grid"
            parts.append(tag("line", class_=kind, x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height))
            parts.append(tag("text", text, class_="tick end", x=LEFT - 5, y=height + 3.5))
        middle = (self.top + self.bottom) / 2
        turned = f"translate(9 {middle:.1f}) rotate(-90)"
        return joined([*parts, tag("text", self.y.name, class_="name mid", transform=turned)])

    def x_axis(self) -> Html:
        """Ticks with their numbers and the axis's name below."""
        parts = []
        for value, text in self.x.ticks():
            across = self.at(value)
            parts.append(tag("line", class_="mark", x1=across, x2=across, y1=self.bottom, y2=self.bottom + 4))
            parts.append(tag("text", text, class_="tick mid", x=across, y=self.bottom + 15))
        return joined([*parts, self.x_name()])

    def x_name(self) -> Html:
        """The axis's name."""
        return tag("text", self.x.name, class_="name mid", x=(LEFT + WIDTH - RIGHT) / 2, y=self.bottom + 31)


def svg(slug: str, height: float, *parts: Html | None) -> Html:
    """A drawing that is read aloud as the question above it and its answer."""
    labels = {"aria_labelledby": f"q-{slug}", "aria_describedby": f"a-{slug}"}
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", **labels)


# --------------------------------------------------------------------------------------------------------- histogram


def histogram(slug: str, found: Overlaid, x_name: str, *, masked: bool, height: float = 220.0) -> Html:
    """Kept tokens before all others, both from 0 up; what lies beyond the axis stands apart at either end."""
    step = float(found.edges[1] - found.edges[0])
    left_open = bool(found.kept[0] + found.other[0])
    low, high = float(found.edges[0]), float(found.edges[-1])
    wide = Axis(low=low - 2.2 * step * left_open, high=high + 2.2 * step, name=x_name)
    most = max(int(found.kept.max()), int(found.other.max()), 1)
    plot = Plot(x=wide, y=Axis(low=0, high=most * 1.05, name="tokens", whole=True), bottom=height - BOTTOM)
    bins = list(_bins(found, step))
    layers = [("other" if masked else "all", found.other), *([("kept", found.kept)] if masked else [])]
    areas = [tag("path", class_=f"area {name}", d=_steps(plot, bins, count)) for name, count in layers]
    zero = tag("line", class_="origin", x1=plot.at(0), x2=plot.at(0), y1=plot.top, y2=plot.bottom) if low < 0 else None
    told = [_told_bin(plot, found, i, bins[i], masked) for i in range(len(bins)) if found.kept[i] + found.other[i]]
    inner = Axis(low=low, high=high, name=x_name)
    ticks = [
        joined(
            [
                tag("line", class_="mark", x1=plot.at(v), x2=plot.at(v), y1=plot.bottom, y2=plot.bottom + 4),
                tag("text", text, class_="tick mid", x=plot.at(v), y=plot.bottom + 15),
            ]
        )
        for v, text in inner.ticks()
    ]
    return svg(slug, height, plot.y_axis(), *areas, zero, *ticks, plot.x_name(), *told)


def _bins(found: Overlaid, step: float) -> Iterator[tuple[float, float]]:
    """Where each bin is drawn: the open ones a little apart."""
    low, high = float(found.edges[0]), float(found.edges[-1])
    yield low - 2 * step, low - step
    for a, b in zip(found.edges[:-1], found.edges[1:], strict=True):
        yield float(a), float(b)
    yield high + step, high + 2 * step


def _steps(plot: Plot, bins: Sequence[tuple[float, float]], count: NDArray[Any]) -> str:
    path = []
    last = None
    for (a, b), height in zip(bins, count, strict=True):
        if last != a:
            path.append(f"{'' if last is None else f'V{plot.bottom:.1f}Z'}M{plot.at(a):.1f} {plot.bottom:.1f}")
        path.append(f"V{plot.up(int(height)):.1f}H{plot.at(b):.1f}")
        last = b
    return "".join(path) + f"V{plot.bottom:.1f}Z"


def _told_bin(plot: Plot, found: Overlaid, i: int, place: tuple[float, float], masked: bool) -> Html:
    name = bin_name(found.edges, i)
    total = int(found.kept[i] + found.other[i])
    kept = f", {int(found.kept[i]):,} kept ({share(found.kept[i] / total)})" if masked else ""
    left, right = plot.at(place[0]), plot.at(place[1])
    title = tag("title", f"{name}: {count(total, 'token')}{kept}")
    return tag("rect", title, class_="hover", x=left, y=plot.top, width=right - left, height=plot.bottom - plot.top)


def bin_name(edges: NDArray[np.floating[Any]], i: int) -> str:
    """`0.1 to 0.2`; `below -2` and `from 2` of the open ones."""
    if i == 0:
        return f"below {number(float(edges[0]))}"
    if i == len(edges):
        return f"from {number(float(edges[-1]))}"
    return f"{number(float(edges[i - 1]))} to {number(float(edges[i]))}"


# ----------------------------------------------------------------------------------------------------------- density


def shades(count: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 to `SHADES` by the logarithm of the count, 0 where there is none; same shape."""
    most = max(int(count.max(initial=0)), 1)
    steps = 1 + np.floor((SHADES - 1e-9) * np.log1p(np.maximum(count, 0)) / math.log1p(most)).astype(np.int64)
    return np.where(count > 0, np.minimum(steps, SHADES), 0)


def density(slug: str, found: Density, x: Axis, y: Axis, height: float = 300.0) -> Html:
    """Darker where more tokens are, by the logarithm of their number; both zero lines."""
    plot = Plot(x=x, y=y, bottom=height - BOTTOM)
    across = [plot.at(float(edge)) for edge in found.x_edges]
    down = [plot.up(float(edge)) for edge in found.y_edges]
    shade = shades(found.count)
    cells = []
    for level in range(1, SHADES + 1):
        path = "".join(
            f"M{across[i]:.1f} {down[j + 1]:.1f}H{across[i + 1]:.1f}V{down[j]:.1f}H{across[i]:.1f}Z"
            for i, j in np.argwhere(shade == level)
        )
        if path:
            cells.append(tag("path", class_=f"cell q{level}", d=path))
    lines = []
    if x.low < 0 < x.high:
        lines.append(tag("line", class_="origin", x1=plot.at(0), x2=plot.at(0), y1=plot.top, y2=plot.bottom))
    if y.low < 0 < y.high:
        lines.append(tag("line", class_="origin", x1=LEFT, x2=WIDTH - RIGHT, y1=plot.up(0), y2=plot.up(0)))
    return svg(slug, height, plot.y_axis(), plot.x_axis(), *cells, *lines)


# ------------------------------------------------------------------------------------------------------------- bands


def bands(slug: str, found: Bands, labels: Sequence[str], x_name: str, y_name: str, *, masked: bool) -> Html:
    """The middle half of values in each bin, their median, and below the share kept; bins are drawn equally wide.

    `labels`: a name for each bin, or for each edge between them.
    """
    at_edges = len(labels) > len(found.count)
    height, strip = (290.0, 52.0) if masked else (220.0, 0.0)
    filled = np.flatnonzero(found.count).tolist()
    low, high = float(np.nanmin([*found.low[filled], 0.0])), float(np.nanmax([*found.high[filled], 0.0]))
    pad = (high - low) * 0.06 or 1.0
    x = Axis(low=0, high=len(found.count), name=x_name)
    y = Axis(low=low - pad * (low < 0), high=high + pad * (high > 0 or low == 0), name=y_name)
    plot = Plot(x=x, y=y, bottom=height - BOTTOM - strip - (14 if masked else 0))
    boxes, told = [], []
    for i in filled:
        left, right = plot.at(float(i)) + 1.5, plot.at(float(i + 1)) - 1.5
        upper, lower, middle = (plot.up(float(part[i])) for part in (found.high, found.low, found.middle))
        boxes.append(
            tag("rect", class_="half", x=left, y=upper, width=right - left, height=max(1.5, lower - upper), rx="1.5")
        )
        boxes.append(tag("line", class_="median", x1=left, x2=right, y1=middle, y2=middle))
        kept = f", {share(float(found.kept[i]))} kept" if masked else ""
        name = f"{labels[i]} to {labels[i + 1]}" if at_edges else labels[i]
        title = f"{x_name} {name}: {count(int(found.count[i]), 'token')}, median {number(float(found.middle[i]))}{kept}"
        area = {"x": left, "y": plot.top, "width": right - left, "height": height - BOTTOM - plot.top}
        told.append(tag("rect", tag("title", title), class_="hover", **area))
    below = Plot(x=x, y=Axis(low=0, high=1, name="kept"), top=plot.bottom + 14, bottom=height - BOTTOM)
    shares = _strip(below, found, filled) if masked else None
    return svg(
        slug,
        height,
        plot.y_axis(),
        *boxes,
        shares,
        _labels(below, labels, 0.0 if at_edges else 0.5),
        below.x_name(),
        *told,
    )


def _strip(plot: Plot, found: Bands, filled: Sequence[int]) -> Html:
    parts: list[Html] = []
    for level, text in ((0.0, "0%"), (0.5, ""), (1.0, "100%")):
        height = plot.up(level)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height))
        parts.append(tag("text", text, class_="tick end", x=LEFT - 5, y=height + 3.5))
    turned = f"translate(9 {(plot.top + plot.bottom) / 2:.1f}) rotate(-90)"
    parts.append(tag("text", "kept", class_="name mid", transform=turned))
    for i in filled:
        left, top = plot.at(float(i)) + 1.5, plot.up(float(found.kept[i]))
        width = plot.at(float(i + 1)) - left - 1.5
        parts.append(tag("rect", class_="keptbar", x=left, y=top, width=width, height=plot.bottom - top))
    return joined(parts)


def _labels(plot: Plot, labels: Sequence[str], shift: float = 0.5) -> Html:
    """Under every bin (or with `shift` 0 where it begins), or every second, as many as there is room for."""
    half = max(map(len, labels), default=1) * 3.1
    every = max(1, math.ceil((2 * half + 6) * len(labels) / (WIDTH - LEFT - RIGHT)))
    parts = []
    for i in range(0, len(labels), every):
        across = min(plot.at(i + shift), WIDTH - half)
        if not shift:
            parts.append(tag("line", class_="mark", x1=across, x2=across, y1=plot.bottom, y2=plot.bottom + 4))
        parts.append(tag("text", labels[i], class_="tick mid", x=across, y=plot.bottom + 15))
    return joined(parts)


# ------------------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A number at each of some points, None where there is none."""

    name: str
    values: Sequence[float | None]


def lines(slug: str, found: Sequence[Line], labels: Sequence[str], x_name: str, y: Axis, height: float = 230.0) -> Html:
    """One line each, told apart by colour and by the shape of its points."""
    x = Axis(low=-0.5, high=len(labels) - 0.5, name=x_name)
    plot = Plot(x=x, y=y, bottom=height - BOTTOM)
    parts: list[Html] = []
    for place, line in enumerate(found):
        points = [(plot.at(i), plot.up(v), i, v) for i, v in enumerate(line.values) if v is not None]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b, _, _ in points)
        parts.append(tag("path", class_=f"line s{place + 1}", d=f"M{path}") if len(points) > 1 else Html(""))
        for a, b, i, value in points:
            title = tag("title", f"{line.name}, {labels[i]}: {number(value)}")
            parts.append(tag("path", title, class_=f"dot s{place + 1}", d=_shape(place, a, b)))
    shift = Plot(x=Axis(low=0, high=len(labels), name=x_name), y=y, bottom=plot.bottom)
    return svg(slug, height, plot.y_axis(), _labels(shift, labels), plot.x_name(), *parts)


def line_key(found: Iterable[Line]) -> Html:
    """What the shapes and colours of lines stand for."""
    items = []
    for place, line in enumerate(found):
        dot = tag("path", class_=f"dot s{place + 1}", d=_shape(place, 6, 6))
        items.append(tag("li", tag("svg", dot, viewBox="0 0 12 12", aria_hidden="true", class_="key"), line.name))
    return tag("ul", *items, class_="keys")


def _shape(place: int, x: float, y: float) -> str:
    """A circle, square, diamond, triangle or cross round a point."""
    shapes = ("m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "m-3.5-3.5h7v7h-7z", "m0-5l5 5l-5 5l-5-5z", "m0-4.5l4.5 8h-9z")
    more = ("m-4-1.5h2.5v-2.5h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5z",)
    return f"M{x:.1f} {y:.1f}{(*shapes, *more)[place % 5]}"
