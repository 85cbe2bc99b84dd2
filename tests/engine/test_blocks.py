from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from tiny import FAMILIES, left_out, tiny_model, tiny_rows
from tiny_files import quiet
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config

from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.engine.blocks import LinearMap, linear_maps, unwrapped
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.errors import ModelError
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.tokens.plan import collate


def maps_of(model: Any) -> list[LinearMap]:
    return ScoringModel(model, 1).maps


def adapted(family: str, config: Any) -> Any:
    import peft

    with warnings.catch_warnings(), quiet(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        return peft.get_peft_model(tiny_model(family), config).double().eval()


def with_lora(family: str, **settings: Any) -> Any:
    import peft

    return adapted(
        family, peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "falcon"])
def test_matrices_are_views_of_uniquely_named_parameters(family: str) -> None:
    model = tiny_model(family)
    maps, stored = maps_of(model), dict(model.named_parameters())
    assert len({m.parameter for m in maps}) == len({m.name for m in maps}) == len(maps)
    for m in maps:
        assert m.bare is stored[m.stored]
        assert (m.expert is None) == (m.bare.ndim == 2)
        assert m.weight.untyped_storage().data_ptr() == m.bare.untyped_storage().data_ptr()
        part = m.bare if m.expert is None else m.bare[m.expert]
        assert torch.equal(m.weight, part.t() if m.transposed else part)
        assert torch.equal(m.matrix(m.bare.clone()), m.weight)


def test_every_matrix_of_a_block_is_listed_once() -> None:
    """As many numbers as the block's parameters of two dimensions and more hold, biases of experts left out."""
    for family in ("llama", "gpt2", "mixtral", "gpt_oss", "ernie4_5_moe", "qwen2_moe"):
        model = tiny_model(family)
        block = ScoringModel(model, 1).blocks[0]
        whole = {n: p for n, p in block.named_parameters() if p.ndim > 1 and not n.endswith("bias")}
        assert sum(m.weight.numel() for m in linear_maps(model, block)) == sum(p.numel() for p in whole.values())


def test_names_of_experts_and_routers() -> None:
    names = [m.parameter for m in maps_of(tiny_model("gpt_oss"))]
    assert names[4:6] == ["model.layers.3.mlp.router.weight", "model.layers.3.mlp.experts.gate_up_proj[0]"]
    assert names[-1] == "model.layers.3.mlp.experts.down_proj[4]"
    with_names = {m.parameter: m for m in maps_of(tiny_model("gpt_oss"))}
    assert with_names["model.layers.3.mlp.experts.gate_up_proj[0]"].weight.shape == (48, 16)
    assert with_names["model.layers.3.mlp.router.weight"].name == "model.layers.3.mlp.router"


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("mixtral", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
    ],
)
def test_a_lora_in_place_is_scored_exactly_its_own_matrices_too(family: str, settings: dict[str, Any]) -> None:
    plain, scoring = with_lora(family, **settings).get_base_model(), ScoringModel(with_lora(family, **settings), 3)
    assert sum("lora_A" in m.name for m in scoring.maps) == 3 * len(settings["target_modules"]) + 3 * (family == "gpt2")
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(m.weight.shape, generator=generator, dtype=torch.float64) for m in scoring.maps]
    named = {m.name: d for m, d in zip(scoring.maps, direction, strict=True)}
    row = tiny_rows()[1]
    found = make_scorer(scoring, [direction], "exact+influence", 4).score(collate([row], [0]))
    places = np.flatnonzero(row.response).tolist()
    ids = torch.from_numpy(row.input_ids.astype(np.int64))
    matrix = oracles.contraction_by_backwards(plain, 3, named, ids, places)
    own = torch.stack([matrix[t - 1, j] for j, t in enumerate(places)])
    later = torch.stack([matrix[t - 1, j + 1 :].sum() for j, t in enumerate(places)])
    assert found.direct is not None
    assert found.causal is not None
    assert found.influence is not None
    misses = [found.direct[0] - own, found.causal[0] - later, found.influence[0] - matrix.sum(0)]
    error = torch.stack(misses).abs().max()
    assert (error / torch.stack([own, later]).abs().max()).item() < 1e-10


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("llama", {"target_modules": ["o_proj"], "use_dora": True}, r"lora_A\.default is called more than once"),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}, "is not called by"),
    ],
)
def test_adapters_that_do_more_than_multiply_are_refused(family: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=f"ForCausalLM: the linear map .*{why}"):
        ScoringModel(with_lora(family, **settings), 1)


def test_an_adapter_that_is_switched_off_is_refused() -> None:
    model = with_lora("llama", target_modules=["q_proj"])
    with model.disable_adapter(), pytest.raises(ModelError, match=r"lora_A\.default is not called"):
        ScoringModel(model, 1)


