from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from small_run import published, small_run, value_rows, with_by, with_stability, write_pieces
from tiny_files import command

from alphatoken_curate.cli.show import command as show
from alphatoken_curate.cli.stats import command as stats
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.reading.row import BranchView, read_row
from alphatoken_curate.reading.stats import stats as compute
from alphatoken_curate.runs.schema import ERRORS, SIGNALS, components
from alphatoken_curate.tokens.pieces import Piece
from alphatoken_curate.views.stats_picture import svg as draw

COLOUR = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
BRANCHES = ("chosen", "rejected")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "run", value_rows(30))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return small_run(tmp_path / "pairs", kind="preference", generations=(0, 2))


def invoke(command: Any, *arguments: object, **env: str | None) -> Result:
    surroundings = {"COLUMNS": "80", "NO_COLOR": None, "FORCE_COLOR": None, "COLORTERM": None, **env}
    return CliRunner().invoke(command, list(map(str, arguments)), env=surroundings)


def test_show_without_a_terminal_is_plain(run: Path) -> None:
    result = invoke(show, run, "--row", 0)
    assert result.exit_code == 0
    assert result.output.startswith("row 0 · scored · rows.jsonl:1 · id n0\n")
    assert "\x1b" not in result.output
    has_values(result.output, read_row(run, row=0).branches[0])


def has_values(output: str, branch: BranchView) -> None:
    for at in np.flatnonzero(branch.response):
        number = branch.token_ids[at]
        cell = f"<{number}>:{branch.signals['value'][at]:+.2f}"[: len(f"<{number}>:+0")]
        assert (cell if branch.kept[at] else f"~{cell}") in output


def test_show_has_both_branches_of_a_pair_one_after_the_other(pairs: Path) -> None:
    out = invoke(show, pairs, "--row", 1).output
    view = read_row(pairs, row=1)
    title, chosen, rejected = re.split(r"\n(?:chosen|rejected) · ", out)
    flowed = " ".join(title.split())
    assert f"margin {view.margin:+.3g}: the model prefers chosen to rejected" in flowed
    assert f"omega {view.omega:.3g}: the weight of the pair" in flowed
    for text, branch in ((chosen, view.branches[0]), (rejected, view.branches[1])):
        assert text.startswith(f"{len(branch.token_ids)} tokens, {branch.response.sum()} in the response; mask 0 keeps")
        has_values(text, branch)
    assert out.count("Each response token is") == 1
    assert "\n\n\n" not in out


@pytest.mark.one_in(2)
@pytest.mark.parametrize("more", [[], ["--tokens"]])
@pytest.mark.parametrize("env", [{}, COLOUR])
def test_show_one_branch(pairs: Path, more: list[str], env: dict[str, str]) -> None:
    outputs = {name: invoke(show, pairs, "--row", 1, "--branch", name, *more, **env).output for name in BRANCHES}
    plain = {name: re.sub(r"\x1b\[[0-9;]*m", "", out) for name, out in outputs.items()}
    assert ["\nchosen ·" in out for out in plain.values()] == [True, False]
    assert ["\nrejected ·" in out for out in plain.values()] == [False, True]
    both = re.sub(r"\x1b\[[0-9;]*m", "", invoke(show, pairs, "--row", 1, *more, **env).output)
    for name in BRANCHES:
        body = plain[name][plain[name].index(f"\n{name} ·") :].split("\nvalue and its parts")[0].rstrip()
        assert body in both


def test_show_a_branch_of_a_row_without_any_is_refused(run: Path, pairs: Path) -> None:
    assert isinstance(invoke(show, run, "--row", 0, "--branch", "chosen").exception, UsageError)
    assert invoke(show, pairs, "--row", 0, "--branch", "both").exit_code == 2


def test_show_tables_of_both_branches(pairs: Path) -> None:
    out = invoke(show, pairs, "--row", 8, "--tokens", COLUMNS="40").output
    for branch, part in zip(
        read_row(pairs, row=8).branches, re.split(r"\n(?:chosen|rejected) · ", out)[1:], strict=True
    ):
        lines = part.split("\n\n")[1].splitlines()
        assert len(lines) == 2 + branch.response.sum()
        assert len(lines[-1].split()) == 4 + len(set(components("published").signals) - set(ERRORS)) - 2
        assert lines[-1].split()[0] == str(np.flatnonzero(branch.response)[-1])
    assert out.count("value and its parts in nats") == 1


