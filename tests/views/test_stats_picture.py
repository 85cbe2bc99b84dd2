"""The pictures of `stats`: what is drawn is what was counted, and text of others is only text."""

from __future__ import annotations

import builtins
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from small_run import small_run, value_row, value_rows

from alphatoken_curate.errors import UsageError
from alphatoken_curate.reading.stats import Stats, stats
from alphatoken_curate.views.stats_picture import Panel, panels, png, svg

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "\x1b]0;x\x07<script>alert(1)</script>&\"'\u202e$\\frac{$"


@pytest.fixture(scope="module", params=["sft", "preference"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    rows = [replace(row, source=f"part-{row.row_id % 2}.jsonl") for row in value_rows(30, kind=request.param)]
    return stats(small_run(tmp_path_factory.mktemp("runs") / "run", rows, generations=(0, 2)))


def tree(picture: bytes) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


@pytest.mark.long
def test_there_is_a_panel_for_every_histogram(found: Stats) -> None:
    names = [panel.name for panel in panels(found)]
    signals = ["value", *(name for name in found.histograms if name != "value")]
    branches = ["value, branch chosen", "value, branch rejected"] if found.kind == "preference" else []
    sources = ["value, source part-0.jsonl", "value, source part-1.jsonl"]
    assert set(names[len(signals) :]) == {
        *branches,
        *sources,
        "value, generation 0, base",
        "value, generation 2, checkpoint-2",
    }
    assert names[: len(signals)] == signals
    titles = [one.text for one in tree(svg(found, "a run")).iter(f"{SVG}text") if one.get("class") == "name"]
    assert titles == names


@pytest.mark.long
def test_bars_are_as_high_as_their_tokens_are_many(found: Stats) -> None:
    picture = tree(svg(found, "a run"))
    bars = []
    for group in picture.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        assert title is not None and title.text is not None
        numbers = re.search(r": ([\d,]+) tokens?, ([\d,]+) kept$", title.text)
        assert numbers
        count, kept = (int(text.replace(",", "")) for text in numbers.groups())
        boxes = {one.get("class"): float(one.get("height", "0")) for one in group.iter(f"{SVG}rect")}
        assert set(boxes) == ({"kept"} if kept else set()) | ({"dropped"} if kept < count else set())
        bars.append((count, kept, boxes))
    shown = iter(bars)
    for panel in panels(found):
        counted = zip(panel.histogram.count, panel.histogram.kept or (), strict=True)
        wanted = [(count, kept) for count, kept in counted if count]
        drawn = [next(shown) for _ in wanted]
        assert [told[:2] for told in drawn] == wanted
        full = max(sum(boxes.values()) / count for count, _, boxes in drawn if count == max(panel.histogram.count))
        for count, kept, boxes in drawn:
            assert boxes.get("kept", 0) == pytest.approx(full * kept, abs=0.02)
            assert boxes.get("dropped", 0) == pytest.approx(full * (count - kept), abs=0.02)
    assert next(shown, None) is None


@pytest.mark.long
def test_it_loads_nothing_and_runs_nothing(found: Stats) -> None:
    evil = replace(found, sources={f"{EVIL}{i}": one for i, one in enumerate(found.sources.values())})
    text = svg(evil, EVIL).decode()
    picture = tree(text.encode())
    assert {one.tag.removeprefix(SVG) for one in picture.iter()} == {
        "svg", "title", "desc", "style", "rect", "text", "line", "g",
    }  # fmt: skip
    assert not re.search(r"url\(|@import|href|\son\w+=", text)
    assert not set("\x1b\x07\u202e") & set(text)
    assert any("<script>alert(1)" in (one.text or "") for one in picture.iter(f"{SVG}text"))


@pytest.mark.long
def test_the_end_of_a_long_name_is_shown(found: Stats) -> None:
    long = "a/very/long/folder/of/many/rows"
    evil = replace(found, sources={f"{long}/{i}.jsonl": one for i, one in enumerate(found.sources.values())})
    names = [panel.name for panel in panels(evil) if "source" in panel.name]
    assert sorted(names) == [f"value, source …er/of/many/rows/{i}.jsonl" for i in (0, 1)]


@pytest.mark.long
def test_of_many_sources_the_largest_are_drawn(found: Stats) -> None:
    one = next(iter(found.sources.values()))
    many = {f"{i}.jsonl": replace(one, scored_tokens=i) for i in range(20)}
    names = [panel.name for panel in panels(replace(found, sources=many)) if "source" in panel.name]
    assert names == [f"value, source {i}.jsonl" for i in range(19, 7, -1)]


@pytest.mark.long
def test_a_run_in_which_nothing_was_scored_has_empty_panels(tmp_path: Path) -> None:
    nothing = stats(small_run(tmp_path / "run", [value_row(0, 5, "target")]))
    assert not list(tree(svg(nothing, "a")).iter(f"{SVG}g"))
    assert png(nothing, "a").startswith(b"\x89PNG")


@pytest.mark.long
def test_without_a_mask_bars_are_whole_and_there_is_no_legend(found: Stats) -> None:
    bare = {name: replace(one, kept=None) for name, one in found.histograms.items()}
    picture = tree(svg(replace(found, histograms=bare, kept_tokens=None, kept_share=None, masks=()), "a"))
    words = [one.text for one in picture.iter(f"{SVG}text")]
    assert "kept" not in words and "dropped" not in words
    (first, *_) = (one.find(f"{SVG}title") for one in picture.iter(f"{SVG}g"))
    assert first is not None and first.text is not None
    assert re.search(r": (1 token|[\d,]+ tokens)$", first.text)


@pytest.mark.long
def test_png_is_a_picture_of_the_same_panels(found: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    drawn: list[tuple[str, list[float]]] = []
    bar = axes.Axes.bar

    def watch(self: Any, left: Any, height: Any, *rest: Any, **how: Any) -> Any:
        drawn.append((how["label"], list(height)))
        return bar(self, left, height, *rest, **how)

    monkeypatch.setattr(axes.Axes, "bar", watch)
    evil = replace(found, sources={f"{EVIL}{i}": one for i, one in enumerate(found.sources.values())})
    png(evil, EVIL)
    drawn.clear()
    picture = png(found, EVIL)
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") == 1920
    made = panels(found)
    assert len(drawn) == 2 * len(made)
    for panel, (_, kept), (_, dropped) in zip(made, drawn[::2], drawn[1::2], strict=True):
        assert sum(kept) == sum(panel.histogram.kept or ())
        assert sum(kept) + sum(dropped) == sum(panel.histogram.count)
    assert png(found, EVIL) == picture


@pytest.mark.long
def test_names_in_any_script_are_drawn_without_a_warning(found: Stats) -> None:
    names = ("日本語.jsonl", "हिन्दी🙂.jsonl")
    png(replace(found, sources=dict(zip(names, found.sources.values(), strict=True))), "日本語")


@pytest.mark.long
def test_png_without_matplotlib_says_how_to_install_it(found: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"pip install 'alphatoken-curate\[png\]'.*--svg needs nothing"):
        png(found, "a")
    assert isinstance(panels(found)[0], Panel)
    svg(found, "a")
