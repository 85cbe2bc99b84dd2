"""Tiny random models of every family the project promises, and rows for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from alphatoken_curate.tokens import TokenRow

VOCABULARY = 61

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}
_GEMMA = {**_COMMON, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 5}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"attention_bias": True, "mlp_bias": True},
    "qwen2": _COMMON | {"tie_word_embeddings": True},
    "qwen3": _COMMON | {"head_dim": 4},
    "mistral": _COMMON | {"sliding_window": 4},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    "gemma3_text": _GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": _COMMON,
    "gpt_neox": _COMMON | {"use_parallel_residual": True},
    "olmo2": _COMMON,
    "smollm3": _COMMON | {"no_rope_layers": [1, 0, 1, 0]},
    "granite": _COMMON
    | {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0, "embedding_multiplier": 1.5},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_inner": 24,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.4,
    },
}


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model of a family, in evaluation mode. Norm weights and biases are random too, not ones and zeros."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model.eval()


def make_row(row_id: int, ids: list[int], responses: list[tuple[int, int]]) -> TokenRow:
    """A row whose tokens first..last-1 respond, for each (first, last)."""
    response = np.zeros(len(ids), dtype=np.bool_)
    for first, last in responses:
        response[first:last] = True
    return TokenRow(
        row_id=row_id,
        source="tiny.jsonl",
        line=row_id + 1,
        id=None,
        input_ids=np.array(ids, dtype=np.int32),
        response=response,
        truncated=0,
    )


def tiny_rows(seed: int = 0) -> list[TokenRow]:
    """Rows that differ in length: a long prompt, a prompt of one token, a one-token answer, two turns."""
    draw = np.random.default_rng(seed)
    spans = [
        (17, [(11, 17)]),
        (9, [(1, 9)]),
        (14, [(13, 14)]),
        (19, [(10, 13), (16, 19)]),
        (22, [(12, 21)]),
        (2, [(1, 2)]),
    ]
    return [make_row(i, draw.integers(3, VOCABULARY, n).tolist(), responses) for i, (n, responses) in enumerate(spans)]
