"""Mixtures of experts: one forward for the experts of the scoring blocks, and routers, that tell what they multiply.

Experts keep one matrix each in a shared parameter, and routers a bare matrix of their own; neither is a module that
could be hooked. The experts' function is registered with transformers' experts interface, and the scoring blocks alone
are given a config that names it; routers run as they are, with their matrix product watched.
Shapes: n positions (all of a batch, flat), k experts chosen for each, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NAME = "alphatoken_curate"

Watch = Callable[[str, int | None, Tensor, Tensor, Tensor | None], Tensor]
"""Told (slot of the matrix, expert, h, z, flat positions (n,) of the rows or None for all in order); returns z, or what
to go on with in its place."""

_watches: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()


def expert_matrices(module: nn.Module) -> dict[str, bool]:
    """Parameters that hold a matrix for each expert, and whether as (d_in, d_out); of another module, none."""
    # What transformers' interface gives each of its modules.
    if not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return {}
    return dict.fromkeys((_first(module), "down_proj"), bool(module.is_transposed))


def _first(module: Any) -> str:
    """The matrix that an expert begins with."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def install(blocks: list[nn.Module]) -> Callable[[], None]:
    """Give the experts in `blocks` a copied config that names our function. Returns what undoes it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    replaced: list[tuple[Any, Any]] = []
    for module in (m for block in blocks for m in block.modules() if expert_matrices(m)):
        config: Any = module.config
        renamed = copy.copy(config)
        renamed._experts_implementation_internal = NAME
        module.config = renamed
        replaced.append((module, config))

    def undo() -> None:
        for module, config in replaced:
            module.config = config

    return undo


def watch(module: nn.Module, told: Watch) -> Callable[[], None]:
    """Have a module of experts, or a router, tell what its matrices multiply. Returns what undoes it."""
    undo = ExitStack()
    if expert_matrices(module):
        _watches[module] = told
        undo.callback(_watches.pop, module)
        return undo.close
    running = ExitStack()

    def enter(router: nn.Module, _: Any) -> None:
        running.enter_context(_Spy(router.weight, told))

    def leave(*_: Any) -> None:
        running.close()

    undo.callback(module.register_forward_pre_hook(enter).remove)
    undo.callback(module.register_forward_hook(leave, always_call=True).remove)
    return undo.close


class _Spy(TorchFunctionMode):
    """Sees `linear(h, weight)` while a router runs, also where the weight is cast before."""

    def __init__(self, weight: Any, told: Watch) -> None:
        super().__init__()
        self.known, self.told = [weight], told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and self._knows(args[1]):
            return self.told("weight", None, args[0], out, None)
        if func in (Tensor.to, Tensor.type, Tensor.float) and self._knows(args[0]):
            self.known.append(out)
        return out

    def _knows(self, x: Any) -> bool:
        return any(x is one for one in self.known)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states (n, D), top_k_index (n, k) int64 and top_k_weights (n, k) -> (n, D), the experts' weighted sum.

    Each expert that was hit is applied to its positions at once, in plain operations.
    """
    chosen = top_k_index.shape[-1]
    flat = top_k_index.flatten()
    order = torch.argsort(flat, stable=True)
    where = order // chosen
    counts = torch.bincount(flat, minlength=module.num_experts).tolist()
    told = _watches.get(module, _go_on)
    parts = []
    for expert, (x, places) in enumerate(zip(hidden_states[where].split(counts), where.split(counts), strict=True)):
        if len(places):
            parts.append(_expert(module, expert, x, places, told))
    weighted = torch.cat(parts) * top_k_weights.flatten()[order].unsqueeze(-1)
    apart = weighted[torch.argsort(order)].unflatten(0, (-1, chosen))
    summed: Tensor = apart.sum(1).to(hidden_states.dtype)
    return summed


def _expert(module: Any, expert: int, x: Tensor, places: Tensor, told: Watch) -> Tensor:
    """One expert on the rows x (n, D) of its positions."""
    into = _first(module)
    inner = told(into, expert, x, _multiply(module, into, expert, x), places)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = told("down_proj", expert, inner, _multiply(module, "down_proj", expert, inner), places)
    normed: Tensor = module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out
    return normed


def _multiply(module: Any, slot: str, expert: int, x: Tensor) -> Tensor:
    matrix = getattr(module, slot)[expert]
    bias = getattr(module, f"{slot}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(x, matrix.t() if module.is_transposed else matrix, bias)


def _go_on(_: str, __: int | None, ___: Tensor, z: Tensor, ____: Tensor | None) -> Tensor:
    return z
