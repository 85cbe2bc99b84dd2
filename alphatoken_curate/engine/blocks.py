"""What a model is made of: its trunk, its decoder blocks, and the linear maps inside a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alphatoken_curate.engine.experts import expert_matrices
from alphatoken_curate.errors import ModelError
from alphatoken_curate.wording import count


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LinearMap:
    """One linear map of S: z = W h (+ bias), W (d_out, d_in).

    It is a module of its own, a matrix that its module multiplies with (a router's), or one expert's slice of a bigger
    parameter.
    """

    owner: str
    """Name of the module that holds it."""
    module: nn.Module
    slot: str = "weight"
    """Name of its parameter in that module."""
    expert: int | None = None
    """Its index along the first dimension of the parameter, where that holds a matrix for each expert."""
    transposed: bool = False
    """Whether the matrix is kept as (d_in, d_out)."""
    called: bool = True
    """Whether calling the module is applying the map; otherwise the module multiplies with it somewhere inside."""

    @property
    def name(self) -> str:
        """What users know it by: its module, with slot and number for an expert's."""
        return self.owner if self.expert is None else self.parameter

    @property
    def parameter(self) -> str:
        """Unique name of the matrix: its parameter in the model's state dict, with `[expert]` for an expert's."""
        return self.stored if self.expert is None else f"{self.stored}[{self.expert}]"

    @property
    def stored(self) -> str:
        """Name of the whole parameter in the model's state dict."""
        return f"{self.owner}.{self.slot}"

    @property
    def bare(self) -> nn.Parameter:
        """The whole parameter the matrix lies in."""
        parameter = getattr(self.module, self.slot)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def weight(self) -> Tensor:
        """W as (d_out, d_in), a view, whichever way round it is kept."""
        return self.matrix(self.bare)

    def matrix(self, bare: Tensor) -> Tensor:
        """The (d_out, d_in) of this map in a tensor kept as its whole parameter is, a view."""
        one = bare if self.expert is None else bare[self.expert]
        return one.t() if self.transposed else one


_LINEAR = {
    f"{nn.Linear.__module__}.Linear": False,
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}
"""Modules that are a linear map and nothing else, and whether they keep it as (d_in, d_out). Not their subclasses."""


def unwrapped(model: Any) -> nn.Module:
    """The causal language model inside a model of peft, its adapters in place; any other model as it is.

    Raises ModelError where the wrapper itself takes part in the forward (prompts, prefixes).
    """
    adapters = getattr(model, "peft_config", None)
    if adapters is None or not hasattr(model, "get_base_model"):
        assert isinstance(model, nn.Module)
        return model
    odd = sorted({str(a.peft_type.value) for a in adapters.values() if a.is_prompt_learning})
    if odd:
        raise ModelError(
            f"{type(model).__name__}: its adapter ({odd[0]}) puts in positions that are no tokens, so it cannot be"
            " scored. Score the base instead."
        )
    base = model.get_base_model()
    assert isinstance(base, nn.Module)
    return base


def trunk(model: Any) -> nn.Module:
    """The part of a causal language model under its head. Raises ModelError where there is none."""
    base = getattr(model, "base_model", None)
    if base is None or base is model or not hasattr(model, "get_output_embeddings"):
        raise ModelError(
            f"{type(model).__name__}: no causal language model of transformers, or one (such as Llama 4's) whose"
            " base_model_prefix names no trunk under its head: it cannot be scored."
        )
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__}: it has no output embeddings; only causal language models can be scored."
        )
    assert isinstance(base, nn.Module)
    return base


def embeddings(model: Any) -> Tensor:
    """The weight of a model's input embeddings, (V, D): token ids go where it is."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight


class _Trunk:
    """What a head gets in place of its trunk's output: last hidden states, and None for whatever else it looks up."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


