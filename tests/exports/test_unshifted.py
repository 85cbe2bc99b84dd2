"""verl and SkyRL: columns and types, and the dataset that an export for verl brings along."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from exported import SOFT, truth
from small_run import small_run

from alphatoken_curate import export
from alphatoken_curate.exports.verl_dataset import TokenRows


def command(place: Path) -> list[str]:
    text = (place / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    return shlex.split(text.replace("\\\n", " "))


def test_skyrl(tmp_path: Path) -> None:
    place = tmp_path / "with a space"
    done = export(small_run(tmp_path / "run"), trainer="skyrl", output=place)
    schema = pq.read_schema(done.data)
    assert {f.name: f.type.value_type for f in schema} == {"input_ids": pa.int32(), "loss_mask": pa.int8()}
    assert f'pretokenized_dataset_paths=["{done.data}"]' in command(place)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    export(small_run(tmp_path / "run", config=SOFT), trainer="verl", output=tmp_path / "out")
    return tmp_path / "out"


def brought(place: Path) -> Any:
    """The class in the folder, loaded as verl does, from its file."""
    given = dict(item.partition("=")[::2] for item in command(place) if item.startswith("data."))
    spec = importlib.util.spec_from_file_location("brought", given["data.custom_cls.path"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, given["data.custom_cls.name"]), given


def test_verl_gets_a_dataset_that_reads_the_file(place: Path, tmp_path: Path) -> None:
    kind, given = brought(place)
    schema = pq.read_schema(given["data.train_files"])
    assert {f.name: f.type.value_type for f in schema} == {"input_ids": pa.int32(), "loss_mask": pa.float32()}
    config = {"pad_mode": given["data.pad_mode"], "max_length": int(given["data.max_length"])}
    rows = kind(parquet_files=given["data.train_files"], tokenizer=None, config=config, processor=None, max_samples=-1)
    wanted = truth(tmp_path / "run")
    assert len(rows) == len(wanted)
    for row, (branch,) in zip([rows[i] for i in range(len(rows))], wanted, strict=True):
        assert row.keys() == {"input_ids", "position_ids", "loss_mask"}
        assert row["input_ids"].dtype == torch.int64 and row["loss_mask"].dtype == torch.float32
        assert row["position_ids"].tolist() == list(range(len(row["input_ids"])))
        assert row["loss_mask"][0] == 0
        alive = row["loss_mask"].nonzero().squeeze(1).tolist()
        assert {(i, int(row["input_ids"][i])): float(row["loss_mask"][i]) for i in alive} == branch


def test_the_dataset_cuts_nothing_and_pads_nothing(place: Path) -> None:
    file = str(place / "train.parquet")
    whole = TokenRows(file)
    assert len(TokenRows([file, file])) == 2 * len(whole) and len(TokenRows(file, max_samples=2)) == 2
    longest = max(len(whole[i]["input_ids"]) for i in range(len(whole)))
    assert len(TokenRows(file, config={"max_length": longest})) == len(whole)
    with pytest.raises(ValueError, match=f"a row has {longest} tokens"):
        TokenRows(file, config={"max_length": longest - 1})
    with pytest.raises(ValueError, match="no_padding"):
        TokenRows(file, config={"pad_mode": "right"})
