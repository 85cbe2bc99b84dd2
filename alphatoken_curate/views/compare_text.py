"""Two scorings side by side as rich text and tables. Nothing here prints; no text is ever read as markup."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from alphatoken_curate.reading.compare import Changed, Comparison, Overlap, Side, Step
from alphatoken_curate.rows.files import visible
from alphatoken_curate.views.heat import readable
from alphatoken_curate.views.row_text import SYMBOLS, shortened
from alphatoken_curate.wording import chosen_by, count

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def compare_lines(found: Comparison, width: int) -> Iterator[Text | Table]:
    """All of a comparison, in the order it is shown."""
    from rich.text import Text

    for name, side in (("first ", found.first), ("second", found.second)):
        place = f"{visible(side.run)}, generation {side.generation}, at {visible(side.checkpoint)}"
        yield Text(f"{name}  ", "bold").append(f"{place} ({_along(side)})", "not bold")
    apart = (
        f"; {count(found.rows_apart, 'row')} {'is' if found.rows_apart == 1 else 'are'} not, or differ"
        if found.rows_apart
        else ""
    )
    yield Text(f"{count(found.tokens, 'response token')} of {count(found.rows, 'row')} are in both{apart}")
    yield Text("\nrank correlation (Spearman) and RMS", "bold")
    yield _signals(found)
    yield Text("\nmasks", "bold")
    for line in _masks(found):
        yield Text(textwrap.fill(line, width, break_on_hyphens=False))
    if len(found.steps) > 1:
        yield Text("\nfrom each generation to the next", "bold")
        yield _steps(found.steps)
    if found.changed:
        yield Text("\ntokens that changed most; rank: the share of tokens below it", "bold")
        yield _changed(found.changed, width)
        yield Text(f"{SYMBOLS}.", "dim")


def _along(side: Side) -> str:
    """By which estimator its values are, and of what where that is not the published gradient."""
    return side.estimator if side.direction == "gradient" else f"{side.estimator}, {side.direction}"


def _table(*heads: str, left: Sequence[str] = ("",)) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _signals(found: Comparison) -> Table:
    table = _table("", "correlation", "RMS first", "RMS second")
    for name, correlation in found.correlations.items():
        _add(table, name, _correlation(correlation), *(f"{size:.3g}" for size in found.rms[name]))
    return table


def _correlation(number: float | None) -> str:
    return "constant" if number is None else f"{number:+.3f}"


def _masks(found: Comparison) -> Iterator[str]:
    first, second = (visible(chosen_by(side.mask_settings), 300) for side in (found.first, found.second))
    yield f"each by {first}" if first == second else f"first by {first}; second by {second}"
    masks = found.masks
    counts = {"both keep": masks.both, "only first": masks.only_first, "only second": masks.only_second}
    told = [f"{name} {count:,} ({count / masks.tokens:.1%})" for name, count in counts.items()]
    yield f"{', '.join(told)}, neither {masks.neither:,}"
    if masks.jaccard is not None and masks.by_chance is not None:
        yield (
            f"overlap {masks.jaccard:.3f} (kept by both, of those kept by either), by chance {masks.by_chance:.3f};"
            f" {_others(masks)} of decisions are others"
        )


def _others(masks: Overlap) -> str:
    return f"{(masks.only_first + masks.only_second) / masks.tokens:.1%}"


def _steps(steps: Sequence[Step]) -> Table:
    table = _table("", "tokens", "correlation", "overlap", "other decisions")
    for one in steps:
        overlap = "" if one.masks.jaccard is None else f"{one.masks.jaccard:.3f}"
        numbers = (f"{one.masks.tokens:,}", _correlation(one.correlation), overlap, _others(one.masks))
        _add(table, f"{one.first} to {one.second}", *numbers)
    return table


def _changed(changed: Sequence[Changed], width: int) -> Table:
    """A line each, with values and the text around it where there is room."""
    pair = any(one.branch for one in changed)
    heads = {
        "row": True,
        "branch": pair,
        "at": True,
        "token": True,
        "first": width >= 80,
        "second": width >= 80,
        "rank": True,
        "to": True,
        "kept": True,
        "text": width >= 100,
    }
    table = _table(*(name for name, shown in heads.items() if shown), left=("branch", "token", "kept", "text"))
    for one in changed:
        around = _plain(one.before)[-18:] + _plain(one.text) + _plain(one.after)
        cells = (
            f"{one.row_id} turn {one.turn}" if one.turn else str(one.row_id),
            one.branch,
            str(one.position),
            shortened(readable(one.text, alone=True), 14),
            *(f"{x:+.3g}" for x in one.values),
            *(f"{x:.1%}" for x in one.ranks),
            " to ".join("yes" if kept else "no" for kept in one.kept),
            shortened(around, 40),
        )
        _add(table, *(cell for cell, shown in zip(cells, heads.values(), strict=True) if shown))
    return table


def _plain(text: str) -> str:
    return readable(text, alone=True, dots=False)