def test_show_and_stats_of_one_generation(pairs: Path) -> None:
    newest, first = (invoke(show, pairs, "--row", 6, "--generation", number).output for number in (2, 0))
    assert newest == invoke(show, pairs, "--row", 6).output
    assert "\ngeneration 2, at checkpoint-2\n" in newest
    assert "\ngeneration 0, at base; mask 0 is made from generation 2\n" in first
    has_values(first, read_row(pairs, row=6, generation=0).branches[1])
    for tested, more in ((show, ["--row", 6]), (stats, [])):
        result = invoke(tested, pairs, *more, "--generation", 1)
        assert "has no generation 1; it has 0, 2" in str(result.exception)
    assert orjson.loads(invoke(stats, pairs, "--json", "--generation", 0).output)["generation"] == 0
    assert "value of generation 0," in invoke(stats, pairs, "--generation", 0).output


@pytest.mark.parametrize("row", [3, 5, 7])
def test_show_pairs_without_values(pairs: Path, row: int) -> None:
    out = invoke(show, pairs, "--row", row, "--tokens").output
    view = read_row(pairs, row=row)
    assert out.count(" in the response") == (0 if row == 3 else 2)
    for branch in view.branches:
        assert "".join(branch.texts) in out


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
    columns = [*components("published").always, "reference_nll", "loss_weight"]
    outputs = {name: invoke(show, run, "--id", "n6", "--by", name).output for name in columns}
    assert len(set(outputs.values())) == len(outputs)
    for name, out in outputs.items():
        assert out.startswith("row 6 ")
        assert f"text:{name}" in out


def test_show_several_columns(run: Path) -> None:
    out = invoke(show, run, "--row", 6, "--by", "nll", "--by", "adapt_direct").output
    assert out.index("text:nll") < out.index("text:adapt_direct")
    table = invoke(show, run, "--row", 6, "--by", "nll", "--by", "adapt_direct", "--tokens").output
    assert table.split("\n\n")[1].split()[:7] == ["adapt", "at", "text", "kept", "weight", "nll", "direct"]


def test_show_takes_what_masks_are_made_by(run: Path) -> None:
    by = ("--by", "7 - surprise", "--by", "nll")
    out = invoke(show, run, "--row", 6, *by).output
    assert "text:7 - surprise;" in out and "text:nll, in nats;" in " ".join(out.split())
    table = invoke(show, run, "--row", 6, *by, "--tokens").output.split("\n\n")[1].splitlines()
    view = read_row(run, row=6)
    (branch,) = view.branches
    numbers = view.column(branch, "7 - surprise")[branch.response]
    assert table[0].split() == ["at", "text", "kept", "weight", "7", "-", "surprise", "nll"]
    assert [float(line.split()[-2]) for line in table[1:]] == pytest.approx(numbers, abs=0.006)


def test_nothing_is_shown_of_what_is_refused(run: Path) -> None:
    for by in ("nul", "nll - avg(nll)"):
        for more in ((), ("--tokens",)):
            refused = command("show", run, "--row", 6, "--by", "nll", "--by", by, *more)
            assert (refused.code, refused.out) == (2, "") and f"by: '{by}'" in refused.err


def test_show_a_row_by_its_text(run: Path) -> None:
    (branch,) = read_row(run, row=6).branches
    words = "".join(branch.texts[1:5])
    assert invoke(show, run, "--search", words).output == invoke(show, run, "--row", 6).output
    out = invoke(show, run, "--search", "<").output
    assert out.startswith("29 rows have it; show one with --row N\n\nrow 0 · scored · rows.jsonl:1 · id n0\n")
    assert out.count("\nrow ") == 20
    assert out.endswith("\nand 9 more: search for a longer text\n")
    assert "no row has the text 'nowhere'" in str(invoke(show, run, "--search", "nowhere").exception)
    assert invoke(show, run, "--search", "a", "--row", 1).exit_code == 2


def test_show_tokens_through_a_pipe_leaves_nothing_out(run: Path) -> None:
    out = invoke(show, run, "--row", 8, "--tokens", COLUMNS="40").output
    lines = out.split("\n\n")[1].splitlines()
    (branch,) = read_row(run, row=8).branches
    assert len(lines) == 2 + branch.response.sum()
    # The drift was not computed beside stability.
    assert len(lines[-1].split()) == 4 + len(set(components("published").signals) - set(ERRORS)) - 2


@pytest.mark.one_in(5)
@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("more", [[], ["--tokens"]])
def test_show_fits_its_terminal(run: Path, pairs: Path, width: int, more: list[str]) -> None:
    env = {"COLUMNS": str(width), "FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": "1"}
    for folder in (run, pairs):
        out = invoke(show, folder, "--row", 9, *more, **env).output
        assert max(map(cell_len, re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines())) <= width


@pytest.mark.parametrize(("row", "told"), [(3, "Refused"), (5, "Failed"), (7, "Held out")])
def test_show_rows_without_values(run: Path, row: int, told: str) -> None:
    result = invoke(show, run, "--row", row, "--tokens")
    assert result.exit_code == 0
    assert told in result.output


