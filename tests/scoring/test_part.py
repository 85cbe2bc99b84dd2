"""Parts of a scoring, each a command of its own, make the run that one command makes."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pooled
import pytest
import torch
from page_lines import check_lines, lines_of
from tiny_files import Notes, command, contents, pair_records, token_records, write_jsonl

from alphatoken_curate import Local, ScoreConfig, UsageError, score, score_part, verify
from alphatoken_curate.errors import BusyError, FingerprintError
from alphatoken_curate.runs.atomic import TEMPORARY, one_writer
from alphatoken_curate.scoring import identity
from alphatoken_curate.scoring.part import share_of
from alphatoken_curate.scoring.scorer import ShardScorer

PYTHON = platform.python_version()


@pytest.fixture
def settings(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    return {
        "data": write_jsonl(tmp_path / "rows.jsonl", token_records(34)),
        "target": write_jsonl(tmp_path / "target.jsonl", token_records(5, seed=5)),
        "model": models["tuned"],
        "reference": models["base"],
        "rows_per_shard": 7,
    }


@pytest.mark.long
def test_parts_make_the_run_that_one_command_makes(settings: dict[str, Any], tmp_path: Path) -> None:
    config, run = ScoreConfig(**settings), tmp_path / "run"
    score(config, tmp_path / "whole")
    first = score_part(config, "prepare", run)
    assert (first.scored, first.missing, first.shards) == (0, 5, 5) and not (run / "values").exists()
    before = contents(run)
    assert score_part(config, "prepare", run) == first and contents(run) == before  # it is there already
    assert score_part(config, "1/2", run).scored == 2
    assert score_part(config, "1/2", run).scored == 0
    last = score_part(config, "0/2", run)
    assert (last.scored, last.missing) == (3, 0) and not (run / "manifest.json").exists()
    assert score(config, run).shards_scored == 0
    assert contents(run) == contents(tmp_path / "whole") and verify(run) == []
    assert score_part(config, "prepare", run).missing == score_part(config, "0/3", run).scored == 0
    assert contents(run) == contents(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "preference", "precondition": "adam"},
        {"kind": "preference", "drift": "lookahead", "lookahead_lr": 0.1, "estimator": "exact"},
        {"estimator": "influence", "target_groups": 2, "fisher": "generate", "fisher_new_tokens": 4},
        pytest.param({"direction": "rehearsal", "rehearse_lr": 1e-3}, marks=pytest.mark.slow),
        {"kind": "preference", "direction": "rehearsal", "rehearse_lr": 1e-3},
        pytest.param({"precondition": "astra", "precondition_iterations": 2}, marks=pytest.mark.slow),
        {"reference": None},
    ],
    ids=["pairs", "lookahead", "groups", "rehearsal", "rehearsed pairs", "astra", "alone"],
)
def test_parts_of_every_kind_of_run(changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= changes
    if settings.pop("kind", "sft") == "preference":
        settings["data"] = write_jsonl(tmp_path / "pairs.jsonl", pair_records(34))
    config, run = ScoreConfig(**settings), tmp_path / "run"
    score(config, tmp_path / "whole")
    score_part(config, "prepare", run, engine=Local(2))
    for part in ("2/3", "0/3"):
        score_part(config, part, run)
    assert score(config, run).shards_scored == 2  # what no part did
    assert contents(run) == contents(tmp_path / "whole")


def test_what_is_not_prepared_is_not_begun(settings: dict[str, Any], tmp_path: Path) -> None:
    config, run = ScoreConfig(**settings), tmp_path / "run"
    for _ in range(2):
        with pytest.raises(UsageError, match=r"--part 0/2: .*run is not prepared\. .*--part prepare"):
            score_part(config, "0/2", run)
        assert not run.exists() or not list(run.iterdir())
        run.mkdir(exist_ok=True)
    score_part(config, "prepare", run)
    before = contents(run)
    with pytest.raises(FingerprintError, match="seed"):
        score_part(ScoreConfig(**settings | {"seed": 1}), "0/2", run)
    (run / "artifacts" / "fisher.safetensors").rename(tmp_path / "kept")
    with pytest.raises(UsageError, match=r"not prepared \(fisher of these settings and inputs is not there\)"):
        score_part(config, "0/2", run)
    (tmp_path / "kept").rename(run / "artifacts" / "fisher.safetensors")
    assert contents(run) == before


def test_parts_run_beside_one_another_and_beside_nothing_else(settings: dict[str, Any], tmp_path: Path) -> None:
    config, run = ScoreConfig(**settings), tmp_path / "run"
    score_part(config, "prepare", run)
    live = run / "values" / "generation=0" / f".part-00001.parquet.{'0' * 16}.tmp"
    live.parent.mkdir(parents=True)
    with one_writer(run, shared=True):  # another part, or the same one, begun twice
        live.write_bytes(b"under way")
        assert score_part(config, "0/2", run).scored == 3 and live.exists()
        for alone in (lambda: score(config, run), lambda: score_part(config, "prepare", run)):
            with pytest.raises(BusyError, match="another process"):
                alone()
        with pytest.raises(KeyboardInterrupt), one_writer(run, shared=True):
            raise KeyboardInterrupt
        assert live.exists()
    with one_writer(run), pytest.raises(BusyError, match="another process"):
        score_part(config, "1/2", run)
    score(config, run)
    assert not [path for path in run.rglob("*") if TEMPORARY.fullmatch(path.name)]


def test_what_a_part_did_by_less_memory_is_told_as_one_command_tells_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardScorer, "score", pooled.scored_short_of_memory)
    config, run = ScoreConfig(**settings | {"batch_tokens": 400, "threads": 1}), tmp_path / "run"
    score(config, tmp_path / "whole")
    score_part(config, "prepare", run)
    for part in ("0/2", "1/2"):
        score_part(config, part, run)
    score(replace(config, threads=None), run)
    assert contents(run) == contents(tmp_path / "whole")
    assert b"threads: 1" in (run / "config.yaml").read_bytes()


def test_parts_take_the_threads_and_tell_of_other_releases_of_what_was_prepared(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, before = ScoreConfig(**settings), torch.get_num_threads()
    torch.set_num_threads(3)  # as torch takes them on the machine that prepares
    try:
        score_part(config, "prepare", tmp_path / "run")
        torch.set_num_threads(1)
        monkeypatch.setenv(pooled.MARKS, str(tmp_path))
        monkeypatch.setattr(ShardScorer, "score", pooled.scored_with_threads_told)
        run, notes = tmp_path / "run", Notes()
        with pytest.raises(UsageError, match=r"--threads 2: .*run was prepared without it, with 3\. Leave it out"):
            score_part(replace(config, threads=2), "0/2", run)
        score_part(config, "0/2", run, notes)
        assert (tmp_path / "3").exists() and not (tmp_path / "1").exists() and torch.get_num_threads() == 1
        assert not notes.warnings
        monkeypatch.setattr(identity.platform, "python_version", lambda: "3.99")
        score_part(replace(config, threads=3), "1/2", run, notes)
    finally:
        torch.set_num_threads(before)
    assert notes.warnings == [
        f"Computed with python 3.99 (begun with {PYTHON}): values may round otherwise than those that are there."
    ]


@pytest.mark.parametrize("part", ["", "1", "2/2", "3/2", "-1/2", "a/b", "0/0", "1/2/3", " 0/2", "prepared"])
def test_what_no_part_is(part: str) -> None:
    with pytest.raises(UsageError, match="it takes prepare, or I/N"):
        share_of(part)
    assert share_of("0/1") == (0, 1) and share_of("3/8") == (3, 8) and share_of("prepare") is None


def test_what_the_command_says_of_parts(settings: dict[str, Any], tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "data"]
    run = tmp_path / "my run"

    def told(*part: str) -> list[str]:
        ended = command("score", settings["data"], *flags, "-o", run, *part)
        assert ended.code == 0, ended.err
        return ended.out.splitlines()

    assert told("--part", "prepare") == [
        f"{run}: prepared; there: 0 of 5 shards.",
        "Next: the same command with --part 0/N to N-1/N, each where it may run; then without --part, to end it.",
    ]
    assert told("--part", "0/2", "--workers", "1")[0] == f"{run}: part 0/2: scored 3 shards; there: 3 of 5 shards."
    assert told("--part", "1/2") == [
        f"{run}: part 1/2: scored 2 shards; there: 5 of 5 shards.",
        "Next: the same command without --part, which writes manifest and mask.",
    ]
    assert told()[0] == f"Wrote {run}"
    for part in ("prepare", "0/2"):
        assert told("--part", part)[1:] == [f"The run is finished. Next: alphatoken-curate stats '{run}'"]
    bad = command("score", settings["data"], *flags, "-o", run, "--part", "2/2")
    assert bad.code == 2 and "it takes prepare, or I/N" in bad.err


def test_rows_are_told_of_once(settings: dict[str, Any], tmp_path: Path) -> None:
    """By `prepare`: a hundred parts do not say the same a hundred times."""
    config, notes = ScoreConfig(**settings | {"max_length": 19}), Notes()
    score_part(config, "prepare", tmp_path / "run", notes)
    assert any("longer than --max-length" in text for text in notes.warnings)
    notes = Notes()
    score_part(config, "0/2", tmp_path / "run", notes)
    assert not notes.warnings


_SBATCH = """
sbatch() {
    local range="" line="" argument
    for argument in "$@"; do
        case $argument in --array=*) range=${argument#--array=} ;; --*) ;; *) line=$argument ;; esac
    done
    if [ -z "$range" ]; then bash -c "$line" >&2 || exit 1; fi
    if [ -n "$range" ]; then
        for task in $(seq "${range%-*}" "${range#*-}"); do SLURM_ARRAY_TASK_ID=$task bash -c "$line" >&2 || exit 1; done
    fi
    echo 1
}
"""


@pytest.mark.long
def test_the_lines_for_slurm_make_the_same_run(settings: dict[str, Any], tmp_path: Path) -> None:
    lines = lines_of("slurm", tmp_path, settings, rows_per_shard=7).replace("=0-7", "=0-1").replace("/8", "/2")
    alike = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # a run keeps how many it was made by
    subprocess.run(["bash", "-euc", _SBATCH + lines], cwd=tmp_path, env=alike, check=True, capture_output=True)
    check_lines(tmp_path, rows_per_shard=7)
