"""Weights that stay on disk when a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_files import quiet

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.disk import Disk
from alphatoken_curate.models.load import find_model, load_model, skeleton

CPU = torch.device("cpu")


def left(folder: Path, modules: list[str], others: list[str], dtype: torch.dtype = torch.float32) -> tuple[Any, Disk]:
    disk = Disk(modules, others)
    return load_model(find_model(str(folder)), dtype=dtype, device=CPU, disk=disk), disk


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_read_is_what_would_have_been_loaded(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of more than ten blocks, whose numbers begin alike; of experts, which lie one by one in files."""
    with quiet():
        made = tiny_model(family, dtype=torch.float32, num_hidden_layers=12)
        made.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    plain = load_model(find_model(str(tmp_path)), dtype=dtype, device=CPU)
    blocks = [f"model.layers.{n}" for n in range(12)]
    model, disk = left(tmp_path, [blocks[1]], [*blocks[:1], *blocks[2:]], dtype)
    away = {name for name, p in model.named_parameters() if p.device.type == "meta"}
    assert away == {name for name, _ in plain.named_parameters() if name.startswith("model.layers.1.")}
    wanted = dict(plain.named_parameters())
    found = disk.read(away)
    assert found.keys() == away
    for name, p in [*found.items(), *((n, p) for n, p in model.named_parameters() if n not in away)]:
        assert p.dtype == dtype and torch.equal(p, wanted[name]), name


def test_a_file_that_is_gone_or_cut_is_told_in_a_line(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    _, disk = left(tmp_path, ["model.layers.0"], [f"model.layers.{n}" for n in (1, 2, 3)])
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    whole = path.read_bytes()
    for change in (lambda: path.write_bytes(whole[:-100]), path.unlink):
        change()
        with pytest.raises(
            ModelError, match=r"model\.safetensors: blocks that stay on disk are read from it, and"
        ) as e:
            disk.read([name])
        assert "\n" not in str(e.value)


def test_the_modules_are_known_without_weights(tmp_path: Path) -> None:
    with quiet():
        made = tiny_model("mixtral", dtype=torch.float32)
        made.save_pretrained(tmp_path)
    found = skeleton(find_model(str(tmp_path)))
    assert [name for name, _ in found.named_modules()] == [name for name, _ in made.named_modules()]
    assert {p.device.type for p in found.parameters()} == {"meta"}
