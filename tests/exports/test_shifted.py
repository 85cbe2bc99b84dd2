"""Levanter, Tinker and Megatron-Bridge: columns, types, the shift, and the lines of their READMEs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from exported import SOFT, truth
from small_run import small_run

from alphatoken_curate import export


def fenced(place: Path, language: str) -> str:
    return (place / "README.md").read_text().split(f"```{language}\n")[1].split("```")[0]


def test_levanter(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config=SOFT)
    export(run, trainer="levanter", output=tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    assert {f.name: f.type.value_type for f in table.schema} == {"input_ids": pa.int32(), "loss_weights": pa.float32()}
    first, (wanted,) = table.to_pylist()[0], truth(run)[0]
    assert {p + 1: weight for p, weight in enumerate(first["loss_weights"]) if weight} == {
        i: weight for (i, _), weight in wanted.items()
    }
    data = yaml.safe_load(fenced(tmp_path / "out", "yaml"))["data"]
    assert data["train_urls"] == [str(tmp_path / "out" / "train.parquet")]
    assert data["format"] == {
        "type": "prebuilt",
        "input_ids_key": "input_ids",
        "loss_weights_key": "loss_weights",
    }


def test_megatron(tmp_path: Path) -> None:
    done = export(small_run(tmp_path / "run"), trainer="megatron", output=tmp_path / "out")
    assert done.data.name.endswith(".idx.parquet")
    table = pq.read_table(done.data)
    assert {f.name: f.type.value_type for f in table.schema} == {
        "input_ids": pa.int32(),
        "seq_start_id": pa.int32(),
        "loss_mask": pa.int8(),
    }
    longest = max(len(row["input_ids"]) for row in table.to_pylist())
    call = ast.parse(fenced(tmp_path / "out", "python")).body[0]
    assert isinstance(call, ast.Assign)
    text = ast.unparse(call)
    assert "'answer_only_loss': True" in text and f"packed_sequence_size={longest}" in text
    assert f"packed_train_data_path={str(done.data)!r}" in text


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_the_code_for_tinker_makes_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With stand-ins that keep what Datum is given."""
    run = small_run(tmp_path / "run", kind=kind, config=SOFT)
    done = export(run, trainer="tinker", output=tmp_path / "out")
    types = SimpleNamespace(
        Datum=lambda model_input, loss_fn_inputs: (model_input, loss_fn_inputs),
        ModelInput=SimpleNamespace(from_ints=list),
    )
    code = fenced(tmp_path / "out", "python").replace("from tinker import types\n", "")
    assert "open(" in code
    known = {"types": types, "open": lambda path: Path(path).read_text().splitlines()}
    exec(code, known)
    data = known["data"]
    branches = [branch for row in truth(run) for branch in row]
    assert len(data) == len(branches) == done.rows * (1 + (kind == "preference"))  # type: ignore[arg-type]
    for (ids, inputs), wanted in zip(data, branches, strict=True):  # type: ignore[call-overload]
        assert len(ids) == len(inputs["target_tokens"]) == len(inputs["weights"])
        alive = {p + 1 for p, weight in enumerate(inputs["weights"]) if weight}
        assert alive == {i for i, _ in wanted}
        assert all(inputs["target_tokens"][i - 1] == token for i, token in wanted)


def test_tinker_rows_of_another_kind_are_seen(tmp_path: Path) -> None:
    from alphatoken_curate.errors import CurateError
    from alphatoken_curate.exports.form import Asked
    from alphatoken_curate.exports.shifted import TINKER
    from alphatoken_curate.runs.schema import PREFERENCE

    row = {"model_input": [1], "target_tokens": [2], "weights": [1.0]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(CurateError, match="another kind"):
        TINKER.check(tmp_path, iter([]), Asked(layout=PREFERENCE, strict=False))
