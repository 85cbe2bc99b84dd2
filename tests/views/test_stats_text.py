from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from alphatoken_curate.reading.counting import GroupStats
from alphatoken_curate.reading.histogram import Histogram
from alphatoken_curate.reading.stats import GenerationStats, MaskStats, Stats
from alphatoken_curate.reading.sums import PairStats
from alphatoken_curate.runs.schema import COMPONENTS, components
from alphatoken_curate.views.stats_text import histogram_bars, stats_lines, strip


def bars(count: tuple[int, ...], kept: tuple[int, ...] | None, width: int = 40) -> list[str]:
    histogram = Histogram(edges=(-0.5, 0.0, 0.5), count=count, kept=kept)
    return histogram_bars(histogram, width).plain.splitlines()


def test_any_kept_or_dropped_token_shows_however_few() -> None:
    assert bars((1000, 800, 1, 200), (1, 799, 1, 0)) == [
        "                             tokens kept",
        "  below -0.5 █░░░░░░░░░░░░░░  1,000  <1%",
        "-0.5 to    0 ███████████░       800 >99%",
        "   0 to  0.5 █                    1 100%",
        "   from  0.5 ░░░                200   0%",
    ]


def test_empty_bins_at_the_ends_are_left_out_and_those_between_are_not() -> None:
    assert [line.split()[-1] for line in bars((0, 3, 0, 4), None)] == ["tokens", "3", "0", "4"]
    assert [line.split()[0] for line in bars((0, 3, 0, 0), (0, 1, 0, 0))][1:] == ["-0.5"]


def test_without_a_mask_bars_are_whole() -> None:
    lines = bars((1, 2, 3, 4), None)
    assert "░" not in "".join(lines)
    assert "kept" not in lines[0]


def test_nothing_to_count() -> None:
    assert bars((0, 0, 0, 0), (0, 0, 0, 0)) == ["no scored tokens"]


VALUES = Histogram(edges=(-1.0, 0.0, 1.0), count=(0, 50, 40, 10), kept=(0, 0, 40, 10))


def group(tokens: int, kept: int | None) -> GroupStats:
    share = None if kept is None else kept / tokens
    return GroupStats(scored_tokens=tokens, kept_tokens=kept, kept_share=share, mean=0.25, rms=1.5, values=VALUES)


PAIRS = PairStats(rows=40, omega=0.0478, margin=0.0912, margin_above_zero=0.625)


def spread(stability: float) -> Mapping[str, float]:
    return {**dict.fromkeys((*COMPONENTS, "adaptation", "value"), 0.5), "stability": stability}


def generation(number: int, stability: float, **changes: Any) -> GenerationStats:
    one = GenerationStats(
        generation=number,
        checkpoint=f"out/checkpoint-{number}",
        shards=1,
        rows=40,
        bytes=1000,
        rms=spread(stability),
        pairs=None,
        values=group(100, 50),
    )
    return replace(one, **changes)


def mask(*generations: int) -> MaskStats:
    return MaskStats(
        mask=6,
        generations=generations,
        settings={"by": "value", "keep": 0.5},
        kept_tokens=50,
        response_tokens=100,
        kept_share=0.5,
        rows_given_back=0,
        end_of_turn_tokens=12,
        end_of_turn_kept=9,
        over_share=0,
    )


BASE = Stats(
    kind="sft",
    estimator="published",
    generation=0,
    rows={"read": 40, "scored": 40},
    tokens=200,
    response_tokens=100,
    truncated_rows=0,
    truncated_tokens=0,
    scored_tokens=100,
    kept_tokens=50,
    kept_share=0.5,
    rows_left_out=0,
    branches={},
    sources={"a.jsonl": group(100, 50)},
    pairs=None,
    histograms={"nll": replace(VALUES, edges=(0.0, 1.0, 2.0)), "adapt_direct": VALUES, "value": VALUES},
    rms=spread(0.25),
    mean={"nll": 1.0},
    stability_is_zero=False,
    decisions_changed={"none": 12, "rms": 34},
    decided_tokens=100,
    decided_generations=(0,),
    decided_by_value=True,
    generations=(generation(0, 0.25),),
    masks=(mask(0),),
)
SEVERAL = replace(BASE, generation=8, generations=(generation(0, 0.0), generation(8, 0.0625), generation(16, 0.25)))


def shown(found: Stats, width: int = 100) -> str:
    console = Console(width=width, markup=False, highlight=False, emoji=False, color_system=None)
    with console.capture() as captured:
        for part in stats_lines(found, width):
            console.print(part)
    text = captured.get()
    assert max(map(cell_len, text.splitlines())) <= width
    return text


def flowed(found: Stats, width: int = 100) -> str:
    return " ".join(shown(found, width).split())


