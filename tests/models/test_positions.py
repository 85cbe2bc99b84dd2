from __future__ import annotations

from typing import Any

import pytest
import torch
from daily import daily
from tiny import CORE, FAMILIES, tiny_model

from alphatoken_curate.models.positions import TABLES, Reach, reach_of

LONG = {"short_factor": [1.0] * 2, "long_factor": [4.0] * 2, "rope_theta": 1e4}


@pytest.mark.parametrize("family", daily(FAMILIES, {*CORE, *TABLES}))
def test_positions_end_where_a_model_fails_beyond_them(family: str) -> None:
    model: Any = tiny_model(family, dtype=torch.float32)
    config = model.config.get_text_config()
    reach = reach_of(config.to_dict())
    most = 64 if reach is None else reach.tokens
    for length in (most, most + 1):
        ids = torch.arange(length)[None] % 50 + 3
        if reach is not None and length > most:
            with pytest.raises((IndexError, RuntimeError), match="out of"), torch.no_grad():
                model(input_ids=ids)
        else:
            with torch.no_grad():
                model(input_ids=ids)


def logits_beside(model: Any, ids: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of a row in a batch with a longer one."""
    with torch.no_grad():
        batch = torch.nn.utils.rnn.pad_sequence([ids, other], batch_first=True)
        found: torch.Tensor = model(input_ids=batch).logits[0, : len(ids)]
    return found


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "linear"])
def test_a_row_depends_on_no_other_up_to_its_reach(kind: str) -> None:
    rope = {"rope_type": kind, **(LONG if kind == "longrope" else {"factor": 4.0, "rope_theta": 1e4})}
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 12} if kind == "longrope" else {}
    told = {"rope_parameters": rope, "max_position_embeddings": 12} | sizes
    model: Any = tiny_model("phi3" if kind == "longrope" else "llama", dtype=torch.float32, **told)
    reach = reach_of(model.config.get_text_config().to_dict())
    assert reach == (None if kind == "linear" else Reach(12, kind))
    ids, row = torch.arange(40) % 50 + 3, torch.arange(9) % 50 + 3
    with torch.no_grad():
        alone = model(input_ids=row[None]).logits[0]
    for length in (12, 13):
        same = torch.allclose(logits_beside(model, row, ids[:length]), alone, atol=1e-5)
        assert same == (kind == "linear" or length == 12)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"max_position_embeddings": 2048, "model_type": "llama"}, None),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, None),
        ({"model_type": "gpt2"}, None),
        ({"model_type": "gpt2", "n_positions": 1024}, Reach(1024, None)),
        ({"model_type": "opt", "max_position_embeddings": 2048}, Reach(2048, None)),
        # As Phi-3 was published, before transformers 5.
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]},
            },
            Reach(4096, "su"),
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"full": {"rope_type": "dynamic"}, "sliding": {"rope_type": "default"}},
            },
            Reach(4096, "dynamic"),
        ),
        ({"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None),
    ],
)
def test_the_reach_of_configs_as_they_are_written(config: dict[str, Any], wanted: Reach | None) -> None:
    assert reach_of(config) == wanted
