from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_run import published
from tiny import tiny_model
from tiny_adapters import save_adapter
from tiny_files import (
    NAN_TOKEN,
    Notes,
    command,
    contents,
    ended_records,
    moments,
    perturbed,
    quiet,
    token_records,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from alphatoken_curate import (
    FingerprintError,
    InputError,
    ScoreConfig,
    StoredDataError,
    UsageError,
    mask,
    scan,
    score,
    score_tokens,
    verify,
)
from alphatoken_curate.directions.generate import sample_answers
from alphatoken_curate.errors import CurateError
from alphatoken_curate.models.load import find_model, load_model
from alphatoken_curate.progress import Silent
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.atomic import TEMPORARY
from alphatoken_curate.runs.schema import COMPONENTS, SFT, SIGNALS
from alphatoken_curate.scoring.folder import default_run
from alphatoken_curate.scoring.prepare import prepare
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.spec import spec_of
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import Batch

PARITY = Path(__file__).parents[3] / "shared" / "fixtures" / "release_parity"
ROWS = 11


@pytest.fixture
def target(folder: Path) -> str:
    return write_jsonl(folder / "target.jsonl", token_records(4, seed=9))


@pytest.fixture
def settings(folder: Path, models: dict[str, str]) -> dict[str, Any]:
    """Rows in four shards, a tuned model and its reference."""
    data = write_jsonl(folder / "rows.jsonl", token_records(ROWS))
    return {"data": data, "model": models["tuned"], "reference": models["base"], "rows_per_shard": 3, "layers": 2}


@pytest.fixture
def run(folder: Path, settings: dict[str, Any], tmp_path: Path) -> Path:
    """A finished run of `settings`, copied from one that was made once."""
    return _copy(folder / "finished", ScoreConfig(**settings), tmp_path / "run")


def _copy(made: Path, config: ScoreConfig, run: Path) -> Path:
    if not made.exists():
        score(config, made)
    return Path(shutil.copytree(made, run))


def frame(run: Path) -> pl.DataFrame:
    return scan(run).collect()


def flat(column: pl.Series) -> np.ndarray[Any, Any]:
    return np.concatenate([np.array(row, dtype=np.float64) for row in column.to_list()])


def assert_same_signals(found: pl.DataFrame, wanted: pl.DataFrame, tolerance: float = 1e-5) -> None:
    assert found["row_id"].to_list() == wanted["row_id"].to_list()
    for name in SIGNALS:
        a, b = flat(found[name]), flat(wanted[name])
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        if not np.isnan(b).all():
            assert np.nanmax(np.abs(a - b)) <= tolerance * np.nanmax(np.abs(b)), name


def test_values_that_give_no_such_mask_stay_and_give_another(settings: dict[str, Any], tmp_path: Path) -> None:
    about = ("score", settings["data"], "--model", settings["model"], "--layers", 1, "-o", tmp_path / "run")
    asked = ("--keep", 0.5, "--by", "LN(nll - nll)")
    ended = command(*about, *asked)
    assert ended.code == 2 and "gives no finite float32" in ended.err
    assert "The values are scored and stay: give the mask other settings, by `alphatoken-curate mask`." in ended.err
    assert verify(tmp_path / "run") == []
    before = contents(tmp_path / "run")
    again = command(*about, *asked)
    assert again.code == 2 and "gives no finite float32" in again.err and contents(tmp_path / "run") == before
    ended = command("mask", tmp_path / "run", "--keep", 0.5, "--by", "nll")
    assert ended.code == 0 and verify(tmp_path / "run") == []


# --- parity with the released code


def parity() -> Path:
    if not PARITY.is_dir():
        pytest.skip(f"needs the numbers of the released code in {PARITY}")
    return PARITY


def test_the_command_line_gives_the_numbers_of_the_released_code(tmp_path: Path) -> None:
    fixture = parity()
    ended = command(
        *("score", fixture / "train.jsonl", "--model", fixture / "model", "--reference", fixture / "reference"),
        *("--target", fixture / "target.jsonl", "--fisher", fixture / "fisher.safetensors", "--layers", 3),
        *("--window", 4, "--estimator", "published", "-o", tmp_path / "run"),
    )
    assert ended.code == 0, ended.err
    found = frame(tmp_path / "run")
    expected = [json.loads(line) for line in (fixture / "expected_sft.jsonl").read_text().splitlines()]
    assert found["status"].to_list() == ["scored"] * len(expected)
    for name in (*COMPONENTS, "value"):
        wanted = [np.array(row[name], dtype=np.float64) for row in expected]
        largest = np.nanmax(np.abs(np.concatenate(wanted)))
        assert largest > 0
        for mine, theirs in zip(found[name].to_list(), wanted, strict=True):
            both = np.array(mine, dtype=np.float64)
            assert np.array_equal(np.isnan(both), np.isnan(theirs))
            assert np.nanmax(np.abs(both - theirs)) <= 1e-5 * largest, name


def test_preference_values_are_those_of_the_released_code(tmp_path: Path) -> None:
    fixture = parity()
    ended = command(
        *("score", fixture / "preference.jsonl", "--model", fixture / "model", "--reference", fixture / "reference"),
        *("--target", fixture / "target.jsonl", "--fisher", fixture / "fisher.safetensors", "--layers", 3),
        *("--window", 4, "--estimator", "published", "-o", tmp_path / "run"),
    )
    assert ended.code == 0, ended.err
    found = frame(tmp_path / "run")
    expected = [json.loads(line) for line in (fixture / "expected_preference.jsonl").read_text().splitlines()]
    told = json.loads((fixture / "settings.json").read_text())
    assert found["omega"].mean() == pytest.approx(told["omega_mean"], rel=1e-6)
    gains = {}
    for branch in ("chosen", "rejected"):
        wanted = [np.array(row[f"{branch}_value"], dtype=np.float64) for row in expected]
        largest = np.nanmax(np.abs(np.concatenate(wanted)))
        for mine, theirs in zip(found[f"{branch}_value"].to_list(), wanted, strict=True):
            both = np.array(mine, dtype=np.float64)
            assert np.array_equal(np.isnan(both), np.isnan(theirs))
            assert np.nanmax(np.abs(both - theirs)) <= 1e-5 * largest, branch
        before, after = (
            np.array([np.nansum(np.array(row, dtype=np.float64)) for row in found[f"{branch}_{name}"].to_list()])
            for name in ("reference_nll", "nll")
        )
        gains[branch] = before - after
        assert gains[branch].mean() == pytest.approx(told[f"{branch}_reward_mean"], abs=2e-5)
    margins = told["beta"] * (gains["chosen"] - gains["rejected"])
    np.testing.assert_allclose(found["margin"].to_numpy(), margins, rtol=1e-5)


def test_the_empirical_fisher_is_that_of_the_released_code() -> None:
    from alphatoken_curate.directions.fisher import fisher_diagonal
    from alphatoken_curate.engine.capture import ScoringModel
    from alphatoken_curate.rows.read import read_rows
    from alphatoken_curate.tokens.plan import collate, plan_batches
    from alphatoken_curate.tokens.tokenise import tokenise

    fixture = parity()
    rows, _ = tokenise(
        read_rows([str(fixture / "fisher_rows.jsonl")]).rows, None, max_length=99, turns="all", vocab_size=None
    )
    scoring = ScoringModel(AutoModelForCausalLM.from_pretrained(fixture / "reference"), 3)
    batches = [collate(rows, indices) for indices in plan_batches(rows, 64)]
    found = fisher_diagonal(scoring, rows, batches, sampled=False, seed=0)
    expected = load_file(fixture / "fisher.safetensors")
    assert expected.keys() == {m.parameter for m in scoring.maps}
    for m, mine in zip(scoring.maps, found, strict=True):
        wanted = expected[m.parameter]
        assert (mine - wanted).abs().max() <= 1e-5 * wanted.abs().max(), m.parameter


# --- a run from end to end


def test_the_run_folder_is_laid_out_as_promised(settings: dict[str, Any], tmp_path: Path) -> None:
    made = score(ScoreConfig(**settings), tmp_path / "run")
    names = set(contents(tmp_path / "run"))
    part = [f"part-{i:05d}.parquet" for i in range(4)]
    assert names == {
        *("config.yaml", "manifest.json", "README.md"),
        *("artifacts/run.json", "artifacts/target-00000.safetensors", "artifacts/fisher.safetensors"),
        *(f"artifacts/reference_nll-{i:05d}.safetensors" for i in range(4)),
        *(f"values/generation=0/{name}" for name in part),
        *(f"train/mask=0000/{name}" for name in part),
    }
    assert made.run == tmp_path / "run" and made.shards_scored == 4 and made.mask.created
    assert verify(tmp_path / "run") == []
    stored = manifest.read(tmp_path / "run")
    assert [shard.rows for shard in stored.generations[0].shards] == [3, 3, 3, 2]
    text = (tmp_path / "run" / "manifest.json").read_text()
    assert str(tmp_path) not in text  # no absolute path


@pytest.mark.one_in(2)
@pytest.mark.parametrize("estimator", ["published", "exact"])
def test_values_are_those_of_score_tokens_in_memory(
    estimator: Any, settings: dict[str, Any], target: str, tmp_path: Path
) -> None:
    changes = {"target": target, "estimator": estimator, "fisher_rows": 999, "window": 5, "stability_weight": 0.7}
    score(ScoreConfig(**settings | changes), tmp_path / "run")
    wanted = score_tokens(
        AutoModelForCausalLM.from_pretrained(settings["model"]),
        token_records(ROWS),
        target=token_records(4, seed=9),
        reference=AutoModelForCausalLM.from_pretrained(settings["reference"]),
        estimator=estimator,
        layers=2,
        window=5,
        stability_weight=0.7,
    )
    found = frame(tmp_path / "run")
    assert_same_signals(found, wanted)
    assert found["id"].to_list() == [f"r{i}" for i in range(ROWS)]
    value = flat(found["adapt_direct"]) + flat(found["adapt_causal"])
    value += 0.7 * (flat(found["stab_direct"]) + flat(found["stab_causal"]))
    np.testing.assert_allclose(flat(found["value"]), value, rtol=1e-5, atol=1e-6 * np.nanmax(np.abs(value)))
    assert all(np.nanmax(np.abs(flat(found[name]))) > 0 for name in COMPONENTS)


def test_every_row_read_is_accounted_for(settings: dict[str, Any], tmp_path: Path) -> None:
    records: list[Any] = token_records(25)
    records[3] = '{"input_ids": [5, 6'
    records[4] = {"input_ids": [5, 6], "labels": [-100, 7]}
    records[10] = {"input_ids": [5, 600], "labels": [-100, 600]}
    settings |= {"data": write_jsonl(tmp_path / "odd.jsonl", records), "bad_rows": "quarantine"}
    made = score(ScoreConfig(**settings), tmp_path / "run")
    counts = made.manifest.counts
    assert (counts.read, counts.scored, counts.target, counts.failed, counts.rejected) == (25, 20, 2, 0, 3)
    found = frame(tmp_path / "run")
    assert found["row_id"].to_list() == list(range(25))
    rejected = found.filter(status="rejected")
    assert rejected["row_id"].to_list() == [3, 4, 10] and rejected["line"].to_list() == [4, 5, 11]
    for name in ("input_ids", "response", *SIGNALS):
        assert rejected[name].list.len().to_list() == [0, 0, 0]  # empty, not null
    lines = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"], line["reason"]) for line in lines] == [
        ("odd.jsonl", 4, "invalid_json"),
        ("odd.jsonl", 5, "label_mismatch"),
        ("odd.jsonl", 11, "token_out_of_vocabulary"),
    ]
    assert all(line["excerpt"] and line["message"] for line in lines)
    train = scan(tmp_path / "run", "train").collect()
    assert train["row_id"].to_list() == found.filter(status="scored")["row_id"].to_list()
    assert verify(tmp_path / "run") == []


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("rows", "most", "held"), [(2, 32, 1), (19, 32, 1), (40, 32, 4), (40, 3, 3)])
def test_held_out_rows(rows: int, most: int, held: int, settings: dict[str, Any], tmp_path: Path) -> None:
    notes = Notes()
    data = write_jsonl(tmp_path / "n.jsonl", token_records(rows))
    settings |= {"data": data, "target_rows": most, "reference": None, "rows_per_shard": 50, "layers": 1}
    made = score(ScoreConfig(**settings), tmp_path / "run", notes)
    assert made.manifest.counts.target == held and made.manifest.counts.scored == rows - held
    assert any(f"{'1 row is' if held == 1 else f'{held} rows are'} held out" in note for note in notes.notes)
    found = frame(tmp_path / "run")
    aside = found.filter(status="target")
    assert aside["input_ids"].list.len().min() > 0 and aside["response"].list.any().all()
    assert aside["value"].list.len().to_list() == [0] * held
    train = scan(tmp_path / "run", "train").collect()
    assert not set(train["row_id"]) & set(aside["row_id"])
    if most == 3:
        other = score(ScoreConfig(**settings | {"seed": 5}), tmp_path / "other")
        assert set(frame(other.run).filter(status="target")["row_id"]) != set(aside["row_id"])