def test_one_generation_says_nothing_of_generations_but_its_line() -> None:
    text = shown(BASE)
    assert text.count("generation") == 2
    assert "stability changes 12 of 100 decisions of mask 6 (12.0%); with --stability-scale rms 34 (34.0%)" in text
    assert "chosen" not in text
    assert "margin" not in text
    assert "drift" not in text
    assert "left out" not in text


def test_the_drift_has_a_line_where_it_was_computed() -> None:
    text = shown(replace(BASE, rms={**BASE.rms, "drift_direct": 0.125, "drift_causal": 2.0, "drift": 3.0}))
    assert ["drift", "0.125", "2", "3"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_stability_is_seen_to_grow_over_generations(width: int) -> None:
    tiny = spread(1.23e-05) | dict.fromkeys(COMPONENTS, 1.23e-05)
    found = replace(SEVERAL, generations=(*SEVERAL.generations, generation(123, 0, rms=tiny)))
    text = shown(found, width)
    lines = [line.split() for line in text.split("spread of each generation")[1].splitlines()]
    for one, stability in zip(found.generations, ("0", "0.0625", "0.25", "1.23e-05"), strict=True):
        (line,) = [line for line in lines if line[:1] == [str(one.generation)] and len(line) > 6]
        assert line[6] == stability
        assert (line[7:] == [one.checkpoint]) == (width >= 80)
        assert one.checkpoint in text
    assert "value of generation 8," in text
    assert "spread of generation 8:" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_pairs_have_margins_and_counts_of_each_branch(width: int) -> None:
    both = {
        "chosen": group(60, 30),
        "rejected": group(40, 10),
    }
    several = tuple(replace(one, pairs=PAIRS) for one in SEVERAL.generations)
    text = flowed(replace(SEVERAL, kind="preference", branches=both, pairs=PAIRS, generations=several), width)
    assert "chosen 30 of 60 (50.0%)" in text
    assert "rejected 10 of 40 (25.0%)" in text
    assert "40 pairs: mean margin +0.0912, above 0 in 62.5%" in text
    assert "mean omega 0.0478" in text
    assert text.count("+0.0912") == (4 if width >= 80 else 1)
    bare = {name: replace(one, kept_tokens=None, kept_share=None) for name, one in both.items()}
    assert "rejected 40 scored" in flowed(replace(BASE, kind="preference", branches=bare, masks=()), width)


def test_nothing_is_said_of_pairs_where_none_was_scored() -> None:
    none = PairStats(rows=0, omega=None, margin=None, margin_above_zero=None)
    assert "pairs" not in shown(replace(BASE, kind="preference", pairs=none))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"masks": (mask(8),), "decided_generations": (8,)}, "decisions of mask 6 from generation 8 (12.0%)"),
        ({"masks": (mask(0, 8),), "decided_generations": (0, 8)}, "decisions of mask 6 from generations 0, 8 (12.0%)"),
        (
            {"masks": (mask(0, 8),), "decided_generations": (8,)},
            "decisions of a mask of the settings of mask 6 from generation 8 (12.0%)",
        ),
        ({"masks": (), "decided_generations": (8,)}, "of a mask of the default settings from generation 8 (12.0%)"),
    ],
)
def test_decisions_say_which_mask_and_generations_they_are_of(changes: dict[str, Any], told: str) -> None:
    text = flowed(replace(SEVERAL, **changes))
    assert told in text
    assert "; with --stability-scale rms 34 (34.0%)" in text


def test_decisions_of_a_mean_are_told_where_stability_is_zero_in_the_generation_shown() -> None:
    found = replace(SEVERAL, generation=0, stability_is_zero=True, decided_generations=(0, 8), masks=(mask(0, 8),))
    text = flowed(found)
    assert "stability changes 12 of 100 decisions of mask 6 from generations 0, 8" in text
    assert "Stability is 0 for every token of generation 0," in text
    assert "Score with --reference" not in text
    nothing = replace(found, decisions_changed={"none": 0, "rms": 0})
    assert "stability changes" not in flowed(nothing)


def test_stability_that_is_zero_everywhere_says_what_to_do() -> None:
    zero = tuple(generation(number, 0.0) for number in (0, 8))
    assert "Score with --reference" in flowed(replace(SEVERAL, stability_is_zero=True, generations=zero))


def test_masks_say_what_they_are_made_from_and_leave_out() -> None:
    text = flowed(replace(SEVERAL, masks=(mask(0, 16),), rows_left_out=3))
    assert "left out 3 rows: not each of generations 0, 16 of the mask scored them" in text
    assert "6 50 50.0% 0, 16 value; --keep 0.5" in text


