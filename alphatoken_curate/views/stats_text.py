"""Statistics of a run as rich text and tables. Nothing here prints; no text is ever read as markup."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from alphatoken_curate.reading.counting import GroupStats
from alphatoken_curate.reading.histogram import Histogram
from alphatoken_curate.reading.stats import SCALES, GenerationStats, Stats
from alphatoken_curate.reading.sums import MEANS, objectives
from alphatoken_curate.rows.files import visible
from alphatoken_curate.runs.schema import components
from alphatoken_curate.wording import chosen_by, count, end_of_turn, in_sequences, over_share, sequences_are

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def stats_lines(found: Stats, width: int) -> Iterator[Text | Table]:
    """All of a run's statistics, in the order they are shown."""
    from rich.text import Text

    several = len(found.generations) > 1
    shown = f" of generation {found.generation}" if several else ""
    yield _counts(found)
    values = found.histograms["value"]
    marks = "  (█ kept, ░ dropped)" if values.kept else ""
    yield Text(f"\nvalue{shown}, {found.unit}{marks}", "bold")
    yield histogram_bars(values, width)
    for name, groups in _groups(found).items():
        yield Text(f"\nvalue by {name}, from {values.edges[0]:g} to {values.edges[-1]:g}", "bold")
        yield _group_table(groups, width)
    if found.scored_tokens:
        units = ", ".join(name for name in MEANS if name in found.histograms)
        yield Text(f"\nsignals{shown}, {found.unit}; {units} in nats", "bold")
        yield _signal_table(found.histograms)
    yield Text(f"\nspread{shown}: RMS over {count(found.scored_tokens, 'token')}, {found.unit}", "bold")
    yield _spread_table(found)
    notes = [*_pair_notes(found), *_notes(found)]
    yield Text("\n" + "\n".join(_filled(line, width) for line in notes))
    if found.stability_is_zero and found.scored_tokens:
        yield Text(_filled(_no_stability(found), width), "yellow")
    if found.beyond:
        yield Text(f"\nvalues beyond their error{shown}", "bold")
        told, *command = found.beyond.lines()
        yield Text("\n".join([_filled(told, width), *command]))
    yield Text("\ngenerations and masks", "bold")
    yield _generation_table(found)
    if several:
        yield Text(f"\nspread of each generation: RMS, {found.unit}", "bold")
        yield _growth_table(found, width)
        yield Text()
    yield _mask_table(found)


def _filled(line: str, width: int) -> str:
    # Never inside the name of an option.
    return textwrap.fill(line, width, break_on_hyphens=False)


def _no_stability(found: Stats) -> str:
    if any(one.rms["stability"] for one in found.generations):
        return (
            f"Stability is 0 for every token of generation {found.generation}, so it plays no part in its values: its"
            " checkpoint and the reference have the same weights. In other generations it is not 0."
        )
    return (
        "Stability is 0 for every token, so it plays no part in values or masks: the model and its reference have the"
        " same weights. Score with --reference set to the model that the checkpoint was tuned from."
    )


def _counts(found: Stats) -> Table:
    from rich.table import Table
    from rich.text import Text

    rows = ", ".join(f"{count:,} {status}" for status, count in found.rows.items() if status != "read")
    lines = {
        "rows": f"{found.rows['read']:,} read: {rows}{in_sequences(found.sequences)}",
        "tokens": f"{found.tokens:,}, of them {found.response_tokens:,} in responses; {found.scored_tokens:,} scored",
    }
    if found.rehearsed:
        lines["values"] = f"of a rehearsed training: {found.rehearsed}"
    if found.kept_tokens is not None and found.masks:
        lines["kept"] = f"{_kept(found)} by mask {found.masks[-1].mask}"
    lines |= {f"  {name}": _kept(branch) for name, branch in found.branches.items()}
    newest = found.masks[-1] if found.masks else None
    if newest and (told := end_of_turn(newest.end_of_turn_tokens, newest.end_of_turn_kept)):
        name, _, lines_told = told.partition(": ")
        over = f"; {over_share(newest.over_share)}" if newest.over_share else ""
        lines[name] = lines_told + over
    if found.rows_left_out:
        numbers = ", ".join(map(str, found.masks[-1].generations))
        left_out = count(found.rows_left_out, *sequences_are(found.sequences))
        lines["left out"] = f"{left_out}: not each of generations {numbers} of the mask scored them"
    if found.truncated_rows:
        lines["cut"] = (
            f"{count(found.truncated_tokens, 'token')} of {count(found.truncated_rows, 'row')}, by --max-length"
        )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in lines.items():
        table.add_row(Text(name), Text(line))
    return table


