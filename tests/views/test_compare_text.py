"""A comparison as text: everything is told, fits, and commands nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from rich.console import Console
from small_run import small_run, value_rows

from alphatoken_curate.cli.compare import command
from alphatoken_curate.errors import UsageError
from alphatoken_curate.reading.compare import Changed, Comparison, compare
from alphatoken_curate.views.compare_text import compare_lines

EVIL = "\x1b]0;x\x07[bold]\u202e"


@pytest.fixture(scope="module", params=["sft", "preference"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = value_rows(30, kind=request.param)
    return small_run(tmp_path_factory.mktemp("runs") / "run", rows, generations=(0, 2, 5))


def shown(found: Comparison, width: int = 120) -> str:
    console = Console(width=width, markup=False, highlight=False, emoji=False, color_system=None)
    with console.capture() as captured:
        for part in compare_lines(found, width):
            console.print(part)
    return captured.get()


@pytest.mark.one_in(6)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_everything_is_told_and_fits(run: Path, width: int) -> None:
    found = compare(run)
    text = shown(found, width)
    assert max(map(cell_len, text.splitlines())) <= width
    flowed = " ".join(text.split())
    assert f"{found.tokens} response tokens of {found.rows} rows are in both rank" in flowed
    for name, correlation in found.correlations.items():
        one, other = found.rms[name]
        assert f"{name} {correlation:+.3f} {one:.3g} {other:.3g}" in flowed
    assert "each by value; --keep 0.5, --scope global, --weights binary, --stability-weight" in flowed
    assert f"both keep {found.masks.both} (" in flowed and f"overlap {found.masks.jaccard:.3f} (" in flowed
    assert f"0 to 2 {found.tokens} {found.steps[0].correlation:+.3f} {found.steps[0].masks.jaccard:.3f}" in flowed
    lines = text.partition("tokens that changed most")[2].splitlines()[2:-1]
    assert len(lines) == len(found.changed)
    for line, one in zip(lines, found.changed, strict=True):
        values = [f"{x:+.3g}" for x in one.values] if width >= 80 else []
        kept = " to ".join("yes" if kept else "no" for kept in one.kept).split()
        branch = [one.branch] if one.branch else []
        told = [str(one.row_id), *branch, str(one.position), one.text, *values, *(f"{x:.1%}" for x in one.ranks), *kept]
        assert line.split()[: len(told)] == told
        assert (one.before[-18:] + one.text + one.after in line) == (width >= 100)


@pytest.mark.one_in(2)
def test_rows_that_are_apart_and_settings_that_differ_are_told(run: Path) -> None:
    found = compare(run)
    other = replace(found.second, mask_settings={**found.second.mask_settings, "keep": 0.25})
    flowed = " ".join(shown(replace(found, rows_apart=1234, second=other)).split())
    assert "in both; 1,234 rows are not, or differ" in flowed
    assert "first by value; --keep 0.5, --scope" in flowed and "; second by value; --keep 0.25, --scope" in flowed


@pytest.mark.one_in(2)
def test_what_is_not_there_is_not_told(run: Path) -> None:
    found = compare(run)
    nothing = replace(found.masks, jaccard=None, by_chance=None)
    text = shown(replace(found, steps=found.steps[:1], changed=(), masks=nothing, correlations={"nll": None}))
    assert not any(word in text for word in ("from each generation", "changed most", "overlap"))
    assert "nll     constant" in text


@pytest.mark.one_in(2)
def test_text_of_others_commands_nothing(run: Path) -> None:
    found = compare(run)
    side = replace(found.first, run=EVIL, checkpoint=EVIL)
    evil = Changed(
        row_id=1, branch="", position=2, before=EVIL, text=EVIL, after="\n\r", values=(0.0, 1.0), ranks=(0.1, 0.9),
        kept=(False, True),
    )  # fmt: skip
    text = shown(replace(found, first=side, changed=(evil,)))
    assert not set("\x1b\x07\u202e\r") & set(text)
    assert "[bold]" in text


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, list(map(str, arguments)), env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.mark.one_in(2)
def test_the_command_prints_what_the_library_computes(run: Path) -> None:
    assert invoke(run).output == shown(compare(run))
    assert invoke(run, "--generations", "2,5", "--changed", 3).output == shown(
        compare(run, generations=(2, 5), changed=3)
    )
    assert invoke(run, run, "--generations", "0,2").output == shown(compare(run, run, generations=(0, 2)))
    found: Any = orjson.loads(invoke(run, "--json").output)
    assert found == orjson.loads(orjson.dumps(compare(run)))
    assert list(found) == sorted(found)


@pytest.mark.parametrize("text", ["0", "0,", "a,b", "0,1,2", "-1,0"])
def test_generations_are_two_numbers(run: Path, text: str) -> None:
    result = invoke(run, "--generations", text)
    assert result.exit_code == 2
    assert "give two numbers, such as 0,2" in result.output


def test_errors_are_left_to_the_caller(run: Path) -> None:
    assert isinstance(invoke(run, "--generations", "0,9").exception, UsageError)
