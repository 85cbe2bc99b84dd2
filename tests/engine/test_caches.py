"""The cache that a forward leaves is the one that the next goes on from, whatever its argument is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

from alphatoken_curate.engine.caches import cache_of, forward_with_cache


class OldName(nn.Module):
    """A model whose forward has the name that transformers gave the cache before 5.24."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        assert use_cache
        out = forward_with_cache(self.inner, past_key_values, input_ids=input_ids)
        return type("Output", (), {"logits": out.logits, "past_key_values": cache_of(self.inner, out)})


@pytest.mark.parametrize("wrapped", [False, True])
def test_goes_on_from_the_cache(wrapped: bool) -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    whole = model(input_ids=ids).logits[:, 5:]
    model = OldName(model) if wrapped else model
    before = forward_with_cache(model, None, input_ids=ids[:, :5])
    after = forward_with_cache(model, cache_of(model, before), input_ids=ids[:, 5:])
    torch.testing.assert_close(after.logits, whole)


def test_a_model_without_a_cache_leaves_none() -> None:
    assert cache_of(tiny_model("llama"), type("Output", (), {})) is None
