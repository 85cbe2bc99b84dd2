"""What `show`, `stats` and `compare` print of a few real rows, word for word.

`pytest --rewrite` of this file writes those in tests/golden anew: look at what changed before you keep it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from real_run import STORED, real_run, records, scored_anew

from alphatoken_curate.cli.main import cli
from alphatoken_curate.runs import manifest

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN: dict[str, str | None] = {
    "COLUMNS": "80",
    "NO_COLOR": None,
    "FORCE_COLOR": None,
    "COLORTERM": None,
    "TERM": "dumb",
}
SIXTEEN = {**PLAIN, "FORCE_COLOR": "1", "TERM": "xterm"}
MANY = {**PLAIN, "FORCE_COLOR": "1", "TERM": "xterm-256color"}

CASES: dict[str, tuple[list[str], dict[str, str | None]]] = {
    "show": (["show", "sft", "--row", "0"], PLAIN),
    "show-scripts": (["show", "sft", "--id", "words-peace"], PLAIN),
    "show-emoji-256-colours": (["show", "sft", "--id", "email-thanks"], MANY),
    "show-japanese-16-colours": (["show", "sft", "--search", "japanese", "--by", "nll"], SIXTEEN),
    "show-no-colour": (["show", "sft", "--row", "0", "--generation", "0"], {**MANY, "NO_COLOR": "1"}),
    "show-code-tokens": (["show", "sft", "--id", "code-dedupe", "--tokens"], {**PLAIN, "COLUMNS": "120"}),
    "show-two-columns": (
        ["show", "sft", "--id", "unit-oven", "--tokens", "--by", "nll", "--by", "value"],
        PLAIN,
    ),
    "show-search": (["show", "sft", "--search", "×"], PLAIN),
    "show-pair": (["show", "preference", "--row", "1"], PLAIN),
    "show-pair-tokens-rejected": (["show", "preference", "--row", "0", "--branch", "rejected", "--tokens"], MANY),
    "stats": (["stats", "sft"], PLAIN),
    "stats-narrow-16-colours": (["stats", "sft", "--generation", "0"], {**SIXTEEN, "COLUMNS": "60"}),
    "stats-pairs": (["stats", "preference"], {**PLAIN, "COLUMNS": "100"}),
    "compare": (["compare", "sft"], {**PLAIN, "COLUMNS": "120"}),
    "compare-pairs": (["compare", "preference", "--changed", "3"], PLAIN),
}


def make(folder: Path) -> None:
    """The runs that the cases name."""
    for kind in ("sft", "preference"):
        real_run(folder / kind, kind)


def printed(folder: Path, arguments: list[str], env: dict[str, Any]) -> str:
    """What a command prints; escape is shown as ␛, and sizes of files, which depend on libraries, as #."""
    with contextlib.chdir(folder):
        result = CliRunner().invoke(cli, arguments, env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    out = result.output.replace("\x1b", "␛")
    for one in manifest.read(folder / arguments[1]).generations:
        size = f"{sum(shard.bytes for shard in one.shards):,}"
        out = out.replace(size, "#" * len(size))
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make(folder)
    return folder


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CASES)
def test_what_is_printed_is_what_was_looked_at(runs: Path, name: str, same_text: Callable[[Path, str], None]) -> None:
    same_text(GOLDEN / f"{name}.txt", printed(runs, *CASES[name]))


def test_there_is_no_other_file() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.txt" for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_them_commands_a_terminal(name: str) -> None:
    text = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    bare = re.sub(r"␛\[[0-9;]*m", "", text)
    assert "␛" not in bare
    assert ("␛" in text) == (CASES[name][1].get("FORCE_COLOR") == "1")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    wide = "--tokens" in CASES[name][0]
    assert wide or all(len(line) <= int(CASES[name][1]["COLUMNS"] or 0) for line in bare.splitlines())


@pytest.mark.slow
def test_the_stored_rows_are_what_the_model_gives(tmp_path: Path) -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))["preference"]
    found = list(records(scored_anew(tmp_path, "preference"), "preference", generations=1))
    for one, anew in zip(stored, found, strict=True):
        assert {name: one[name] for name in ("source", "line", "id")} == {
            name: anew[name] for name in ("source", "line", "id")
        }
        for branch, again in zip(one["branches"], anew["branches"], strict=True):
            assert (branch["input_ids"], branch["response"]) == (again["input_ids"], again["response"])
            assert branch["signals"][0].keys() == again["signals"][0].keys()
            for name, numbers in branch["signals"][0].items():
                np.testing.assert_allclose(
                    again["signals"][0][name], numbers, rtol=0.01, atol=0.005 * max(map(abs, numbers))
                )
