"""Adapters as peft saves them, read without it; and what of one cannot be rehearsed on, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import lora, save_adapter

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.unmerged import read_unmerged

pytest.importorskip("peft")


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 3, "use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_what_peft_saved_is_read(settings: dict[str, Any], models: dict[str, str], tmp_path: Path) -> None:
    adapted = lora(models["base"], **settings)
    adapted.save_pretrained(tmp_path)
    found = read_unmerged(tmp_path, 4)
    layers = {name: m for name, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert found.start is not None and found.start.keys() == layers.keys() and found.rank == 4
    for name, (a, b) in found.start.items():
        assert torch.equal(a, layers[name].lora_A["default"].weight)
        assert torch.equal(b, layers[name].lora_B["default"].weight)
        assert found.scale == pytest.approx(layers[name].scaling["default"], rel=1e-15)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is "),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is "),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is "),
        ({"lora_bias": True, "target_modules": ["o_proj"]}, "lora_bias is True"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens."),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices is "),
    ],
)
def test_what_is_more_than_a_plain_lora_is_refused_by_name(
    settings: dict[str, Any], name: str, models: dict[str, str], tmp_path: Path
) -> None:
    save_adapter(models["base"], tmp_path, **settings)
    with pytest.raises(ModelError) as error:
        read_unmerged(tmp_path, 4)
    assert name in str(error.value) and "Merge it, save the result with save_pretrained" in str(error.value)


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"init_lora_weights": "pissa"}, "its training began by changing the base (init_lora_weights 'pissa')"),
        ({"r": 8}, "its rank is 8, and that of --rehearse-lora is 4: a training goes on with the rank it has"),
        ({"lora_alpha": 16}, "its lora_alpha is 16, and --rehearse-lora-alpha is 8. Leave that out"),
        ({"lora_alpha": True}, "lora_alpha is True. Write the number"),
        ({"lora_alpha": 0}, "lora_alpha is 0. Write the number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'. Write true or false"),
        ({"from_a_later_release": 3}, "from_a_later_release is 3, and only a plain LoRA"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], told: str, models: dict[str, str], tmp_path: Path
) -> None:
    save_adapter(models["base"], tmp_path)
    changed(tmp_path, **settings)
    with pytest.raises(ModelError) as error:
        read_unmerged(tmp_path, 4, 8.0)
    assert told in str(error.value)


def test_an_adapter_that_is_not_whole_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    save_adapter(models["base"], tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[1]
    save_file({name: x for name, x in tensors.items() if name != first}, path)
    with pytest.raises(ModelError, match=r"lora_B\.weight is missing"):
        read_unmerged(tmp_path, 4)
    save_file({name: x[:2] if name == first else x for name, x in tensors.items()}, path)
    assert read_unmerged(tmp_path, 4).start
    save_file({name: x[:2] if ".lora_A." in name else x for name, x in tensors.items()}, path)
    with pytest.raises(ModelError, match=r"is not of rank 4, which its adapter_config\.json says"):
        read_unmerged(tmp_path, 4)
