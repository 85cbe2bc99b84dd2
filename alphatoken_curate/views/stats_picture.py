"""Histograms of a run as a picture: SVG that needs nothing, or PNG by matplotlib (the extra `png`)."""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from alphatoken_curate.errors import UsageError
from alphatoken_curate.reading.counting import GroupStats
from alphatoken_curate.reading.histogram import Histogram
from alphatoken_curate.reading.stats import Stats
from alphatoken_curate.reading.sums import MEANS
from alphatoken_curate.views.heat import PALETTE, readable
from alphatoken_curate.views.stats_text import end_of
from alphatoken_curate.wording import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _COLUMNS, _MARGIN, _GAP = 960, 3, 24, 24
_TALL, _SMALL = 300, 190
_MOST_GROUPS = 12
_KEPT, _DROPPED = "#c9651a", PALETTE[4].background

_STYLE = f"""
svg {{ --ground: #fff; --ink: #1c1c1c; --faint: #5c5c5c; --line: #c9c9c9; --dropped: {_DROPPED}; --kept: {_KEPT}; }}
@media (prefers-color-scheme: dark) {{
  svg {{ --ground: #16181c; --ink: #ececec; --faint: #a8a8a8; --line: #4a4d52; --dropped: #5f8fbe; --kept: #e8954a; }}
}}
text {{ font: 12px system-ui, sans-serif; fill: var(--faint); unicode-bidi: isolate; }}
.head {{ font-size: 20px; font-weight: 600; fill: var(--ink); }}
.name {{ font-size: 14px; font-weight: 600; fill: var(--ink); }}
.mid {{ text-anchor: middle; }}
.ground {{ fill: var(--ground); }}
.kept {{ fill: var(--kept); }}
.dropped {{ fill: var(--dropped); }}
line {{ stroke: var(--line); }}
.faint {{ stroke-dasharray: 2 4; }}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One histogram: its `name`, what is `told` of it, and the `unit` of its axis."""

    name: str
    told: str
    unit: str
    histogram: Histogram


def panels(found: Stats) -> list[Panel]:
    """The value first; then every other signal; then the value by branch, source and generation, if there are several.

    Of many sources or generations the largest.
    """
    mask = "" if found.kept_share is None else f", mask {found.masks[-1].mask} keeps {found.kept_share:.1%}"
    told = f"generation {found.generation}, {count(found.scored_tokens, 'token')}{mask}"
    return [
        Panel(name="value", told=told, unit=found.unit, histogram=found.histograms["value"]),
        *(_of_signal(found, name) for name in found.histograms if name != "value"),
        *_of_groups(found.unit, "branch", list(found.branches.items())),
        *_of_groups(found.unit, "source", list(found.sources.items())),
        *_of_groups(
            found.unit, "generation", [(f"{one.generation}, {one.checkpoint}", one.values) for one in found.generations]
        ),
    ]


def _of_signal(found: Stats, name: str) -> Panel:
    mean = found.mean.get(name)
    told = f"mean {mean:.3g}" if mean is not None else f"RMS {found.rms.get(name, 0):.3g}"
    return Panel(name=name, told=told, unit="nats" if name in MEANS else found.unit, histogram=found.histograms[name])


def _of_groups(unit: str, word: str, groups: Sequence[tuple[str, GroupStats]]) -> Iterator[Panel]:
    if len(groups) < 2:
        return
    for name, one in sorted(groups, key=lambda item: -item[1].scored_tokens)[:_MOST_GROUPS]:
        kept = "" if one.kept_share is None else f", {one.kept_share:.1%} kept"
        told = f"{count(one.scored_tokens, 'token')}{kept}, mean {one.mean or 0:+.3g}"
        title = f"value, {word} {end_of(readable(name, alone=True, dots=False))}"
        yield Panel(name=title, told=told, unit=unit, histogram=one.values)


def _bins(histogram: Histogram) -> Iterator[tuple[float, float, int, int, str]]:
    """Of each bin that is drawn: where it is, in bins from the left; tokens; tokens kept; and what it says.

    The open bins stand apart. One below 0 of numbers that are never below 0 is left out.
    """
    edges, kept = histogram.edges, histogram.kept or histogram.count
    names = [f"below {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(edges)), f"from {edges[-1]:g}"]
    for i, name in enumerate(names):
        if i or histogram.count[0]:
            left = i - 1 + 0.4 * ((i == len(edges)) - (i == 0))
            share = f", {kept[i]:,} kept" if histogram.kept else ""
            yield left, left + 1, histogram.count[i], kept[i], f"{name}: {count(histogram.count[i], 'token')}{share}"


def _ticks(histogram: Histogram) -> range:
    """The edges whose numbers are written: five of 21."""
    return range(0, len(histogram.edges), 5)


# ---------------------------------------------------------------------------------------------------------------- svg


def svg(found: Stats, title: str) -> bytes:
    """The panels as one SVG document in UTF-8, light or dark as the reader has it, that loads nothing and runs nothing.

    `title`: of the whole. No text in it is read as markup.
    """
    first, *others = panels(found)
    rows = -(-len(others) // _COLUMNS)
    height = 96 + _TALL + rows * (_SMALL + _GAP) + _MARGIN
    small = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) / _COLUMNS
    masked = first.histogram.kept is not None
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="t d">',
        f'<title id="t">{_text(title)}</title><desc id="d">{_text(f"Histograms of {first.told}")}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}"/>',
        f'<text class="head" x="{_MARGIN}" y="40">{_text(end_of(readable(title, alone=True, dots=False), 70))}</text>',
        *(_legend() if masked else ()),
        *_panel(first, _MARGIN, 72, _WIDTH - 2 * _MARGIN, _TALL),
    ]
    for place, panel in enumerate(others):
        row, column = divmod(place, _COLUMNS)
        top = 96 + _TALL + row * (_SMALL + _GAP)
        parts += _panel(panel, _MARGIN + column * (small + _GAP), top, small, _SMALL)
    return ("\n".join([*parts, "</svg>"]) + "\n").encode()


