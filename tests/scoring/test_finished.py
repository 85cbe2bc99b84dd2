"""A finished run is known by its files and settings; anything else goes to the scoring, which says what differs."""

from __future__ import annotations

import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from loaded import HEAVY, loaded_by
from tiny_files import contents, token_records, write_jsonl

from alphatoken_curate import FingerprintError, InputError, ScoreConfig, score, verify
from alphatoken_curate.progress import Silent
from alphatoken_curate.runs import manifest, sealed
from alphatoken_curate.runs.fingerprint import differing
from alphatoken_curate.runs.shards import read_footer
from alphatoken_curate.scoring.engines import Here
from alphatoken_curate.scoring.finished import finished
from alphatoken_curate.scoring.identity import OF_TOKENS
from alphatoken_curate.scoring.loop import score_rows
from alphatoken_curate.scoring.prepare import fingerprint_fields, prepare


@pytest.fixture(scope="module")
def settings(folder: Path, models: dict[str, str]) -> dict[str, Any]:
    data = write_jsonl(folder / "rows.jsonl", token_records(9))
    target = write_jsonl(folder / "target.jsonl", token_records(3, seed=5))
    return {"data": data, "target": target, "model": models["tuned"], "reference": models["base"], "layers": 2}


@pytest.fixture(scope="module")
def whole(folder: Path, settings: dict[str, Any]) -> Path:
    return score(ScoreConfig(**settings), folder / "whole").run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_finished_run_is_left_alone(settings: dict[str, Any], run: Path) -> None:
    before = contents(run)
    found = finished(ScoreConfig(**settings), run)
    assert found is not None and found.shards_scored == 0 and not found.mask.created and found.has_stability
    assert contents(run) == before


def test_another_mask_is_made_without_a_model(settings: dict[str, Any], run: Path) -> None:
    found = finished(ScoreConfig(**settings | {"keep": 0.5}), run)
    assert found is not None and found.mask.created and found.mask.mask == 1 and verify(run) == []


