"""A run in which nothing was scored is no success, and says what overflowed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import small_run
from tiny_files import NAN_TOKEN, Notes, command, contents, token_records, write_jsonl

from alphatoken_curate import InputError, ScoreConfig, refresh, score, verify, watch
from alphatoken_curate.errors import UsageError
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.scoring.outcome import largest, made_of, told_of_failed

WHY = r"no row was scored: the losses or signals of all 5 rows are not finite.*adaptation, of the gradient of --target"


@pytest.fixture
def settings(tmp_path: Path, models: dict[str, str]) -> dict[str, Any]:
    """Rows that the broken model fails on, and a target that it does not."""
    records = token_records(5)
    for record in records:
        record["input_ids"][0], record["labels"][0] = NAN_TOKEN, -100
    data, target = (
        write_jsonl(tmp_path / f"{name}.jsonl", of)
        for name, of in (("rows", records), ("task", token_records(3, seed=4)))
    )
    return {"data": data, "target": target, "model": models["broken"], "layers": 2, "rows_per_shard": 2}


def test_a_run_where_nothing_was_scored_is_refused(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(InputError, match=WHY):
            score(ScoreConfig(**settings), run)
        assert not shards.listed(shards.values_folder(run, 0)) and not (run / manifest.NAME).exists()
    flags = [
        part for name, value in settings.items() if name != "data" for part in (f"--{name.replace('_', '-')}", value)
    ]
    ended = command("score", settings["data"], *flags, "-o", run)
    assert ended.code == 3 and "no row was scored" in ended.err and "Next:" not in ended.out
    whole = ScoreConfig(**settings | {"model": models["base"]})
    assert score(whole, tmp_path / "other").manifest.counts.scored == 5


def test_a_finished_run_of_another_release_where_nothing_was_scored_is_refused_too(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as older:
        older.setattr("alphatoken_curate.scoring.loop.check_scored", lambda *_: None)
        assert score(ScoreConfig(**settings), run).manifest.counts.failed == 5
    before = contents(run)
    with pytest.raises(InputError, match="no row was scored"):
        score(ScoreConfig(**settings), run)
    assert contents(run) == before and verify(run) == []


def test_rows_that_failed_are_told_of_by_their_sequences(tmp_path: Path) -> None:
    small_run(tmp_path)  # of twelve rows nine are scored; an eleventh is the target, another rejected
    assert told_of_failed(tmp_path, 0, 9, "all") is None
    told = told_of_failed(tmp_path, 0, 10, "all")
    assert told is not None and told.startswith("1 of 10 rows failed in generation 0: that is in no mask of its values")
    each = told_of_failed(tmp_path, 0, 11, "each")
    assert each is not None and each.startswith("2 of 11 answers failed in generation 0: these are in no mask")


@pytest.mark.long
def test_a_checkpoint_at_which_nothing_is_scored_leaves_nothing_behind(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    run = score(ScoreConfig(**settings | {"model": models["base"]}), tmp_path / "run").run
    refresh(run, models["tuned"])
    before = contents(run)
    with pytest.raises(InputError, match="no row was scored"):
        refresh(run, models["broken"])
    assert contents(run) == before and verify(run) == []
    assert command("refresh", run, "--checkpoint", models["broken"]).code == 3
    out = tmp_path / "out"
    shutil.copytree(models["broken"], out / "checkpoint-5")
    shutil.copytree(models["tuned"], out / "checkpoint-9")
    notes = Notes()
    assert next(iter(watch(run, out, interval=0.01, progress=notes))).checkpoint == "checkpoint-9"
    assert any("checkpoint-5 is not scored" in told and "no row was scored" in told for told in notes.warnings)


def test_a_direction_that_overflows_is_named(settings: dict[str, Any], models: dict[str, str], tmp_path: Path) -> None:
    about = settings | {"model": models["tuned"], "reference": models["base"]}
    made = score(ScoreConfig(**about), tmp_path / "run").run
    found = load_file(made / "artifacts/fisher.safetensors")
    save_file({name: torch.full_like(one, 3e38) for name, one in found.items()}, tmp_path / "F.safetensors")
    flags = {"fisher": str(tmp_path / "F.safetensors"), "drift": "lookahead", "lookahead_lr": 1e3}
    with pytest.raises(InputError) as caught:
        score(ScoreConfig(**about | flags), tmp_path / "other")
    assert f"overflows float32, that of stability, of --fisher {flags['fisher']} and the drift after a step of" in str(
        caught.value
    )
    assert "--lookahead-lr 1000" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "objective", "told"),
    [
        ({}, "adapt", "adaptation, of the gradient of the target rows"),
        ({"target": "t"}, "adapt", "adaptation, of the gradient of --target t"),
        ({"precondition": "adam"}, "adapt", "by --precondition adam with --precondition-eps 1e-08"),
        ({"precondition": "kfac"}, "adapt", "by --precondition kfac with --precondition-damping 0.1"),
        ({"retention": "r"}, "stab", "stability, of the gradient of --retention r"),
        (
            {"retention": "r", "precondition": "adam", "precondition_stability": True},
            "stab",
            "r by --precondition adam",
        ),
        ({"precondition": "adam"}, "stab", "stability, of --fisher sampled and the drift"),
    ],
)
def test_a_direction_is_told_by_what_it_is_made_of(more: dict[str, Any], objective: str, told: str) -> None:
    config = ScoreConfig(data=("d",), **more)
    assert told in made_of(config, objective) and ("precondition" in told) == (
        "precondition" in made_of(config, objective)
    )
    assert largest(config, objective, [torch.tensor([[1.0, -7.0]]), torch.empty(0, 2)]) == 7
    for bad in (torch.inf, torch.nan):
        with pytest.raises(InputError, match="overflows float64"):
            largest(config, objective, [torch.tensor([[bad]], dtype=torch.float64)])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("precondition_damping", 1e-10, 1e4),
        ("precondition_eps", 1e-20, 1e3),
        ("lookahead_lr", 1e-12, 1e3),
        ("beta", 1e-6, 1e3),
        ("stability_weight", -1e6, 1e6),
    ],
)
def test_settings_that_leave_no_effect_or_nothing_else_are_refused(name: str, low: float, high: float) -> None:
    more = {"drift": "lookahead", "lookahead_lr": 1e-3}
    for value in (low, high):
        assert getattr(ScoreConfig(data=("d",), **more | {name: value}), name) == value
    for value in (high * 1.01, 1e300, *((low / 2, 1e-300) if low > 0 else (low * 1.01,))):
        with pytest.raises(UsageError) as caught:
            ScoreConfig(data=("d",), **more | {name: value})
        flag = f"--{name.replace('_', '-')}"
        assert f"{flag} {value!r}: it takes a number from {low:g} to {high:g}" in str(caught.value)