def head_logits(model: Any, base: Any, hidden: Tensor) -> Tensor:
    """Logits (n, V) of last hidden states (n, D): the model's own forward with its trunk replaced by `hidden`."""
    weight = model.get_output_embeddings().weight
    states = hidden.to(weight.dtype).unsqueeze(0)
    given = _Trunk(states)
    # Some heads (OPT's) call the trunk's decoder, and not the trunk.
    called = [m for m in (base, getattr(base, "decoder", None)) if isinstance(m, nn.Module)]
    forwards = [m.forward for m in called]
    try:
        for module in called:
            module.forward = lambda *_, **__: given
        logits: Tensor = model(inputs_embeds=states, use_cache=False).logits
    finally:
        for module, forward in zip(called, forwards, strict=True):
            module.forward = forward
    return logits.squeeze(0)


def decoder_blocks(model: Any, base: nn.Module) -> list[nn.Module]:
    """All decoder blocks, first to last. Raises ModelError where they are not found."""
    depth = model.config.get_text_config().num_hidden_layers
    # Beside it there may be a tower of as many blocks that sees pictures.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else base
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise ModelError(f"{type(model).__name__}: found no list of {count(depth, 'decoder block')} in it.")
    return list(stacks[0])


def linear_maps(model: nn.Module, block: nn.Module) -> list[LinearMap]:
    """Every linear map of a block. Raises ModelError, by name, for anything else that owns a matrix.

    Also for a weight whose numbers are not there to be moved: quantised ones, and those left on disk.
    """
    names = {module: name for name, module in model.named_modules()}
    for slot, parameter in block.named_parameters():
        refuse_odd(type(model).__name__, f"{names[block]}.{slot}", parameter)
    return shapes_of_maps(model, block, names)


def shapes_of_maps(model: nn.Module, block: nn.Module, names: Mapping[nn.Module, str] | None = None) -> list[LinearMap]:
    """The same, though its weights may be of any kind, and nowhere. `names`: of the model's modules, if known."""
    names = names or {module: name for name, module in model.named_modules()}
    return [m for module in block.modules() for m in _maps_of(model, names[module], module)]


def in_memory(kind: str, name: str, weight: Tensor) -> None:
    """Raise ModelError where a weight has no numbers: it was left on disk, or on torch's device meta."""
    if weight.device.type == "meta":
        raise ModelError(
            f"{kind}: {name} is on no device (meta): blocks that score and embeddings have to be in memory, and only"
            " blocks below them may lie elsewhere: --trunk-device cpu or disk."
        )


def refuse_odd(kind: str, name: str, weight: nn.Parameter) -> None:
    """Raise ModelError where a weight of S is no plain tensor of floating-point numbers in memory.

    A map of torchao is an nn.Linear whose weight is a tensor of a kind of its own, which stands for other numbers.
    """
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise ModelError(
            f"{kind}: {name} is no plain tensor of floating-point numbers ({type(weight).__name__}, {weight.dtype}):"
            " weights that are quantised, or spread over processes, cannot be scored. Load the model as it was before."
        )
    in_memory(kind, name, weight)


def _maps_of(model: nn.Module, name: str, module: nn.Module) -> Iterator[LinearMap]:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if kind in _LINEAR:
        yield LinearMap(owner=name, module=module, transposed=_LINEAR[kind])
        return
    matrices = {slot: p for slot, p in module.named_parameters(recurse=False) if p.ndim > 1 and not _is_bias(slot, p)}
    experts = expert_matrices(module)
    for slot, transposed in experts.items():
        for expert in range(len(matrices.pop(slot))):
            yield LinearMap(owner=name, module=module, slot=slot, expert=expert, transposed=transposed, called=False)
        matrices.pop(f"{slot}_bias", None)
    if not experts and _multiplies_inside(module) and matrices.keys() == {"weight"} and matrices["weight"].ndim == 2:
        yield LinearMap(owner=name, module=module, called=False)
        return
    for slot, parameter in matrices.items():
        shape = "x".join(map(str, parameter.shape))
        raise ModelError(
            f"{type(model).__name__}: {name}.{slot} ({shape}) is a weight of {kind}, which cannot be captured, and"
            " scoring the rest would be a score in part."
        )


def _is_bias(slot: str, parameter: Tensor) -> bool:
    return slot.endswith("bias") and parameter.numel() == max(parameter.shape)


def _multiplies_inside(module: nn.Module) -> bool:
    """A model's own module, not a library's layer: its forward is watched for what its weight is multiplied with."""
    return type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
