from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from small_run import small_run, value_rows
from test_stats import with_stability

from alphatoken_curate.cli.show import command as show
from alphatoken_curate.cli.stats import command as stats
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.remask import make_mask
from alphatoken_curate.row_view import read_row
from alphatoken_curate.schema import SIGNALS
from alphatoken_curate.stats import stats as compute


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "run", value_rows(30))


def invoke(command: Any, *arguments: object, **env: str | None) -> Result:
    surroundings = {"COLUMNS": "80", "NO_COLOR": None, "FORCE_COLOR": None, "COLORTERM": None, **env}
    return CliRunner().invoke(command, list(map(str, arguments)), env=surroundings)


COLOUR = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}


def test_show_without_a_terminal_is_plain(run: Path) -> None:
    result = invoke(show, run, "--row", 0)
    assert result.exit_code == 0
    view = read_row(run, row=0)
    assert result.output.startswith("row 0 · scored · rows.jsonl:1 · id n0\n")
    assert "\x1b" not in result.output
    for at in np.flatnonzero(view.response):
        cell = f"<{view.token_ids[at]}>:{view.signals['value'][at]:+.2f}"[: len(f"<{view.token_ids[at]}>:+0")]
        assert (cell if view.kept[at] else f"~{cell}") in result.output


def test_show_on_a_terminal_of_256_colours(run: Path) -> None:
    out = invoke(show, run, "--row", 6, **COLOUR).output
    assert "48;5;" in out
    assert "\x1b[9" in out or "\x1b[1;9" in out
    assert ":+" not in out.split("\n\n", 1)[1]


@pytest.mark.parametrize("env", [{"NO_COLOR": "1", **COLOUR}, {"FORCE_COLOR": "1", "TERM": "xterm"}])
def test_show_without_a_palette_writes_numbers(run: Path, env: dict[str, str]) -> None:
    out = invoke(show, run, "--row", 6, **env).output
    assert "[response]" in out
    assert "48;" not in out


def test_show_any_column_and_by_id(run: Path) -> None:
    outputs = {name: invoke(show, run, "--id", "n6", "--column", name).output for name in (*SIGNALS, "loss_weight")}
    assert len(set(outputs.values())) == len(outputs)
    for name, out in outputs.items():
        assert out.startswith("row 6 ")
        assert f"text:{name}" in out


def test_show_tokens_through_a_pipe_leaves_nothing_out(run: Path) -> None:
    out = invoke(show, run, "--row", 8, "--tokens", COLUMNS="40").output
    lines = out.split("\n\n")[1].splitlines()
    view = read_row(run, row=8)
    assert len(lines) == 2 + view.response.sum()
    assert len(lines[-1].split()) == 4 + len(SIGNALS)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("more", [[], ["--tokens"]])
def test_show_fits_its_terminal(run: Path, width: int, more: list[str]) -> None:
    out = invoke(show, run, "--row", 9, *more, COLUMNS=str(width), FORCE_COLOR="1", TERM="xterm", NO_COLOR="1").output
    assert max(map(cell_len, re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines())) <= width


@pytest.mark.parametrize(("row", "told"), [(3, "Refused"), (5, "Failed"), (7, "Held out")])
def test_show_rows_without_values(run: Path, row: int, told: str) -> None:
    result = invoke(show, run, "--row", row, "--tokens")
    assert result.exit_code == 0
    assert told in result.output


def test_show_leaves_errors_to_the_caller(run: Path) -> None:
    assert isinstance(invoke(show, run, "--row", 99).exception, UsageError)
    assert isinstance(invoke(show, run).exception, UsageError)
    assert isinstance(invoke(show, run, "--row", 0, "--column", "x").exception, UsageError)
    assert isinstance(invoke(show, run / "none", "--row", 0).exception, StoredDataError)


def test_help_names_every_column_and_imports_nothing_heavy() -> None:
    out = invoke(show, "--help").output
    assert all(re.search(rf"\b{name}\b", out.split("Columns:")[1]) for name in (*SIGNALS, "loss_weight"))
    code = (
        "import sys; from alphatoken_curate.cli import show, stats;"
        " print([m for m in ('rich', 'numpy', 'polars', 'pyarrow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_stats_json_is_what_the_library_computes(run: Path) -> None:
    result = invoke(stats, run, "--json")
    assert result.exit_code == 0
    found = orjson.loads(result.output)
    assert found == orjson.loads(orjson.dumps(compute(run)))
    assert list(found) == sorted(found)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_stats_fit_and_tell_everything(run: Path, width: int) -> None:
    make_mask(run, MaskConfig(keep=0.2))
    out = invoke(stats, run, COLUMNS=str(width)).output
    found = compute(run)
    assert max(map(cell_len, out.splitlines())) <= width
    flowed = " ".join(out.split())
    assert "30 read: 27 scored, 1 target, 1 failed, 1 rejected" in flowed
    assert f"{found.kept_tokens} of {found.scored_tokens} ({found.kept_share:.1%}) by mask 1" in flowed
    for number in found.rms.values():
        assert f"{number:.3g}" in flowed
    none, rms = found.decisions_changed["none"], found.decisions_changed["rms"]
    assert f"stability changes {none} of {found.scored_tokens} decisions of mask 1" in flowed
    assert f"--stability-scale rms {rms} " in flowed
    assert "keep 0.2, scope global" in flowed
    assert "Stability is 0" not in flowed


def test_stats_bars_count_tokens_and_show_every_kept_and_dropped_one(run: Path) -> None:
    found = compute(run).values
    lines = [line for line in invoke(stats, run).output.splitlines() if set("█░") & set(line)][1:]
    counts = [count for count in found.count if count]
    assert [int(line.split()[-2].replace(",", "")) for line in lines] == counts
    kept = [kept for kept, count in zip(found.kept or (), found.count, strict=True) if count]
    assert ["█" in line for line in lines] == [one > 0 for one in kept]
    assert ["░" in line for line in lines] == [one < count for one, count in zip(kept, counts, strict=True)]


def test_stats_say_what_to_do_where_stability_is_nothing(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", [with_stability(row, 0.0) for row in value_rows(reference=False)])
    out = " ".join(invoke(stats, run).output.split())
    assert "Stability is 0 for every token" in out
    assert "Score with --reference set to the model that the checkpoint was tuned from" in out
    assert "stability changes" not in out


def test_stats_say_where_stability_cannot_matter(run: Path) -> None:
    make_mask(run, MaskConfig(by="nll"))
    assert "mask 1 does not select by value" in " ".join(invoke(stats, run).output.split())


def test_stats_of_a_run_in_which_nothing_was_scored(tmp_path: Path) -> None:
    out = invoke(stats, small_run(tmp_path / "run", [value_rows()[7]])).output
    assert "no scored tokens" in out
    assert "Stability is 0" not in out


def test_hostile_text_in_a_run_commands_nothing(run: Path) -> None:
    texts = pa.array(["\x1b]52;c;aGk=\x07[bold]\u202e"] * 50)
    table = pa.table({"token_id": pa.array(range(50), pa.int32()), "text": texts})
    pq.write_table(table, run / "artifacts/vocab.parquet")
    make_mask(run, MaskConfig(by="nll + 0 * length('\x1b]0;x\x07')"))
    for arguments in ([show, run, "--row", 6], [show, run, "--row", 6, "--tokens"], [stats, run]):
        for env in ({}, COLOUR):
            result = invoke(*arguments, **env)
            assert result.exit_code == 0
            assert not set("\x07\u202e") & set(result.output)
            assert "\x1b]" not in result.output
