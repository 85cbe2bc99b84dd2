"""The Hugging Face family: columns, types, and what --strict leaves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exported import HALF, SOFT, read, truth
from small_run import small_run, value_rows

from alphatoken_curate import UsageError, export

TYPES = {
    "input_ids": pa.int32(),
    "attention_mask": pa.int8(),
    "labels": pa.int64(),
    "assistant_masks": pa.int8(),
    "loss_weight": pa.float32(),
}
STRICT = ["input_ids", "attention_mask", "labels"]


def columns(path: Path) -> dict[str, pa.DataType]:
    return {field.name: field.type.value_type for field in pq.read_schema(path)}


def test_sft_columns(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config=SOFT)
    export(run, trainer="hf", output=tmp_path / "out")
    assert columns(tmp_path / "out" / "train.parquet") == TYPES
    for row in pq.read_table(tmp_path / "out" / "train.parquet").to_pylist():
        assert set(row["attention_mask"]) == {1}
        assert row["assistant_masks"] == [int(label != -100) for label in row["labels"]]
        assert row["assistant_masks"] == [int(weight > 0) for weight in row["loss_weight"]]
        pairs = zip(row["labels"], row["input_ids"], strict=True)
        assert all(label in (-100, token) for label, token in pairs) and row["labels"][0] == -100


def test_preference_columns(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", kind="preference", config=SOFT)
    export(run, trainer="hf", output=tmp_path / "out")
    wanted = {
        prefix + name: kind
        for prefix in ("chosen_", "rejected_")
        for name, kind in TYPES.items()
        if name != "assistant_masks"
    }
    assert columns(tmp_path / "out" / "train.parquet") == wanted


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_strict_leaves_three_columns_and_takes_binary_weights_alone(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path / "run", kind=kind, config=SOFT)
    with pytest.raises(UsageError, match="labels alone"):
        export(run, trainer="hf", output=tmp_path / "out", strict=True)
    export(run, trainer="hf", output=tmp_path / "out", strict=True, binarize=True)
    prefixes = ("chosen_", "rejected_") if kind == "preference" else ("",)
    wanted = {prefix + name: TYPES[name] for prefix in prefixes for name in STRICT}
    assert columns(tmp_path / "out" / "train.parquet") == wanted
    assert read("hf", tmp_path / "out") == truth(run, binarize=True)


def test_the_readme_names_what_reads_it(tmp_path: Path) -> None:
    soft = small_run(tmp_path / "soft", config=SOFT)
    export(soft, trainer="hf", output=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "WeightedSFTTrainer(model, args=SFTConfig(max_length=None)" in text and "AlphaTokenPlugin" in text
    assert "not all 0 or 1" in text and "alphatoken_curate.trainers" in text
    export(soft, trainer="hf", output=tmp_path / "strict", strict=True, binarize=True)
    text = (tmp_path / "strict" / "README.md").read_text()
    assert "ds_type: parquet, type: }" in text and "Together: upload" in text and "loss_weight" not in text
    pairs = small_run(tmp_path / "pairs", kind="preference", config=SOFT)
    export(pairs, trainer="hf", output=tmp_path / "dpo")
    text = (tmp_path / "dpo" / "README.md").read_text()
    assert "DPOTrainer" in text and "`rejected_`" in text and "assistant_masks" not in text


def test_the_readme_says_what_the_strict_form_cannot_do(tmp_path: Path) -> None:
    """Old releases of TRL pack without labels; the trainer of pairs needs weights."""
    for kind in ("sft", "preference"):
        run, place = small_run(tmp_path / kind, kind=kind), tmp_path / f"{kind}.strict"
        export(run, trainer="hf", output=place, strict=True)
    assert "TRL before 1.7 loses labels when it packs" in (tmp_path / "sft.strict" / "README.md").read_text()
    pairs = (tmp_path / "preference.strict" / "README.md").read_text()
    assert "export without `--strict`" in pairs and "WeightedDPOTrainer(" not in pairs


def loaded(place: Path) -> Any:
    """The rows of an export, by the code of its README up to the trainer itself."""
    code = (place / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (load,) = [line for line in code.splitlines() if line.startswith("rows = ")]
    known: dict[str, Any] = {}
    exec(f"from datasets import load_dataset\n{load}", known)
    return known["rows"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ['a "quoted" [n]ame', "json", "one two \U0001f600", "g[1]/mine.trl"])
def test_the_code_of_the_readme_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the folder that the name would be a pattern of."""
    run, others = small_run(tmp_path / "run"), small_run(tmp_path / "others", value_rows(3))
    (tmp_path / "g[1]").mkdir()
    for output in ('a "quoted" name', "g1/mine.trl"):
        export(others, trainer="hf", output=tmp_path / output)
    monkeypatch.chdir(tmp_path / Path(name).parent)
    done = export(run, trainer="hf", output=Path(name).name)
    assert len(loaded(done.path)) == done.rows


def test_a_folder_that_was_written_anew_at_the_same_time_is_loaded_anew(tmp_path: Path) -> None:
    """As an unpacked archive is, or a disk whose times are all alike."""
    found = []
    for weights in (HALF, SOFT):
        shutil.rmtree(tmp_path, ignore_errors=True)
        export(small_run(tmp_path / "run", config=weights), trainer="hf", output=tmp_path / "out")
        os.utime(tmp_path / "out" / "train.parquet", (1.7e9, 1.7e9))
        found.append(loaded(tmp_path / "out")["loss_weight"][:])
        assert found[-1] == pq.read_table(tmp_path / "out" / "train.parquet")["loss_weight"].to_pylist()
    assert found[0] != found[1]
