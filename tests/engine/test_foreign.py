from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from tiny import tiny_model, tiny_rows

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.engine.value_rows import find_value_rows
from alphatoken_curate.errors import ModelError
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import collate

_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", {}),
    "codegen": ("codegen", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "gpt_neo": ("gpt_neo", {}),
    "bloom": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "falcon, one key head": ("falcon", {}),
    "falcon, a key head each": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon, grouped": ("falcon", _NEW),
    "falcon, grouped, sdpa": ("falcon", _NEW | {"attn_implementation": "sdpa"}),
    "falcon, alibi": ("falcon", {"alibi": True, "attn_implementation": "sdpa", "multi_query": False}),
    "falcon, alibi, eager": ("falcon", {"alibi": True, "multi_query": False}),
}


@pytest.mark.one_in(6)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("case", CASES)
def test_exact_equals_one_backward_per_token_with_and_without_a_prefix(case: str) -> None:
    family, changes = CASES[case]
    plain, scoring = tiny_model(family, **changes), ScoringModel(tiny_model(family, **changes), 3)
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(m.weight.shape, generator=generator, dtype=torch.float64) for m in scoring.maps]
    named = {m.name: d for m, d in zip(scoring.maps, direction, strict=True)}
    scorer = PathScorer(scoring, [direction], "exact", 4)
    for rows in (tiny_rows()[:1], tiny_rows()[1:4]):
        batch = collate(rows, range(len(rows)))
        found = scorer.score(batch)
        assert found.direct is not None
        assert found.causal is not None
        for i, index in enumerate(batch.rows):
            ids = torch.from_numpy(rows[index].input_ids.astype(np.int64))
            places = np.flatnonzero(rows[index].response).tolist()
            matrix = oracles.contraction_by_backwards(plain, 3, named, ids, places)
            own = torch.stack([matrix[t - 1, j] for j, t in enumerate(places)])
            later = torch.stack([matrix[t - 1, j + 1 :].sum() for j, t in enumerate(places)])
            mine = torch.from_numpy(batch.row == i)
            error = torch.stack([found.direct[0, mine] - own, found.causal[0, mine] - later]).abs().max()
            assert (error / torch.stack([own, later]).abs().max()).item() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_what_was_replaced_is_given_back(case: str) -> None:
    family, changes = CASES[case]
    model = tiny_model(family, **changes)
    before = {module: set(vars(module)) for module in model.modules()}
    ids = torch.arange(24).reshape(2, 12) % 61
    logits = model(input_ids=ids).logits
    scoring = ScoringModel(model, 2)
    assert all(not isinstance(rows, str) for rows in find_value_rows(scoring))
    scoring.release_model()
    assert torch.equal(model(input_ids=ids).logits, logits)
    blocks = scoring.blocks
    assert all(set(vars(m)) == before[m] for block in blocks for m in block.modules())


def test_a_bloom_that_multiplies_with_slices_of_its_weights_is_refused() -> None:
    model = tiny_model("bloom", pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(ModelError, match="BloomForCausalLM: "):
        ScoringModel(model, 2)