def test_show_leaves_errors_to_the_caller(run: Path) -> None:
    assert isinstance(invoke(show, run, "--row", 99).exception, UsageError)
    assert isinstance(invoke(show, run).exception, UsageError)
    assert isinstance(invoke(show, run, "--row", 0, "--by", "x").exception, UsageError)
    assert isinstance(invoke(show, run.parent / "none", "--row", 0).exception, UsageError)
    (run / "manifest.json").unlink()
    assert isinstance(invoke(show, run, "--row", 0).exception, StoredDataError)


def test_help_names_every_column_and_imports_nothing_heavy() -> None:
    out = invoke(show, "--help").output
    assert all(re.search(rf"\b{name}\b", out.split("--by, which may")[1]) for name in (*SIGNALS, "loss_weight"))
    code = (
        "import sys; from alphatoken_curate.cli import compare, show, stats;"
        " print([m for m in ('rich', 'numpy', 'polars', 'pyarrow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_stats_json_is_what_the_library_computes(run: Path, pairs: Path) -> None:
    for folder in (run, pairs):
        result = invoke(stats, folder, "--json")
        assert result.exit_code == 0
        found = orjson.loads(result.output)
        assert found == orjson.loads(orjson.dumps(compute(folder)))
        assert list(found) == sorted(found)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_stats_fit_and_tell_everything(run: Path, width: int) -> None:
    make_mask(run, published(keep=0.2))
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
    assert "value; --keep 0.2, --scope global" in flowed
    assert "Stability is 0" not in flowed


@pytest.mark.one_in(3)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_stats_of_pairs_fit_and_tell_everything(pairs: Path, width: int) -> None:
    out = invoke(stats, pairs, COLUMNS=str(width)).output
    found = compute(pairs)
    assert max(map(cell_len, out.splitlines())) <= width
    flowed = " ".join(out.split())
    for name, branch in found.branches.items():
        assert f"{name} {branch.kept_tokens} of {branch.scored_tokens} ({branch.kept_share:.1%})" in flowed
    assert found.pairs is not None
    assert found.pairs.margin is not None
    assert f"mean margin {found.pairs.margin:+.3g}," in flowed
    for one in found.generations:
        assert f" {one.rms['stability']:.3g}" in out.split("spread of each generation")[1]
    assert (
        f"decisions of mask 0 from generation 2 ({found.decisions_changed['none'] / found.decided_tokens:.1%})"
        in flowed
    )


def test_stats_bars_count_tokens_and_show_every_kept_and_dropped_one(run: Path) -> None:
    found = compute(run).histograms["value"]
    out = invoke(stats, run).output.partition("\nsignals")[0]
    lines = [line for line in out.splitlines() if set("█░") & set(line)][1:]
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
    make_mask(run, published(by="nll"))
    assert "mask 1 does not select by value" in " ".join(invoke(stats, run).output.split())


def test_stats_of_a_run_in_which_nothing_was_scored(tmp_path: Path) -> None:
    out = invoke(stats, small_run(tmp_path / "run", [value_rows()[7]])).output
    assert "no scored tokens" in out
    assert "Stability is 0" not in out


def test_sql_of_other_releases_is_left_out_with_a_line(run: Path) -> None:
    told = compute(with_by(run, "length('x') + nll"))
    assert not told.decided_by_value and told.decisions_changed == compute(with_by(run, "nll")).decisions_changed
    out = " ".join(invoke(stats, with_by(run, "read_csv('pipe')")).output.split())
    assert "mask 0 selects by SQL that --by does not take, so what stability decides in it is not told" in out


def test_hostile_text_in_a_run_commands_nothing(run: Path) -> None:
    write_pieces(run, [Piece(content="\x1b]52;c;aGk=\x07[bold]\u202e".encode(), special=False)] * 50)
    with_by(run, "nll\x1b]0;x\x07")
    for arguments in ([show, run, "--row", 6], [show, run, "--row", 6, "--tokens"], [stats, run]):
        for env in ({}, COLOUR):
            result = invoke(*arguments, **env)
            assert result.exit_code == 0
            assert not set("\x07\u202e") & set(result.output)
            assert "\x1b]" not in result.output


@pytest.mark.long
def test_stats_draws_pictures_in_place_of_text(run: Path, tmp_path: Path) -> None:
    svg, png = tmp_path / "new" / "a.svg", tmp_path / "a.png"
    result = invoke(stats, run, "--svg", svg, "--png", png)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"Wrote {svg}\nWrote {png}\n"
    assert svg.read_bytes() == draw(compute(run), "run")
    assert png.read_bytes().startswith(b"\x89PNG")
    both = invoke(stats, run, "--svg", svg, "--json")
    assert orjson.loads(both.stdout)["kind"] == "sft"
