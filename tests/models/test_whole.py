"""What of a model's files transformers leaves out, and when that makes it another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.whole import Readable, reason, refuse_depth, refuse_other


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "model.layers.9.mlp.up_proj.weight"),
        ("llama", "layers.0.mlp.extra"),
        ("llama", "model.norm.bias"),
        ("gpt2", "h.0.attn.c_attn.scale"),
        ("gpt_neox", "gpt_neox.layers.0.attention.norm.weight"),
    ],
)
def test_what_is_missed(family: str, key: str) -> None:
    with pytest.raises(ModelError, match=f"^x: 1 tensor of its files .*{key}"):
        refuse_other("x", tiny_model(family), [key], {}, [])


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.layers.9.eh_proj.weight"),
        ("llama", "score.weight"),
        ("gpt2", "h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
    ],
)
def test_what_is_not(family: str, key: str) -> None:
    refuse_other("x", tiny_model(family), [key], {}, [])


def test_quantised_weights_need_a_configuration(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_file({"lm_head.weight": torch.zeros(4, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight, I8"):
        refuse_other("x", model, [], {}, [tmp_path / "a.safetensors"])
    refuse_other("x", model, [], {"quantization_config": {"quant_method": "x"}}, [tmp_path / "a.safetensors"])
    for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        save_file({"lm_head.weight": torch.zeros(4, dtype=kind)}, tmp_path / "a.safetensors")
        refuse_other("x", model, [], {}, [tmp_path / "a.safetensors"])
    save_file({"lm_head.ids": torch.zeros(4, dtype=torch.int64)}, tmp_path / "a.safetensors")
    refuse_other("x", model, [], {}, [tmp_path / "a.safetensors"])


def test_there_are_no_more_blocks_than_tensors(tmp_path: Path) -> None:
    save_file({name: torch.zeros(1) for name in "abc"}, tmp_path / "a.safetensors")
    files = [tmp_path / "a.safetensors"]
    for config in ({"n_layer": 4000}, {"text_config": {"num_hidden_layers": 2**40}}, {"num_local_experts": 10**6}):
        with pytest.raises(ModelError, match=r"its files hold 3 tensors"):
            refuse_depth("x", config, files)
    refuse_depth("x", {"n_layer": 4, "num_experts": 512, "num_hidden_layers": None}, files)


def test_a_reason_is_one_line_that_is_not_long() -> None:
    assert reason(OSError("a\nb")) == "a b"
    assert reason(KeyError("a")) == "KeyError('a')"
    assert len(reason(ValueError("x" * 10_000))) < 400
    assert "shapes" in reason(RuntimeError("You set `ignore_mismatched_sizes` to `False`"))


def test_what_readers_raise_is_told_and_nothing_else() -> None:
    for error in (ValueError("x"), Exception("of no kind")):
        with pytest.raises(ModelError, match=r"^m: .*x|kind"), Readable("m", None):
            raise error
    with pytest.raises(ModelError, match="fetch it again"), Readable("m", "x.gguf"):
        raise OSError("x")
    for other in (torch.OutOfMemoryError("x"), KeyboardInterrupt(), ModelError("own"), StopIteration()):
        with pytest.raises(type(other)), Readable("m", None):
            raise other
