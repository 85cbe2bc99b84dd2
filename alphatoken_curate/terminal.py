"""Rows and statistics as rich renderables. Nothing here prints, and no text of a run is ever read as markup."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from alphatoken_curate import heat
from alphatoken_curate.files import visible
from alphatoken_curate.heat import MIDDLE, PALETTE, Unit, readable
from alphatoken_curate.row_view import RowView
from alphatoken_curate.schema import COMPONENTS, SIGNALS
from alphatoken_curate.stats import Histogram, Stats

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Cell = tuple[str, str]
"""Text as it is shown, and its rich style."""

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
    return legend.append(_SYMBOLS + "\n\n", "dim").append_text(_flow(_words(cells), width))


def plain_row(view: RowView, column: str, width: int) -> Text:
    """The row without a palette: `text:+0.42` for each response token, `~text:-0.10~` for a dropped one.

    Styles are named ones, which a terminal of 16 colours can show and others leave out.
    """
    from rich.text import Text

    values = view.column(column)
    scale = heat.scale_of(values)
    unit = heat.unit_of(column, scale)
    legend = f"Each response token is text:{column}, in {unit.label}; ~text:{column}~ is dropped. {_SYMBOLS}."
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


_SYMBOLS = "· space, ⏎ newline, ⇥ tab, ▯ part of a character"


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


def token_table(view: RowView, column: str, *, palette: bool) -> Table:
    """One line per response token: position, text, whether it is kept, its weight and every signal of the row."""
    from rich.table import Table
    from rich.text import Text

    names = [name for name in _TABLE_ORDER if name in SIGNALS and view.computed(name)]
    scales = {name: heat.scale_of(view.signals[name]) for name in names}
    units = {name: heat.unit_of(name, scales[name]) for name in names}
    colours = heat.levels(view.column(column), heat.scale_of(view.column(column)))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("text", no_wrap=True)
    table.add_column("kept", no_wrap=True)
    table.add_column("weight", justify="right", no_wrap=True)
    for name in names:
        power = f"\n1e{units[name].exponent}" if units[name].exponent else ""
        table.add_column(_HEADS.get(name, name) + power, justify="right", no_wrap=True)
    for at in np.flatnonzero(view.response):
        kept = bool(view.kept[at])
        text = Text(readable(view.texts[at], alone=True), _style(int(colours[at]), kept) if palette else "")
        weight = "" if view.weight is None else f"{view.weight[at]:.2f}"
        numbers = [Text(units[name].write(float(view.signals[name][at]))) for name in names]
        known = "" if view.weight is None else "yes" if kept else "no"
        table.add_row(Text(str(at)), text, Text(known), Text(weight), *numbers, style="" if kept else "dim")
    return table


def table_note(view: RowView) -> str:
    """What the table's numbers are."""
    missing = "" if view.computed("reference_nll") else " reference_nll was not computed: the reference is the model."
    return (
        "value and its components in nats per unit step, nll and entropy in nats; 1e-3 in a heading: its numbers are"
        f" thousandths. {_SYMBOLS}.{missing}"
    )


# --------------------------------------------------------------------------------------------------------- statistics


def stats_lines(found: Stats, width: int) -> Iterator[Text | Table]:
    """All of a run's statistics, in the order they are shown."""
    from rich.text import Text

    yield _counts(found)
    yield Text(f"\nvalue, nats per unit step{'  (█ kept, ░ dropped)' if found.values.kept else ''}", "bold")
    yield histogram_bars(found.values, width)
    yield Text(f"\nspread: RMS over {found.scored_tokens:,} tokens, nats per unit step", "bold")
    yield _spread_table(found)
    yield Text("\n" + "\n".join(textwrap.fill(line, width) for line in _notes(found)))
    if found.stability_is_zero and found.scored_tokens:
        yield Text(textwrap.fill(_NO_STABILITY, width), "yellow")
    yield Text("\ngenerations and masks", "bold")
    yield _generation_table(found)
    yield _mask_table(found)


_NO_STABILITY = (
    "Stability is 0 for every token, so it plays no part in values or masks: the model and its reference have the same"
    " weights. Score with --reference set to the model that the checkpoint was tuned from."
)


def _counts(found: Stats) -> Table:
    from rich.table import Table
    from rich.text import Text

    rows = ", ".join(f"{count:,} {status}" for status, count in found.rows.items() if status != "read")
    lines = {
        "rows": f"{found.rows['read']:,} read: {rows}",
        "tokens": f"{found.tokens:,}, of them {found.response_tokens:,} in responses; {found.scored_tokens:,} scored",
    }
    if found.kept_tokens is not None and found.masks:
        share = "" if found.kept_share is None else f" ({found.kept_share:.1%})"
        lines["kept"] = f"{found.kept_tokens:,} of {found.scored_tokens:,}{share} by mask {found.masks[-1].mask}"
    if found.truncated_rows:
        lines["cut"] = f"{found.truncated_tokens:,} tokens of {found.truncated_rows:,} rows, by --max-length"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in lines.items():
        table.add_row(Text(name), Text(line))
    return table


