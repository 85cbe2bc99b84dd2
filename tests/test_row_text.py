from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from alphatoken_curate.heat import PALETTE
from alphatoken_curate.row_text import coloured_row, has_palette, plain_row, row_title, token_table, without_values
from alphatoken_curate.row_view import RowView
from alphatoken_curate.schema import SIGNALS

EVIL = (
    "\x1b]52;c;aGk=\x07",
    "\x1b[2J",
    "[bold red]x[/]",
    "[link=http://x]",
    "\u202e",
    "\x9b31m",
    "\r",
    "\t",
    ":smile:",
)


def view_of(texts: list[str], values: list[float | None], kept: list[bool], **changes: Any) -> RowView:
    """A scored row: None is a prompt token."""
    value = np.array([np.nan if x is None else x for x in values], np.float32)
    view = RowView(
        row_id=4,
        source="a.jsonl",
        line=5,
        id="x",
        status="scored",
        token_ids=np.arange(len(texts), dtype=np.int32),
        texts=tuple(texts),
        response=~np.isnan(value),
        signals=dict.fromkeys(SIGNALS, value),
        weight=np.array(kept, np.float32) * 2,
        mask=0,
    )
    return replace(view, **changes)


SMALL = view_of(
    ["Hi", " there", "\n", "No", " way", ".\n", "Bye", "<end>"],
    [None, None, None, 1.0, -0.5, 0.25, 0.0, None],
    [False, False, False, True, False, True, False, False],
)


def printed(what: object, width: int = 80, **settings: Any) -> str:
    console = Console(width=width, markup=False, highlight=False, emoji=False, **settings)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def test_plain_text_has_values_and_marks_what_is_dropped() -> None:
    body = plain_row(SMALL, "value", 80).plain.split("\n\n", 1)[1]
    assert body == ("[prompt]\nHi there⏎\n\n[response]\nNo:+1.00 ~·way:-0.50~ .⏎:+0.25\n~Bye:0~\n\n[prompt]\n<end>\n")


def test_plain_text_is_the_same_without_colours_and_with_sixteen() -> None:
    text = plain_row(SMALL, "value", 80)
    bare = printed(text, color_system=None)
    assert "\x1b" not in bare
    sixteen = printed(text, force_terminal=True, color_system="standard")
    assert "\x1b[1;33mNo:+1.00" in sixteen
    assert "\x1b[9;34m~·way:-0.50~" in sixteen


def test_colours_follow_the_value_and_dropped_tokens_are_struck_through() -> None:
    text = coloured_row(SMALL, "value", 80)
    spans = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert spans["No"] == f"bold {PALETTE[16].text} on {PALETTE[16].background}"
    assert spans["·way"] == f"not bold strike {PALETTE[4].faded} on {PALETTE[4].background}"
    assert spans[".⏎\n"] == f"bold {PALETTE[10].text} on {PALETTE[10].background}"
    assert spans["Bye"] == "not bold strike bright_black"
    assert spans[" there"] == "dim"
    assert "value in nats per unit step: -1.00 " in text.plain
    assert text.plain.endswith("Hi there⏎\nNo·way.⏎\nBye<end>")


@pytest.mark.parametrize("system", ["256", "truecolor"])
def test_a_palette_needs_256_colours(system: Any) -> None:
    assert has_palette(Console(force_terminal=True, color_system=system))
    assert not has_palette(Console(force_terminal=True, color_system=system, no_color=True))
    assert not has_palette(Console(force_terminal=True, color_system="standard"))
    assert not has_palette(Console(color_system=None))


@pytest.mark.parametrize("settings", [{"color_system": None}, {"force_terminal": True, "color_system": "truecolor"}])
def test_hostile_text_commands_nothing(settings: dict[str, Any]) -> None:
    response = view_of(list(EVIL), [1.0] * len(EVIL), [True] * len(EVIL), id=EVIL[0], source="\x1b[2J.jsonl")
    prompt = view_of(list(EVIL), [None] * len(EVIL), [False] * len(EVIL))
    rejected = replace(prompt, status="rejected", reason="\x1b]0;x\x07")
    for view in (response, prompt, rejected):
        made: list[object] = [row_title(view), without_values(view, 80), plain_row(view, "value", 80)]
        made += [coloured_row(view, "value", 80), token_table(view, "value", palette=True, width=200)[0]]
        for out in (printed(part, 200, **settings) for part in made):
            assert not set("\x07\x9b\u202e\r\t") & set(out)
            # Only rich's own colours: escape, bracket, numbers, m.
            assert all(
                part[0] == "[" and part[1:].split("m")[0].replace(";", "").isdigit() for part in out.split("\x1b")[1:]
            )
    shown = plain_row(response, "value", 80).plain
    assert "[bold red]x[/]:+1.00" in shown
    assert ":smile:" in printed(plain_row(response, "value", 80), color_system=None)


