from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import orjson
import pytest
from small_run import run_with_errors, small_run, value_rows
from tiny_files import command

from alphatoken_curate import report, scan_tokens
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.reading.errors import Beyond, beyond
from alphatoken_curate.reading.stats import stats


def by_hand(run: Path, factor: float, generation: int | None = None) -> list[bool]:
    tokens = scan_tokens(run, generation=generation).collect()
    return [v + factor * e < 0 for v, e in zip(tokens["value"], tokens["value_error"], strict=True)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_values_beyond_their_error_are_what_a_loop_counts(tmp_path: Path, kind: str) -> None:
    run = run_with_errors(tmp_path / "run", kind=kind)
    found, wanted = beyond(run), by_hand(run, 1.895)
    assert found is not None and found == stats(run).beyond
    assert (found.tokens, found.below, found.groups, found.factor) == (len(wanted), sum(wanted), 8, 1.895)
    assert found.by_chance == pytest.approx(0.05 * len(wanted)) and 0 < found.below < found.tokens


@pytest.mark.one_in(2)
@pytest.mark.parametrize("weight", [1.5, 0.5])
def test_the_command_that_is_told_makes_the_mask_without_them(tmp_path: Path, weight: float) -> None:
    run = run_with_errors(tmp_path / "a run", settings={"groups": 3, "stability_weight": weight})
    found = beyond(run)
    assert found is not None
    lines = list(found.lines())
    told = shlex.split(" ".join(lines[2:]).replace("\\ ", ""))
    assert told == list(found.command) and told[:3] == ["alphatoken-curate", "mask", str(run)]
    command(*told[1:], "--always-keep", "none", "--allow-empty-rows")
    tokens = scan_tokens(run).collect()
    below = np.array(by_hand(run, 2.92))
    assert (tokens["kept"].to_numpy() == ~below).all() and below.sum() == found.below
    assert all(len(line) <= 100 for line in lines[3:])


def test_what_is_told_says_chance_and_whether_there_is_much_to_cut(tmp_path: Path) -> None:
    few = Beyond(
        generation=0,
        tokens=2000,
        below=90,
        by_chance=100.0,
        groups=8,
        factor=1.895,
        command=("a", "mask", "b c", "--x"),
    )
    first, second, *_ = few.lines()
    assert first == (
        "90 of 2,000 response tokens (4.5%) lie below 0 beyond their error (1.895 standard errors, of 8 groups of"
        " target rows); chance alone would let 100 (5%) pass"
    )
    assert second.startswith("that is no more than chance")
    run = run_with_errors(tmp_path / "run")
    found = beyond(run)
    assert found is not None and found.below > found.by_chance
    assert list(found.lines())[1:] == [
        "what leaves them out, which has done harm (milder: --weights tilt:0.25):",
        f"  alphatoken-curate mask {shlex.quote(str(run))} \\",
        '    --by "value + 1.895 * value_error" --keep positive',
    ]


def test_another_generation_is_named_in_its_command(tmp_path: Path) -> None:
    run = run_with_errors(tmp_path / "run", generations=(0, 3))
    newest, first = beyond(run), beyond(run, 0)
    assert newest is not None and first is not None and newest == beyond(run, 3)
    assert (newest.below, first.below) == (sum(by_hand(run, 1.895)), sum(by_hand(run, 1.895, 0)))
    assert newest.below != first.below
    assert first.command[-2:] == ("--generation", "0") and "--generation" not in newest.command
    with pytest.raises(UsageError, match="no generation 7"):
        beyond(run, 7)


def test_without_errors_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert beyond(small_run(tmp_path / "plain")) is None
    assert beyond(small_run(tmp_path / "one", settings={"groups": 1})) is None
    assert beyond(small_run(tmp_path / "asked", settings={"groups": 8})) is None, "no errors are stored"


def test_an_error_that_some_tokens_lack_is_damage(tmp_path: Path) -> None:
    rows = value_rows(8, errors=True) + [row for row in value_rows(12) if row.row_id >= 8]
    run = small_run(tmp_path, rows, settings={"groups": 8})
    with pytest.raises(StoredDataError, match=r"column value_error has no value at .* run `verify`"):
        beyond(run)


def test_stats_tell_the_direction_and_the_errors(tmp_path: Path) -> None:
    run = run_with_errors(tmp_path / "run")
    out = command("stats", run).out
    assert "of a rehearsed training: 14 steps of AdamW at 3e-05, 4 rows each, 2 epochs" in " ".join(out.split())
    found = beyond(run)
    assert found is not None
    told, *rest = found.lines()
    assert "values beyond their error" in out and told in " ".join(out.split())
    assert all(line in out for line in (rest[0], rest[-1]))
    told_json = orjson.loads(command("stats", run, "--json").out)
    assert (told_json["direction"], told_json["beyond"]["below"]) == ("rehearsal", found.below)
    histograms = stats(run).histograms
    tokens = scan_tokens(run).collect()
    for name in ("adapt_error", "stab_error", "value_error"):
        assert sum(histograms[name].count) == len(tokens) and histograms[name].edges[0] == 0
        assert name in out
    plain = small_run(tmp_path / "plain")
    out = command("stats", plain).out
    assert "rehearsed" not in out and "error" not in out
    told_json = orjson.loads(command("stats", plain, "--json").out)
    assert (told_json["direction"], told_json["rehearsed"], told_json["beyond"]) == ("gradient", None, None)


def test_show_compare_and_report_name_them(tmp_path: Path) -> None:
    run, plain = run_with_errors(tmp_path / "run"), small_run(tmp_path / "plain", value_rows(30, estimator="influence"))
    out = command("compare", run, plain).out
    assert "(influence, rehearsal)" in " ".join(out.split()) and "(influence)" in " ".join(out.split())
    out = command("show", run, "--row", 0, "--by", "value + 1.895 * value_error", "--by", "value_error").out
    assert "value + 1.895 * value_error" in out and "~text:value_error~ is dropped" in " ".join(out.split())
    table = command("show", run, "--row", 0, "--tokens").out
    assert "error" in table.splitlines()[4]
    page = report(run).read_text()
    assert "of a rehearsed training: 14 steps of AdamW" in page
    assert "Which values are below 0 beyond their error?" in page and "standard error of the value" in page
    assert "alphatoken-curate mask RUN --by &#x27;value + 1.895 * value_error&#x27; --keep positive" in page
    assert str(tmp_path) not in page
    page = report(plain).read_text()
    assert "rehearsed" not in page and "beyond their error" not in page