def _kept(found: Stats | GroupStats) -> str:
    if found.kept_tokens is None:
        return f"{found.scored_tokens:,} scored"
    share = "" if found.kept_share is None else f" ({found.kept_share:.1%})"
    return f"{found.kept_tokens:,} of {found.scored_tokens:,}{share}"


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
    text = Text().append(f"{'':{left + room + 1}} {'tokens':>{digits}}{' kept' if histogram.kept else ''}", "bold")
    for i in shown:
        count = histogram.count[i]
        kept = histogram.kept[i] if histogram.kept else count
        size = -(-count * room // most)
        # Any kept and any dropped token shows, however few.
        solid = size if kept == count else min(size - 1, -(-kept * size // max(1, count)))
        text.append(f"\n{ranges[i]:>{left}} ").append("█" * solid, "yellow").append("░" * (size - solid), "cyan")
        text.append(f"{' ' * (room - size)} {count:>{digits},}{_share(kept, count) if histogram.kept else '':>5}")
    return text


# ------------------------------------------------------------------------------------------------ many histograms

_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_GROUPS = 12


def strip(histogram: Histogram) -> str:
    """A block for each bin, as high as its tokens are many beside the fullest; blank where there is none, │ at 0."""
    most = max(histogram.count)
    blocks = [_BLOCKS[-(-count * len(_BLOCKS) // most) - 1] if count else " " for count in histogram.count]
    if histogram.edges[0] < 0:
        # Before the first bin that no value below 0 is counted in.
        blocks.insert(histogram.edges.index(0.0) + 1, "│")
    return "".join(blocks)


def _groups(found: Stats) -> dict[str, list[tuple[str, GroupStats]]]:
    """Groups of tokens whose values are told beside each other, where there is more than one."""
    sources = [(end_of(visible(name)), one) for name, one in found.sources.items()]
    generations = [(f"{one.generation} {end_of(visible(one.checkpoint))}", one.values) for one in found.generations]
    groups = {"branch": list(found.branches.items()), "source": sources, "generation": generations}
    return {name: members for name, members in groups.items() if len(members) > 1}


def end_of(name: str, width: int = 24) -> str:
    """The end of a long name, which tells files of one folder apart."""
    from rich.cells import cell_len, set_cell_size

    return name if cell_len(name) <= width else "…" + set_cell_size(name[::-1], width - 1)[::-1]


def _group_table(groups: Sequence[tuple[str, GroupStats]], width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    wide, masked = width >= 80, any(one.kept_share is not None for _, one in groups)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    for head in ("tokens", *(["kept"] if masked else []), *(["mean", "RMS"] if wide else [])):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = sorted((one.scored_tokens for _, one in groups), reverse=True)[:_MOST_GROUPS]
    shown = [(name, one) for name, one in groups if one.scored_tokens >= most[-1]][:_MOST_GROUPS]
    for name, one in shown:
        kept = "" if one.kept_share is None else f"{one.kept_share:.1%}"
        sizes = [f"{one.mean or 0:+.3g}", f"{one.rms or 0:.3g}"] if wide else []
        cells = [name, f"{one.scored_tokens:,}", *([kept] if masked else []), *sizes, strip(one.values)]
        table.add_row(*map(Text, cells))
    if len(groups) > len(shown):
        table.add_row(Text(f"and {count(len(groups) - len(shown), 'smaller one')}, in --json"))
    return table


def _signal_table(histograms: Mapping[str, Histogram]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for name, one in histograms.items():
        table.add_row(*map(Text, (name, f"{one.edges[0]:g}", strip(one), f"{one.edges[-1]:g}")))
    return table


# ---------------------------------------------------------------------------------------------------------- spreads


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

    known = components(found.estimator)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    heads = [_path(part) for part in known.adaptation]
    for head in (*heads, *(["sum"] if len(heads) > 1 else []), *(["upstream"] if known.upstream else [])):
        table.add_column(head, justify="right", no_wrap=True)
    for name, parts in objectives(known).items():
        beside = [one for one in known.upstream if parts[0].split("_")[0] == one.split("_")[0]]
        if name in found.rms:
            table.add_row(Text(name), *_sizes(found.rms, [*_with_sum(name, parts), *beside]))
    table.add_row(Text("value"), *[""] * (len(heads) - 1 + (len(heads) > 1)), *_sizes(found.rms, ["value"]))
    return table


def _path(signal: str) -> str:
    """`direct` of `adapt_direct`."""
    return signal.split("_")[1]


def _with_sum(objective: str, parts: Sequence[str]) -> list[str]:
    """The parts of an objective and, where there are several, their sum."""
    return [*parts, *([objective] if len(parts) > 1 else [])]


def _sizes(rms: Mapping[str, float], names: Sequence[str]) -> list[Text]:
    from rich.text import Text

    return [Text(f"{rms[name]:.3g}") for name in names]


def _notes(found: Stats) -> Iterator[str]:
    means = [f"{name} {mean:.3f}" for name, mean in found.mean.items() if mean is not None]
    if means:
        yield f"mean in nats: {', '.join(means)}"
    whose = _whose(found)
    if not found.decided_by_value:
        yield f"{whose} {found.undecided}"
        whose = "the published mask (--by value --keep 0.5 --always-keep none)"
    if found.decided_tokens and (any(found.decisions_changed.values()) or not found.stability_is_zero):
        none, rms, of = *(found.decisions_changed[scale] for scale in SCALES), found.decided_tokens
        yield (
            f"stability changes {none:,} of {count(of, 'decision')} of {whose} ({none / of:.1%});"
            f" with --stability-scale rms {rms:,} ({rms / of:.1%})"
        )


def _whose(found: Stats) -> str:
    """The mask whose decisions were looked at."""
    numbers = ", ".join(map(str, found.decided_generations))
    plural = "s" if len(found.decided_generations) > 1 else ""
    made = f" from generation{plural} {numbers}" if len(found.generations) > 1 else ""
    if not found.masks:
        return f"a mask of the default settings{made}"
    newest = found.masks[-1]
    if newest.generations != found.decided_generations:
        return f"a mask of the settings of mask {newest.mask}{made}"
    return f"mask {newest.mask}{made}"


def _pair_notes(found: Stats) -> Iterator[str]:
    pairs = found.pairs
    if pairs and pairs.omega is not None and pairs.margin is not None and pairs.margin_above_zero is not None:
        yield (
            f"{count(pairs.rows, 'pair')}: mean margin {pairs.margin:+.3g}, above 0 in {pairs.margin_above_zero:.1%}"
            " (the model prefers chosen to rejected more than the reference does);"
            f" mean omega {pairs.omega:.3g} (the weight of a pair in DPO)"
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


def _growth_table(found: Stats, width: int) -> Table:
    """How large each part is from checkpoint to checkpoint; names and margins where the terminal is wide enough."""
    from rich.table import Table
    from rich.text import Text

    known = components(found.estimator)
    short = {"adapt": ("adaptation", known.adaptation), "stab": ("stability", known.stability)}
    names = [name for objective, parts in short.values() for name in _with_sum(objective, parts)]
    heads = [
        f"{prefix}\n{'sum' if name == objective else _path(name)}"
        for prefix, (objective, parts) in short.items()
        for name in _with_sum(objective, parts)
    ]
    wide = width >= 80
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for head in ("", *heads, *(["margin"] if wide and found.pairs else [])):
        table.add_column(head, justify="right", no_wrap=True)
    if wide:
        table.add_column("checkpoint", overflow="fold")
    for one in found.generations:
        beside = [*([_margin(one)] if found.pairs else []), visible(one.checkpoint)] if wide else []
        table.add_row(Text(str(one.generation)), *_sizes(one.rms, names), *map(Text, beside))
    return table


def _margin(one: GenerationStats) -> str:
    return "" if one.pairs is None or one.pairs.margin is None else f"{one.pairs.margin:+.3g}"


def _mask_table(found: Stats) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    several = len(found.generations) > 1
    for head in ("mask", "kept", "share", *(["generations"] if several else [])):
        table.add_column(head, justify="right", no_wrap=head != "generations")
    table.add_column("settings", overflow="fold")
    for one in found.masks:
        share = "" if one.kept_share is None else f"{one.kept_share:.1%}"
        settings = visible(chosen_by(one.settings), 400)
        made_from = [", ".join(map(str, one.generations))] if several else []
        table.add_row(*map(Text, (str(one.mask), f"{one.kept_tokens:,}", share, *made_from, settings)))
    return table
