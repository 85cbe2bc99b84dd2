"""The HTML page of runs of several sizes: seconds, peak memory, and bytes, in all and for each token.

    python tests/benchmarks/report.py

Runs are made of random signals by the functions that a real run uses, in a temporary folder. The page holds prompts
too, so bytes are given for each response token and for each token. Each page is made in a process of its own. With
Playwright and Chromium there, also the seconds until the page has drawn its first rows, of a search through all rows,
and of sorting all rows by a column.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from made_run import made_run
from speed import in_a_process, peak

from alphatoken_curate.runs import manifest


def write_page(run: Path) -> tuple[float, int]:
    """Write the page of a run: seconds, and peak bytes above what is loaded."""
    from alphatoken_curate.page.report import report

    with peak() as most:
        begun = time.perf_counter()
        report(run)
        seconds = time.perf_counter() - begun
    return seconds, most[0]


def in_browser(page: Path) -> tuple[float, float, float]:
    """Seconds until rows are drawn, of a search that reads every row, and of sorting every row."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page()
        marks = [time.perf_counter()]
        tab.goto(page.as_uri())
        tab.wait_for_selector("html[data-ready]")
        marks.append(time.perf_counter())
        tab.fill("#query", "no row has this text")
        tab.get_by_text("No row is like that").wait_for(timeout=120_000)
        marks.append(time.perf_counter())
        tab.fill("#query", "")
        tab.wait_for_selector("article")
        marks.append(time.perf_counter())
        first = tab.locator("article h3").first
        tab.select_option("#sort", "highest")
        while tab.locator("article").count() > 1 and first.inner_text() == "Row 0":
            time.sleep(0.02)
        marks.append(time.perf_counter())
        browser.close()
    return marks[1] - marks[0], marks[2] - marks[1], marks[4] - marks[3]


def can_browse() -> bool:
    """Whether Playwright and Chromium are there."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return False
    return shutil.which("chromium") is not None


def main() -> None:
    """Make the pages and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 10_000, 1_000_000], help="response tokens")
    parser.add_argument("--response", type=int, default=100, help="response tokens of each row")
    parser.add_argument("--prompt", type=int, default=50, help="prompt tokens of each row")
    args = parser.parse_args()
    browse = can_browse()
    heads = ["response tokens", "rows", "seconds", "peak MiB", "MB", "B/response token", "B/token"]
    heads += ["first rows, s", "search, s", "sort, s"] if browse else []
    print("  ".join(heads))
    for tokens in args.tokens:
        with tempfile.TemporaryDirectory() as folder:
            run = made_run(Path(folder) / "run", tokens, response=args.response, prompt=args.prompt)
            counts = manifest.read(run).counts
            seconds, most = in_a_process(write_page, run)
            size = (run / "report.html").stat().st_size
            cells = [f"{counts.response_tokens:,}", f"{counts.read:,}", f"{seconds:.1f}", f"{most / 2**20:.0f}"]
            cells += [f"{size / 1e6:.2f}", f"{size / counts.response_tokens:.1f}", f"{size / counts.tokens:.1f}"]
            cells += [f"{one:.1f}" for one in in_browser(run / "report.html")] if browse else []
            print("  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True)), flush=True)


if __name__ == "__main__":
    main()
