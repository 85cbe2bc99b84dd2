"""The HTML report in Chromium: needs `pip install playwright` and a Chromium of the system."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hostile_run import PAYLOADS, hostile_run
from pages import rgb
from small_run import scored, small_run, value_row, value_rows, write_pieces

from alphatoken_curate.page.report import dark_palette, report
from alphatoken_curate.reading.row import read_row
from alphatoken_curate.reading.scan import scan_tokens
from alphatoken_curate.runs.shards import Branch, ValueRow
from alphatoken_curate.tokens.pieces import Piece
from alphatoken_curate.views import heat

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")

WORDS = ["The", " total", " is", " 42", ".", "\n", " so", " we", " have", " né"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium, or its path in CHROMIUM")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page that was opened from disk, and all that it asked for or complained of."""

    def __init__(self, browser: Any, path: Path, **how: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def rows(self) -> list[str]:
        return [str(text) for text in self.page.locator("article h3").all_inner_texts()]

    def said(self) -> str:
        return str(self.page.inner_text("#said"))

    def after(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
        """Do something that draws the rows anew; what is said then."""
        drawn = self.page.get_attribute("html", "data-ready")
        act(*args, **kwargs)
        self.page.wait_for_selector(f"html:not([data-ready='{drawn}'])")
        return self.said()

    def find(self, query: str) -> str:
        return self.after(self.page.fill, "#query", query)

    def colours(self) -> list[tuple[int, ...]]:
        """Background of every response token on the page."""
        script = "all => all.map(one => getComputedStyle(one).backgroundColor)"
        found = self.page.eval_on_selector_all("article .t", script)
        return [tuple(int(part) for part in one[4:-1].split(",")) for one in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run(tmp_path_factory.mktemp("report") / "run", value_rows(24))
    write_pieces(run, [Piece(WORDS[i % 10].encode() + b"!" * (i // 10), special=False) for i in range(50)])
    report(run)
    return run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run(tmp_path_factory.mktemp("report") / "pairs", kind="preference")
    report(run)
    return run


def levels_of(run: Path, column: str, rows: list[int]) -> list[int]:
    """The level of each response token of these rows, as they are stored."""
    tokens = scan_tokens(run).collect()
    scale = heat.scale_of(tokens[column].to_numpy())
    of_rows = [tokens.filter(pl.col("row_id") == row)[column].to_numpy() for row in rows]
    return [int(level) for values in of_rows for level in heat.levels(values, scale)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_alone_and_colours_are_those_of_the_stored_values(browser: Any, run: Path, scheme: str) -> None:
    with Opened(browser, run / "report.html", color_scheme=scheme) as opened:
        assert opened.said() == "Rows 1 to 10 of 24."
        palette = heat.PALETTE if scheme == "light" else dark_palette()
        for column in ("value", "adapt_causal", "nll", "loss_weight"):
            label = {"value": "value", "adapt_causal": "causal adaptation", "nll": "loss (nll)"}.get(
                column, "loss weight"
            )
            if column != "value":
                opened.after(opened.page.select_option, "#column", label=label)
            expected = levels_of(run, column, list(range(10)))
            assert opened.colours() == [rgb(palette[level].background) for level in expected], column
        assert opened.requests == [(run / "report.html").as_uri()] and opened.complaints == []


def test_dropped_tokens_are_struck_through(browser: Any, run: Path) -> None:
    with Opened(browser, run / "report.html") as opened:
        script = "all => all.map(one => getComputedStyle(one).textDecorationLine)"
        lines = opened.page.eval_on_selector_all("article .t", script)
    kept = scan_tokens(run).filter(pl.col("row_id") < 10).collect()["kept"].to_list()
    assert lines == ["none" if one else "line-through" for one in kept]


def test_pointing_shows_exact_numbers(browser: Any, run: Path) -> None:
    tokens = scan_tokens(run).filter(row_id=4).collect()
    with Opened(browser, run / "report.html") as opened:
        opened.page.locator("article").nth(4).locator(".t").nth(1).hover()
        opened.page.wait_for_selector("#told:not([hidden])")
        names = opened.page.locator("#numbers th").all_inner_texts()
        shown = [text.replace("−", "-") for text in opened.page.locator("#numbers td").all_inner_texts()]
        told = dict(zip(names, shown, strict=True))
        for name, column in (("value", "value"), ("loss (nll)", "nll"), ("direct stability", "stab_direct")):
            assert np.float32(told[name]) == np.float32(tokens[column][1])
        where = opened.page.inner_text("#about")
        assert "token 2 of the response" in where and f"position {tokens['position'][1]}" in where
        assert ("kept" if tokens["kept"][1] else "dropped") in where and tokens["class"][1] in where


def test_everything_goes_by_keyboard(browser: Any, run: Path) -> None:
    tokens = scan_tokens(run).filter(row_id=0).collect()
    with Opened(browser, run / "report.html") as opened:
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        reached = []
        for _ in range(80):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
            if reached[-1] == "text":
                break
        assert [one for one in reached if one in ("theme", "column", "query", "sort", "order", "text")] == [
            "theme", "column", "query", "sort", "order", "text",
        ]  # fmt: skip

        def active(key: str = "") -> tuple[str, str]:
            """What is read aloud of the active token, and what stands beside it."""
            if key:
                page.keyboard.press(key)
            page.wait_for_selector("#active[aria-label]")
            assert page.evaluate("document.activeElement.getAttribute('aria-activedescendant')") == "active"
            return str(page.get_attribute("#active", "aria-label")), str(page.inner_text("#about"))

        said, _ = active()
        assert "token 1 of the response, value " in said and said.endswith("kept" if tokens["kept"][0] else "dropped")
        value = said.split("value ")[1].split(",")[0].replace("−", "-")
        assert np.float32(value) == np.float32(tokens["value"][0])
        last = read_row(run, row=0).branches[0]
        assert f"position {len(last.texts) - 1} " in active("End")[1]
        assert f"position {len(last.texts) - 2} " in active("ArrowLeft")[1]
        assert " · prompt · position 0" in active("Home")[1]
        assert "position 1" in active("ArrowRight")[1]
        page.keyboard.press("Escape")
        assert page.locator("#told").is_hidden() and page.locator("#active").count() == 0


def test_search_filter_and_sort(browser: Any, run: Path) -> None:
    views = [read_row(run, row=i) for i in range(24)]
    joined = ["".join(view.branches[0].texts).lower() if view.branches else "" for view in views]
    tokens = scan_tokens(run).collect()
    with Opened(browser, run / "report.html") as opened:
        page = opened.page
        needle = joined[6][2:7]
        expected = [f"Row {i}" for i, text in enumerate(joined) if needle in text]
        said = opened.find(needle.upper())
        assert said in (f"{len(expected)} row found.", f"{len(expected)} rows found.")
        assert opened.rows() == expected and page.locator(".hit").count() > 0
        for query, row in (("#17", "Row 17"), ("n8", "Row 8")):
            assert opened.find(query) == "1 row found." and opened.rows() == [row]
        assert opened.find("zzzz").startswith("No row is like that") and opened.rows() == []
        opened.find("")
        assert opened.after(page.select_option, "#status", label="failed") == "1 row." and opened.rows() == ["Row 5"]
        assert opened.after(page.select_option, "#status", "") == "Rows 1 to 10 of 24."
        by_mean = tokens.group_by("row_id").agg(pl.col("value").mean().alias("mean")).sort("mean")["row_id"].to_list()
        opened.after(page.select_option, "#sort", "mean")
        assert opened.rows() == [f"Row {i}" for i in by_mean[:10]]
        opened.after(page.click, "#order")
        assert opened.rows() == [f"Row {i}" for i in by_mean[::-1][:10]]
        opened.after(page.click, "#last")
        assert opened.rows()[-3:] == ["Row 3", "Row 5", "Row 7"]  # without values: last either way
        assert opened.complaints == []


def test_pairs_stand_side_by_side_and_below_each_other_on_a_phone(browser: Any, pairs: Path) -> None:
    for width, side_by_side in ((1280, True), (390, False)):
        with Opened(browser, pairs / "report.html", viewport={"width": width, "height": 844}) as opened:
            card = opened.page.locator("article").first
            assert card.locator("h4").all_inner_texts() == ["chosen", "rejected"]
            one, other = (card.locator(".branch").nth(i).bounding_box() for i in range(2))
            assert one and other
            assert (abs(one["y"] - other["y"]) < 2) == side_by_side
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            opened.after(opened.page.select_option, "#sort", "difference")
            frame = scan_tokens(pairs).collect()
            means = frame.group_by("row_id", "branch").agg(pl.col("value").mean()).pivot("branch", index="row_id")
            order = means.sort(pl.col("chosen") - pl.col("rejected"))["row_id"].to_list()
            assert opened.rows() == [f"Row {i}" for i in (*order, *(i for i in range(12) if i not in order))][:10]


def test_the_theme_can_be_turned(browser: Any, run: Path) -> None:
    with Opened(browser, run / "report.html", color_scheme="dark") as opened:
        button = opened.page.locator("#theme")
        paper = "getComputedStyle(document.body).backgroundColor"
        assert button.get_attribute("aria-pressed") == "true" and opened.page.evaluate(paper) == "rgb(21, 23, 28)"
        button.click()
        assert button.get_attribute("aria-pressed") == "false" and opened.page.evaluate(paper) == "rgb(255, 255, 255)"
        opened.page.emulate_media(media="print", color_scheme="dark")
        assert opened.page.locator("#column").is_hidden() and opened.page.locator("#token").is_hidden()
        assert opened.page.locator("article .t").first.is_visible()


def test_hostile_text_is_shown_and_not_obeyed(browser: Any, tmp_path: Path) -> None:
    path = report(hostile_run(tmp_path / "run"))
    with Opened(browser, path) as opened:
        page = opened.page
        title = page.title()
        for number, payload in enumerate(PAYLOADS):
            assert opened.find(f"#{number}") == "1 row found."
            text = page.locator("article .text").text_content().replace("▯", "")  # bytes that end no character
            assert text == heat.readable(payload, dots=False) + heat.readable(payload, dots=False), payload
            header = page.locator("article header").inner_text()
            assert heat.readable(payload, alone=True, dots=False).split(" ")[0][:20] in header
            page.locator("article .text").focus()
            page.keyboard.press("End")
            page.locator("article .text span").last.hover()
            page.wait_for_selector("#told:not([hidden])")
        assert opened.find(PAYLOADS[1]).endswith("found.")
        opened.find(f"#{len(PAYLOADS)}")
        assert page.locator("article .note").text_content() == "Refused: " + PAYLOADS[4]
        opened.after(page.select_option, "#source", index=4)
        foreign = "img, iframe, object, embed, base, link, form, math, style:not(head style), [onload], [onerror]"
        assert page.locator(foreign).count() == 0 and page.locator("script:not([type])").count() == 1
        assert page.title() == title and "struck" not in title
        assert opened.requests == [path.as_uri()] and opened.complaints == [] and len(opened.context.pages) == 1


def test_a_sampled_and_rounded_page_shows_its_rows(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alphatoken_curate.page.rows.MOST_ROWS", 6)
    monkeypatch.setattr("alphatoken_curate.page.rows.MOST_EXACT", 5)
    monkeypatch.setattr("alphatoken_curate.page.rows.BLOCK_TOKENS", 20)
    run = small_run(tmp_path / "run")
    with Opened(browser, report(run)) as opened:
        rows = [int(text.removeprefix("Row ")) for text in opened.rows()]
        assert len(rows) == 6
        expected = levels_of(run, "value", rows)
        levels = [
            int(name.split("l")[1].split(" ")[0])
            for name in opened.page.eval_on_selector_all("article .t", "all => all.map(one => one.className)")
        ]
        apart = np.abs(np.array(levels) - expected)
        assert apart.max() <= 1 and apart.mean() < 0.1
        opened.page.locator("article .t").first.hover()
        assert opened.page.locator("#numbers td").first.inner_text().startswith("≈ ")


def test_joined_characters_marks_and_scripts_of_other_directions(browser: Any, tmp_path: Path) -> None:
    many = "".join(chr(0x4E00 + i) for i in range(300))
    family, text = "👩‍👧", f"a é שלום e\u0301\n  x\u202e{many}"
    ids = np.array([256, *text.encode(), 10], np.int32)
    branch = Branch(input_ids=ids, response=ids == 10, end_of_turn=ids == 10)
    row = ValueRow(row_id=0, source="a", line=1, id=None, status="scored", branches=(branch,))
    run = small_run(tmp_path / "run", [scored(row)])
    write_pieces(run, [*(Piece(bytes([i]), False) for i in range(256)), Piece(family.encode(), False)])
    with Opened(browser, report(run)) as opened:
        shown = opened.page.locator("article .text").text_content()
        assert shown.replace("▯", "") == heat.readable(family + text + "\n", dots=False)
        for needle in (family + "a", many[200:210], "שלום", "é ש", "e\u0301"):
            assert opened.find(needle) == "1 row found."
        assert opened.complaints == []


@pytest.mark.parametrize("name", ["failed", "rejected"])
def test_rows_without_values(browser: Any, tmp_path: Path, name: str) -> None:
    run = small_run(tmp_path / "run", [value_row(0, 5, name), value_row(1, 4, name)])
    with Opened(browser, report(run)) as opened:
        assert opened.rows() == ["Row 0", "Row 1"] and opened.page.locator(".t:not(.scale .t)").count() == 0
        opened.after(opened.page.select_option, "#sort", "mean")
        assert opened.rows() == ["Row 0", "Row 1"] and opened.complaints == []
