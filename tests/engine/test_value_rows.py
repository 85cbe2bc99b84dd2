from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.engine.value_rows import find_value_rows


def rows_of(family: str, **changes: Any) -> tuple[ScoringModel, list[tuple[int, torch.Tensor] | str]]:
    scoring = ScoringModel(tiny_model(family, **changes), 2)
    return scoring, find_value_rows(scoring)


@pytest.mark.parametrize(
    ("family", "name", "wanted"),
    [
        ("llama", "self_attn.v_proj", list(range(8))),
        ("mixtral", "self_attn.v_proj", list(range(8))),
        ("phi3", "self_attn.qkv_proj", list(range(24, 32))),
        ("gpt2", "attn.c_attn", list(range(32, 48))),
        ("gpt_neox", "attention.query_key_value", [12 * h + 8 + j for h in range(4) for j in range(4)]),
        ("bloom", "self_attention.query_key_value", [12 * h + 8 + j for h in range(4) for j in range(4)]),
        ("falcon", "self_attention.query_key_value", list(range(20, 24))),
        ("gpt_bigcode", "attn.c_attn", list(range(20, 24))),
        ("codegen", "attn.qkv_proj", [12 * h + 4 + j for h in range(4) for j in range(4)]),
    ],
)
def test_they_are_the_value_rows_in_the_models_own_layout(family: str, name: str, wanted: list[int]) -> None:
    scoring, found = rows_of(family)
    for kept in found:
        assert not isinstance(kept, str)
        assert scoring.maps[kept[0]].name.endswith(name)
        assert kept[1].tolist() == wanted


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_rows_that_were_pruned_are_told_by_their_order(family: str) -> None:
    model = tiny_model(family, **({"attention_bias": False} if family == "llama" else {}))
    attention = model.model.layers[3].self_attn
    with torch.no_grad():
        (attention.v_proj.weight if family == "llama" else attention.qkv_proj.weight[24:])[:3] = 0
    found = find_value_rows(ScoringModel(model, 2))
    first = 0 if family == "llama" else 24
    assert all(not isinstance(kept, str) and kept[1].tolist() == list(range(first, first + 8)) for kept in found)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("deepseek_v3", "kv_b_proj: it makes values from a latent"),
        ("mimo_v2_flash", "does not receive the plain output of one linear map"),
    ],
)
def test_values_that_no_map_makes_plainly_are_told(family: str, why: str) -> None:
    _, found = rows_of(family, dtype=torch.float32)
    assert all(isinstance(kept, str) and why in kept for kept in found)
