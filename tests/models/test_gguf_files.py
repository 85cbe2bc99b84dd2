"""What of a GGUF file transformers does not read, beside the same model in safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_files import quiet, save_gguf

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.load import find_model, load_model

IDS = torch.arange(40)[None] % 50 + 3


def load(path: Path) -> Any:
    return load_model(find_model(str(path)), dtype=torch.float32, device=torch.device("cpu"))


def llama(**told: Any) -> Any:
    return tiny_model("llama", dtype=torch.float32, attention_bias=False, mlp_bias=False, **told)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def scaled(kind: str) -> Callable[[Any], None]:
    def add(writer: Any) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_float32("llama.rope.scaling.factor", 8.0)

    return add


def with_frequencies(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1.0, 4.0], np.float32))


def with_biases(writer: Any) -> None:
    for block in range(4):
        writer.add_tensor(f"blk.{block}.attn_v.bias", np.ones(8, np.float32))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            with_frequencies,
            r"reads 1 tensor of it into no part of a LlamaForCausalLM \(the first: rope_freqs\.weight\)",
        ),
        (with_biases, r"reads 4 tensors of it into no part of a LlamaForCausalLM \(the first: blk\.0\.attn_v\.bias\)"),
        (scaled("linear"), r"its rotary positions are scaled \(linear\)"),
        (scaled("yarn"), r"its rotary positions are scaled \(yarn\)"),
    ],
)
def test_what_transformers_leaves_out_is_refused(more: Callable[[Any], None], told: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(llama(), path, more)
    with pytest.raises(ModelError, match=told + ".* it would be another model"):
        load(path)


def test_a_file_that_scales_nothing_is_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "model.gguf"
    save_gguf(model, path, scaled("none"))
    assert torch.allclose(logits(load(path)), logits(model), atol=1e-5)


def test_positions_that_are_scaled_would_be_left_out(tmp_path: Path) -> None:
    """What the refusal is for: the same weights, whose configuration scales positions, say something else."""
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
    model = llama(rope_parameters=rope)
    with quiet():
        model.save_pretrained(tmp_path / "folder")
    assert torch.allclose(logits(load(tmp_path / "folder")), logits(model), atol=1e-5)
    assert not torch.allclose(logits(llama()), logits(model), atol=0.1)


def test_one_part_of_a_split_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    save_gguf(llama(), path, lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(ModelError, match=r"one of 2 files that a model was split into.*llama-gguf-split --merge"):
        load(path)
    save_gguf(llama(), path, lambda writer: writer.add_uint16("split.count", 1))
    load(path)
