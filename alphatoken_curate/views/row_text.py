"""A row of a run as rich text: coloured, plain or as a table. Nothing here prints; no text is ever read as markup."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.reading.row import BranchView, RowView
from alphatoken_curate.reading.search import Hit
from alphatoken_curate.rows.files import visible
from alphatoken_curate.runs.schema import SIGNALS
from alphatoken_curate.views import heat
from alphatoken_curate.views.heat import MIDDLE, PALETTE, Unit, readable
from alphatoken_curate.wording import count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Cell = tuple[str, str]
"""Text as it is shown, and its rich style."""

SYMBOLS = "· space, ⏎ newline, ⇥ tab, ▯ part of a character"
"""The symbols of `heat.readable` that are met most."""

_LAST = ("nll", "entropy", "reference_nll")
_TABLE_ORDER = ("value", *(name for name in SIGNALS if name not in ("value", *_LAST)), *_LAST)
_HEADS = {name: name.replace("reference", "ref").replace("_", "\n") for name in SIGNALS}


def has_palette(console: Console) -> bool:
    """Whether values can be told by background colours: 256 or more of them, and NO_COLOR not set."""
    return console.color_system in ("256", "truecolor") and not console.no_color


# --------------------------------------------------------------------------------------------------------- show a row


def row_parts(
    view: RowView, branch: str | None, columns: Sequence[str], widths: tuple[int, int], *, palette: bool, tokens: bool
) -> Iterator[Text | Table]:
    """All that is shown of a row, of the branch of this name or all, in order.

    Without `tokens` the text once for each of the `columns` (by default the value), in lines of the first of `widths`;
    with it a table of these columns (by default all), as wide as the second. Raises `UsageError` for a branch or column
    that is not there.
    """
    from rich.text import Text

    width, wide = widths
    branches = view.chosen_branches(branch)
    yield row_title(view)
    if view.status != "scored":
        yield why_without_values(view, width)
        branches = tuple(one for one in branches if len(one.texts))
        for one in branches:
            gap = one is not branches[0] or tokens
            yield from _branch_titles(view, one, gap=gap)
            yield without_values(one, width)
    elif tokens:
        left_out: list[str] = []
        for one in branches:
            table, lost = token_table(view, one, columns, palette=palette, width=wide)
            left_out += lost
            yield from _branch_titles(view, one, gap=True)
            yield Text()
            yield table
        yield Text("\n" + textwrap.fill(table_note(view, left_out), width))
    else:
        for place, column in enumerate(columns or ("value",)):
            yield Text("\n" * (place > 0)).append_text(legend(view, column, width, palette=palette))
            for one in branches:
                yield from _branch_titles(view, one, gap=one is not branches[0])
                yield (coloured_row if palette else plain_row)(view, one, column, width)


def _branch_titles(view: RowView, branch: BranchView, *, gap: bool) -> Iterator[Text]:
    """Of a pair, the title of this branch, below an empty line where there is a `gap`."""
    from rich.text import Text

    if branch.name:
        yield Text("\n" * gap).append_text(branch_title(view, branch))


def row_title(view: RowView) -> Text:
    """Which row this is and what became of it; of one sequence its tokens, of a pair its margin and omega."""
    from rich.text import Text

    own = f" · id {visible(view.id)}" if view.id is not None else ""
    turn = f" · turn {view.turn} of {', '.join(map(str, view.turns))}" if view.turns != (0,) else ""
    title = Text(f"row {view.row_id}{turn} · {view.status} · {visible(view.source)}:{view.line}{own}", "bold")
    if view.checkpoint is not None:
        title.append(f"\ngeneration {view.generation}, at {visible(view.checkpoint)}{_other_mask(view)}", "not bold")
    if view.margin is not None and view.omega is not None:
        title.append(f"\n{_pair_line(view.margin, view.omega)}", "not bold")
    return title if len(view.branches) > 1 else title.append(f"\n{_counts(view, view.branches[0])}", "not bold")


def _other_mask(view: RowView) -> str:
    """What the mask was made from, where that is not the generation that is shown."""
    if view.mask_generations in ((), (view.generation,)):
        return ""
    plural = "s" if len(view.mask_generations) > 1 else ""
    made = f"mask {view.mask} is made from generation{plural} {', '.join(map(str, view.mask_generations))}"
    missing = "and not each of them scored this row" if plural else "which did not score this row"
    return f"; {made}, {missing}" if view.left_out else f"; {made}"


def branch_title(view: RowView, branch: BranchView) -> Text:
    """Of a pair: which of its branches this is, and how many of its tokens are kept."""
    from rich.text import Text

    return Text(branch.name, "bold").append(f" · {_counts(view, branch)}", "not bold")


def _pair_line(margin: float, omega: float) -> str:
    more = "more than" if margin > 0 else "less than" if margin < 0 else "exactly as much as"
    return (
        f"margin {margin:+.3g}: the model prefers chosen to rejected {more} the reference does\n"
        f"omega {omega:.3g}: the weight of the pair in DPO; the smaller the margin, the larger"
    )


def _counts(view: RowView, branch: BranchView) -> str:
    tokens, response = len(branch.token_ids), int(branch.response.sum())
    about = f"{count(tokens, 'token')}, {response:,} in the response"
    if branch.weight is not None:
        kept = int(branch.kept.sum())
        about += f"; mask {view.mask} keeps {kept:,} of {response:,} ({kept / max(1, response):.1%})"
    elif view.status == "scored" and not view.left_out:
        about += "; no mask yet"
    return about


def why_without_values(view: RowView, width: int) -> Text:
    """Why a row was not scored."""
    from rich.text import Text

    why = {
        "target": "Held out as a target row: it tells what to learn, so it is not scored and not in train/.",
        "failed": "Failed: its values could not be computed. It is not in train/.",
        "rejected": f"Refused when it was read: {visible(view.reason or 'see rejects.jsonl')}. It has no tokens.",
    }
    return Text(textwrap.fill(why.get(view.status, "Not scored."), width) + "\n", "yellow")


def without_values(branch: BranchView, width: int) -> Text:
    """The text alone of a row that was not scored, its prompt dim."""
    cells = [(readable(t, dots=False), "" if r else "dim") for t, r in zip(branch.texts, branch.response, strict=True)]
    return _flow(_words(cells), width)


def scale_of_row(view: RowView, column: str) -> float:
    """The magnitude of the end colours: one for all branches, so that they compare."""
    return heat.scale_of(np.concatenate([view.column(branch, column) for branch in view.branches]))


def legend(view: RowView, column: str, width: int, *, palette: bool) -> Text:
    """How to read `coloured_row` where there is a palette, else `plain_row`. All branches of a row share it."""
    from rich.text import Text

    scale = scale_of_row(view, column)
    unit, shown = heat.unit_of(column, scale, view.layout.unit), visible(column)
    units = f" in {unit.label}" if unit.label else ""
    if not palette:
        units = units and f",{units}"
        told = f"Each response token is text:{shown}{units}; ~text:{shown}~ is dropped. {SYMBOLS}."
        return Text(textwrap.fill(told, width) + "\n")
    result = Text(f"{shown}{units}: ").append_text(_ramp(unit, scale))
    result.append("\n").append("kept", "bold").append(" ").append("dropped", "strike").append(" ")
    result.append("prompt", "dim").append(f" · the ends hold the {100 - heat.SCALE_PERCENTILE}% largest\n")
    return result.append(SYMBOLS + "\n", "dim")


def coloured_row(view: RowView, branch: BranchView, column: str, width: int) -> Text:
    """A branch's tokens on the colours of their values: prompt dim, kept bold, dropped struck through."""
    values, scale = view.column(branch, column), scale_of_row(view, column)
    cells = [
        (readable(text, dots=bool(response)), _style(int(level), bool(kept)) if response else "dim")
        for text, level, response, kept in zip(
            branch.texts, heat.levels(values, scale), branch.response, branch.kept, strict=True
        )
    ]
    return _flow(_words(cells), width)