@pytest.mark.parametrize("depth", [2, 4])
def test_a_tower_beside_the_blocks_is_none_of_them(depth: int) -> None:
    """It may have as many blocks, and stand before the others."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    seen = Gemma3Config(
        text_config={**FAMILIES["gemma3_text"], "model_type": "gemma3_text"},
        vision_config={**tower, "num_hidden_layers": depth, "model_type": "siglip_vision_model"},
        **{"mm_tokens_per_image": 4, "boi_token_index": 50, "eoi_token_index": 51, "image_token_index": 52},
    )
    model = AutoModelForCausalLM.from_config(seen, dtype=torch.float32).eval()
    scoring = ScoringModel(model, "all")
    assert scoring.depth == seen.text_config.num_hidden_layers
    assert all(".language_model." in name for name in scoring.names)


def test_prompt_tuning_is_refused_and_a_plain_model_is_itself() -> None:
    import peft

    model = tiny_model("llama")
    assert unwrapped(model) is model
    tuned = adapted("llama", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ModelError, match=r"its adapter \(PROMPT_TUNING\) puts in positions that are no tokens"):
        ScoringModel(tuned, 1)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_quantised_linear_maps_are_refused_by_name(kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", dtype=torch.float32)
    mlp = model.model.layers[3].mlp
    quantised = getattr(bitsandbytes.nn, kind)(24, 16)
    quantised.load_state_dict(mlp.down_proj.state_dict())
    mlp.down_proj = quantised.to("cpu")
    with pytest.raises(
        ModelError, match=rf"layers\.3\.mlp\.down_proj\.weight .* of bitsandbytes\..*{kind}, which cannot"
    ):
        ScoringModel(model, 1)


def test_a_subclass_that_computes_otherwise_is_refused_by_name() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = tiny_model("llama")
    model.model.layers[3].mlp.down_proj = Doubled(24, 16, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"mlp\.down_proj\.weight \(16x24\) is a weight of .*Doubled, which cannot"):
        ScoringModel(model, 1)


class Quantised(torch.Tensor):
    """A weight as libraries of quantisation make them: an nn.Linear holds it, and it dispatches what meets it."""

    @staticmethod
    def __new__(cls, numbers: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers: Any) -> None:
        self.numbers = numbers.mul(127).to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = [x.numbers.float() / 127 if isinstance(x, Quantised) else x for x in args]
        return func(*plain, **(kwargs or {}))


class Own(nn.Parameter):
    """A parameter of a kind of its own."""


def with_weight(weight: Any, block: int = 3) -> Any:
    model = tiny_model("llama", dtype=torch.float32)
    linear = model.model.layers[block].mlp.up_proj
    linear._parameters["weight"] = weight(linear.weight.detach())
    return model


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (lambda w: nn.Parameter(Quantised(w), requires_grad=False), "Quantised, torch.float32"),
        (Own, "Own, torch.float32"),
        (lambda w: nn.Parameter(w.to(torch.int8), requires_grad=False), "Parameter, torch.int8"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused_by_name(weight: Any, kind: str) -> None:
    said = rf"LlamaForCausalLM: model\.layers\.3\.mlp\.up_proj\.weight is no plain tensor .*\({kind}\).* quantised"
    with pytest.raises(ModelError, match=said) as error:
        ScoringModel(with_weight(weight), 1)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match=said):
        Trainee(with_weight(weight), 1, "linear")


def test_quantised_weights_below_the_blocks_that_score_are_none_of_theirs() -> None:
    model = with_weight(lambda w: nn.Parameter(Quantised(w), requires_grad=False), block=1)
    assert len(ScoringModel(model, 1).maps) == 7


def test_torchao_is_refused_in_the_blocks_that_score() -> None:
    torchao: Any = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama", dtype=torch.float32)
    torchao.quantize_(model.model.layers[3], torchao.Int8WeightOnlyConfig())
    with pytest.raises(ModelError, match=r"model\.layers\.3\.self_attn\.q_proj\.weight is no plain tensor"):
        ScoringModel(model, 1)


IN_MEMORY = {"layers.3.mlp": r"model\.layers\.3\.mlp\.\w+\.weight", "embed_tokens": "the weight of its embeddings"}


@pytest.mark.parametrize("part", IN_MEMORY)
def test_blocks_that_score_and_embeddings_have_to_be_in_memory(part: str) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    left_out(model.model.get_submodule(part))
    said = rf"LlamaForCausalLM: {IN_MEMORY[part]} is on no device \(meta\).*--trunk-device cpu or disk"
    with pytest.raises(ModelError, match=said) as error:
        ScoringModel(model, 1)
    assert "\n" not in str(error.value)


def test_with_all_parameters_whatever_lies_around_the_blocks_has_to_be_there_too() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    left_out(model.lm_head)
    with pytest.raises(ModelError, match=r"lm_head\.weight is on no device \(meta\)"):
        ScoringModel(model, 2, "all")
