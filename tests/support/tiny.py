"""Tiny random models of every family the project promises, and rows for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_run import closes
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from alphatoken_curate.models.devices import keep_full_experts
from alphatoken_curate.models.releases import before, keep_soft_caps
from alphatoken_curate.tokens.tokenise import PairRow, TokenRow

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
_OWN_NAMES = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}
_EXPERTS = _COMMON | {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
_NUMBERED = _EXPERTS | {"num_experts": 5}
_LOCAL = _EXPERTS | {"num_local_experts": 5}
_ROUTED = _EXPERTS | {
    "n_routed_experts": 5,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
}
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}

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
    "gpt2": _OWN_NAMES,
    "apertus": _COMMON,
    "arcee": _COMMON,
    "biogpt": _COMMON,
    "bitnet": _COMMON,
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 4, "n_head": 4, "initializer_range": 0.4},
    "codegen": _OWN_NAMES | {"rotary_dim": 4, "n_ctx": 64},
    "cohere": _COMMON | {"logit_scale": 0.5},
    "ctrl": _OWN_NAMES | {"dff": 24},
    "cohere2": _COMMON | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "ernie4_5": _COMMON,
    "exaone4": _COMMON
    | {"sliding_window": 4, "sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "falcon": _COMMON
    | {"attn_implementation": "eager", "alibi": False, "multi_query": True, "parallel_attn": True, "bias": False},
    "gemma": _COMMON | {"head_dim": 4},
    "gemma4_unified_text": _GEMMA
    | {
        "global_head_dim": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm": _COMMON | {"head_dim": 4} | _PARTIAL,
    "glm4": _COMMON | {"head_dim": 4} | _PARTIAL,
    "gpt_bigcode": _OWN_NAMES | {"multi_query": True},
    "gpt_neo": _COMMON
    | {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4},
    "gpt_neox_japanese": _COMMON | {"intermediate_multiple_size": 2},
    "gptj": _OWN_NAMES | {"rotary_dim": 4},
    "helium": _COMMON | {"head_dim": 4},
    "hunyuan_v1_dense": _COMMON | {"head_dim": 4},
    "hyperclovax": _COMMON,
    "internlm3": _COMMON,
    "jais2": _COMMON,
    "ministral3": _COMMON | {"head_dim": 4},
    "lfm2": _COMMON | {"full_attn_idxs": [0, 1, 2, 3]},
    "minicpm3": _COMMON | _LATENT,
    "nanochat": _COMMON,
    "nemotron": _COMMON | {"head_dim": 4},
    "olmo": _COMMON,
    "olmo3": _COMMON | {"sliding_window": 4},
    "opt": _COMMON | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "persimmon": _COMMON,
    "phi": _COMMON,
    "seed_oss": _COMMON | {"head_dim": 4},
    "stablelm": _COMMON | {"use_qkv_bias": True},
    "starcoder2": _COMMON | {"sliding_window": 4},
    "vaultgemma": _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    "mixtral": _LOCAL | {"sliding_window": 6},
    "qwen2_moe": _NUMBERED | {"shared_expert_intermediate_size": 8, "mlp_only_layers": [1]},
    "qwen3_moe": _NUMBERED | {"head_dim": 4},
    "olmoe": _NUMBERED,
    "gpt_oss": _LOCAL
    | {
        "head_dim": 4,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "afmoe": _NUMBERED | {"num_shared_experts": 1, "num_dense_layers": 2, "head_dim": 4},
    "aria_text": _EXPERTS | {"moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 1},
    "deepseek_v2": _ROUTED | _LATENT,
    "deepseek_v3": _ROUTED | _LATENT,
    "cohere2_moe": _NUMBERED,
    "dots1": _ROUTED,
    "ernie4_5_moe": _EXPERTS
    | {"moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 2},
    "exaone_moe": _NUMBERED | {"head_dim": 4},
    "flex_olmo": _NUMBERED,
    "glm4_moe": _ROUTED | {"head_dim": 4},
    "granitemoe": _LOCAL | {"attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "granitemoeshared": _LOCAL | {"shared_intermediate_size": 8, "attention_multiplier": 0.3},
    "hunyuan_v1_moe": _NUMBERED | {"head_dim": 4, "moe_topk": 2},
    "mimo_v2_flash": _ROUTED | {"head_dim": 4},
    "minimax_m2": _LOCAL | {"head_dim": 4},
    "phimoe": _LOCAL | {"router_jitter_noise": 0.1},
    "solar_open": _ROUTED | {"head_dim": 4},
}
"""By the model type of transformers: settings that make it small, and use what the family can do."""

SINCE = {"cohere2_moe": "5.9", "hyperclovax": "5.9", "gemma4_unified_text": "5.10", "nemotron": "5.13"}
SINCE |= dict.fromkeys(("ctrl", "deepseek_v2", "granitemoe", "granitemoeshared", "mimo_v2_flash", "minicpm3"), "5.13")
SINCE |= {"aria_text": "5.18", "internlm3": "5.23"}
"""Of families above: the first release of transformers that has them in a form which can be captured."""

LAYERS_ALL = {"qwen2", "gpt2", "mixtral", "gpt_oss"}
"""Families that are tried with every block in the scoring set, the others with the last three."""

_FROM_LATENT = "it makes values from a latent, not from the block's input"
_NOT_PLAIN = "attention does not receive the plain output of one linear map as its values"
REFUSED: dict[str, dict[str, str]] = {
    "deepseek_v2": {"published": _FROM_LATENT},
    "deepseek_v3": {"published": _FROM_LATENT},
    "minicpm3": {"published": _FROM_LATENT},
    "gemma4_unified_text": {"published": _NOT_PLAIN},
    "mimo_v2_flash": {"published": _NOT_PLAIN},
}
"""Of families above: the estimators that refuse it, each with what its message says."""

ROUNDING: dict[str, dict[str, float]] = {
    "deepseek_v2": {"exact": 1e-6, "influence": 1e-6},  # routes, and turns positions, in float32
    "bloom": {"influence": 1e-6},  # its GELU's own backward has rounded constants
}
"""Of families above: the tolerance of an estimator, where the model itself rounds in a float64 model."""

_STATE_SPACE = "state-space blocks, whose recurrence is no linear map"
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
UNCAPTURED: dict[str, tuple[dict[str, Any], str, str]] = {
    "mamba": (_COMMON, r"mixer\.A_log .* cannot be captured", _STATE_SPACE),
    "jamba": (_NUMBERED, r"mamba\.A_log .* cannot be captured", _STATE_SPACE),
    "rwkv": (
        _COMMON | {"attention_hidden_size": 16, "context_length": 64},
        r"cannot be captured",
        "a recurrence over time that is no linear map",
    ),
    "qwen3_next": (
        _NUMBERED | _MIXED | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 4},
        r"linear_attn\.conv1d\.weight .* cannot be captured",
        "blocks of linear attention, with convolutions",
    ),
    "jetmoe": (
        _COMMON | {"kv_channels": 4, "num_local_experts": 4},
        "cannot be captured",
        "experts outside transformers' experts interface",
    ),
    "diffllama": (_COMMON, "[04] of 2 scoring blocks use", "attention taken twice in a block"),
    "mpt": (
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 4, "n_heads": 4, "max_seq_len": 64},
        "0 of 2 scoring blocks use",
        "attention outside transformers' attention interface, and no adapter",
    ),
    "xglm": (
        _COMMON | {"d_model": 16, "num_layers": 4, "attention_heads": 4, "ffn_dim": 24},
        "0 of 2 scoring blocks use",
        "attention outside transformers' attention interface, and no adapter",
    ),
    "olmo with clip_qkv": (
        _COMMON | {"clip_qkv": 0.5},
        "it does not run under capture: .* in-place operation",
        "queries, keys and values that are cut off in place",
    ),
    "lfm2 with convolutions": (
        _COMMON | {"layer_types": ["conv", "full_attention"] * 2},
        r"conv\.conv\.weight .* cannot be captured",
        "blocks of convolutions, as the released ones have; its last blocks alone can score where they have none",
    ),
    "bart": (_COMMON, r"found no list of 4 decoder blocks", "an encoder and a decoder"),
}
"""By model type: settings, what the message says, and why in the words of models/README.md."""


CORE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2", "gpt_oss"]
"""Families that are tested each time: what most people have, and what is made in other ways."""


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model of a family, in evaluation mode. Norm weights and biases are random too, not ones and zeros.

    Skips the test where the installed transformers is older than the family.
    """
    if family in SINCE and before(SINCE[family]):
        pytest.skip(f"{family}: needs transformers {SINCE[family]}")
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(dtype)
    keep_soft_caps(model)
    keep_full_experts(model)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model.eval()