@pytest.mark.parametrize("width", [20, 60, 80, 120])
def test_lines_break_between_words_and_fit(width: int) -> None:
    words = [" word", "s", " of", " 日本", "語", " x" * 3, "=" * 30, "\n", "  indent"] * 12
    values: list[float | None] = [0.5 - i % 2 for i in range(len(words))]
    scored = view_of(words, values, [i % 3 > 0 for i in range(len(words))])
    prompt = view_of(words, [None] * len(words), [False] * len(words))
    for text in (coloured_row(scored, "value", width), plain_row(scored, "value", width)):
        lines = printed(text, width, color_system=None).splitlines()
        assert max(map(cell_len, lines)) <= width
    body = coloured_row(scored, "value", width).plain.split("\n\n", 1)[1]
    assert body.replace("\n", "") == ("·words·of·日本語·x x x" + "=" * 30 + "⏎··indent") * 12
    assert not any(line.startswith("s·") for line in body.splitlines())
    indents = [line for line in plain_row(prompt, "value", width).plain.splitlines() if line.startswith("  indent")]
    assert len(indents) == 12


def test_split_characters_stay_together_as_pieces() -> None:
    view = view_of([" a", " \ufffd", "\ufffd", "b"], [1.0, 1.0, 1.0, 1.0], [True] * 4)
    assert coloured_row(view, "value", 5).plain.endswith("\n\n·a\n·▯▯b")


def test_the_title_tells_what_is_kept() -> None:
    assert row_title(SMALL).plain == (
        "row 4 · scored · a.jsonl:5 · id x\n8 tokens, 4 in the response; mask 0 keeps 2 of 4 (50.0%)"
    )
    assert row_title(replace(SMALL, weight=None, id=None)).plain.endswith(
        "a.jsonl:5\n8 tokens, 4 in the response; no mask yet"
    )


@pytest.mark.parametrize(
    ("status", "told"), [("target", "Held out"), ("failed", "could not be computed"), ("rejected", "see rejects.jsonl")]
)
def test_rows_without_values_say_why(status: str, told: str) -> None:
    shown = without_values(replace(SMALL, status=status, signals={}, weight=None), 80).plain
    assert told in shown
    assert shown.endswith("Hi there⏎\nNo way.⏎\nBye<end>")


def test_the_table_has_a_line_per_response_token_and_every_signal() -> None:
    table, note = token_table(SMALL, "value", palette=False, width=200)
    lines = printed(table, 200, color_system=None).splitlines()
    assert len(lines) == 2 + 4
    assert [line.split()[:5] for line in lines[2:]] == [
        ["3", "No", "yes", "2.00", "+1.00"],
        ["4", "·way", "no", "0.00", "-0.50"],
        ["5", ".⏎", "yes", "2.00", "+0.25"],
        ["6", "Bye", "no", "0.00", "0"],
    ]
    assert all(len(line.split()) == 4 + len(SIGNALS) for line in lines[2:])
    assert "Too narrow" not in note


@pytest.mark.parametrize("width", [30, 60, 80])
def test_columns_that_do_not_fit_are_named(width: int) -> None:
    table, note = token_table(SMALL, "value", palette=True, width=width)
    lines = printed(table, width, color_system=None).splitlines()
    assert len(lines) == (1 if width == 30 else 2) + 4
    assert not any("…" in line for line in lines)
    assert ("Too narrow for" in note) == (width < 80)
    if width < 80:
        assert "ref nll" in note


def test_powers_of_ten_are_in_the_heading() -> None:
    tiny = np.where(SMALL.response, np.float32(0.00123), np.nan).astype(np.float32)
    view = replace(SMALL, signals={**SMALL.signals, "stab_direct": tiny, "reference_nll": tiny * np.nan})
    table, note = token_table(view, "value", palette=False, width=200)
    heads = [str(column.header) for column in table.columns]
    assert "stab\ndirect\n1e-3" in heads
    assert "ref\nnll" not in heads
    assert "reference nll was not computed" in note
    assert "+1.23" in printed(table, 200, color_system=None)
    assert "1e-3 nats per unit step" in plain_row(view, "stab_direct", 200).plain
