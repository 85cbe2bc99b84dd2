from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, UNCAPTURED, left_out, tiny_model

from alphatoken_curate.engine.capture import ScoringModel, captured
from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.releases import before


@pytest.mark.one_in(9)
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
        assert all(scoring.input(i)[0].shape[0] == 2 * 9 for i in range(len(scoring.maps)))
        seen: list[int] = []
        scoring.backward([hidden], [torch.ones_like(hidden)], lambda index, *_: seen.append(index))
    assert sorted(seen) == list(range(len(scoring.maps)))
    assert not any(p.requires_grad for p in scoring.model.parameters())


def test_pairs_share_a_prompt_where_a_cache_cannot_be_repeated_too() -> None:
    """Of linear attention below S, whose cached state transformers does not repeat."""
    families = {"llama": {}} if before("5.24") else {"llama": {}, "qwen3_next": UNCAPTURED["qwen3_next"][0]}
    for family, changes in families.items():
        scoring = ScoringModel(tiny_model(family, dtype=torch.float32, **changes), 1)
        ids = torch.arange(4 * 15).reshape(4, 15) % 61
        ids[1::2, :9] = ids[::2, :9]
        whole = scoring.hidden(ids)[:, 9:]
        for pairs in (False, True):
            torch.testing.assert_close(scoring.hidden(ids, 9, pairs=pairs), whole, rtol=1e-4, atol=1e-4)


def test_what_is_named_after_a_weight_goes_where_that_is() -> None:
    scoring = ScoringModel(tiny_model("mixtral"), 2, "all")
    left_out(scoring.model.model.layers[2])
    scoring.rest = {name: scoring.model.get_parameter(name) for name in scoring.rest}
    names = [f"{before}{name}{behind}" for name in scoring.names for before in ("", "3 ") for behind in ("", ".part")]
    found = scoring.near({name: torch.zeros(1) for name in (*names, "lent", "tokens")})
    assert list(found) == [*names, "lent", "tokens"]
    on_meta = {name for name, x in found.items() if x.device.type == "meta"}
    assert on_meta == {name for name in names if "model.layers.2." in name} and len(on_meta) < len(names)
    assert scoring.device == torch.device("cpu")


@pytest.mark.parametrize("turned", [True, False])
def test_a_map_that_gets_its_positions_in_another_order_is_refused(turned: bool) -> None:
    """Flat rows are taken to be those of (B, T) in order; (T, B) has as many, and the same logits."""
    model = tiny_model("llama")
    mlp = model.model.layers[3].mlp
    plain = mlp.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not turned:
            return plain(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        flat = x.transpose(0, 1).flatten(0, 1)
        return plain(flat).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)

    mlp.forward = forward
    if turned:
        with pytest.raises(ModelError, match=r"layers\.3\.mlp\.\w+_proj is not one vector for each position"):
            ScoringModel(model, 2)
    else:
        ScoringModel(model, 2)


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ModelError, match=r"--layers 5: the model has 4 decoder blocks\. Give 1 to 4, or all"):
        ScoringModel(tiny_model("llama"), 5)
    with pytest.raises(ModelError, match=r"the model has 1 decoder block\. Give 1 to 1, or all"):
        ScoringModel(tiny_model("llama", num_hidden_layers=1), 5)