def histogram_bars(histogram: Histogram, width: int) -> Text:
    """A line per bin: its range, a bar of kept (█) and dropped (░) tokens, their number, and the share kept."""
    from rich.cells import cell_len
    from rich.text import Text

    filled = [i for i, count in enumerate(histogram.count) if count]
    if not filled:
        return Text("no scored tokens")
    shown = range(min(filled), max(filled) + 1)
    ranges = _ranges(histogram.edges)
    left = max(cell_len(ranges[i]) for i in shown)
    digits = max(len("tokens"), *(len(f"{count:,}") for count in histogram.count))
    most = max(histogram.count)
    room = max(8, min(60, width - left - digits - (7 if histogram.kept else 2)))
    text = Text(f"{'':{left + room + 1}} {'tokens':>{digits}}{' kept' if histogram.kept else ''}", "bold")
    for i in shown:
        count = histogram.count[i]
        kept = histogram.kept[i] if histogram.kept else count
        size = -(-count * room // most)
        # Any kept and any dropped token shows, however few.
        solid = size if kept == count else min(size - 1, -(-kept * size // max(1, count)))
        text.append(f"\n{ranges[i]:>{left}} ", "not bold").append("█" * solid, "yellow").append(
            "░" * (size - solid), "blue"
        )
        text.append(f"{' ' * (room - size)} {count:>{digits},}{_share(kept, count) if histogram.kept else '':>5}")
    return text


def _share(part: int, whole: int) -> str:
    """Whole percents, of which 0% and 100% mean none and all."""
    if not whole:
        return ""
    return "<1%" if 0 < part < 0.01 * whole else ">99%" if 0.99 * whole < part < whole else f"{part / whole:.0%}"


def _ranges(edges: Sequence[float]) -> list[str]:
    names = [f"{edge:g}" if edge else "0" for edge in edges]
    wide = max(map(len, names))
    inner = [f"{a:>{wide}} to {b:>{wide}}" for a, b in pairwise(names)]
    return [f"below {names[0]:>{wide}}", *inner, f"from {names[-1]:>{wide}}"]


def _spread_table(found: Stats) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for head in ("direct", "causal", "sum"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, short in (("adaptation", "adapt"), ("stability", "stab")):
        numbers = [found.rms[f"{short}_direct"], found.rms[f"{short}_causal"], found.rms[name]]
        table.add_row(Text(name), *(Text(f"{x:.3g}") for x in numbers))
    table.add_row(Text("value"), "", "", Text(f"{found.rms['value']:.3g}"))
    return table


def _notes(found: Stats) -> Iterator[str]:
    means = [f"{name} {mean:.3f}" for name, mean in found.mean.items() if mean is not None]
    if means:
        yield f"mean in nats: {', '.join(means)}"
    whose = f"mask {found.masks[-1].mask}" if found.masks else "a mask of the default settings"
    if not found.decided_by_value:
        yield f"{whose} does not select by value, so stability decides nothing in it"
    elif found.scored_tokens and not found.stability_is_zero:
        none, rms = (found.decisions_changed[scale] for scale in ("none", "rms"))
        yield (
            f"stability changes {none:,} of {found.scored_tokens:,} decisions of {whose}"
            f" ({none / found.scored_tokens:.1%}); with --stability-scale rms {rms:,} ({rms / found.scored_tokens:.1%})"
        )


def _generation_table(found: Stats) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("generation", "shards", "rows", "bytes"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("checkpoint", overflow="fold")
    for one in found.generations:
        numbers = (str(one.generation), f"{one.shards:,}", f"{one.rows:,}", f"{one.bytes:,}")
        table.add_row(*map(Text, numbers), Text(visible(one.checkpoint)))
    return table


def _mask_table(found: Stats) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("mask", "kept", "share"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for one in found.masks:
        share = "" if one.kept_share is None else f"{one.kept_share:.1%}"
        settings = visible(", ".join(f"{name} {one.settings[name]}" for name in _SETTINGS if name in one.settings))
        table.add_row(Text(str(one.mask)), Text(f"{one.kept_tokens:,}"), Text(share), Text(settings))
    return table


_SETTINGS = ("keep", "scope", "weights", "by", "stability_weight", "stability_scale")
