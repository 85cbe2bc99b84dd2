"""A row of a run as rich text: coloured, plain or as a table. Nothing here prints; no text is ever read as markup."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate import heat
from alphatoken_curate.files import visible
from alphatoken_curate.heat import MIDDLE, PALETTE, Unit, readable
from alphatoken_curate.row_view import RowView
from alphatoken_curate.schema import COMPONENTS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Cell = tuple[str, str]
"""Text as it is shown, and its rich style."""

SYMBOLS = "· space, ⏎ newline, ⇥ tab, ▯ part of a character"
"""The symbols of `heat.readable` that are met most."""

_TABLE_ORDER = ("value", *COMPONENTS, "nll", "entropy", "reference_nll")
_HEADS = {
    "adapt_direct": "adapt\ndirect",
    "adapt_causal": "adapt\ncausal",
    "stab_direct": "stab\ndirect",
    "stab_causal": "stab\ncausal",
    "reference_nll": "ref\nnll",
}


def has_palette(console: Console) -> bool:
    """Whether values can be told by background colours: 256 or more of them, and NO_COLOR not set."""
    return console.color_system in ("256", "truecolor") and not console.no_color


# --------------------------------------------------------------------------------------------------------- show a row


def row_title(view: RowView) -> Text:
    """Which row this is, what became of it, and how many of its tokens are kept."""
    from rich.text import Text

    own = f" · id {visible(view.id)}" if view.id is not None else ""
    title = Text(f"row {view.row_id} · {view.status} · {visible(view.source)}:{view.line}{own}", "bold")
    tokens, response = len(view.token_ids), int(view.response.sum())
    about = f"\n{tokens:,} tokens, {response:,} in the response"
    if view.weight is not None:
        kept = int(view.kept.sum())
        about += f"; mask {view.mask} keeps {kept:,} of {response:,} ({kept / max(1, response):.1%})"
    elif view.status == "scored":
        about += "; no mask yet"
    return title.append(about, "not bold")


def without_values(view: RowView, width: int) -> Text:
    """A row that was not scored: why, and its text."""
    from rich.text import Text

    why = {
        "target": "Held out as a target row: it tells what to learn, so it is not scored and not in train/.",
        "failed": "Failed: its values could not be computed. It is not in train/.",
        "rejected": f"Refused when it was read: {visible(view.reason or 'see rejects.jsonl')}. It has no tokens.",
    }
    text = Text(textwrap.fill(why.get(view.status, "Not scored."), width) + "\n", "yellow")
    if len(view.texts):
        text.append("\n")
        cells = [(readable(t, dots=False), "" if r else "dim") for t, r in zip(view.texts, view.response, strict=True)]
        text.append_text(_flow(_words(cells), width))
    return text


def coloured_row(view: RowView, column: str, width: int) -> Text:
    """The row's tokens on the colours of their values, with a legend: prompt dim, kept bold, dropped struck through."""
    from rich.text import Text

    values = view.column(column)
    scale = heat.scale_of(values)
    unit = heat.unit_of(column, scale)
    cells = [
        (readable(text, dots=bool(response)), _style(int(level), bool(kept)) if response else "dim")
        for text, level, response, kept in zip(
            view.texts, heat.levels(values, scale), view.response, view.kept, strict=True
        )
    ]
    legend = Text(f"{column} in {unit.label}: ").append_text(_ramp(unit, scale))
    legend.append("\n").append("kept", "bold").append(" ").append("dropped", "strike").append(" ")
    legend.append("prompt", "dim").append(f" · the ends hold the {100 - heat.SCALE_PERCENTILE}% largest\n")
    return legend.append(SYMBOLS + "\n\n", "dim").append_text(_flow(_words(cells), width))


def plain_row(view: RowView, column: str, width: int) -> Text:
    """The row without a palette: `text:+0.42` for each response token, `~text:-0.10~` for a dropped one.

    Styles are named ones, which a terminal of 16 colours can show and others leave out.
    """
    from rich.text import Text

    values = view.column(column)
    scale = heat.scale_of(values)
    unit = heat.unit_of(column, scale)
    legend = f"Each response token is text:{column}, in {unit.label}; ~text:{column}~ is dropped. {SYMBOLS}."
    result = Text(textwrap.fill(legend, width) + "\n")
    for responds, first, last in _turns(view):
        result.append(f"\n[{'response' if responds else 'prompt'}]\n", "bold")
        if responds:
            kept = view.kept[first:last]
            numbers = [unit.write(float(x)) for x in values[first:last]]
            levels = heat.levels(values[first:last], scale)
            made = zip(view.texts[first:last], numbers, kept, levels, strict=True)
            words = [[_plain_cell(text, number, bool(k), int(level))] for text, number, k, level in made]
            result.append_text(_flow(words, width, gap=" "))
        else:
            cells = [(readable(text, dots=False), "dim") for text in view.texts[first:last]]
            result.append_text(_flow(_words(cells), width))
        if not result.plain.endswith("\n"):
            result.append("\n")
    return result


def _style(level: int, kept: bool) -> str:
    colour = PALETTE[level]
    # The middle keeps the terminal's own background: a screen of white would hide what stands out.
    ground = "" if level == MIDDLE else f"{colour.text if kept else colour.faded} on {colour.background}"
    return f"bold {ground}".strip() if kept else f"not bold strike {ground or 'bright_black'}"


