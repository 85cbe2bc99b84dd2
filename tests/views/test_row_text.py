from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from small_run import small_run, value_rows

from alphatoken_curate.errors import UsageError
from alphatoken_curate.reading.row import BranchView, RowView, read_row
from alphatoken_curate.reading.search import Hit
from alphatoken_curate.runs.schema import ERRORS, SIGNALS, Components, components
from alphatoken_curate.views.heat import PALETTE
from alphatoken_curate.views.row_text import (
    branch_title,
    coloured_row,
    has_palette,
    hit_text,
    legend,
    plain_row,
    row_parts,
    row_title,
    scale_of_row,
    table_note,
    token_table,
    why_without_values,
    without_values,
)

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


PARTED = components("published")


def signals_of(known: Components, value: np.ndarray) -> dict[str, np.ndarray]:
    """The same numbers for each signal of an estimator, NaN for those of others, as a row is read."""
    return {
        name: value if name in known.signals and name not in ERRORS else np.full_like(value, np.nan) for name in SIGNALS
    }


def branch_of(texts: list[str], values: list[float | None], kept: list[bool], name: str = "") -> BranchView:
    """A scored branch: None is a prompt token."""
    value = np.array([np.nan if x is None else x for x in values], np.float32)
    return BranchView(
        name=name,
        token_ids=np.arange(len(texts), dtype=np.int32),
        texts=tuple(texts),
        response=~np.isnan(value),
        signals=signals_of(PARTED, value),
        weight=np.array(kept, np.float32) * 2,
    )


def view_of(*branches: BranchView, **changes: Any) -> RowView:
    """A scored row of these branches."""
    view = RowView(
        row_id=4,
        source="a.jsonl",
        line=5,
        id="x",
        status="scored",
        generation=0,
        checkpoint=None,
        branches=branches,
        mask=0,
        mask_generations=(0,),
    )
    return replace(view, **changes)


def row_of(texts: list[str], values: list[float | None], kept: list[bool], **changes: Any) -> RowView:
    """A scored row of one branch."""
    return view_of(branch_of(texts, values, kept), **changes)


def only(view: RowView, **changes: Any) -> RowView:
    """The row of one branch with that branch changed."""
    return replace(view, branches=(replace(view.branches[0], **changes),))


def plain(view: RowView, column: str = "value", width: int = 80) -> Text:
    return plain_row(view, view.branches[0], column, width)


def coloured(view: RowView, column: str = "value", width: int = 80) -> Text:
    return coloured_row(view, view.branches[0], column, width)


def table_of(view: RowView, *columns: str, palette: bool, width: int) -> tuple[Table, tuple[str, ...]]:
    return token_table(view, view.branches[0], columns, palette=palette, width=width)


