from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from alphatoken_curate.capture import ScoringModel, captured
from alphatoken_curate.errors import ModelError

_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({}, r"layers\.\d\.mlp\.gate\.weight .* cannot be captured"),
    "gpt_oss": ({}, r"layers\.\d\.mlp\.router\.weight .* cannot be captured"),
    "mamba": ({}, r"mixer\.A_log .* cannot be captured"),
    "olmo": ({"clip_qkv": 0.5}, "it does not run under capture: .* in-place operation"),
    "falcon": ({}, r"self_attention\.query_key_value\.weight .* cannot be captured"),
    "gptj": ({"n_embd": 16, "n_layer": 4, "n_head": 4, "rotary_dim": 4}, "0 of 2 scoring blocks use"),
    "bloom": ({"n_layer": 4, "n_head": 4}, "0 of 2 scoring blocks use"),
    "opt": ({"word_embed_proj_dim": 16, "ffn_dim": 24}, r"goes into .*fc1 is not one vector for each position"),
    "deepseek_v3": (
        _LATENT | {"n_routed_experts": 4, "first_k_dense_replace": 9, "num_key_value_heads": 4},
        r"goes into .*kv_b_proj is not one vector for each position",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_captured_is_refused_by_name_and_left_as_it_was(family: str) -> None:
    changes, message = REFUSED[family]
    config = CONFIG_MAPPING[family](**{**FAMILIES["llama"], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match=f"{type(model).__name__}: .*{message}"):
        ScoringModel(model, 2)
    assert all(p.requires_grad for p in model.parameters())
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} <= {"sdpa", "eager"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_model_gives_the_same_logits_and_is_given_back_unchanged(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(2 * 15).reshape(2, 15) % 61
    before = model(input_ids=ids).logits
    kinds = {name: p.requires_grad for name, p in model.named_parameters()}
    with captured(model, 2) as scoring:
        for start in (0, 9):
            hidden = scoring.hidden(ids, start)
            logits = scoring.head(hidden.flatten(0, 1)).view(2, 15 - start, -1)
            assert torch.allclose(logits, before[:, start:], atol=1e-6)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == kinds


def test_the_prefix_needs_no_graph_and_the_trunk_keeps_none() -> None:
    scoring = ScoringModel(tiny_model("llama"), 2)
    ids = torch.arange(2 * 15).reshape(2, 15) % 61
    with scoring.graph(ids, 6) as hidden:
        assert hidden.shape == (2, 9, 16)
        assert all(scoring.input(i).shape[1] == 9 for i in range(len(scoring.maps)))
        seen: list[int] = []
        scoring.backward([hidden], [torch.ones_like(hidden)], lambda index, _, __: seen.append(index))
    assert sorted(seen) == list(range(len(scoring.maps)))
    assert not any(p.requires_grad for p in scoring.model.parameters())


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ModelError, match=r"--layers 5: the model has 4 decoder blocks\. Give 1 to 4, or all"):
        ScoringModel(tiny_model("llama"), 5)
