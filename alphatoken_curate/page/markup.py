"""HTML made of parts that are safe by construction: whatever is not `Html` already is made visible and escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from alphatoken_curate.views.heat import readable, unit_of

MINUS = "\u2212"
NONE = "–"
"""Stands for a number that is not there."""

_VOID = frozenset({"meta", "input", "col", "br", "hr"})


class Html(str):
    """Text that is markup already. Made here alone."""

    __slots__ = ()


Part = str | Html | None


def escaped(text: str) -> Html:
    """Text to be seen: control and direction characters as symbols, and nothing that is markup."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(readable(text, alone=True, dots=False), quote=True))


def joined(parts: Iterable[Part]) -> Html:
    """Parts one after the other; None is nothing."""
    return Html("".join(escaped(part) for part in parts if part is not None))


def tag(name: str, /, *content: Part, **attributes: str | float | None) -> Html:
    """`<name attribute="...">content</name>`. `class_` is class, `aria_label` aria-label; None leaves one out."""
    told = []
    for key, value in attributes.items():
        if value is not None:
            text = value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
            told.append(f' {key.rstrip("_").replace("_", "-")}="{escaped(text)}"')
    if name in _VOID:
        return Html(f"<{name}{''.join(told)}>")
    return Html(f"<{name}{''.join(told)}>{joined(content)}</{name}>")


# ------------------------------------------------------------------------------------------------- numbers as text


def number(value: float | None, *, signed: bool = False) -> str:
    """Three digits: `0.0312`, `-2.4e-5`, `1,234`; with `signed`, `+0.42`."""
    if value is None or math.isnan(value):
        return NONE
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
        mantissa, _, power = text.partition("e")
        text = f"{mantissa}e{int(power)}" if power else text
    return ("+" if signed and value > 0 else "") + text.replace("-", MINUS)


def share(value: float | None) -> str:
    """`42%`, `0.3%`, `99.8%`; 0% and 100% mean none and all."""
    if value is None or math.isnan(value):
        return NONE
    percent = 100 * value
    if 0 < percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%" if 0 < percent < 1 or 99 < percent < 100 else f"{percent:.0f}%"


def column(values: Sequence[float]) -> tuple[str, list[str]]:
    """Signed numbers to be read one below the other: of one power of ten, which comes first, and as many digits."""
    far = max((abs(value) for value in values), default=0.0) or 1.0
    unit = unit_of("value", far)
    power = f", 1e{unit.exponent}" if unit.exponent else ""
    return power.replace("-", MINUS), [unit.write(value).replace("-", MINUS) for value in values]


def agreement(value: float | None) -> str:
    """A correlation: `+0.42`, `-0.05`."""
    text = NONE if value is None else f"{value:+.2f}".replace("-", MINUS)
    return "0.00" if text[1:] == "0.00" else text


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


# -------------------------------------------------------------------------------------------------- parts of a page


def prose(text: str) -> Html:
    """Our own sentences, in which backticks hold names of commands."""
    if isinstance(text, Html):
        return text
    return joined(tag("code", part) if place % 2 else part for place, part in enumerate(text.split("`")))


def foreign(text: str) -> Html:
    """Text of others, whose direction does not reach beyond it."""
    return tag("bdi", text)


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Part]], *, left: int = 1, class_: str | None = None
) -> Html:
    """A table whose first column names the row; columns after the first `left` hold numbers, set to the right.

    A column without a name holds bars.
    """

    def cells(row: Sequence[Part]) -> Iterable[Html]:
        for place, content in enumerate(row):
            kind = {"class_": None if place < left else "n"}
            yield tag("th", content, scope="row", **kind) if place == 0 else tag("td", content, **kind)

    names: list[Part] = [name or tag("span", "as a bar", class_="unseen") for name in head]
    heads = [tag("th", name, scope="col", class_=None if place < left else "n") for place, name in enumerate(names)]
    body = tag("tbody", *(tag("tr", *cells(row)) for row in rows))
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", *heads)), body, class_=class_)
    return tag("div", whole, class_="wide")


def facts(pairs: Iterable[tuple[str, Part]]) -> Html:
    """A list of names and what they are."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", told)) for name, told in pairs), class_="facts")


def figure(slug: str, question: str, answer: str, drawing: Html, numbers: Html | None = None, class_: str = "") -> Html:
    """A chart under the question it answers and the answer in numbers, the numbers it is drawn from folded away."""
    folded = None
    if numbers is not None:
        summary = tag("summary", "Numbers", tag("span", f" of: {question}", class_="unseen"))
        scrolled = tag(
            "div", numbers, class_="scroll", role="region", aria_label=f"Numbers of: {question}", tabindex="0"
        )
        folded = tag("details", summary, scrolled)
    head = tag("h3", question, id=f"q-{slug}")
    told = tag("p", prose(answer), class_="answer", id=f"a-{slug}")
    body = (tag("figcaption", head, told), drawing, folded)
    return tag("figure", *body, class_=f"chart {class_}".strip(), aria_labelledby=f"q-{slug}")


def note(text: str) -> Html:
    """A sentence in place of a chart that there is nothing to draw for."""
    return tag("p", prose(text), class_="note")