SMALL = row_of(
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
    assert plain(SMALL).plain == (
        "[prompt]\nHi there⏎\n\n[response]\nNo:+1.00 ~·way:-0.50~ .⏎:+0.25\n~Bye:0~\n\n[prompt]\n<end>"
    )
    told = legend(SMALL, "value", 200, palette=False).plain
    assert told.startswith("Each response token is text:value, in nats per unit step; ~text:value~ is dropped.")


def test_plain_text_is_the_same_without_colours_and_with_sixteen() -> None:
    text = plain(SMALL)
    bare = printed(text, color_system=None)
    assert "\x1b" not in bare
    sixteen = printed(text, force_terminal=True, color_system="standard")
    # Black on yellow and cyan, whatever ground the terminal has.
    assert "\x1b[30;43mNo:+1.00" in sixteen
    assert "\x1b[9;30;46m~·way:-0.50~" in sixteen


def test_colours_follow_the_value_and_dropped_tokens_are_struck_through() -> None:
    text = coloured(SMALL)
    spans = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert spans["No"] == f"bold {PALETTE[16].text} on {PALETTE[16].background}"
    assert spans["·way"] == f"not bold strike {PALETTE[4].faded} on {PALETTE[4].background}"
    assert spans[".⏎\n"] == f"bold {PALETTE[10].text} on {PALETTE[10].background}"
    assert spans["Bye"] == "not bold strike bright_black"
    assert spans[" there"] == "dim"
    assert text.plain == "Hi there⏎\nNo·way.⏎\nBye<end>"
    told = legend(SMALL, "value", 80, palette=True)
    assert told.plain.startswith("value in nats per unit step: -1.00 ")
    assert sum(" on #" in str(span.style) for span in told.spans) == len(PALETTE)


def test_both_branches_of_a_pair_are_coloured_on_one_scale() -> None:
    one = branch_of(["a", "b"], [None, 1.0], [False, True], "chosen")
    other = branch_of(["a", "c"], [None, -0.5], [False, True], "rejected")
    view = view_of(one, other)
    styles = [{str(span.style) for span in coloured_row(view, branch, "value", 80).spans} for branch in (one, other)]
    assert f"bold {PALETTE[16].text} on {PALETTE[16].background}" in styles[0]
    assert f"bold {PALETTE[4].text} on {PALETTE[4].background}" in styles[1]
    assert plain_row(view, other, "value", 80).plain == "[prompt]\na\n\n[response]\nc:-0.50"
    small = replace(other, signals=signals_of(PARTED, one.signals["value"] / 1000))
    table, _ = token_table(view_of(one, small), small, (), palette=False, width=200)
    assert "+0.00" in printed(table, 200, color_system=None)


@pytest.mark.parametrize("system", ["256", "truecolor"])
def test_a_palette_needs_256_colours(system: Any) -> None:
    assert has_palette(Console(force_terminal=True, color_system=system))
    assert not has_palette(Console(force_terminal=True, color_system=system, no_color=True))
    assert not has_palette(Console(force_terminal=True, color_system="standard"))
    assert not has_palette(Console(color_system=None))


@pytest.mark.parametrize("settings", [{"color_system": None}, {"force_terminal": True, "color_system": "truecolor"}])
def test_hostile_text_commands_nothing(settings: dict[str, Any]) -> None:
    response = row_of(list(EVIL), [1.0] * len(EVIL), [True] * len(EVIL), id=EVIL[0], source="\x1b[2J.jsonl")
    prompt = row_of(list(EVIL), [None] * len(EVIL), [False] * len(EVIL), checkpoint="\x1b[2J\x07")
    rejected = replace(prompt, status="rejected", reason="\x1b]0;x\x07")
    for view in (response, prompt, rejected):
        made: list[object] = [row_title(view), why_without_values(view, 80), without_values(view.branches[0], 80)]
        made += [plain(view), coloured(view), table_of(view, palette=True, width=200)[0]]
        for out in (printed(part, 200, **settings) for part in made):
            assert not set("\x07\x9b\u202e\r\t") & set(out)
            # Only rich's own colours: escape, bracket, numbers, m.
            assert all(
                part[0] == "[" and part[1:].split("m")[0].replace(";", "").isdigit() for part in out.split("\x1b")[1:]
            )
    shown = plain(response).plain
    assert "[bold red]x[/]:+1.00" in shown
    assert ":smile:" in printed(plain(response), color_system=None)


@pytest.mark.parametrize("width", [20, 60, 80, 120])
def test_lines_break_between_words_and_fit(width: int) -> None:
    words = [" word", "s", " of", " 日本", "語", " x" * 3, "=" * 30, "\n", "  indent"] * 12
    values: list[float | None] = [0.5 - i % 2 for i in range(len(words))]
    scored = row_of(words, values, [i % 3 > 0 for i in range(len(words))])
    prompt = row_of(words, [None] * len(words), [False] * len(words))
    for text in (coloured(scored, width=width), plain(scored, width=width)):
        lines = printed(text, width, color_system=None).splitlines()
        assert max(map(cell_len, lines)) <= width
    body = coloured(scored, width=width).plain
    assert body.replace("\n", "") == ("·words·of·日本語·x x x" + "=" * 30 + "⏎··indent") * 12
    assert not any(line.startswith("s·") for line in body.splitlines())
    indents = [line for line in plain(prompt, width=width).plain.splitlines() if line.startswith("  indent")]
    assert len(indents) == 12


def test_split_characters_stay_together_as_pieces() -> None:
    view = row_of([" a", " \ufffd", "\ufffd", "b"], [1.0, 1.0, 1.0, 1.0], [True] * 4)
    assert coloured(view, width=5).plain == "·a\n·▯▯b"


def test_the_title_tells_what_is_kept() -> None:
    assert row_title(SMALL).plain == (
        "row 4 · scored · a.jsonl:5 · id x\n8 tokens, 4 in the response; mask 0 keeps 2 of 4 (50.0%)"
    )
    bare = row_title(replace(only(SMALL, weight=None), id=None, mask=None, mask_generations=())).plain
    assert bare.endswith("a.jsonl:5\n8 tokens, 4 in the response; no mask yet")


@pytest.mark.parametrize(
    ("made_from", "weighed", "told"),
    [
        ((3,), True, "generation 3, at step-9\n8 tokens, 4 in the response; mask 0 keeps"),
        ((1,), True, "generation 3, at step-9; mask 0 is made from generation 1\n8 tokens"),
        ((1, 3), True, "step-9; mask 0 is made from generations 1, 3\n8 tokens"),
        ((1, 3), False, "mask 0 is made from generations 1, 3, and not each of them scored this row\n8 tokens, 4 in"),
        ((1,), False, "mask 0 is made from generation 1, which did not score this row\n8 tokens, 4 in the response"),
    ],
)
def test_the_title_tells_the_generation_and_that_of_the_mask(
    made_from: tuple[int, ...], weighed: bool, told: str
) -> None:
    view = SMALL if weighed else only(SMALL, weight=None)
    title = row_title(replace(view, generation=3, checkpoint="step-9", mask_generations=made_from)).plain
    assert told in title
    assert "no mask yet" not in title


@pytest.mark.parametrize(("margin", "told"), [(0.25, "more than"), (-0.25, "less than"), (0.0, "exactly as much as")])
def test_the_titles_of_a_pair_tell_margin_omega_and_each_branch(margin: float, told: str) -> None:
    one, other = (replace(SMALL.branches[0], name=name) for name in ("chosen", "rejected"))
    view = view_of(one, other, margin=margin, omega=0.05)
    lines = row_title(view).plain.split("\n")
    assert lines[1] == f"margin {margin:+.3g}: the model prefers chosen to rejected {told} the reference does"
    assert lines[2].startswith("omega 0.05: the weight of the pair")
    assert len(lines) == 3
    assert branch_title(view, other).plain == ("rejected · 8 tokens, 4 in the response; mask 0 keeps 2 of 4 (50.0%)")


@pytest.mark.parametrize(
    ("status", "told"), [("target", "Held out"), ("failed", "could not be computed"), ("rejected", "see rejects.jsonl")]
)
def test_rows_without_values_say_why(status: str, told: str) -> None:
    view = replace(only(SMALL, signals={}, weight=None), status=status)
    assert told in why_without_values(view, 80).plain
    assert without_values(view.branches[0], 80).plain == "Hi there⏎\nNo way.⏎\nBye<end>"


def test_the_table_has_a_line_per_response_token_and_every_signal() -> None:
    table, left_out = table_of(SMALL, palette=False, width=200)
    lines = printed(table, 200, color_system=None).splitlines()
    assert len(lines) == 2 + 4
    assert [line.split()[:5] for line in lines[2:]] == [
        ["3", "No", "yes", "2.00", "+1.00"],
        ["4", "·way", "no", "0.00", "-0.50"],
        ["5", ".⏎", "yes", "2.00", "+0.25"],
        ["6", "Bye", "no", "0.00", "0"],
    ]
    assert all(len(line.split()) == 4 + len(set(PARTED.signals) - set(ERRORS)) for line in lines[2:])
    assert left_out == ()
    assert "Too narrow" not in table_note(SMALL, left_out)


@pytest.mark.parametrize("width", [30, 60, 100])
def test_columns_that_do_not_fit_are_named(width: int) -> None:
    table, left_out = table_of(SMALL, palette=True, width=width)
    lines = printed(table, width, color_system=None).splitlines()
    assert len(lines) == (1 if width == 30 else 2) + 4
    assert not any("…" in line for line in lines)
    assert bool(left_out) == (width < 100)
    if left_out:
        assert "Too narrow for" in table_note(SMALL, left_out)
        assert table_note(SMALL, [*left_out, *left_out]) == table_note(SMALL, left_out)
        assert "ref nll" in left_out


def test_powers_of_ten_are_in_the_heading() -> None:
    (branch,) = SMALL.branches
    tiny = np.where(branch.response, np.float32(0.00123), np.nan).astype(np.float32)
    view = only(SMALL, signals={**branch.signals, "stab_direct": tiny})
    table, _ = table_of(view, palette=False, width=200)
    assert "stab\ndirect\n1e-3" in [str(column.header) for column in table.columns]
    assert "+1.23" in printed(table, 200, color_system=None)
    assert "1e-3 nats per unit step" in legend(view, "stab_direct", 200, palette=False).plain


def test_signals_that_were_not_computed_have_no_column() -> None:
    (branch,) = SMALL.branches
    nothing = np.full(len(branch.texts), np.nan, np.float32)
    optional = [name for name in PARTED.signals if name not in PARTED.always]
    view = only(SMALL, signals={**branch.signals, **dict.fromkeys(optional, nothing)})
    heads = [[str(one.header) for one in table_of(row, palette=False, width=200)[0].columns] for row in (SMALL, view)]
    assert [head for head in heads[0] if head not in heads[1]] == ["drift\ndirect", "drift\ncausal", "ref\nnll"]
    assert "reference nll was not computed" in table_note(view, ())
    assert "reference nll was not computed" not in table_note(SMALL, ())


@pytest.mark.parametrize(
    ("estimator", "heads"),
    [
        ("influence", "adapt influence|stab influence|drift influence"),
        (
            "exact+influence",
            "adapt direct|adapt causal|adapt upstream|stab direct|stab causal|stab upstream|drift direct|drift causal",
        ),
    ],
)
def test_the_table_has_the_signals_of_the_estimator(estimator: str, heads: str) -> None:
    (branch,) = SMALL.branches
    view = only(SMALL, signals=signals_of(components(estimator), branch.signals["value"]))
    table, left_out = table_of(view, palette=False, width=200)
    found = [str(column.header).replace("\n", " ") for column in table.columns]
    assert found[4:] == ["value", *heads.split("|"), "nll", "entropy", "ref nll"]
    assert left_out == ()


def test_right_to_left_text_leaves_the_numbers_where_they_are() -> None:
    view = row_of(["a", " שלום", "b"], [None, 1.0, -0.5], [False, True, True])
    assert "·שלום\u200e:+1.00 b:-0.50" in plain(view).plain
    line = next(
        line for line in printed(table_of(view, palette=False, width=200)[0], 200).splitlines() if "שלום" in line
    )
    assert line.index("\u200e") < line.index("yes") < line.index("+1.00")
    # In running text it reads as such text does.
    assert coloured(view).plain == "a·שלוםb"


def test_columns_of_the_table_by_choice() -> None:
    table, _ = table_of(SMALL, "nll", "adapt_direct", palette=True, width=200)
    assert [str(column.header) for column in table.columns] == ["at", "text", "kept", "weight", "nll", "adapt\ndirect"]
    view = only(SMALL, signals={**SMALL.branches[0].signals, "nll": -SMALL.branches[0].signals["value"]})
    styles = [
        str(span.style) for span in next(iter(table_of(view, "nll", palette=True, width=200)[0].columns[1].cells)).spans
    ]
    assert styles == [f"bold {PALETTE[0].text} on {PALETTE[0].background}"]
    with pytest.raises(UsageError, match="by: 'no': names no column"):
        table_of(SMALL, "no", palette=False, width=200)
    with pytest.raises(UsageError, match="drift_direct was not computed"):
        none = np.full(8, np.nan, np.float32)
        table_of(
            only(SMALL, signals={**view.branches[0].signals, "drift_direct": none}),
            "drift_direct",
            palette=False,
            width=99,
        )


def parts_of(view: RowView, *columns: str, tokens: bool = False, branch: str | None = None) -> list[str]:
    parts = row_parts(view, branch, columns, (80, 200), palette=False, tokens=tokens)
    return [printed(part, 200, color_system=None) for part in parts]


def test_the_text_is_shown_once_for_each_column() -> None:
    title, *rest = parts_of(SMALL, "nll", "value")
    assert title.startswith("row 4 ")
    assert ["text:nll" in part for part in rest] == [True, False, False, False]
    assert ["text:value" in part for part in rest] == [False, False, True, False]
    assert rest[1] == printed(plain(SMALL, "nll"), 200, color_system=None)
    assert parts_of(SMALL)[1:] == [part.lstrip("\n") for part in rest[2:]]


def hit(**changes: Any) -> Hit:
    one = Hit(
        row_id=7,
        source="a.jsonl",
        line=8,
        id="x",
        status="scored",
        branch="",
        before="…we ",
        found="carry",
        after=" it\n",
    )
    return replace(one, **changes)


def test_a_row_that_was_searched_for_is_told_with_what_was_found() -> None:
    assert hit_text(hit(), 80).plain == "row 7 · scored · a.jsonl:8 · id x\n…we carry it⏎"
    (found,) = [span for span in hit_text(hit(), 80).spans if "reverse" in str(span.style)]
    assert hit_text(hit(), 80).plain[found.start : found.end] == "carry"
    assert "id" not in hit_text(hit(id=None, branch="rejected"), 80).plain
    assert "a.jsonl:8 · rejected\n" in hit_text(hit(id=None, branch="rejected"), 80).plain


@pytest.mark.parametrize("width", [20, 60])
def test_what_was_found_fits_and_commands_nothing(width: int) -> None:
    evil = hit(source=EVIL[0], id=EVIL[1], before=" ".join(EVIL), found="[bold]x", after="日本語 " * 20)
    text = hit_text(evil, width)
    assert not set("\x07\x9b\x1b\u202e\r\t") & set(text.plain)
    assert "[bold]x" in text.plain.replace("\n", "")
    assert max(map(cell_len, text.plain.splitlines()[1:])) <= width


def test_colours_of_both_branches_share_a_scale(tmp_path: Path) -> None:
    rows = value_rows(kind="preference")
    run = small_run(tmp_path / "run", rows, kind="preference")
    larger = set()
    for row in rows[:3]:
        sizes = [float(np.abs(branch.signals["nll"][branch.response]).max()) for branch in row.branches]
        assert scale_of_row(read_row(run, row=row.row_id), "nll") == max(sizes)
        larger.add(sizes.index(max(sizes)))
    assert larger == {0, 1}
