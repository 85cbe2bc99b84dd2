"""`report`: one HTML page of a run, which opens from disk, asks the network for nothing and runs no script but its own.

What runs and what styles are named by their hashes in the page's content security policy; nothing else may run, load or
be sent. Text of the run is escaped where it stands in the page, and set as text where the script puts it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from alphatoken_curate.errors import UsageError
from alphatoken_curate.page.markup import Html, Part, joined, note, share, tag
from alphatoken_curate.page.overview import NAMES, how_distributed, how_many_kept, what_was_run
from alphatoken_curate.page.relations import over_time, what_agrees, what_goes_with_it, which_tokens
from alphatoken_curate.page.rows import MOST_ROWS, MOST_TOKENS, PackedRows, pack_rows
from alphatoken_curate.page.tokens import RunTokens, read_tokens
from alphatoken_curate.reading.stats import Stats, stats
from alphatoken_curate.runs.atomic import atomic_file, check_replaces
from alphatoken_curate.runs.schema import STATUSES
from alphatoken_curate.urls import OUT_ADVICE, check_local
from alphatoken_curate.views import heat
from alphatoken_curate.wording import count

NAME = "report.html"
"""The page's name in a run folder, unless another place is named."""

_MIDDLE, _SURFACE = 8, (29, 32, 38)
_DARK = {-1: ((30, 84, 145), (150, 200, 245)), 1: ((150, 80, 20), (252, 190, 110))}
"""Colours of dark pages half-way and at the end of the scale, below and above 0."""