def _plain_cell(text: str, number: str, kept: bool, level: int) -> Cell:
    shown = f"{readable(text, alone=True)}:{number}"
    colour = "blue" if level <= MIDDLE - 2 else "yellow" if level >= MIDDLE + 2 else ""
    shown, style = (shown, f"bold {colour}") if kept else (f"~{shown}~", f"strike {colour}")
    return shown + ("\n" if "\n" in text else ""), style.strip()


def _ramp(unit: Unit, scale: float) -> Text:
    from rich.text import Text

    ramp = Text(f"{unit.write(-scale)} " if unit.signed else "0 ")
    for colour in PALETTE if unit.signed else PALETTE[MIDDLE:]:
        ramp.append(" ", f"{colour.text} on {colour.background}")
    return ramp.append(f" {unit.write(scale)}")


def _turns(view: RowView) -> Iterator[tuple[bool, int, int]]:
    """Stretches of prompt and response: (responds, first, last)."""
    edges = np.flatnonzero(np.diff(view.response.astype(np.int8))) + 1
    for first, last in zip([0, *edges], [*edges, len(view.response)], strict=True):
        yield bool(view.response[first]), int(first), int(last)


def _words(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Tokens that a line break should not part: a word begins with a space, or after a line break."""
    words: list[list[Cell]] = []
    for cell in cells:
        starts = not words or cell[0][:1] in ("·", " ") or words[-1][-1][0].endswith("\n")
        if starts:
            words.append([cell])
        else:
            words[-1].append(cell)
    return words


def _flow(words: Sequence[Sequence[Cell]], width: int, gap: str = "") -> Text:
    """Words in lines of at most `width` columns. A word that is wider than a line is broken between its tokens."""
    from rich.cells import cell_len
    from rich.text import Text

    result, column = Text(), 0
    for word in words:
        parts = [word] if _first_line(word) <= width else [[cell] for cell in word]
        for part in parts:
            wraps = bool(column) and column + len(gap) + _first_line(part) > width
            if wraps:
                result.append("\n")
            elif column and gap:
                result.append(gap)
            column = 0 if wraps else column + len(gap) * bool(column)
            for place, (shown, style) in enumerate(part):
                # A space of the prompt at the start of a new line would look like an indent.
                text = shown[1:] if wraps and place == 0 and shown[:1] == " " else shown
                result.append(text, style)
                column = cell_len(text.rsplit("\n", 1)[1]) if "\n" in text else column + cell_len(text)
    return result


def _first_line(cells: Sequence[Cell]) -> int:
    from rich.cells import cell_len

    return cell_len("".join(text for text, _ in cells).split("\n", 1)[0])


# ---------------------------------------------------------------------------------------------------- a row's table


def token_table(view: RowView, column: str, *, palette: bool, width: int) -> tuple[Table, str]:
    """One line per response token: position, text, whether it is kept, its weight, every signal; and what they mean.

    Text is coloured by `column` where there is a `palette`. Columns that do not fit `width` are left out, and named.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    at = np.flatnonzero(view.response)
    columns = [column for column in _columns(view, at) if any(column.cells)]
    sizes = [max(cell_len(text) for text in (*column.head.split("\n"), *column.cells)) + 1 for column in columns]
    fits = max(2, int(np.searchsorted(np.cumsum(sizes), width, side="right")))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for one in columns[:fits]:
        table.add_column(one.head, justify="left" if one.head in ("text", "kept") else "right", no_wrap=True)
    colours = heat.levels(view.column(column), heat.scale_of(view.column(column)))[at]
    for line, (level, kept) in enumerate(zip(colours, view.kept[at], strict=True)):
        texts = [Text(one.cells[line]) for one in columns[:fits]]
        if palette:
            texts[1].stylize(_style(int(level), bool(kept)))
        table.add_row(*texts, style="" if kept else "dim")
    return table, _table_note(view, [column.head.split("\n1e")[0].replace("\n", " ") for column in columns[fits:]])


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    cells: tuple[str, ...]


def _columns(view: RowView, at: NDArray[np.intp]) -> Iterator[_Column]:
    yield _Column("at", tuple(map(str, at)))
    yield _Column("text", tuple(_shortened(readable(view.texts[i], alone=True)) for i in at))
    if view.weight is not None:
        yield _Column("kept", tuple("yes" if view.kept[i] else "no" for i in at))
        yield _Column("weight", tuple(f"{view.weight[i]:.2f}" for i in at))
    for name in filter(view.computed, _TABLE_ORDER):
        signal = view.signals[name]
        unit = heat.unit_of(name, heat.scale_of(signal))
        power = f"\n1e{unit.exponent}" if unit.exponent else ""
        yield _Column(_HEADS.get(name, name) + power, tuple(unit.write(float(signal[i])) for i in at))


def _shortened(text: str, width: int = 24) -> str:
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def _table_note(view: RowView, left_out: Sequence[str]) -> str:
    note = (
        "value and its parts in nats per unit step, nll and entropy in nats; 1e-3 in a heading: these numbers are"
        f" thousandths. {SYMBOLS}."
    )
    if not view.computed("reference_nll"):
        note += " reference nll was not computed: the reference is the model itself."
    return f"{note} Too narrow for {', '.join(left_out)}: widen, or pipe to `less -S`." if left_out else note