def plain_row(view: RowView, branch: BranchView, column: str, width: int) -> Text:
    """A branch without a palette: `text:+0.42` for each response token, `~text:-0.10~` for a dropped one.

    Styles are named ones, which a terminal of 16 colours can show and others leave out.
    """
    from rich.text import Text

    values, scale = view.column(branch, column), scale_of_row(view, column)
    unit = heat.unit_of(column, scale, view.layout.unit)
    result = Text()
    for responds, first, last in _turns(branch):
        result.append("\n" * (first > 0) + f"[{'response' if responds else 'prompt'}]\n", "bold")
        if responds:
            kept = branch.kept[first:last]
            numbers = [unit.write(float(x)) for x in values[first:last]]
            levels = heat.levels(values[first:last], scale)
            made = zip(branch.texts[first:last], numbers, kept, levels, strict=True)
            words = [[_plain_cell(text, number, bool(k), int(level))] for text, number, k, level in made]
            result.append_text(_flow(words, width, gap=" "))
        else:
            cells = [(readable(text, dots=False), "dim") for text in branch.texts[first:last]]
            result.append_text(_flow(_words(cells), width))
        if not result.plain.endswith("\n"):
            result.append("\n")
    result.right_crop()
    return result


def _style(level: int, kept: bool) -> str:
    colour = PALETTE[level]
    # The middle keeps the terminal's own background: a screen of white would hide what stands out.
    ground = "" if level == MIDDLE else f"{colour.text if kept else colour.faded} on {colour.background}"
    return f"bold {ground}".strip() if kept else f"not bold strike {ground or 'bright_black'}"


def _plain_cell(text: str, number: str, kept: bool, level: int) -> Cell:
    shown = f"{readable(text, alone=True)}:{number}"
    # Black on a light ground can be read whatever ground the terminal has.
    ground = "cyan" if level <= MIDDLE - 2 else "yellow" if level >= MIDDLE + 2 else ""
    colour = f"black on {ground}" if ground else "bold" if kept else ""
    shown, style = (shown, colour) if kept else (f"~{shown}~", f"strike {colour}")
    return shown + ("\n" if "\n" in text else ""), style.strip()


