from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from alphatoken_curate.errors import UsageError
from alphatoken_curate.reading.row import COLUMNS
from alphatoken_curate.runs.schema import ERRORS, SIGNALS
from alphatoken_curate.views.heat import (
    LEVELS,
    MIDDLE,
    NO_LEVEL,
    PALETTE,
    Unit,
    levels,
    luminance,
    readable,
    scale_of,
    unit_of,
)

NAN = float("nan")


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# ------------------------------------------------------------------------------------------------- scale and levels


def test_the_scale_is_the_98th_percentile_of_the_magnitudes() -> None:
    values = np.arange(1, 101, dtype=np.float32) * np.where(np.arange(100) % 2, 1, -1)
    assert scale_of(values) == 98
    values[99] = 1e9
    assert scale_of(values) == 98


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (array(), 1.0),
        (array(NAN, NAN), 1.0),
        (array(0.0, 0.0), 1.0),
        (array(-3.0), 3.0),
        (array(NAN, 2.0, -1.0), 2.0),
        (np.concatenate([np.zeros(99, np.float32), array(0.25)]), 0.25),
    ],
)
def test_the_scale_is_never_zero_and_leaves_out_missing_values(values: np.ndarray, expected: float) -> None:
    assert scale_of(values) == expected


def test_levels_are_linear_centred_and_clipped() -> None:
    found = levels(array(-9, -1, -0.5, 0, 0.0625, 0.125, 1, 9, NAN), 1.0)
    assert found.tolist() == [0, 0, 4, 8, 8, 9, 16, 16, NO_LEVEL]
    assert found.dtype == np.int8


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1))
def test_levels_mirror_and_ascend(numbers: list[float]) -> None:
    values = np.sort(array(*numbers))
    found = levels(values, scale_of(values))
    assert np.all(np.diff(found) >= 0)
    assert np.array_equal(levels(-values, scale_of(values)), LEVELS - 1 - found)


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN])
def test_a_scale_that_is_no_magnitude_is_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="scale"):
        levels(array(1.0), scale)


# ---------------------------------------------------------------------------------------------------------- palette


def rgb(text: str) -> tuple[int, ...]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(rgb(one)), luminance(rgb(other))), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_text_can_be_read_on_every_colour() -> None:
    assert luminance((255, 255, 255)) == pytest.approx(1)
    for colour in PALETTE:
        assert contrast(colour.text, colour.background) >= 4.5
        assert contrast(colour.faded, colour.background) >= 3


def test_the_palette_is_white_at_zero_and_darkens_to_blue_and_orange() -> None:
    assert len(PALETTE) == LEVELS
    assert PALETTE[MIDDLE].background == "#ffffff"
    bright = [luminance(rgb(colour.background)) for colour in PALETTE]
    assert np.all(np.diff(bright[: MIDDLE + 1]) > 0)
    assert np.all(np.diff(bright[MIDDLE:]) < 0)
    for level, colour in enumerate(PALETTE):
        red, _, blue = rgb(colour.background)
        assert np.sign(red - blue) == np.sign(level - MIDDLE)


# ------------------------------------------------------------------------------------------------------------ units


def test_numbers_are_written_in_a_unit_that_gives_three_digits() -> None:
    cases = {0.0042: "+4.20", 0.05: "+50.00", 0.42: "+0.420", 4.2: "+4.20", 42: "+42.00", 420: "+420.0"}
    cases |= {4e-7: "+400.0", 4.2e4: "+42.00"}
    assert {value: unit_of("value", value).write(value) for value in cases} == cases
    assert unit_of("value", 0.0042).label == "1e-3 nats per unit step"
    assert unit_of("value", 4.2).label == "nats per unit step"
    assert unit_of("value", 0.0042, "nats per unit weight").label == "1e-3 nats per unit weight"
    assert unit_of("nll", 0.0042, "nats per unit weight") == Unit(name="nats", signed=False)
    assert unit_of("loss_weight", 1.0).label == "multiples of the mean"


def test_every_column_has_a_unit() -> None:
    assert set(SIGNALS) < set(COLUMNS)
    for column in COLUMNS:
        assert unit_of(column, 1.0).label in ("nats", "nats per unit step", "multiples of the mean")
        is_signed = unit_of(column, 1.0).label == "nats per unit step" and column not in ERRORS
        assert unit_of(column, 1.0).signed == is_signed
    assert unit_of("value_error", 2e-5).write(3.1e-5) == "31.00", "a size, in the unit of values"


def test_zero_and_missing_numbers() -> None:
    assert unit_of("value", 1.0).write(0.0) == "0"
    assert unit_of("value", 1.0).write(NAN) == ""
    assert unit_of("value", 1.0).write(-1e-9) == "-0.00"


# ------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("word", "word"),
        (" the", "·the"),
        ("    ", "····"),
        ("two words ", "two words·"),
        ("\n", "⏎\n"),
        (" \n\n  x", "·⏎\n⏎\n  x"),
        ("\t", "⇥"),
        ("\r\n", "␍⏎\n"),
        ("\x1b]52;c;aGk=\x07", "␛]52;c;aGk=␇"),
        ("\x1b[2J", "␛[2J"),
        ("\x00\x7f", "␀␡"),
        ("\x9b31m\x85", "⟨U+009B⟩31m⟨U+0085⟩"),
        ("\u202eabc\u2069", "⟨U+202E⟩abc⟨U+2069⟩"),
        ("\u2028\ufeff\u00ad", "⟨U+2028⟩⟨U+FEFF⟩⟨U+00AD⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("a\u00a0b\u3000c", "a␣b␣c"),
        ("\u3164", "⟨U+3164⟩"),
        ("\ufffd\ufffda", "▯a"),
        (" \ufffd", "·▯"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("नमस्ते", "नमस्ते"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("\u200d", "⟨U+200D⟩"),
        ("日本語", "日本語"),
        ("⏎", "⏎"),
        ("", ""),
    ],
)
def test_text_is_made_visible(text: str, expected: str) -> None:
    assert readable(text) == expected


def test_text_alone_has_no_line_break_and_its_marks_stand_on_a_circle() -> None:
    assert readable(" \n\n", alone=True) == "·⏎⏎"
    assert readable("\u0301a", alone=True) == "◌\u0301a"
    assert readable("\u0301a") == "\u0301a"


@pytest.mark.parametrize("text", ["שלום", "مرحبا", " ١٢", "abc א"])
def test_right_to_left_text_alone_ends_where_it_ends(text: str) -> None:
    assert readable(text, alone=True) == readable(text) + "\u200e"
    assert cell_len(readable(text, alone=True)) == cell_len(text)
    assert "\u200e" not in readable(text) + readable("abc é 日本", alone=True)


def test_spaces_can_be_left_as_they_are() -> None:
    assert readable("  a ", dots=False) == "  a "


@given(st.text(alphabet=st.one_of(st.characters(), st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Zs"]))))
def test_nothing_that_commands_a_terminal_gets_through(text: str) -> None:
    shown = readable(text)
    assert shown.count("\n") == text.count("\n")
    odd = {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert odd <= {"\n", "\u200c", "\u200d"}
    assert not text or shown
    alone = readable(text, alone=True)
    assert "\n" not in alone
    assert "\u200e" not in alone.rstrip("·")[:-1]
    alone.encode()