def test_bytes_are_read_again_only_where_they_may_be_others(
    settings: dict[str, Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that was written or copied since the manifest was is read whole; one that was not is by its footer."""
    hashed, plain = [], sealed.check_body
    monkeypatch.setattr(sealed, "check_body", lambda path, body: (hashed.append(path.name), plain(path, body))[1])
    config = ScoreConfig(**settings | {"rows_per_shard": 3})
    made = score(config, tmp_path / "made").run
    values = sorted((made / "values/generation=0").iterdir())
    names = [path.name for path in values]
    assert len(names) == 3 and not [name for name in hashed if name in names[3:]]
    hashed.clear()
    assert finished(config, made) is not None and hashed == []
    os.utime(values[1])
    assert finished(config, made) is not None and hashed == names[1:2]
    hashed.clear()
    (made / "manifest.json").unlink()
    values[2].unlink()
    score(config, made)  # those that are there are read once more than what was written just now
    read = [hashed.count(name) for name in names]
    assert read == [read[2] + 1, read[2] + 1, read[2]]


CHANGES: list[dict[str, Any]] = [
    {"layers": 1},
    {"estimator": "exact"},
    {"reference": None},
    {"target": None},
    {"dtype": "float64"},
    {"seed": 3},
    {"limit": 4},
    {"max_length": 12},
    {"rows_per_shard": 2},
    {"stability_weight": 2.0},
    {"fisher_rows": 2},
    {"drift": "lookahead", "lookahead_lr": 1e-3},
    {"precondition": "adam"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_with_other_settings_it_is_not_finished(settings: dict[str, Any], run: Path, change: dict[str, Any]) -> None:
    assert finished(ScoreConfig(**settings | change), run) is None
    with pytest.raises(FingerprintError):
        score(ScoreConfig(**settings | change), run)


@pytest.mark.parametrize("name", ["data", "target"])
def test_with_other_rows_it_is_not_finished(settings: dict[str, Any], run: Path, tmp_path: Path, name: str) -> None:
    other = tmp_path / Path(settings[name]).name
    other.write_bytes(Path(settings[name]).read_bytes() + b"\n")
    assert finished(ScoreConfig(**settings | {name: str(other)}), run) is None
    same = Path(shutil.copy(settings[name], tmp_path / "same" if (tmp_path / "same").mkdir() is None else tmp_path))
    assert finished(ScoreConfig(**settings | {name: str(same)}), run) is not None


@pytest.mark.parametrize("name", ["model", "reference"])
def test_with_another_model_it_is_not_finished(
    settings: dict[str, Any], models: dict[str, str], run: Path, tmp_path: Path, name: str
) -> None:
    same = shutil.copytree(settings[name], tmp_path / "model")
    assert finished(ScoreConfig(**settings | {name: str(same)}), run) is not None
    with (same / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        last = weights.read(1)
        weights.seek(-1, 2)
        weights.write(bytes([last[0] ^ 1]))
    assert finished(ScoreConfig(**settings | {name: str(same)}), run) is None


@pytest.mark.parametrize(
    "lost", ["manifest.json", "config.yaml", "values/generation=0/part-00000.parquet", "artifacts/target_rows.parquet"]
)
def test_where_a_file_is_lost_it_is_not_finished_and_the_scoring_mends_it(
    settings: dict[str, Any], run: Path, whole: Path, lost: str
) -> None:
    (run / lost).unlink()
    assert finished(ScoreConfig(**settings), run) is None
    if not lost.startswith("values"):
        score(ScoreConfig(**settings), run)
        assert contents(run) == contents(whole)


@pytest.mark.parametrize("damage", [False, True])
def test_a_run_goes_on_without_what_it_was_made_from_as_verify_says(
    damage: bool, settings: dict[str, Any], run: Path
) -> None:
    lost = sorted((run / "artifacts").glob("*.safetensors"))[0]
    lost.write_bytes(lost.read_bytes()[:-1])
    if not damage:
        lost.unlink()
    (problem,) = verify(run)
    assert problem.file == f"artifacts/{lost.name}" and ("delete it; then" in problem.do) == damage
    assert "delete manifest.json and run the `score` command that began the run again" in problem.do
    lost.unlink(missing_ok=True)
    (run / manifest.NAME).unlink()
    assert score(ScoreConfig(**settings), run).shards_scored == 0 and verify(run) == []


def test_a_limit_that_was_not_reached_says_nothing_of_files_that_came(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    write_jsonl(rows / "a.jsonl", token_records(5))
    for limit, finished_then in ((100, False), (5, True), (4, True)):
        config = ScoreConfig(**settings | {"data": str(rows), "limit": limit})
        run = score(config, tmp_path / f"run{limit}").run
        assert finished(config, run) is not None
        write_jsonl(rows / "b.jsonl", token_records(7, seed=9))
        assert (finished(config, run) is not None) == finished_then
        if finished_then:
            assert score_rows(config, run, Silent(), Here()).shards_scored == 0
        else:
            with pytest.raises(FingerprintError, match="data"):
                score(config, run)
        (rows / "b.jsonl").unlink()


@pytest.mark.parametrize("name", ["additional_chat_templates/tool_use.jinja", "tokenization_own.py", "tekken.json"])
def test_what_no_digest_of_a_tokenizer_covers_is_in_doubt(
    settings: dict[str, Any], run: Path, tmp_path: Path, name: str
) -> None:
    model = Path(shutil.copytree(settings["model"], tmp_path / "model"))
    assert finished(ScoreConfig(**settings | {"model": str(model)}), run) is not None
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{}")
    assert finished(ScoreConfig(**settings | {"model": str(model)}), run) is None


def test_a_device_that_may_not_be_there_is_in_doubt(settings: dict[str, Any], run: Path) -> None:
    assert finished(ScoreConfig(**settings | {"device": "cpu"}), run) is not None
    assert finished(ScoreConfig(**settings | {"device": "cuda:7"}), run) is None


def test_other_versions_are_in_doubt(settings: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = read_footer(run / manifest.read(run).generations[0].shards[0].path).facts["versions"]
    assert isinstance(made, dict)
    monkeypatch.setattr(
        "alphatoken_curate.scoring.finished.versions", lambda device: made | {"device": device, "transformers": "0.1"}
    )
    assert finished(ScoreConfig(**settings), run) is None


def test_bad_rows_are_refused_as_before(settings: dict[str, Any], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [*token_records(6), "{"])
    aside = settings | {"data": data, "bad_rows": "quarantine"}
    run = score(ScoreConfig(**aside), tmp_path / "run").run
    assert finished(ScoreConfig(**aside), run) is not None
    assert finished(ScoreConfig(**aside | {"bad_rows": "refuse"}), run) is None
    with pytest.raises(InputError, match="invalid_json"):
        score(ScoreConfig(**aside | {"bad_rows": "refuse"}), run)


def test_what_is_compared_and_what_follows_from_it_is_the_whole_fingerprint(settings: dict[str, Any]) -> None:
    """Each setting that a config has plays its part in fields of both kinds, or in none."""
    prepared = prepare(ScoreConfig(**settings))
    whole = fingerprint_fields(prepared, prepared.source, "float32")
    assert set(OF_TOKENS) - {"groups"} < set(whole)
    assert {item.name for item in fields(ScoreConfig)} & set(whole) >= {"layers", "estimator", "seed", "target", "data"}
    other = fingerprint_fields(prepare(ScoreConfig(**settings | {"turns": "last"})), prepared.source, "float32")
    assert differing(whole, other) == ("turns",)


def test_the_command_says_so_without_torch(settings: dict[str, Any], run: Path) -> None:
    flags = [f"--{name}={settings[name]}" for name in ("target", "model", "reference", "layers")]
    ended = loaded_by("score", settings["data"], *flags, "-o", run)
    assert ended.code == 0 and "is finished" in ended.out and not ended.modules & HEAVY
