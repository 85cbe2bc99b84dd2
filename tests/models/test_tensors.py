"""Models whose tensors are empty, and headers that are none. Files that are cut: test_checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter
from tiny_files import command, token_records, write_jsonl

from alphatoken_curate import ModelError
from alphatoken_curate.models.checkpoints import find_checkpoints
from alphatoken_curate.models.load import find_model
from alphatoken_curate.models.tensors import header_problems, shapes


def emptied(path: Path, *names: str) -> None:
    """As ZeRO-3 saves what no process holds whole."""
    tensors = load_file(path)
    save_file({**tensors, **dict.fromkeys(names, torch.empty(0))}, path, metadata={"format": "pt"})


def test_a_model_with_empty_tensors_is_told_in_one_line(models: dict[str, str], tmp_path: Path) -> None:
    path = Path(shutil.copytree(models["tuned"], tmp_path / "checkpoint-5"))
    emptied(path / "model.safetensors", "model.embed_tokens.weight", "lm_head.weight")
    wanted = (
        rf"{path}: 2 of \d+ tensors in it are empty \(the first: lm_head\.weight\), as .*ZeRO-3"
        r".*stage3_gather_16bit_weights_on_model_save: true\.$"
    )
    for find in (find_model, lambda name: find_checkpoints(name, base=None)):
        with pytest.raises(ModelError, match=wanted):
            find(str(path))
    data = write_jsonl(tmp_path / "rows.jsonl", [*token_records(2), "{"])
    ended = command("score", data, "-o", tmp_path / "run", "--model", path)
    assert ended.code == 2 and "2 of" in ended.err and "invalid_json" not in ended.err


def test_what_is_sharded_beside_them_is_to_be_merged(models: dict[str, str], tmp_path: Path) -> None:
    path = Path(shutil.copytree(models["tuned"], tmp_path / "checkpoint-5"))
    emptied(path / "model.safetensors", "lm_head.weight")
    (path / "global_step5").mkdir()
    (path / "global_step5" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_text("")
    with pytest.raises(ModelError, match=r"Of this folder, its weights are sharded, as DeepSpeed .*zero_to_fp32"):
        find_model(str(path))


def test_an_adapter_with_empty_tensors(models: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_adapter(models["base"], tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    emptied(weights, *load_file(weights))
    with pytest.raises(ModelError, match=r"adapter: (\d+) of \1 tensors in it are empty"):
        find_model(str(tmp_path / "adapter"))


def test_what_is_no_weight_may_be_empty(models: dict[str, str], tmp_path: Path) -> None:
    path = Path(shutil.copytree(models["tuned"], tmp_path / "model"))
    emptied(path / "model.safetensors", "model.layers.0.mlp._extra_state")
    assert find_model(str(path)).folder == path


@pytest.mark.parametrize("header", ["[]", '{"a": 3}', '{"a": {"shape": 3}}', "{"])
def test_what_has_no_header_gives_no_shapes(header: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert shapes([path]) == {} and list(header_problems(path))
    path.write_bytes(b"xy")
    assert shapes([path]) == {} and "no whole header in its 2 bytes" in next(header_problems(path))
    good = json.dumps({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    path.write_bytes(len(good).to_bytes(8, "little") + good.encode())
    assert shapes([path]) == {"a": (0,)} and not list(header_problems(path))