def of_estimator(estimator: str) -> Stats:
    """SEVERAL as that estimator gives it: adaptation is 0.5, stability 0.25, upstream 0.75."""
    known = components(estimator)
    rms = dict.fromkeys((*known.adaptation, "adaptation", "value"), 0.5)
    rms |= dict.fromkeys((*known.stability, "stability"), 0.25) | dict.fromkeys(known.upstream, 0.75)
    rms |= dict.fromkeys((*known.drift, "drift"), 0.125)
    generations = tuple(replace(one, rms=rms) for one in SEVERAL.generations)
    return replace(SEVERAL, estimator=estimator, rms=rms, generations=generations)


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize(
    ("estimator", "spreads", "growth"),
    [
        (
            "influence",
            "influence|adaptation 0.5|stability 0.25|drift 0.125|value 0.5",
            "adapt stab|influence influence|8 0.5 0.25",
        ),
        (
            "exact+influence",
            "direct causal sum upstream|adaptation 0.5 0.5 0.5 0.75|stability 0.25 0.25 0.25 0.75"
            "|drift 0.125 0.125 0.125|value 0.5",
            "adapt adapt adapt stab stab stab|direct causal sum direct causal sum|8 0.5 0.5 0.5 0.25 0.25 0.25",
        ),
    ],
)
def test_spreads_have_the_columns_of_the_estimator(estimator: str, spreads: str, growth: str, width: int) -> None:
    text = shown(of_estimator(estimator), width)
    first, _, later = text.partition("spread of each generation")
    lines = [" ".join(line.split()) for line in first.splitlines()]
    assert set(spreads.split("|")) <= set(lines)
    grown = [" ".join(line.split()).removesuffix("checkpoint").strip() for line in later.splitlines()]
    assert all(any(line.startswith(want) for line in grown) for want in growth.split("|")), grown


def test_the_value_stands_under_the_sum() -> None:
    lines = shown(of_estimator("exact+influence")).partition("\nspread of generation")[2].splitlines()
    head, value = (next(line for line in lines if line.split()[:1] == [word]) for word in ("direct", "value"))
    assert head.index("sum") + len("sum") == len(value.rstrip())


# ------------------------------------------------------------------------------------------------- many histograms


def test_a_strip_has_a_block_for_each_bin_and_a_line_at_zero() -> None:
    assert strip(Histogram(edges=(-1.0, 0.0, 1.0), count=(0, 1, 800, 200), kept=None)) == " ▁│█▂"
    assert strip(Histogram(edges=(0.0, 1.0, 2.0), count=(0, 8, 4, 1), kept=None)) == " █▄▁"
    assert strip(Histogram(edges=(-1.0, 0.0, 1.0), count=(0, 0, 0, 0), kept=None)) == "  │  "


def test_every_signal_has_its_strip() -> None:
    lines = shown(BASE).partition("\nsignals")[2].splitlines()
    assert lines[0] == ", nats per unit step; nll in nats"
    assert [line.split() for line in lines[1:4]] == [
        ["nll", "0", "█▇▂", "2"], ["adapt_direct", "-1", "█│▇▂", "1"], ["value", "-1", "█│▇▂", "1"],
    ]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_sources_branches_and_generations_are_told_apart(width: int) -> None:
    sources = {f"a/very/long/path/to/some/rows/part-{i}.jsonl": group(100 + i, 50) for i in range(15)}
    found = replace(SEVERAL, sources=sources, branches={"chosen": group(60, 30), "rejected": group(40, 10)})
    text = shown(found, width)
    assert "value by source, from -1 to 1" in text
    lines = [line for line in text.splitlines() if "part-" in line]
    assert [line.split()[1] for line in lines] == [str(100 + i) for i in range(3, 15)]
    assert "and 3 smaller ones" in text
    one_more = dict(list(sources.items())[:13])
    assert "and 1 smaller one, in --json" in shown(replace(found, sources=one_more), width)
    assert all("█│▇▂" in line and line.startswith("…") for line in lines)
    assert all(("+0.25" in line) == (width >= 80) for line in lines)
    chosen, rejected = (next(line for line in text.splitlines() if line.startswith(name)) for name in found.branches)
    assert "50.0%" in chosen and "25.0%" in rejected
    assert text.count("out/checkpoint-16") == (3 if width >= 80 else 2)


def test_what_there_is_only_one_of_is_not_told_apart() -> None:
    assert "value by" not in shown(BASE)
    bare = replace(
        SEVERAL, masks=(), generations=tuple(replace(one, values=group(9, None)) for one in SEVERAL.generations)
    )
    assert "kept" not in shown(bare).partition("value by generation")[2].splitlines()[1]


def test_the_names_of_sources_command_nothing() -> None:
    evil = {"\x1b]0;x\x07.jsonl": group(60, 30), "[bold]a\u202e": group(40, 10)}
    text = shown(replace(BASE, sources=evil))
    assert not set("\x1b\x07\u202e") & set(text)
    assert "[bold]a" in text
