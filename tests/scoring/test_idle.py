from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_files import command, token_records, write_jsonl

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.models.load import find_model
from alphatoken_curate.scoring.idle import _READ, idle
from alphatoken_curate.scoring.prepare import fingerprint_fields, prepare

REHEARSAL: dict[str, Any] = {"direction": "rehearsal", "rehearse_lr": 1e-4}
SGD = {**REHEARSAL, "rehearse_optimizer": "sgd"}
REHEARSED: tuple[dict[str, Any], ...] = (
    {"rehearse_epochs": 2},
    {"rehearse_rows_per_step": 4},
    {"rehearse_optimizer": "sgd"},
    {"rehearse_weight_decay": 0.1},
    {"rehearse_schedule": "linear"},
    {"rehearse_warmup": 2},
    {"rehearse_clip": 1.0},
    {"rehearse_denominator": "sum"},
    {"rehearse_seeds": 2},
)
ADAMW: tuple[dict[str, Any], ...] = ({"rehearse_betas": "0.8,0.9"}, {"rehearse_eps": 1e-6}, {"rehearse_root": 1e-9})
_BY = "read only with --direction rehearsal and --rehearse-optimizer"

CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"subset": "main"}, {"data": ("s3://bucket/rows.jsonl",)}, "read only for datasets of the Hub"),
    ({"split": "test"}, {"data": ("*.jsonl",)}, "read only where DATA has splits"),
    ({"target_groups": 1}, {}, "read only from 2 on"),
    ({"target_rows": 3}, {"target": "t.jsonl"}, "read only without --target"),
    ({"trunk_device": "cpu"}, {"device": "cpu"}, "read only beside another --device"),
    ({"window": 3}, {"estimator": "exact"}, "read only with --estimator published"),
    ({"window": 3}, {"estimator": "influence"}, "read only with --estimator published"),
    ({"window": 3}, {"estimator": "exact+influence"}, "read only with --estimator published"),
    ({"fisher": "empirical"}, {"retention": "r.jsonl"}, "read only without --retention, or with --drift"),
    ({"fisher_rows": 3}, {"fisher": "f.safetensors"}, "read only where a Fisher is estimated"),
    ({"fisher_rows": 3}, {"retention": "r.jsonl"}, "read only where a Fisher is estimated"),
    ({"fisher_new_tokens": 3}, {}, "read only with --fisher generate"),
    ({"lookahead_rows": 3}, {"drift": "weights"}, "read only with --drift lookahead"),
    ({"precondition_rows": 3}, {}, "read only with --precondition"),
    ({"precondition_eps": 1e-3}, {"precondition": "kfac"}, "read only with --precondition adam"),
    ({"precondition_damping": 1e-3}, {"precondition": "adam"}, "read only with --precondition kfac, ekfac or astra"),
    ({"precondition_iterations": 3}, {"precondition": "ekfac"}, "read only with --precondition astra"),
    ({"beta": 0.3}, {}, "read only for preference rows"),
    ({"rehearse_simpo": 0.0}, REHEARSAL, "read only for preference rows"),
    ({"stability_scale": "rms"}, {"by": "nll - reference_nll"}, "read only where --by depends on value"),
    ({"aggregate": "last"}, {"generation": "0"}, "read only with several of --generation"),
    *((setting, {}, "read only with --direction rehearsal") for setting in REHEARSED),
    *((setting, SGD, f"{_BY} adamw") for setting in ADAMW),
    ({"rehearse_momentum": 0.9}, REHEARSAL, f"{_BY} sgd"),
    ({"rehearse_lora_alpha": 8.0}, REHEARSAL, "read only with --direction rehearsal and --rehearse-lora"),
]
"""A setting, others beside which it plays no part, and when it would."""

PLAYS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"subset": "main"}, {"data": ("*.jsonl", "owner/name")}, "sft"),
    ({"split": "test"}, {"data": ("owner/name",)}, "sft"),
    ({"target_groups": 2}, {}, "sft"),
    ({"target_rows": 3}, {}, "sft"),
    ({"trunk_device": "cpu"}, {}, "sft"),
    ({"trunk_device": "disk"}, {"device": "cpu"}, "sft"),
    ({"window": 3}, {}, "sft"),
    ({"fisher": "empirical"}, {"retention": "r.jsonl", "drift": "weights"}, "sft"),
    ({"fisher_rows": 3}, {}, "sft"),
    ({"fisher_new_tokens": 3}, {"fisher": "generate"}, "sft"),
    ({"fisher_prompts": "p.jsonl"}, {"fisher": "generate"}, "sft"),
    ({"lookahead_rows": 3}, {"drift": "lookahead", "lookahead_lr": 0.1}, "sft"),
    ({"precondition_rows": 3}, {"precondition": "adam"}, "sft"),
    ({"precondition_eps": 1e-3}, {"precondition": "adam"}, "sft"),
    ({"precondition_damping": 1e-3}, {"precondition": "ekfac"}, "sft"),
    ({"precondition_damping": 1e-3}, {"precondition": "astra"}, "sft"),
    ({"precondition_iterations": 3}, {"precondition": "astra"}, "sft"),
    ({"beta": 0.3}, {}, "preference"),
    ({"rehearse_simpo": 0.5}, REHEARSAL, "preference"),
    ({"stability_scale": "rms"}, {"by": "value + nll"}, "sft"),
    ({"aggregate": "last"}, {"generation": "0,1"}, "sft"),
    ({"aggregate": "last"}, {"generation": "all"}, "sft"),
    *((setting, REHEARSAL, "sft") for setting in (*REHEARSED, *ADAMW)),
    ({"rehearse_momentum": 0.9}, SGD, "sft"),
    ({"rehearse_lora_alpha": 8.0}, {**REHEARSAL, "rehearse_lora": 4}, "sft"),
]