def left_out(module: torch.nn.Module) -> None:
    """Take the weights of a module away: they are on torch's device meta, as where a loader left them on disk."""
    for part in module.modules():
        kept = {name: p for name, p in part._parameters.items() if p is not None}
        part._parameters.update({name: torch.nn.Parameter(p.to("meta")) for name, p in kept.items()})


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
        end_of_turn=closes(response),
        truncated=0,
    )


def tiny_pairs(seed: int = 0, shared: int = 11) -> list[PairRow]:
    """Pairs that share a prompt of `shared` tokens, one whose prompts part early, one with one-token answers."""
    draw = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return draw.integers(3, VOCABULARY, count).tolist()

    def pair(row_id: int, prompts: tuple[list[int], list[int]], lengths: tuple[int, int]) -> PairRow:
        rows = [
            make_row(row_id, prompt + ids(length), [(len(prompt), len(prompt) + length)])
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        return PairRow(chosen=rows[0], rejected=rows[1])

    prompts = [ids(shared + i) for i in range(3)]
    answers = [(6, 4), (3, 9), (1, 1)]
    made = [pair(i, (prompts[i], prompts[i]), lengths) for i, lengths in enumerate(answers)]
    return [*made, pair(3, (prompts[0], [*prompts[0][:3], *ids(4)]), (4, 5))]


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
