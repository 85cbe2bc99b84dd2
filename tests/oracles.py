"""What the engine must equal, computed the slow way and sharing no code with it: one row, one token at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def linear_maps(model: Any, layers: int) -> dict[str, nn.Module]:
    """The linear maps of the last `layers` blocks, by name, in the model's order."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers]
    names = {module: name for name, module in model.named_modules()}
    return {names[m]: m for block in stacks[0][-layers:] for m in block.modules() if isinstance(m, nn.Linear | Conv1D)}


def weight_of(module: nn.Module) -> Tensor:
    """W as (d_out, d_in)."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def eager(model: Any) -> Any:
    """A copy of the model that computes attention the plain way."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


def losses(model: Any, ids: Tensor, places: list[int]) -> Tensor:
    """-log p(ids[t] | before) for t in places, (len(places),), with whatever graph the model has."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return torch.stack([-torch.log_softmax(logits[t - 1], dim=-1)[ids[t]] for t in places])


def contraction_by_backwards(
    model: Any, layers: int, direction: dict[str, Tensor], ids: Tensor, places: list[int]
) -> Tensor:
    """C[s, t] (T, len(places)): one backward per token, error signals at every position."""
    model = eager(model)
    maps = linear_maps(model, layers)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach()[0], out

        return hook

    handles = [m.register_forward_hook(note(n)) for n, m in maps.items()]
    token_losses = losses(model.requires_grad_(True), ids, places)
    for handle in handles:
        handle.remove()
    columns = []
    for loss in token_losses:
        grads = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True, allow_unused=True)
        column = torch.zeros(len(ids), dtype=token_losses.dtype)
        for name, grad in zip(outputs, grads, strict=True):
            if grad is not None:
                column += ((grad[0] @ direction[name]) * inputs[name]).sum(-1).detach()
        columns.append(column)
    return torch.stack(columns, dim=1)


def contraction_by_eps(model: Any, layers: int, direction: dict[str, Tensor], ids: Tensor, places: list[int]) -> Tensor:
    """The same without hooks on gradients: y = W h + eps[s] (M h), and the derivative of each loss in eps."""
    model = eager(model)
    eps = torch.zeros(len(ids), dtype=next(model.parameters()).dtype, requires_grad=True)
    for name, module in linear_maps(model, layers).items():
        module.register_forward_hook(
            lambda _, args, out, m=direction[name]: out + eps[None, :, None] * (args[0] @ m.t())
        )
    token_losses = losses(model.requires_grad_(False), ids, places)
    return torch.stack([torch.autograd.grad(loss, eps, retain_graph=True)[0] for loss in token_losses], dim=1)


def mean_loss_gradient(model: Any, layers: int, rows: list[tuple[Tensor, list[int]]]) -> dict[str, Tensor]:
    """Gradient of the mean response loss over rows in each linear map of S, by autograd on the weights."""
    model = eager(model).requires_grad_(True)
    maps = linear_maps(model, layers)
    tokens = sum(len(places) for _, places in rows)
    total = sum(losses(model, ids, places).sum() for ids, places in rows) / tokens
    grads = torch.autograd.grad(total, [m.weight for m in maps.values()])
    return {n: g.t() if isinstance(m, Conv1D) else g for (n, m), g in zip(maps.items(), grads, strict=True)}


def published(
    model: Any, layers: int, direction: dict[str, Tensor], ids: Tensor, places: list[int], window: int, value_of: Any
) -> tuple[Tensor, Tensor]:
    """Direct and causal of the paper's Eq. 8-11, by loops. `value_of(name, z, head)` picks a head's value from z."""
    model = eager(model).requires_grad_(True)
    maps = linear_maps(model, layers)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in maps.items():
        module.register_forward_hook(lambda _, args, out, n=name: kept.__setitem__(n, (args[0].detach()[0], out)))
    out = model(input_ids=ids[None], use_cache=False, output_attentions=True)
    total = sum(-torch.log_softmax(out.logits[0, t - 1], dim=-1)[ids[t]] for t in places)
    grads = torch.autograd.grad(total, [z for _, z in kept.values()])
    direct, causal = torch.zeros(len(places), dtype=torch.float64), torch.zeros(len(places), dtype=torch.float64)
    for (name, (h, z)), grad in zip(kept.items(), grads, strict=True):
        delta, product = grad[0], h @ direction[name].t()
        for i, t in enumerate(places):
            direct[i] += delta[t - 1] @ product[t - 1]
        rows = value_of(name, z)
        if rows is None:
            continue
        block = int(name.split(".h." if ".h." in name else ".layers.")[1].split(".")[0])
        attention = out.attentions[block][0].mean(0).detach()
        for i, t in enumerate(places):
            for k in range(t, min(len(ids), t - 1 + window + 1)):
                causal[i] += attention[k, t - 1] * (delta[k, rows] @ product[t - 1, rows])
    return direct, causal