def _text(text: str) -> str:
    return html.escape(readable(text, alone=True, dots=False))


def _legend() -> Iterator[str]:
    for x, name in ((_WIDTH - 190, "kept"), (_WIDTH - 110, "dropped")):
        yield f'<rect class="{name}" x="{x}" y="29" width="13" height="13"/><text x="{x + 19}" y="40">{name}</text>'


def _panel(panel: Panel, x: float, y: float, width: float, height: float) -> Iterator[str]:
    """Title and what is told, then bars from the base line up, the kept tokens below the dropped."""
    yield f'<text class="name" x="{x:.1f}" y="{y + 14:.1f}">{_text(panel.name)}</text>'
    yield f'<text x="{x:.1f}" y="{y + 31:.1f}">{_text(panel.told)}</text>'
    histogram = panel.histogram
    top, base, left = y + 58, y + height - 34, x + 8
    most, size = max(histogram.count), (width - 16) / (len(histogram.edges) + 1.8)
    begin = left + 1.4 * size

    def bar(kind: str, a: float, b: float, low: int, high: int) -> str:
        up, down = (base - (base - top) * tokens / max(1, most) for tokens in (high, low))
        box = f'x="{begin + a * size + 0.5:.1f}" y="{up:.1f}" width="{(b - a) * size - 1:.1f}" height="{down - up:.2f}"'
        return f'<rect class="{kind}" {box}/>'

    yield f'<line class="faint" x1="{left:.1f}" x2="{x + width - 8:.1f}" y1="{top:.1f}" y2="{top:.1f}"/>'
    yield f'<text x="{left:.1f}" y="{top - 4:.1f}">{count(most, "token")}</text>'
    for a, b, tokens, kept, told in _bins(histogram):
        if tokens:
            bars = [bar("kept", a, b, 0, kept)] if kept else []
            bars += [bar("dropped", a, b, kept, tokens)] if kept < tokens else []
            yield f"<g><title>{_text(told)}</title>{''.join(bars)}</g>"
    yield f'<line x1="{left:.1f}" x2="{x + width - 8:.1f}" y1="{base:.1f}" y2="{base:.1f}"/>'
    for place in _ticks(histogram):
        across = begin + place * size
        yield f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{base:.1f}" y2="{base + 5:.1f}"/>'
        yield f'<text class="mid" x="{across:.1f}" y="{base + 18:.1f}">{histogram.edges[place]:g}</text>'
    yield f'<text class="mid" x="{x + width / 2:.1f}" y="{base + 33:.1f}">{panel.unit}</text>'


# ---------------------------------------------------------------------------------------------------------------- png


def png(found: Stats, title: str) -> bytes:
    """The panels as a PNG of 1,920 pixels across. Raises `UsageError` where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "--png needs matplotlib: pip install 'alphatoken-curate[png]'. --svg needs nothing; any browser opens it."
        ) from error
    first, *others = panels(found)
    rows = -(-len(others) // _COLUMNS)
    figure = Figure(figsize=(9.6, 4.0 + 2.1 * rows), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_drawn(end_of(title, 70)), parse_math=False, fontweight="bold", fontsize=13)
    grid = figure.add_gridspec(1 + rows, _COLUMNS, height_ratios=[1.7, *[1] * rows])
    _axes(figure.add_subplot(grid[0, :]), first, legend=True)
    for place, panel in enumerate(others):
        row, column = divmod(place, _COLUMNS)
        _axes(figure.add_subplot(grid[1 + row, column]), panel, legend=False)
    sink = io.BytesIO()
    with warnings.catch_warnings():
        # Names in scripts that its font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _drawn(text: str) -> str:
    return readable(text, alone=True, dots=False)


def _axes(axes: Axes, panel: Panel, *, legend: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    histogram = panel.histogram
    bins = list(_bins(histogram))
    lefts = [left for left, *_ in bins]
    kept = [stays for _, _, _, stays, _ in bins]
    dropped = [count - stays for _, _, count, stays, _ in bins]
    axes.bar(lefts, kept, 0.9, align="edge", color=_KEPT, label="kept")
    if histogram.kept:
        axes.bar(lefts, dropped, 0.9, align="edge", bottom=kept, color=_DROPPED, label="dropped")
        if legend:
            axes.legend(frameon=False, fontsize=8)
    title = f"{_drawn(panel.name)}\n{_drawn(panel.told)}"
    axes.set_title(title, loc="left", fontsize=8, parse_math=False)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    places = _ticks(histogram)
    axes.set_xticks(places, [f"{histogram.edges[place]:g}" for place in places])
    axes.set_xlabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
