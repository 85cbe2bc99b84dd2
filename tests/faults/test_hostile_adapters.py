"""Adapters of odd numbers: each is refused with a line, or merged as it says; none changes values in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import logits, save_adapter
from torch import Tensor

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.load import find_model, load_model

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, about what is refused next

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain(models: dict[str, str], folder: Path) -> Tensor:
    return save_adapter(models["base"], folder / "lora")


@pytest.fixture
def lora(plain: Tensor, folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "lora", tmp_path / "lora"))


def configured(lora: Path, **changes: Any) -> Path:
    path = lora / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return lora


def weighed(lora: Path, change: Callable[[Weights], Any]) -> Path:
    path = lora / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({name: one.contiguous() for name, one in weights.items()}, path, metadata={"format": "pt"})
    return lora


def loaded(lora: Path) -> Any:
    return load_model(find_model(str(lora)), dtype=torch.float32, device=torch.device("cpu"))


def refused(lora: Path) -> None:
    with pytest.raises(ModelError) as found:
        loaded(lora)
    assert str(lora) in str(found.value) and "\n" not in str(found.value)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "changes",
    [
        *({"r": rank} for rank in (0, -1, 3, 8, "4", None, 10**9, 2**70, [4], float("nan"))),
        *({"lora_alpha": alpha} for alpha in (0, "8", None, True, [1], 1e308, float("nan"), float("inf"))),
        *(
            {"rank_pattern": ranks}
            for ranks in ({"q_proj": 0}, {"q_proj": 8}, {"q_proj": "4"}, {"nope": 8}, {"(": 8}, [1])
        ),
        *(
            {"alpha_pattern": scales}
            for scales in ({"q_proj": 0}, {"q_proj": "4"}, {"q_proj": 1e308}, {"nope": 8}, [1])
        ),
        *({"target_modules": names} for names in (["nope"], ["q_proj"], ["q_proj", "v_proj", "k_proj"], [], "(", 5)),
        *({"use_rslora": value} for value in ("no", 1, [])),
        {"use_rslora": True, "r": 0},
        {"use_dora": "false"},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "evil"},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [99]},
        {"layer_replication": [[0, 10**9]]},
        {"trainable_token_indices": [1, 10**9]},
        {"modules_to_save": ["lm_head"]},
        {"exclude_modules": ["q_proj"]},
        {"init_lora_weights": "evil"},
        {"target_parameters": ["x"]},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_tensors_are_refused(changes: dict[str, Any], lora: Path) -> None:
    refused(configured(lora, **changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights[A].fill_(torch.nan),
        lambda weights: weights[B].fill_(torch.inf),
        lambda weights: weights[A].view(-1)[:1].fill_(torch.nan),
        lambda weights: weights.pop(A),
        lambda weights: weights.pop(B),
        lambda weights: (weights.pop(A), weights.pop(B)),
        lambda weights: weights.update(junk=torch.ones(4)),
        lambda weights: weights.update({"base_model.model.extra.lora_A.weight": torch.ones(4, 16)}),
        lambda weights: weights.update({A: weights[A].t()}),
        lambda weights: weights.update({A: weights[A][None]}),
        lambda weights: weights.update({A: weights[A].reshape(-1)}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Callable[[Weights], Any], lora: Path) -> None:
    refused(weighed(lora, change))


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_whole_numbers_are_no_weights(kind: torch.dtype, lora: Path) -> None:
    refused(weighed(lora, lambda weights: weights.update({A: (weights[A] * 10).to(kind)})))


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_floats_are(kind: torch.dtype, lora: Path, plain: Tensor) -> None:
    weighed(lora, lambda weights: weights.update({name: one.to(kind) for name, one in weights.items()}))
    assert (logits(loaded(lora)) - plain).abs().max() < 0.01 * plain.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 8}},
        {"target_modules": ["q_proj", "v_proj", "nope"]},
        {"modules_to_save": ["nope"]},
        {"lora_dropout": 0.5},
        {"fan_in_fan_out": True},
        {"inference_mode": False},
    ],
    ids=str,
)
def test_settings_that_change_nothing_change_nothing(changes: dict[str, Any], lora: Path, plain: Tensor) -> None:
    assert torch.allclose(logits(loaded(configured(lora, **changes))), plain, atol=1e-5)


def test_a_scale_below_zero_is_what_it_says(lora: Path, models: dict[str, str], plain: Tensor) -> None:
    base = logits(loaded(Path(models["base"])))
    opposite = logits(loaded(configured(lora, lora_alpha=-8)))
    assert not torch.allclose(opposite, plain, atol=1e-5) and not torch.allclose(opposite, base, atol=1e-5)
    weighed(lora, lambda weights: [weights[name].neg_() for name in weights if "lora_B" in name])
    assert torch.allclose(logits(loaded(lora)), plain, atol=1e-5)


def test_biases_that_were_trained_are_taken(models: dict[str, str], tmp_path: Path) -> None:
    trained = save_adapter(models["base"], tmp_path / "lora", bias="all")
    assert torch.allclose(logits(loaded(tmp_path / "lora")), trained, atol=1e-5)
    refused(
        weighed(tmp_path / "lora", lambda weights: weights.pop(next(n for n in weights if n.endswith("proj.bias"))))
    )
