from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_files import command, configured, token_records, write_jsonl

from alphatoken_curate import InputError, ScoreConfig, score
from alphatoken_curate.scoring.prepare import prepare
from alphatoken_curate.scoring.spec import spec_of


def of_tokens(length: int) -> dict[str, Any]:
    ids = [i % 50 + 3 for i in range(length)]
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}


@pytest.fixture
def model(models: dict[str, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["base"], tmp_path / "model"))


def test_rows_longer_than_a_table_of_positions_are_refused_with_what_helps(model: Path, tmp_path: Path) -> None:
    configured(model, model_type="gpt2", n_positions=64)
    data = write_jsonl(tmp_path / "d.jsonl", [of_tokens(64), of_tokens(80), of_tokens(65)])
    told = r"d\.jsonl:2 has 80 tokens, the first of 2 rows over \S*model's 64: its positions end there\."
    with pytest.raises(InputError, match=told + " Give --max-length 64"):
        prepare(ScoreConfig(data=data, model=str(model)))
    cut = prepare(ScoreConfig(data=data, model=str(model), max_length=64))
    assert len([*cut.every_row]) == 3 and max(row.truncated for row in cut.rows) <= 16
    ended = command("check", data, "--model", model)
    assert ended.code == 3 and "d.jsonl:2 has 80 tokens" in ended.err


def test_rows_beside_data_and_both_branches_of_pairs_count(model: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    configured(model, rope_parameters=rope)
    data = write_jsonl(tmp_path / "d.jsonl", [of_tokens(60), of_tokens(64)])
    long = write_jsonl(tmp_path / "long.jsonl", [of_tokens(70)])
    with pytest.raises(InputError, match=r"long\.jsonl:1 has 70 tokens, the first of 1 row over .*\(longrope\) go by"):
        prepare(ScoreConfig(data=data, target=long, model=str(model)))
    pair = {"chosen_" + key: value for key, value in of_tokens(40).items()}
    pairs = [pair | {"rejected_" + key: value for key, value in of_tokens(length).items()} for length in (50, 65)]
    with pytest.raises(InputError, match=r"p\.jsonl:2 has 65 tokens, the first of 1 row"):
        prepare(ScoreConfig(data=write_jsonl(tmp_path / "p.jsonl", pairs), target=data, model=str(model)))


def test_a_token_that_the_reference_does_not_know_is_refused(
    model: Path, models: dict[str, str], tmp_path: Path
) -> None:
    wide = json.loads((model / "config.json").read_text())["vocab_size"] + 3
    configured(model, vocab_size=wide)
    records = [*token_records(3), {"input_ids": [1, wide - 1], "labels": [-100, wide - 1]}]
    settings: dict[str, Any] = {"model": str(model), "reference": models["base"], "target_rows": 1}
    known = ScoreConfig(data=write_jsonl(tmp_path / "known.jsonl", records[:3]), **settings)
    spec_of(prepare(known), tmp_path, "cpu")
    config = ScoreConfig(data=write_jsonl(tmp_path / "d.jsonl", records), **settings)
    told = rf"d\.jsonl:4 has token {wide - 1}, which the reference .* does not know: it has {wide - 3} tokens"
    with pytest.raises(InputError, match=told):
        score(config, tmp_path / "run")