def _ramp(unit: Unit, scale: float) -> Text:
    from rich.text import Text

    ramp = Text(f"{unit.write(-scale)} " if unit.signed else "0 ")
    for colour in PALETTE if unit.signed else PALETTE[MIDDLE:]:
        ramp.append(" ", f"{colour.text} on {colour.background}")
    return ramp.append(f" {unit.write(scale)}")


def _turns(branch: BranchView) -> Iterator[tuple[bool, int, int]]:
    """Stretches of prompt and response: (responds, first, last)."""
    edges = np.flatnonzero(np.diff(branch.response.astype(np.int8))) + 1
    for first, last in zip([0, *edges], [*edges, len(branch.response)], strict=True):
        yield bool(branch.response[first]), int(first), int(last)


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


# ------------------------------------------------------------------------------------------------------------ rows


def hit_text(hit: Hit, width: int) -> Text:
    """A row that was searched for: which it is, and the text that was found with what stands around it."""
    from rich.text import Text

    own = f" · id {visible(hit.id)}" if hit.id is not None else ""
    branch = f" · {hit.branch}" if hit.branch else ""
    turn = f" · turn {hit.turn}" if hit.turn else ""
    title = Text(f"row {hit.row_id}{turn} · {hit.status} · {visible(hit.source)}:{hit.line}{own}{branch}\n", "bold")
    parts = ((hit.before, "dim"), (hit.found, "bold reverse"), (hit.after, "dim"))
    cells = [(readable(text, alone=True, dots=False), style) for text, style in parts]
    return title.append_text(_flow([[(word, style)] for text, style in cells for word in _split(text)], width))


def _split(text: str) -> list[str]:
    """Words, each with the space before it."""
    return re.findall(r" *[^ ]+| +", text)


# ---------------------------------------------------------------------------------------------------- a row's table


def token_table(
    view: RowView, branch: BranchView, chosen: Sequence[str], *, palette: bool, width: int
) -> tuple[Table, tuple[str, ...]]:
    """One line per response token: position, text, whether it is kept, its weight, and the columns `chosen`, or all.

    Text is coloured by the first of them, or by value, where there is a `palette`. Columns that do not fit `width` are
    left out, and named beside the table. Raises `UsageError` for columns that there are no numbers of.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    at = np.flatnonzero(branch.response)
    for name in chosen:
        view.column(branch, name)
    columns = [column for column in _columns(view, branch, chosen, at) if any(column.cells)]
    column = (*chosen, "value")[0]
    sizes = [max(cell_len(text) for text in (*column.head.split("\n"), *column.cells)) + 1 for column in columns]
    fits = max(2, int(np.searchsorted(np.cumsum(sizes), width, side="right")))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for one in columns[:fits]:
        table.add_column(one.head, justify="left" if one.head in ("text", "kept") else "right", no_wrap=True)
    colours = heat.levels(view.column(branch, column), scale_of_row(view, column))[at]
    for line, (level, kept) in enumerate(zip(colours, branch.kept[at], strict=True)):
        texts = [Text(one.cells[line]) for one in columns[:fits]]
        if palette:
            texts[1].stylize(_style(int(level), bool(kept)))
        table.add_row(*texts, style="" if kept else "dim")
    return table, tuple(one.head.split("\n1e")[0].replace("\n", " ") for one in columns[fits:])


def table_note(view: RowView, left_out: Sequence[str]) -> str:
    """What the columns of the tables mean, and which were left out as they did not fit."""
    note = (
        f"value and its parts in {view.layout.unit}, nll and entropy in nats; 1e-3 in a heading: these numbers are"
        f" thousandths. {SYMBOLS}."
    )
    if not view.computed("reference_nll"):
        note += " reference nll was not computed: the reference is the model itself."
    if not left_out:
        return note
    return f"{note} Too narrow for {', '.join(dict.fromkeys(left_out))}: widen, or pipe to `less -S`."


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    cells: tuple[str, ...]


def _columns(view: RowView, branch: BranchView, chosen: Sequence[str], at: NDArray[np.intp]) -> Iterator[_Column]:
    yield _Column("at", tuple(map(str, at)))
    yield _Column("text", tuple(shortened(readable(branch.texts[i], alone=True)) for i in at))
    if branch.weight is not None:
        yield _Column("kept", tuple("yes" if branch.kept[i] else "no" for i in at))
        yield _Column("weight", tuple(f"{branch.weight[i]:.2f}" for i in at))
    # The weight stands where it always does.
    names = dict.fromkeys(name for name in chosen if name != "loss_weight")
    for name in names if chosen else filter(view.computed, _TABLE_ORDER):
        unit, values = heat.unit_of(name, scale_of_row(view, name), view.layout.unit), view.column(branch, name)
        power = f"\n1e{unit.exponent}" if unit.exponent else ""
        head = _HEADS.get(name) or shortened(visible(name))
        yield _Column(head + power, tuple(unit.write(float(values[i])) for i in at))


def shortened(text: str, width: int = 24) -> str:
    """Text in so many columns, … where some of it is cut off."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"
