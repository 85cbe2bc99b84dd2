from __future__ import annotations

from alphatoken_curate.stats import Histogram
from alphatoken_curate.stats_text import histogram_bars


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