def flag(setting: dict[str, Any]) -> str:
    return "--" + next(iter(setting)).replace("_", "-")


@pytest.mark.parametrize(("setting", "beside", "when"), CASES)
def test_a_setting_that_plays_no_part_is_named_with_what_it_takes(
    setting: dict[str, Any], beside: dict[str, Any], when: str
) -> None:
    assert (
        idle(ScoreConfig(**{"data": "d"} | beside | setting), "sft")
        == f"Without effect here: {flag(setting)} ({when})."
    )
    assert idle(ScoreConfig(**{"data": "d"} | beside), "sft") is None


@pytest.mark.parametrize(("setting", "beside", "kind"), PLAYS)
def test_one_that_plays_a_part_is_not(setting: dict[str, Any], beside: dict[str, Any], kind: str) -> None:
    assert idle(ScoreConfig(**{"data": "d"} | beside | setting), kind) is None


def test_every_setting_of_the_table_is_known_and_tried_both_ways() -> None:
    assert _READ.keys() <= {item.name for item in fields(ScoreConfig)}
    named = {name for setting, *_ in CASES for name in setting} | {"fisher_prompts"}
    assert named == _READ.keys() == {name for setting, *_ in PLAYS for name in setting}


def test_all_of_them_stand_in_one_line() -> None:
    found = idle(ScoreConfig(data="d", estimator="exact", window=8, beta=0.2, fisher="generate", retention="r"), "sft")
    assert found == (
        "Without effect here: --window (read only with --estimator published),"
        " --fisher (read only without --retention, or with --drift), --beta (read only for preference rows)."
    )
    prompts = ScoreConfig(data="d", fisher="generate", fisher_prompts="p", retention="r")
    assert "--fisher-prompts (read only without" in str(idle(prompts, "sft"))


def test_what_is_named_leaves_the_fingerprint_alone_and_what_is_not_changes_it(
    models: dict[str, str], tmp_path: Path
) -> None:
    data = {name: write_jsonl(tmp_path / f"{name}.jsonl", token_records(40, seed=i)) for i, name in enumerate("dtr")}
    stored = {"target_rows", "window", "fisher_rows", "fisher_new_tokens", "lookahead_rows"}
    stored |= {"precondition_rows", "precondition_eps", "precondition_damping", "precondition_iterations"}

    def made(settings: dict[str, Any]) -> dict[str, Any]:
        paths = {"t.jsonl": data["t"], "r.jsonl": data["r"], "f.safetensors": data["r"]}
        given = {name: paths.get(value, value) for name, value in settings.items()}
        prepared = prepare(ScoreConfig(data=data["d"], model=models["base"], **given))
        return fingerprint_fields(prepared, find_model(models["base"]), "float32")

    for setting, beside, _ in CASES:
        if stored.issuperset(setting) and "retention" not in beside:
            assert made(beside | setting) == made(beside)
    for setting, beside, _ in PLAYS:
        if stored.issuperset(setting):
            assert made(beside | setting) != made(beside)


def test_score_says_so_of_flags_and_of_a_config_and_not_when_it_is_replayed(
    models: dict[str, str], tmp_path: Path
) -> None:
    data, run = write_jsonl(tmp_path / "rows.jsonl", token_records(11)), tmp_path / "run"
    plain = ("score", data, "--model", models["base"], "--layers", 1, "-o")
    said = "! Without effect here: --precondition-eps (read only with --precondition adam)."
    given = command(*plain, run, "--precondition-eps", "1e-3", "--beta", "0.1")
    assert given.code == 0 and given.err.count("Without effect") == 1 and said in given.err.splitlines()
    (tmp_path / "c.yaml").write_text("precondition_eps: 1.0e-3\n")
    again = command(*plain, tmp_path / "other", "-c", tmp_path / "c.yaml")
    assert said in again.err.splitlines()
    clean = command(*plain, tmp_path / "clean")
    assert yaml.safe_load((tmp_path / "clean/config.yaml").read_text()).keys() >= _READ.keys()
    replayed = command("score", "-c", tmp_path / "clean/config.yaml", "-o", tmp_path / "clean")
    assert clean.code == replayed.code == 0
    assert "Without effect" not in clean.err + replayed.err
