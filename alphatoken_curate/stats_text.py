"""Statistics of a run as rich text and tables. Nothing here prints; no text is ever read as markup."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from alphatoken_curate.files import visible
from alphatoken_curate.stats import Histogram, Stats

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


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