def report(run: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a finished run's newest generation and mask; returns where it is.

    `path`: default `report.html` in the run folder; a page there is replaced. The same run gives the same page.
    Raises `UsageError` where `path` is a folder, or a file that is there and does not end in .html; `StoredDataError`
    where the run has no manifest or is damaged.
    """
    folder = Path(run)
    place = folder / NAME if path is None else Path(path)
    if path is not None:
        check_local(path, OUT_ADVICE)
    if place.is_dir():
        raise UsageError(f"{place}: is a folder; name a file, such as {place / NAME}")
    check_replaces(place, ".html")
    page = render(folder)
    with atomic_file(place) as sink:
        sink.write(page.encode())
    return place


def render(run: Path) -> str:
    """The page of a run, as text."""
    tokens, found = read_tokens(run), stats(run)
    rows = pack_rows(run, tokens)
    style, script = _style(), _source("report.js")
    title = f"{run.resolve().name}: values of response tokens"
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        _raw("style", style),
    )
    body = (
        tag("a", "Skip to the report", href="#report", class_="skip"),
        _top(run, tokens, found),
        tag("main", *_sections(run, tokens, found, rows), id="report"),
        tag("footer", "Made by alphatoken-curate. This page holds all it shows and asks the network for nothing."),
        *(_data(name, content) for name, content in rows.parts.items()),
        _raw("script", script),
    )
    page = tag("html", tag("head", *head), tag("body", *body), lang="en")
    return f"<!doctype html>\n{page}\n"


# ------------------------------------------------------------------------------------------- what runs, what styles


def _source(name: str) -> str:
    return resources.files("alphatoken_curate.page").joinpath(name).read_text(encoding="utf-8")


def _raw(name: str, content: str) -> Html:
    """Our own style or script: it is not escaped, since what is inside is no markup."""
    return Html(f"<{name}>{content}</{name}>")


def _data(name: str, content: str) -> Html:
    """Base64, which holds no markup, in a block that no browser runs."""
    return Html(f'<script type="text/plain" id="{name}">{content}</script>\n')


def _policy(style: str, script: str) -> str:
    """Nothing but these two parts, by their hashes."""
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; base-uri 'none';"
        " form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _style() -> str:
    """The style sheet, and a class for each level of the scale."""
    dark = dark_palette()
    levels = [
        f".l{i} {{ background-color: light-dark({light.background}, {night.background});"
        f" color: light-dark({light.text}, {night.text}); }}"
        for i, (light, night) in enumerate(zip(heat.PALETTE, dark, strict=True))
    ]
    return "\n".join([_source("report.css"), *levels, ""])


def dark_palette() -> tuple[heat.Colour, ...]:
    """The scale on dark paper: the same levels and hues, the page's own colour at 0, lighter toward both ends."""
    found = []
    for level in range(heat.LEVELS):
        half, end = _DARK[1 if level >= _MIDDLE else -1]
        far = abs(level - _MIDDLE) / _MIDDLE
        first, last, part = (_SURFACE, half, 2 * far) if far <= 0.5 else (half, end, 2 * far - 1)
        rgb = tuple(round(a + (b - a) * part) for a, b in zip(first, last, strict=True))
        text = "#000000" if heat.luminance(rgb) > 0.18 else "#ffffff"
        found.append(heat.Colour(background="#{:02x}{:02x}{:02x}".format(*rgb), text=text, faded=text))
    return tuple(found)


# ------------------------------------------------------------------------------------------------------- the page


_GOOD = ("a training step on", "a larger weight on")
"""What helps where a value is above 0: of a gradient, and of a rehearsed training."""


def _top(run: Path, tokens: RunTokens, found: Stats) -> Html:
    name = run.resolve().name
    button = tag("button", "Dark", type="button", id="theme", aria_pressed="false", hidden="")
    sub = (
        "What each response token is worth for training, which of them the newest mask keeps, and why."
        f" Values are in {tokens.layout.unit}: above 0, {_GOOD[found.rehearsed is not None]} the token helps."
    )
    tiles = tag("dl", *(tag("div", tag("dt", what), tag("dd", told)) for told, what in _tiles(found)), class_="tiles")
    warning = None
    if found.stability_is_zero and found.scored_tokens:
        warning = tag(
            "p",
            "Stability is 0 for every token: the model and its reference have the same weights. Values are adaptation"
            " alone.",
            class_="warn",
        )
    links = [tag("li", tag("a", short, href=f"#{slug}")) for slug, short, _ in _PARTS]
    parts = tag("nav", tag("ol", *links), class_="parts", aria_label="Parts of the report")
    head = tag("div", tag("div", tag("h1", tag("bdi", name)), tag("p", sub, class_="sub")), button, class_="title")
    return tag("header", head, tiles, warning, parts, class_="top")


def _tiles(found: Stats) -> Iterator[tuple[str, str]]:
    pairs = "pairs" if found.kind == "preference" else "rows"
    yield f"{found.rows['scored']:,}", f"{pairs} scored, of {found.rows['read']:,} read"
    yield f"{found.scored_tokens:,}", "response tokens with a value"
    if found.kept_tokens is not None:
        yield share(found.kept_share), "of them kept by the newest mask"
    if found.decided_by_value:
        total = found.decided_tokens or 1
        yield share(found.decisions_changed["none"] / total), "of decisions made by stability"


_PARTS = (
    ("run", "Run", "What was run?"),
    ("kept", "Kept", "How many tokens are kept, and what do they weigh?"),
    ("values", "Values", "How are values and their components distributed?"),
    ("agreement", "Agreement", "Do adaptation and stability, direct and causal path agree?"),
    ("relations", "Relations", "What goes with a high value?"),
    ("types", "Tokens", "Which tokens are kept and dropped most?"),
    ("time", "Over time", "How do values and masks change between checkpoints?"),
    ("rows", "Rows", "The rows"),
)
"""Anchor, short name and heading of each section, in order."""


def _sections(run: Path, tokens: RunTokens, found: Stats, rows: PackedRows) -> Iterator[Html]:
    contents = (
        what_was_run(run, tokens, found),
        how_many_kept(tokens, found),
        how_distributed(tokens, found),
        what_agrees(tokens, found),
        what_goes_with_it(tokens),
        which_tokens(tokens),
        over_time(run, tokens, found),
        _viewer(tokens, found, rows),
    )
    for (slug, _, heading), content in zip(_PARTS, contents, strict=True):
        yield tag("section", tag("h2", heading, id=f"h-{slug}"), content, id=slug, aria_labelledby=f"h-{slug}")


def _viewer(tokens: RunTokens, found: Stats, rows: PackedRows) -> Html:
    """The controls and the frame that the script fills with rows."""
    said = tag("p", "Reading the rows…", class_="hint", id="said", role="status", aria_live="polite")
    pages = [
        tag("button", "First", type="button", id="first"),
        tag("button", "Previous", type="button", id="before"),
        tag("span", id="which"),
        tag("button", "Next", type="button", id="after"),
        tag("button", "Last", type="button", id="last"),
    ]
    listing = tag("div", id="list", tabindex="-1", role="group", aria_label="Rows")
    nav = tag("nav", *pages, id="pages", aria_label="Pages of rows", hidden="")
    view = tag("div", tag("div", listing, nav), tag("div", _inspector(tokens)), class_="view")
    without = tag("noscript", tag("p", "The rows need JavaScript; all above does not.", class_="warn"))
    return joined(
        [without, note(_how_many(rows)), _tools(tokens, found, rows), _scale(), tag("p", id="doc"), said, view]
    )


def _how_many(rows: PackedRows) -> str:
    told = f"All {count(rows.total, 'row')} are here." if rows.total > 1 else "The one row is here."
    if rows.shown < rows.total:
        told = (
            f"{rows.shown:,} of {rows.total:,} rows are here, drawn at random by their numbers (at most {MOST_ROWS:,}"
            f" rows, and {MOST_TOKENS:,} tokens); all charts and numbers above are of all rows."
        )
    if rows.exact:
        return f"{told} Numbers of tokens are exact."
    return (
        f"{told} To keep the page light, the numbers of single tokens are rounded, to about two digits; the `show`"
        " command and `scan_tokens` give them whole."
    )


def _tools(tokens: RunTokens, found: Stats, rows: PackedRows) -> Html:
    def choice(name: str, slug: str, options: list[tuple[str, Part]]) -> Html:
        return tag(
            "label", name, tag("select", *(tag("option", text, value=value) for value, text in options), id=slug)
        )

    columns: list[tuple[str, Part]] = [(str(i), NAMES[name]) for i, name in enumerate(rows.columns)]
    sources: list[tuple[str, Part]] = [("", "all"), *((str(i), name) for i, name in enumerate(tokens.rows.sources))]
    statuses: list[tuple[str, Part]] = [
        ("", "all"),
        *((str(i), status) for i, status in enumerate(STATUSES) if found.rows[status]),
    ]
    query = tag("input", type="search", id="query", autocomplete="off", placeholder="words, id, or #12 for row 12")
    return tag(
        "div",
        choice("Colour by", "column", columns),
        tag("label", "Search", query, class_="grow"),
        choice("Source", "source", sources) if len(sources) > 2 else _hidden("source"),
        choice("Status", "status", statuses) if len(statuses) > 2 else _hidden("status"),
        choice("Sort by", "sort", list(_orders(tokens))),
        tag("button", "Descending", type="button", id="order", aria_pressed="false"),
        class_="tools",
        role="search",
        aria_label="Find and sort rows",
    )


def _hidden(slug: str) -> Html:
    return tag("input", type="hidden", id=slug, value="")


def _orders(tokens: RunTokens) -> Iterator[tuple[str, Part]]:
    yield "row", "row number"
    yield "mean", "mean of the colour"
    yield "highest", "highest of the colour"
    yield "lowest", "lowest of the colour"
    yield "tokens", "response tokens"
    if tokens.weight is not None:
        yield "kept", "share kept"
    if len(tokens.layout.branches) == 2:
        yield "difference", "chosen less rejected mean"
        yield "margin", "margin"
        yield "omega", "omega"


def _scale() -> Html:
    cells = tag("span", *(tag("span", class_=f"l{i}") for i in range(heat.LEVELS)), class_="cells")
    ramp = tag("span", tag("span", id="low"), cells, tag("span", id="high"), class_="ramp", id="legend")
    unit = tag("span", id="unit", class_="soft")
    mark = tag("span", tag("span", "dropped", class_="t l8 d"), tag("span", " by the mask", class_="soft"))
    return tag("div", ramp, unit, mark, class_="scale", role="group", aria_label="Scale of colours")


def _inspector(tokens: RunTokens) -> Html:
    close = tag("button", "×", type="button", id="close", aria_label="Close the numbers of this token")
    head = tag("div", tag("span", id="piece"), close, class_="headline")
    numbers = tag("table", tag("caption", "Numbers of the token"), tag("tbody", id="numbers"))
    units = tag("p", f"Value and components in {tokens.layout.unit}, losses and entropy in nats.", class_="hint")
    told = tag("div", head, tag("p", id="about"), numbers, units, id="told", hidden="")
    help_ = (
        "Point at a token for its numbers; click to hold them. By keyboard: Tab to a row's text, then the arrow keys,"
        " Home and End; Escape leaves."
    )
    return tag(
        "aside", tag("p", help_, class_="hint", id="help"), told, id="token", class_="idle", aria_label="One token"
    )
