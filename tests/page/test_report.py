from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hostile_run import BY, PAYLOADS, hostile_run
from pages import Parsed, rgb, without_stability
from small_run import published, small_run, value_row, value_rows
from tiny_files import command, contents

import alphatoken_curate
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.page.report import dark_palette, render
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.views import heat

QUESTIONS = (
    "What was run?",
    "How many tokens are kept, and what do they weigh?",
    "How are values and their components distributed?",
    "Do adaptation and stability, direct and causal path agree?",
    "What goes with a high value?",
    "Which tokens are kept and dropped most?",
    "How do values and masks change between checkpoints?",
    "The rows",
)


def contrast(one: str, other: str) -> float:
    light, dark = sorted((heat.luminance(rgb(one)), heat.luminance(rgb(other))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_a_report_lies_in_its_run_and_leaves_it_whole(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    before = contents(run)
    path = alphatoken_curate.report(run)
    assert path == run / "report.html" and path.read_text().startswith("<!doctype html>\n<html lang=")
    assert verify(run) == []
    assert {name: content for name, content in contents(run).items() if name != "report.html"} == before
    again = alphatoken_curate.report(str(run), str(tmp_path / "other.html"))
    assert again.read_bytes() == path.read_bytes()


def test_the_command(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    done = command("report", run)
    assert done.code == 0 and done.out.startswith(f"{run / 'report.html'}: 0.") and "MB" in done.out
    assert command("report", run, "-o", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()
    refused = command("report", run, "-o", tmp_path)
    assert refused.code == 2 and "is a folder; name a file" in refused.err
    assert command("report", tmp_path).code == 2


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(StoredDataError, match="no finished run"):
        alphatoken_curate.report(tmp_path)
    with pytest.raises(UsageError, match="is a folder"):
        alphatoken_curate.report(small_run(tmp_path / "run"), tmp_path)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["manifest.json", "README.md", "values/generation=0/part-00000.parquet"])
def test_only_a_page_is_replaced(tmp_path: Path, name: str) -> None:
    run = small_run(tmp_path / "run")
    before = contents(run)
    for arguments in (("report", run, "-o"), ("stats", run, "--svg"), ("stats", run, "--png")):
        refused = command(*arguments, run / name)
        assert refused.code == 2 and "it is there, and its name does not end in ." in refused.err
    assert contents(run) == before


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_sections_come_in_order_and_ids_are_unique(tmp_path: Path, kind: str) -> None:
    page = render(small_run(tmp_path / "run", kind=kind, generations=(0, 1)))
    found = Parsed(page)
    places = [page.index(f">{question}</h2>") for question in QUESTIONS]
    assert places == sorted(places)
    ids = Counter(attributes["id"] for _, attributes in found.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    named = {"aria-labelledby", "aria-describedby"}
    pointed = {one for _, a in found.tags for key in named & a.keys() for one in (a[key] or "").split()}
    pointed |= {(a["href"] or "")[1:] for name, a in found.tags if name == "a"}
    assert pointed <= ids.keys()


def test_only_its_own_parts_may_run_or_style(tmp_path: Path) -> None:
    page = render(small_run(tmp_path / "run"))
    (policy,) = [
        a["content"] or "" for name, a in Parsed(page).tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    assert directives["trusted-types"] == "'none'" and directives["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy and "http" not in policy
    for kind, pattern in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        (part,) = re.findall(pattern, page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert directives[kind] == f"'sha256-{digest}'"
    assert not [a for _, a in Parsed(page).tags for name in a if name == "style" or name.startswith("on")]
    assert not re.search(r"\b(src|href|action)=\"(?!#)|https?:|url\(", page)


def test_the_script_writes_text_alone() -> None:
    script = (Path(alphatoken_curate.__file__).with_name("page") / "report.js").read_text()
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval", "Function(", "fetch(", "import"):
        assert word not in script, word


def test_hostile_text_adds_no_markup(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "run")
    page = render(run)
    found = Parsed(page)
    names = {name for name, _ in found.tags}
    assert not names & {"img", "iframe", "object", "embed", "base", "link", "form", "math", "textarea", "animate"}
    assert [a.get("type") for name, a in found.tags if name == "script"].count(None) == 1
    assert not [a for _, a in found.tags for name in a if name.startswith("on") or name == "autofocus"]
    for payload in (
        *PAYLOADS[:2],
        BY,
        *PAYLOADS[3:10],
    ):  # these stand in the page itself, not only among the packed rows
        assert heat.readable(payload, alone=True, dots=False) in found.text
    assert "\u202e" not in page and "\x1b" not in page and "\x00" not in page


def test_every_kind_of_run_has_a_report(tmp_path: Path) -> None:
    for name, how in {
        "influence": {"estimator": "influence"},
        "both": {"estimator": "exact+influence", "kind": "preference"},
        "soft": {"config": published(weights="sigmoid")},
        "none": {"rows": [value_row(0, 5, "failed"), value_row(1, 4, "rejected")]},
        "one": {"rows": [value_row(0, 2)]},
        "plain": {"rows": value_rows(reference=False)},
    }.items():
        page = render(small_run(tmp_path / name, **how))  # type: ignore[arg-type]
        assert "NaN" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL) and page.count("<h2") == 8, name


def test_a_sample_says_how_it_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path / "run")
    assert "All 12 rows are here. Numbers of tokens are exact." in render(run)
    monkeypatch.setattr("alphatoken_curate.page.rows.MOST_ROWS", 5)
    monkeypatch.setattr("alphatoken_curate.page.rows.MOST_EXACT", 5)
    page = Parsed(render(run)).text
    assert "5 of 12 rows are here, drawn at random by their numbers" in page and "rounded, to about two digits" in page


def test_stability_of_zero_is_told_first(tmp_path: Path) -> None:
    assert 'class="warn">Stability is 0' not in render(small_run(tmp_path / "run"))
    assert 'class="warn">Stability is 0' in render(small_run(tmp_path / "zero", without_stability(value_rows())))


@pytest.mark.parametrize("palette", [heat.PALETTE, dark_palette()], ids=["light", "dark"])
def test_text_is_legible_on_every_colour(palette: tuple[heat.Colour, ...]) -> None:
    assert len(palette) == heat.LEVELS
    assert min(contrast(one.background, one.text) for one in palette) >= 4.5
    neighbours = pairwise(palette)
    assert (
        min(sum(abs(a - b) for a, b in zip(rgb(x.background), rgb(y.background), strict=True)) for x, y in neighbours)
        > 12
    )


def test_both_scales_are_blue_below_zero_and_orange_above() -> None:
    for palette in (heat.PALETTE, dark_palette()):
        for level in range(heat.LEVELS):
            red, _, blue = rgb(palette[level].background)
            assert (blue > red) if level < 8 else (red > blue) if level > 8 else abs(red - blue) < 12
        ends = [heat.luminance(rgb(palette[i].background)) for i in (0, 8, 16)]
        assert (ends[1] > max(ends[0], ends[2])) if palette is heat.PALETTE else (ends[1] < min(ends[0], ends[2]))
