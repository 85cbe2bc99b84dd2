"""What older releases of transformers do otherwise: that it is put right, seen on the release that is here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from packaging.version import Version
from tiny import FAMILIES, SINCE, tiny_model
from transformers import __version__

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.models.load import ModelSource, find_model, load_model, load_tokenizer
from alphatoken_curate.models.releases import before, keep_soft_caps, name_stops, network_errors


def test_releases_are_told_by_number() -> None:
    assert not before("5.0") and not before(__version__) and before("99.0")
    assert set(SINCE) <= set(FAMILIES)


def test_a_model_that_caps_scores_is_given_the_attention_that_does() -> None:
    model = tiny_model("gemma2", dtype=torch.float32)
    model.config._attn_implementation_internal = "sdpa"  # as older releases begin; newer ones refuse to be asked
    keep_soft_caps(model)
    assert model.config._attn_implementation == "eager"
    ScoringModel(model, 2)  # its own logits are those with the cap, or this refuses it


def test_a_model_without_caps_keeps_its_attention() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    keep_soft_caps(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_caps_scores_is_loaded_with_its_caps(tmp_path: Path) -> None:
    tiny_model("gemma2", dtype=torch.float32).save_pretrained(tmp_path)
    found = load_model(ModelSource(name="gemma2", folder=tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    assert found.config._attn_implementation == "eager"


@pytest.mark.long
def test_a_gguf_says_which_tokens_are_special(smollm2_tokenizer: Any) -> None:
    source = find_model("smollm2-135m")
    tokenizer: Any = load_tokenizer(source)
    assert source.gguf is not None
    wanted = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|im_end|>"}
    assert {name: getattr(tokenizer, name) for name in wanted} == wanted
    tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", None
    name_stops(tokenizer, source.folder / source.gguf)
    assert {name: getattr(tokenizer, name) for name in wanted} == wanted
    text = "def f ( x , y ) : it is n't ."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 2 and tokenizer("a").input_ids == smollm2_tokenizer("a").input_ids


def test_no_answer_of_the_hub_is_told_by_the_errors_of_its_client() -> None:
    client: Any = importlib.import_module("httpx" if Version(huggingface_hub.__version__) < Version("2") else "httpx2")
    assert issubclass(client.ConnectTimeout, network_errors()) and issubclass(TimeoutError, network_errors())
    assert not issubclass(ValueError, network_errors())
