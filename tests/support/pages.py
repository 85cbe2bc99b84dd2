"""A report read back: its markup as a browser reads it, its tables, its colours."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from alphatoken_curate.page.tokens import RunTokens, read_tokens
from alphatoken_curate.reading.stats import Stats, stats
from alphatoken_curate.runs.shards import Branch, ValueRow


class Parsed(HTMLParser):
    """What a parser of HTML makes of markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(run: Path) -> tuple[RunTokens, Stats]:
    return read_tokens(run), stats(run)


def without_stability(rows: list[ValueRow]) -> list[ValueRow]:
    """The rows as they are scored where model and reference are the same."""

    def changed(branch: Branch) -> Branch:
        signals = {name: x * 0 if name.startswith("stab") else x for name, x in branch.signals.items()}
        if signals:
            signals["value"] = signals["adapt_direct"] + signals["adapt_causal"]
        return replace(branch, signals=signals)

    return [replace(row, branches=tuple(map(changed, row.branches))) for row in rows]


def cells(markup: str) -> list[list[str]]:
    """The text of every row of every table."""
    rows = re.findall(r"<tr>(.*?)</tr>", markup)
    return [[Parsed(cell).text for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