def test_one_row_alone_cannot_be_its_own_target(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["data"] = write_jsonl(tmp_path / "one.jsonl", token_records(1))
    with pytest.raises(InputError, match="--target"):
        score(ScoreConfig(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_same_reference_gives_stability_of_exactly_zero(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(models["tuned"], tmp_path / "copy")  # equal weights under another name are the same model
    for reference in (None, settings["model"], str(tmp_path / "copy")):
        run = tmp_path / f"run{len(str(reference))}"
        assert not score(ScoreConfig(**settings | {"reference": reference}), run).has_stability
        found = frame(run).filter(status="scored")
        for name in ("stab_direct", "stab_causal"):
            signal = flat(found[name])
            assert not np.isnan(signal).all() and np.nanmax(np.abs(signal)) == 0
        assert np.isnan(flat(found["reference_nll"])).all()
        assert np.nanmax(np.abs(flat(found["adapt_direct"]))) > 0


def test_another_reference_gives_stability_and_its_losses(
    settings: dict[str, Any], target: str, models: dict[str, str], tmp_path: Path
) -> None:
    notes = Notes()
    score(ScoreConfig(**settings | {"target": target}), tmp_path / "run", notes)
    assert not [told for told in (*notes.notes, *notes.warnings) if "tability" in told]
    score(ScoreConfig(**settings | {"target": target, "model": models["base"]}), tmp_path / "base")
    found, base = frame(tmp_path / "run"), frame(tmp_path / "base")
    assert np.nanmax(np.abs(flat(found["stab_direct"]))) > 0
    np.testing.assert_allclose(flat(found["reference_nll"]), flat(base["nll"]), rtol=1e-5)
    assert not np.allclose(flat(found["reference_nll"]), flat(found["nll"]), equal_nan=True)


def test_rows_that_fail_leave_the_others_as_they_are(
    settings: dict[str, Any], target: str, models: dict[str, str], tmp_path: Path
) -> None:
    records = token_records(ROWS)
    for i in (2, 7):
        records[i]["input_ids"][0] = NAN_TOKEN
        records[i]["labels"][0] = -100
    config = settings | {"data": write_jsonl(tmp_path / "nan.jsonl", records), "target": target, "reference": None}
    score(ScoreConfig(**config | {"model": models["base"]}), tmp_path / "whole")
    made = score(ScoreConfig(**config | {"model": models["broken"]}), tmp_path / "run")
    assert made.manifest.counts.failed == 2 and made.manifest.counts.scored == ROWS - 2
    whole, found = frame(tmp_path / "whole"), frame(tmp_path / "run")
    assert found.filter(status="failed")["row_id"].to_list() == [2, 7]
    assert found["input_ids"].to_list() == whole["input_ids"].to_list()
    assert found.filter(status="failed")["nll"].list.len().to_list() == [0, 0]
    assert_same_signals(found.filter(status="scored"), whole.filter(~pl.col("row_id").is_in([2, 7])), tolerance=0)
    assert scan(tmp_path / "run", "train").collect()["row_id"].to_list() == [0, 1, 3, 4, 5, 6, 8, 9, 10]
    assert verify(tmp_path / "run") == []


def test_a_target_or_fisher_that_is_not_finite_is_refused(
    settings: dict[str, Any], target: str, models: dict[str, str], tmp_path: Path
) -> None:
    records = token_records(3)
    for record in records:
        record["input_ids"][0] = NAN_TOKEN
    bad = write_jsonl(tmp_path / "nan.jsonl", records)
    with pytest.raises(InputError, match="target"):
        score(ScoreConfig(**settings | {"model": models["broken"], "target": bad}), tmp_path / "run")
    with pytest.raises(InputError, match="Fisher of the reference is not finite"):
        config = settings | {"reference": models["broken"], "data": bad, "target": target, "fisher": "empirical"}
        score(ScoreConfig(**config), tmp_path / "other")


@pytest.mark.parametrize("named", ["target", "groups", "retention", "lookahead"])
def test_rows_that_make_a_direction_infinite_are_named(
    settings: dict[str, Any], target: str, models: dict[str, str], named: str, tmp_path: Path
) -> None:
    records = token_records(9)
    for i in (2, 7):
        records[i]["input_ids"][0] = NAN_TOKEN
        records[i]["labels"][0] = -100
    bad = write_jsonl(tmp_path / "nan.jsonl", records)
    given: dict[str, Any] = settings | {"model": models["broken"], "reference": None, "target": target}
    given |= {
        "target": {"target": bad},
        "groups": {"target": bad, "target_groups": 3, "retention": target},
        "retention": {"retention": bad},
        "lookahead": {"data": bad, "drift": "lookahead", "lookahead_rows": 9, "lookahead_lr": 1e-3},
    }[named]
    kind = "target" if named == "groups" else named
    with pytest.raises(InputError, match=rf"nan.jsonl:3, .*nan.jsonl:8: 2 {kind} rows to which the model gives no fin"):
        score(ScoreConfig(**given), tmp_path / "run")


def test_a_fisher_is_of_the_rows_that_have_a_finite_loss(
    settings: dict[str, Any], target: str, models: dict[str, str], tmp_path: Path
) -> None:
    records, found = token_records(ROWS), []
    odd = {"input_ids": [NAN_TOKEN, 5, 6], "labels": [-100, 5, 6]}
    for name, rows in {"whole": records, "run": [*records, odd]}.items():
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        config = settings | {"data": data, "target": target, "reference": models["broken"], "fisher": "sampled"}
        made = score(ScoreConfig(**config), tmp_path / name)
        assert made.manifest.counts.scored == ROWS
        found.append(load_file(tmp_path / name / "artifacts/fisher.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_polars_and_datasets_read_the_folder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = score(ScoreConfig(**settings), tmp_path / "run")
    files = str(tmp_path / "run" / "train" / "mask=0000" / "*.parquet")
    plain = pl.read_parquet(files, hive_partitioning=False)
    weights = plain.explode("loss_weight")["loss_weight"]
    kept = weights.filter(weights > 0)
    assert len(kept) == made.mask.kept_tokens and kept.mean() == pytest.approx(1)
    assert plain.select((pl.col("labels").list.eval(pl.element() != -100)).alias("t"))["t"].to_list() == [
        [w > 0 for w in row] for row in plain["loss_weight"].to_list()
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    train = datasets.load_dataset(str(tmp_path / "run"), split="train", cache_dir=str(tmp_path / "cache"))
    assert train["row_id"][:] == plain["row_id"].to_list()
    assert train["labels"][:] == plain["labels"].to_list()
    values = datasets.load_dataset(str(tmp_path / "run"), "values", split="train", cache_dir=str(tmp_path / "cache"))
    assert values.column_names == SFT.values.names and values.num_rows == ROWS


def test_the_mask_keeps_the_share_asked_for(settings: dict[str, Any], tmp_path: Path) -> None:
    asked = {"keep": 0.3, "by": "value", "allow_empty_rows": True}
    made = score(ScoreConfig(**settings | asked), tmp_path / "run")
    assert made.mask.kept_tokens == -(-3 * made.mask.response_tokens // 10)
    tokens = scan(tmp_path / "run").filter(status="scored").select(pl.col("value").explode()).drop_nulls().collect()
    smallest = tokens["value"].sort(descending=True)[made.mask.kept_tokens - 1]
    train = scan(tmp_path / "run", "train").explode("value", "loss_mask").filter(loss_mask=1).collect()
    assert train["value"].min() == smallest


def test_no_socket_is_opened(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert score(ScoreConfig(**settings), tmp_path / "run").shards_scored == 4
    mask(tmp_path / "run", published(keep=0.2))


def test_nothing_is_written_outside_the_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = token_records(5)
    for record, name in zip(records, ("../../x", "/etc/passwd", "CON", "a/b", ".."), strict=True):
        record["id"] = name
    settings["data"] = write_jsonl(tmp_path / "ids.jsonl", records)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = set(contents(tmp_path))
    score(ScoreConfig(**settings), "run")
    assert {name for name in set(contents(tmp_path)) - before if not name.startswith("here/run/")} == set()
    assert frame(Path("run"))["id"].to_list() == ["../../x", "/etc/passwd", "CON", "a/b", ".."]


def test_progress_tells_every_token(settings: dict[str, Any], target: str, tmp_path: Path) -> None:
    notes = Notes()
    score(ScoreConfig(**settings | {"target": target, "max_length": 17}), tmp_path / "run", notes)
    stages = dict(notes.stages)
    assert [name for name, tokens in notes.stages if not tokens] == [
        "starting", "reading rows", "loading reference", "loading model",
    ]  # fmt: skip
    counted = [name for name, tokens in notes.stages if tokens]
    assert counted == ["Fisher of the reference", "reference losses", "target gradient", "scoring"]
    assert notes.done == stages and stages["scoring"] > 0
    lengths = [len(record["input_ids"]) for record in token_records(ROWS)]
    cut = sum(max(0, n - 17) for n in lengths)
    assert any(f"--max-length 17: {cut} tokens" in told for told in notes.warnings)


@pytest.mark.parametrize(
    ("data", "run"),
    [
        ("a/rows.jsonl", "rows.alphatoken"),
        ("rows.jsonl.zst", "rows.alphatoken"),
        ("folder/", "folder.alphatoken"),
        ("org/name:train[:5]", "name_train__5.alphatoken"),
        ("d/*.parquet", "run.alphatoken"),
        ("..", "run.alphatoken"),
        ("-d.jsonl", "d.alphatoken"),
        ("-.-/", "run.alphatoken"),
    ],
)
def test_the_default_run_folder(data: str, run: str) -> None:
    assert default_run(ScoreConfig(data=data)) == Path(run)
    trial = default_run(ScoreConfig(data=data, limit=20))
    assert trial == Path(run.replace(".alphatoken", ".limit-20.alphatoken"))


# --- resume


def test_a_finished_run_is_left_alone(settings: dict[str, Any], run: Path) -> None:
    files, times = contents(run), moments(run)
    again = score(ScoreConfig(**settings), run)
    assert again.shards_scored == 0 and not again.mask.created
    assert contents(run) == files and moments(run) == times


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "lost",
    [
        ["rejects.jsonl"],
        ["values/generation=0/part-00001.parquet"],
        ["values/generation=0/part-00001.parquet", "artifacts/reference_nll-00001.safetensors"],
        [
            "values/generation=0/part-00003.parquet",
            "artifacts/target-00000.safetensors",
            "artifacts/fisher.safetensors",
        ],
        ["manifest.json"],
        ["manifest.json", "config.yaml", "README.md"],
        ["config.yaml"],
        ["README.md"],
        ["train/mask=0000/part-00002.parquet"],
        ["train"],
    ],
)
def test_what_is_lost_is_made_again_and_nothing_else(
    lost: list[str], settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    settings["data"] = write_jsonl(folder / "odd.jsonl", [*token_records(ROWS), "{"])
    settings["bad_rows"] = "quarantine"
    run = _copy(folder / "finished odd", ScoreConfig(**settings), tmp_path / "run")
    files, times = contents(run), moments(run)
    for name in lost:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    again = score(ScoreConfig(**settings), run)
    assert again.shards_scored == sum(name.startswith("values") for name in lost)
    assert contents(run) == files
    for name in files:
        if name.startswith("values/") and name not in lost:
            assert (run / name).stat().st_mtime_ns == times[str(run / name)]
    assert verify(run) == []


def test_the_same_settings_under_other_names_go_on(settings: dict[str, Any], run: Path, tmp_path: Path) -> None:
    """Batch size, device and paths are no part of a run's identity."""
    files = contents(run)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(settings["data"], moved / "rows.jsonl")
    shutil.copytree(settings["model"], moved / "other name")
    changes = {"batch_tokens": 64, "device": "cpu", "dtype": "float32", "data": str(moved / "rows.jsonl")}
    again = score(ScoreConfig(**settings | changes | {"model": str(moved / "other name")}), run)
    assert again.shards_scored == 0 and contents(run) == files
    (run / "values/generation=0/part-00002.parquet").unlink()
    # The budget that was recorded is used again, whatever is asked for now.
    score(ScoreConfig(**settings | {"batch_tokens": 64}), run)
    assert contents(run) == files


def test_other_batches_give_the_same_values(settings: dict[str, Any], tmp_path: Path) -> None:
    score(ScoreConfig(**settings), tmp_path / "a")
    score(ScoreConfig(**settings | {"batch_tokens": 1, "rows_per_shard": 100}), tmp_path / "b")
    assert_same_signals(frame(tmp_path / "a"), frame(tmp_path / "b"))


def test_a_mask_beside_the_first(settings: dict[str, Any], run: Path) -> None:
    files = contents(run)
    made = mask(run, published(keep=0.2))
    assert made.mask == 1 and made.created
    after = contents(run)
    assert {name for name in after if name not in files} == {f"train/mask=0001/part-{i:05d}.parquet" for i in range(4)}
    assert {name for name in files if files[name] != after[name]} == {"manifest.json", "README.md"}
    assert score(ScoreConfig(**settings), run).mask.created is False
    assert contents(run) == after
    # The values are there, so another share makes a mask and scores nothing.
    third = score(ScoreConfig(**settings | {"keep": "positive", "by": "value"}), run)
    assert (third.shards_scored, third.mask.mask, third.mask.newest) == (0, 2, True)


def test_the_config_replays_the_run(settings: dict[str, Any], target: str, tmp_path: Path) -> None:
    changes = {"target": target, "keep": 0.4, "scope": "row", "weights": "rank", "seed": 3, "window": 6}
    score(ScoreConfig(**settings | changes), tmp_path / "run")
    ended = command("score", "--config", tmp_path / "run" / "config.yaml", "-o", tmp_path / "other")
    assert ended.code == 0, ended.err
    assert contents(tmp_path / "other") == contents(tmp_path / "run")
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["keep"] == 0.4 and stored["target"] == target
    # Later masks, and what they were made with, do not change how the run is replayed.
    score(ScoreConfig(**settings | changes | {"keep": 0.1, "batch_tokens": 512}), tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == stored


def test_a_pattern_is_replayed_on_the_files_it_named(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a working folder whose own name would be a pattern, beside the folder that it would be of."""
    for name, records in (("g[1]", token_records(4)), ("g1", token_records(4, seed=9))):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", records)
    monkeypatch.chdir(tmp_path / "g[1]")
    score(ScoreConfig(**settings | {"data": "*.jsonl", "limit": None}), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for place in ("run", "other"):
        ended = command("score", "--config", "run/config.yaml", "-o", place)
        assert ended.code == 0 and ("Nothing was written" in ended.out) == (place == "run"), ended
    assert contents(tmp_path / "other") == contents(tmp_path / "run")


def test_a_runs_config_from_before_replays_the_mask_of_then(settings: dict[str, Any], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ended_records(ROWS))
    half = settings | {"data": data, "keep": 0.5, "by": "-nll", "scope": "row"}
    score(ScoreConfig(**half, always_keep="none"), tmp_path / "run")
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored.pop("always_keep") == "none"
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(stored))
    ended = command("score", "-c", tmp_path / "old.yaml", "-o", tmp_path / "other")
    assert ended.code == 0, ended.err
    assert "old.yaml: it is from before --always-keep, and read as --always-keep none." in ended.err
    trains = [
        {k: v for k, v in contents(tmp_path / name).items() if k.startswith("train")} for name in ("run", "other")
    ]
    assert trains[0] and trains[0] == trains[1]
    ended = command("score", "-c", tmp_path / "old.yaml", "--always-keep", "end-of-turn", "-o", tmp_path / "other")
    assert ended.code == 0 and "from before" not in ended.err
    newest = manifest.read(tmp_path / "other").masks[-1]
    assert newest.mask == 1 and newest.settings["always_keep"] == "end-of-turn"
    assert newest.end_of_turn_tokens and newest.end_of_turn_kept == newest.end_of_turn_tokens
    # By hand, with what differs from the defaults alone: the default of today.
    (tmp_path / "mask.yaml").write_text(yaml.safe_dump({name: stored[name] for name in ("keep", "by", "scope")}))
    ended = command("mask", tmp_path / "run", "-c", tmp_path / "mask.yaml")
    assert ended.code == 0 and "from before" not in ended.err
    assert manifest.read(tmp_path / "run").masks[-1].settings["always_keep"] == "end-of-turn"


# --- another fingerprint


def _edit(path: str, folder: Path, change: Callable[[list[str]], list[str]]) -> str:
    """A file of the same name with other lines."""
    lines = Path(path).read_text().splitlines()
    changed = folder / Path(path).name
    changed.write_text("\n".join(change(lines)) + "\n")
    return str(changed)


def _saved_fisher(folder: Path, model: str, value: float) -> str:
    weights = load_file(f"{model}/model.safetensors")
    path = folder / f"fisher{value}.safetensors"
    save_file({name: torch.full_like(w, value) for name, w in weights.items() if w.ndim == 2}, path)
    return str(path)


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, str], Path], dict[str, Any]], tuple[str, ...]]] = {
    "data edited": (lambda s, m, p: {"data": _edit(s["data"], p, lambda rows: [*rows[1:], rows[1]])}, ("data",)),
    "data appended": (lambda s, m, p: {"data": _edit(s["data"], p, lambda rows: [*rows, rows[0]])}, ("data",)),
    "data reordered": (lambda s, m, p: {"data": _edit(s["data"], p, lambda rows: rows[::-1])}, ("data",)),
    "model": (lambda s, m, p: {"model": m["broken"]}, ("model",)),
    "reference": (lambda s, m, p: {"reference": m["broken"]}, ("reference",)),
    "no reference": (lambda s, m, p: {"reference": None}, ("reference",)),
    "target edited": (lambda s, m, p: {"target": _edit(s["target"], p, lambda rows: rows[1:])}, ("target",)),
    "no target": (lambda s, m, p: {"target": None}, ("target", "target_rows")),
    "estimator": (lambda s, m, p: {"estimator": "exact"}, ("estimator", "window")),
    "layers": (lambda s, m, p: {"layers": 1}, ("layers",)),
    "window": (lambda s, m, p: {"window": 3}, ("window",)),
    "fisher": (lambda s, m, p: {"fisher": "empirical"}, ("fisher",)),
    "fisher file": (
        lambda s, m, p: {"fisher": _saved_fisher(p, s["model"], 1.0)},
        ("fisher", "fisher_rows"),
    ),
    "fisher_rows": (lambda s, m, p: {"fisher_rows": 5}, ("fisher_rows",)),
    "turns": (lambda s, m, p: {"turns": "last"}, ("turns",)),
    "max_length": (lambda s, m, p: {"max_length": 17}, ("max_length",)),
    "rows_per_shard": (lambda s, m, p: {"rows_per_shard": 4}, ("rows_per_shard",)),
    "seed": (lambda s, m, p: {"seed": 1}, ("seed",)),
    "dtype": (lambda s, m, p: {"dtype": "float64"}, ("dtype",)),
    "stability_weight": (lambda s, m, p: {"stability_weight": 2.0}, ("stability_weight",)),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_decides_values_is_refused_by_name(
    change: str, settings: dict[str, Any], target: str, models: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    settings |= {"target": target}
    run = _copy(folder / "finished with target", ScoreConfig(**settings), tmp_path / "run")
    files = contents(run)
    changes, names = CHANGES[change][0](settings, models, tmp_path), CHANGES[change][1]
    with pytest.raises(FingerprintError) as caught:
        score(ScoreConfig(**settings | changes), run)
    assert caught.value.fields == names
    assert str(run) in str(caught.value) and "-o" in str(caught.value)
    assert all(re.search(rf"\b{name} \(.* in the run, .* now\)", str(caught.value)) for name in names)
    assert contents(run) == files
    # The same is found from the shards alone.
    (run / "artifacts/run.json").unlink()
    with pytest.raises(FingerprintError, match=r"part-00000\.parquet") as caught:
        score(ScoreConfig(**settings | changes), run)
    assert set(names) <= set(caught.value.fields)


def test_without_target_or_reference_only_the_cause_is_named(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    """The seed draws the target, which decides the tokens; the reference follows --model."""
    settings["reference"] = None
    score(ScoreConfig(**settings), tmp_path / "run")
    for changes, names in (
        ({"seed": 1}, ("seed",)),
        ({"target_rows": 7}, ("target_rows",)),
        ({"model": models["base"]}, ("model",)),
        ({"reference": models["base"]}, ("reference",)),
    ):
        with pytest.raises(FingerprintError) as caught:
            score(ScoreConfig(**settings | changes), tmp_path / "run")
        assert caught.value.fields == names


def test_a_window_does_not_matter_to_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["estimator"] = "exact"
    score(ScoreConfig(**settings), tmp_path / "run")
    assert score(ScoreConfig(**settings | {"window": 3}), tmp_path / "run").shards_scored == 0


# --- damage, and folders of others


def test_a_damaged_shard_is_refused(settings: dict[str, Any], run: Path) -> None:
    """Wherever a bit has flipped: pages are sealed by the footer, and the whole file by the manifest."""
    shard = run / "values/generation=0/part-00001.parquet"
    good = shard.read_bytes()
    for place in range(0, len(good), len(good) // 40):
        shard.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(StoredDataError, match=r"part-00001\.parquet"):
            score(ScoreConfig(**settings), run)
    for length in (0, 1, len(good) // 2, len(good) - 1):
        shard.write_bytes(good[:length])
        with pytest.raises(StoredDataError, match=r"part-00001\.parquet"):
            score(ScoreConfig(**settings), run)
    shard.unlink()
    score(ScoreConfig(**settings), run)
    assert shard.read_bytes() == good


def test_a_shard_too_many_is_refused(settings: dict[str, Any], run: Path) -> None:
    folder = run / "values/generation=0"
    shutil.copy(folder / "part-00001.parquet", folder / "part-00007.parquet")
    with pytest.raises(StoredDataError, match=r"part-00007\.parquet"):
        score(ScoreConfig(**settings), run)


def test_a_folder_of_other_things_is_not_written_to(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("My own words.\n")
    with pytest.raises(UsageError, match=r"project.*README\.md"):
        score(ScoreConfig(**settings), tmp_path / "project")
    assert contents(tmp_path / "project") == {"README.md": b"My own words.\n"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        score(ScoreConfig(**settings), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert score(ScoreConfig(**settings), tmp_path / "empty").shards_scored == 4


def test_no_way_round_leads_into_a_folder_of_other_things(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("project").mkdir()
    Path("project/notes.txt").write_text("mine")
    Path("away").symlink_to("gone")
    before = contents(tmp_path)
    for place in ("x/../project", "x/y/../../project", "project/x/..", "project/../x/../project/"):
        with pytest.raises(UsageError, match=r"project.*not a run folder, and not empty \(it has 'notes\.txt'\)"):
            score(ScoreConfig(**settings), place)
    for place in ("away", "away/run", "x/../away"):
        with pytest.raises(UsageError, match=f"{place}: .*away is a symbolic link to gone, where nothing is"):
            score(ScoreConfig(**settings), place)
    assert contents(tmp_path) == before
    made = score(ScoreConfig(**settings), "x/../run")
    assert made.run == tmp_path / "run" and verify("run") == [] and not Path("x").exists()


def test_a_run_that_is_moved_while_it_is_written_is_not_made_twice(settings: dict[str, Any], tmp_path: Path) -> None:
    class Moving(Notes):
        def stage(self, name: str, total: int) -> None:
            super().stage(name, total)
            if name == "scoring":
                (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(CurateError, match=r"run: was moved, removed or replaced while it was written to"):
        score(ScoreConfig(**settings), tmp_path / "run", progress=Moving())
    assert not (tmp_path / "run").exists() and not list((tmp_path / "moved").rglob("*.tmp"))
    assert score(ScoreConfig(**settings), tmp_path / "moved").shards_scored == 4
    assert verify(tmp_path / "moved") == []


def test_two_writers_do_not_share_a_run(settings: dict[str, Any], tmp_path: Path) -> None:
    from alphatoken_curate.runs.atomic import one_writer

    with one_writer(tmp_path / "run"), pytest.raises(UsageError, match="another process"):
        score(ScoreConfig(**settings), tmp_path / "run")


# --- out of memory


def _limit(monkeypatch: pytest.MonkeyPatch, padded_tokens: int) -> list[int]:
    """PathScorer.score runs out of memory above so many padded tokens; returns the sizes it was called with."""
    plain, sizes = PathScorer.score, []

    def limited(self: PathScorer, batch: Batch) -> Any:
        sizes.append(batch.input_ids.size + len(batch.rows))  # a row's last token is planned for, but not run
        if sizes[-1] > padded_tokens:
            raise torch.OutOfMemoryError("none left")
        return plain(self, batch)

    monkeypatch.setattr(PathScorer, "score", limited)
    return sizes


def test_memory_that_runs_out_halves_the_budget(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["data"] = write_jsonl(tmp_path / "many.jsonl", token_records(60, longest=18))
    settings["rows_per_shard"] = 20
    run, notes = tmp_path / "run", Notes()
    with monkeypatch.context() as patch:
        _limit(patch, 90)
        made = score(ScoreConfig(**settings | {"batch_tokens": 300}), run, notes)
    assert [note for note in notes.warnings if "halved to" in note] == [
        f"Memory ran out: --batch-tokens is halved to {n} for shard {shard}." for shard in range(3) for n in (150, 75)
    ]
    plans = made.manifest.generations[0].plan
    assert [(plan.batch_tokens, plan.halvings) for plan in plans] == [(75, 2)] * 3
    plain = score(ScoreConfig(**settings | {"batch_tokens": 75}), tmp_path / "plain")
    assert [(plan.batch_tokens, plan.halvings) for plan in plain.manifest.generations[0].plan] == [(75, 0)] * 3
    assert_same_signals(frame(run), frame(tmp_path / "plain"))
    # A lost shard is made again with the budget that was recorded for it.
    files = contents(run)
    (run / "values/generation=0/part-00001.parquet").unlink()
    sizes = _limit(monkeypatch, 10**9)
    score(ScoreConfig(**settings | {"batch_tokens": 300}), run)
    assert sizes and max(sizes) <= 75
    assert contents(run) == files


def test_memory_that_never_suffices_is_an_error(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _limit(monkeypatch, 0)
    ended = command(*("score", settings["data"], "--model", settings["model"], "-o", tmp_path / "run"))
    assert ended.code == 1 and "--layers" in ended.err and "Traceback" not in ended.err
    assert not [path for path in (tmp_path / "run").rglob("*") if TEMPORARY.fullmatch(path.name)]


def test_a_halving_in_the_reference_pass(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alphatoken_curate.engine.capture import ScoringModel

    plain, calls = ScoringModel.hidden, []

    def limited(self: ScoringModel, ids: torch.Tensor, start: int = 0, *, pairs: bool = False) -> torch.Tensor:
        calls.append(ids.numel())
        if len(calls) == 2:
            raise MemoryError
        return plain(self, ids, start, pairs=pairs)

    score(ScoreConfig(**settings | {"batch_tokens": 200}), tmp_path / "plain")
    monkeypatch.setattr(ScoringModel, "hidden", limited)
    notes = Notes()
    made = score(ScoreConfig(**settings | {"batch_tokens": 200}), tmp_path / "run", notes)
    assert any("halved to 100" in told for told in notes.warnings)
    assert {plan.batch_tokens for plan in made.manifest.generations[0].plan} == {200}  # shards have memory enough
    assert_same_signals(frame(tmp_path / "run"), frame(tmp_path / "plain"))


# --- stability, in all the ways it can be had


def signals_of(run: Path, objective: str) -> np.ndarray[Any, Any]:
    found = frame(run).filter(status="scored")
    return np.stack([flat(found[f"{objective}_{path}"]) for path in ("direct", "causal")])


def assert_close(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], tolerance: float = 1e-5) -> None:
    assert np.nanmax(np.abs(wanted)) > 0 and np.array_equal(np.isnan(found), np.isnan(wanted))
    assert np.nanmax(np.abs(found - wanted)) <= tolerance * np.nanmax(np.abs(wanted))


def test_retention_rows_take_the_place_of_the_drift_or_stand_beside_it(
    settings: dict[str, Any], target: str, run: Path, tmp_path: Path
) -> None:
    """Retention rows that are the target rows give stability that is adaptation, where G is the true gradient."""
    exact = settings | {"estimator": "exact", "target": target}
    plain = score(ScoreConfig(**exact), tmp_path / "plain").run
    notes = Notes()
    alone = score(ScoreConfig(**exact | {"retention": target}), tmp_path / "alone", notes).run
    assert "Fisher of the reference" not in dict(notes.stages)
    both = score(ScoreConfig(**exact | {"retention": target, "drift": "weights"}), tmp_path / "both").run
    for made in (alone, both):
        np.testing.assert_array_equal(signals_of(made, "stab"), signals_of(made, "adapt"))
    assert np.isnan(signals_of(alone, "drift")).all() and np.isnan(signals_of(plain, "drift")).all()
    assert_close(signals_of(both, "drift"), signals_of(plain, "stab"))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stored", ["safetensors", "adapter"])
def test_a_drift_below_the_rounding_of_bfloat16_is_seen(
    stored: str, settings: dict[str, Any], target: str, tmp_path: Path
) -> None:
    """A step of 1e-5: rounded to bfloat16, most weights would not have moved, and the others far too much."""
    if stored == "adapter":
        save_adapter(settings["reference"], tmp_path / "near", lora_alpha=0.01)
    else:
        with quiet():
            perturbed(tiny_model("llama", dtype=torch.float32), 1e-5).save_pretrained(tmp_path / "near")
    changes = {"model": str(tmp_path / "near"), "target": target, "fisher": "empirical"}
    found = {}
    for dtype in ("float32", "bfloat16"):
        found[dtype] = signals_of(
            score(ScoreConfig(**settings | changes | {"dtype": dtype}), tmp_path / dtype).run, "stab"
        )
    one, other = (np.nan_to_num(found[dtype][0]) for dtype in found)
    assert np.corrcoef(one, other)[0, 1] > 0.98  # the trunk below S still rounds
    assert 0.9 < np.std(other) / np.std(one) < 1.1


def test_lookahead_gives_stability_before_any_tuning(settings: dict[str, Any], target: str, tmp_path: Path) -> None:
    base = settings | {"model": settings["reference"], "target": target, "drift": "lookahead"}
    found = {}
    for rate in (1e-6, 2e-6):
        made = score(ScoreConfig(**base | {"lookahead_lr": rate}), tmp_path / f"run{rate}")
        assert made.has_stability
        found[rate] = signals_of(made.run, "stab")
        assert np.isnan(flat(frame(made.run)["reference_nll"])).all()
    assert_close(found[2e-6], 2 * found[1e-6], 1e-6)
    # Of a tuned model it is the drift less the step: -lr F g is what lookahead adds to F (W - W_ref).
    tuned = settings | {"target": target}
    drift = signals_of(score(ScoreConfig(**tuned), tmp_path / "drift").run, "stab")
    ahead = [
        signals_of(
            score(ScoreConfig(**tuned | {"drift": "lookahead", "lookahead_lr": rate}), tmp_path / f"ahead{rate}").run,
            "stab",
        )
        for rate in (0.01, 0.03)
    ]
    assert_close(ahead[1] - drift, 3 * (ahead[0] - drift), 1e-3)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["adam", "kfac", "ekfac"])
def test_preconditioning_changes_adaptation_and_stability_where_asked(
    kind: str, settings: dict[str, Any], target: str, tmp_path: Path
) -> None:
    base = settings | {"target": target, "precondition_rows": 6}
    plain = score(ScoreConfig(**base), tmp_path / "plain").run
    one = score(ScoreConfig(**base | {"precondition": kind}), tmp_path / "one").run
    two = score(ScoreConfig(**base | {"precondition": kind, "precondition_stability": True}), tmp_path / "two").run
    np.testing.assert_array_equal(signals_of(one, "stab"), signals_of(plain, "stab"))
    np.testing.assert_array_equal(signals_of(one, "adapt"), signals_of(two, "adapt"))
    a, b = (np.nan_to_num(signals_of(made, "adapt")[0]) for made in (plain, one))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.999
    assert np.nanmax(np.abs(signals_of(two, "stab") - signals_of(one, "stab"))) > 0
    stored = load_file(one / "artifacts/precondition-00000.safetensors")
    assert any(name.endswith(".second_moment" if kind != "kfac" else ".input_values") for name in stored)


@pytest.mark.parametrize("kind", ["adam", "ekfac"])
def test_experts_that_no_row_of_the_curvature_reached_do_not_stop_a_run(kind: str, target: str, tmp_path: Path) -> None:
    with quiet():
        tiny_model("qwen3_moe", dtype=torch.float32, num_experts=16).save_pretrained(tmp_path / "model")
    data, notes = write_jsonl(tmp_path / "rows.jsonl", token_records(ROWS)), Notes()
    told = {"data": data, "model": str(tmp_path / "model"), "target": target, "layers": 2, "precondition": kind}
    made = score(ScoreConfig(**told, precondition_rows=1), tmp_path / "run", notes)
    assert made.manifest.counts.scored == ROWS
    assert any(f"--precondition {kind}: " in note and "of 32 experts have no gradient" in note for note in notes.notes)


def test_what_another_run_computed_is_taken_over(settings: dict[str, Any], run: Path, tmp_path: Path) -> None:
    notes = Notes()
    other = settings | {"estimator": "exact", "stability_weight": 2.0}
    made = score(ScoreConfig(**other | {"reuse": str(run)}), tmp_path / "made", notes)
    assert "Fisher of the reference" not in dict(notes.stages) and "target gradient" in dict(notes.stages)
    for name in ("fisher.safetensors", *(f"reference_nll-{i:05d}.safetensors" for i in range(4))):
        assert (made.run / "artifacts" / name).read_bytes() == (run / "artifacts" / name).read_bytes()
    plain = score(ScoreConfig(**other), tmp_path / "plain")
    assert frame(made.run).equals(frame(plain.run))
    with pytest.raises(UsageError, match="--reuse"):
        score(ScoreConfig(**settings | {"reuse": str(tmp_path / "nowhere")}), tmp_path / "x")


def test_generated_answers_are_kept_part_by_part(settings: dict[str, Any], target: str, tmp_path: Path) -> None:
    """An estimate that was interrupted goes on where it was, and prompts may come from a file of their own."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", token_records(70, seed=8))
    base = settings | {"target": target, "fisher": "generate", "fisher_new_tokens": 4, "fisher_prompts": prompts}
    made = score(ScoreConfig(**base), tmp_path / "run").run
    parts = sorted(path.name for path in (made / "artifacts").glob("fisher_samples-*"))
    assert parts == ["fisher_samples-00000.safetensors", "fisher_samples-00001.safetensors"]
    before = contents(made)
    for name in ("fisher.safetensors", parts[1]):
        (made / "artifacts" / name).unlink()
    kept = moments(made)[str(made / "artifacts" / parts[0])]
    (made / "values/generation=0/part-00000.parquet").unlink()
    score(ScoreConfig(**base), made)
    assert contents(made) == before and moments(made)[str(made / "artifacts" / parts[0])] == kept
    other = score(ScoreConfig(**{k: v for k, v in base.items() if k != "fisher_prompts"}), tmp_path / "other").run
    assert (other / "artifacts/fisher.safetensors").read_bytes() != before["artifacts/fisher.safetensors"]


def test_a_reference_in_bfloat16_answers_as_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    """Captured it computes in float32 where it scores, which its head does not take."""
    prepared = prepare(ScoreConfig(**settings, fisher="generate", fisher_new_tokens=6, dtype="bfloat16"))
    reference = ReferencePass(spec_of(prepared, tmp_path / "artifacts", "cpu"))
    rows: Any = prepared.rows
    weights = [w.clone() for w in reference.ready(Silent()).weights]
    found = reference.answers(rows, Silent(), 64)
    plain = load_model(find_model(settings["reference"]), dtype=torch.bfloat16, device=torch.device("cpu"))
    wanted = sample_answers(plain, rows, new_tokens=6, seed=0, batch_tokens=64, progress=Silent())
    assert [row.input_ids.tolist() for row in found] == [row.input_ids.tolist() for row in wanted]
    assert all(torch.equal(own, w) for own, w in zip(reference.scoring.weights, weights, strict=True))
    score(ScoreConfig(**settings, fisher="generate", fisher_new_tokens=2, dtype="bfloat16"), tmp_path / "run")


def test_a_mixture_of_rows_is_refused(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    pair = {
        "chosen_input_ids": [5, 6],
        "chosen_labels": [-100, 6],
        "rejected_input_ids": [5, 7],
        "rejected_labels": [-100, 7],
    }
    data = write_jsonl(tmp_path / "mixed.jsonl", [*token_records(3), pair])
    ended = command("score", data, "--model", settings["model"], "-o", tmp_path / "run")
    assert ended.code == 3 and "mixed.jsonl:1" in ended.err and "mixed.jsonl:4" in ended.err
    assert not (tmp_path / "run").exists()
