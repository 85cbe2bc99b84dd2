from __future__ import annotations

import pytest
from pages import Parsed

from alphatoken_curate.page.markup import (
    Html,
    agreement,
    column,
    escaped,
    figure,
    foreign,
    joined,
    listed,
    number,
    prose,
    share,
    table,
    tag,
)


@pytest.mark.parametrize("text", ["<b>", "a & b", "\"'", "</p><script>x</script>", "&lt;", "<!--", "]]>"])
def test_text_stays_text_wherever_it_stands(text: str) -> None:
    found = Parsed(tag("p", text, title=text))
    assert found.tags == [("p", {"title": text})]
    assert found.text == text


def test_what_cannot_be_seen_is_seen() -> None:
    assert escaped("a\x00\x1b\u202eb") == "a␀␛⟨U+202E⟩b"
    assert escaped("\n") == "⏎"
    assert escaped(Html("<b>")) == "<b>"


def test_a_tag() -> None:
    assert tag("a", "x", None, tag("b"), class_="c", aria_label="d", hidden=None) == (
        '<a class="c" aria-label="d">x<b></b></a>'
    )
    assert tag("rect", x=1.0, y=2.5, width=0.333) == '<rect x="1" y="2.5" width="0.33"></rect>'
    assert tag("meta", name="n") == '<meta name="n">'
    assert joined(["<", None, Html("<br>")]) == "&lt;<br>"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.031249, "0.0312"), (-2.4e-5, "−2.4e−5"), (12345.6, "12,346"), (None, "–"), (float("nan"), "–")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_signed_numbers_and_correlations() -> None:
    assert number(0.42, signed=True) == "+0.42"
    assert number(0.0, signed=True) == "0"
    assert (agreement(0.419), agreement(-0.05), agreement(None)) == ("+0.42", "−0.05", "–")
    assert agreement(-0.001) == agreement(0.001) == "0.00"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0%"),
        (1.0, "100%"),
        (0.5, "50%"),
        (0.004, "0.4%"),
        (0.0004, "<0.1%"),
        (0.9999, ">99.9%"),
        (0.996, "99.6%"),
    ],
)
def test_shares_of_none_and_all_are_exact(value: float, text: str) -> None:
    assert share(value) == text
    assert share(None) == "–"


def test_numbers_of_a_column_have_as_many_digits() -> None:
    assert column([3.35, -0.00498, 0.0]) == ("", ["+3.35", "−0.00", "0"])
    power, texts = column([2.5e-6, -1e-6])
    assert power == ", 1e−6" and texts == ["+2.50", "−1.00"]
    assert column([]) == ("", [])


def test_words() -> None:
    assert [listed([]), listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert prose("Run `a<b` now") == "Run <code>a&lt;b</code> now"
    assert foreign("\u202e<") == "<bdi>⟨U+202E⟩&lt;</bdi>"


def test_a_table_names_its_rows_and_columns() -> None:
    found = Parsed(table("All", ("what", "count"), [("<x>", "1"), ("y", "2")]))
    scopes = [attributes["scope"] for name, attributes in found.tags if name == "th"]
    assert scopes == ["col", "col", "row", "row"]
    assert [a.get("class") for name, a in found.tags if name == "td"] == ["n", "n"]
    assert "<x>" in found.text


def test_a_figure_is_named_by_its_question() -> None:
    found = Parsed(figure("s", "Why?", "Since `x`.", tag("svg"), tag("i")))
    assert found.tags[0] == ("figure", {"class": "chart", "aria-labelledby": "q-s"})
    assert ("h3", {"id": "q-s"}) in found.tags and ("p", {"class": "answer", "id": "a-s"}) in found.tags
    assert [name for name, _ in found.tags].index("svg") < [name for name, _ in found.tags].index("details")
