"""What the engine must equal, computed the slow way and sharing no code with it: one row, one token at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D


def scoring_modules(model: Any, layers: int) -> dict[str, nn.Module]:
    """Every module of the last `layers` blocks, by name, in the model's order."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers]
    names = {module: name for name, module in model.named_modules()}
    return {names[m]: m for block in stacks[0][-layers:] for m in block.modules()}


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps one matrix for each of its experts in a parameter of three dimensions."""
    return getattr(getattr(module, "down_proj", None), "ndim", 0) == 3


def linear_maps(model: Any, layers: int) -> dict[str, nn.Module]:
    """The linear maps of the last `layers` blocks that are modules, by name, in the model's order."""
    found = scoring_modules(model, layers).items()
    return {n: m for n, m in found if isinstance(m, nn.Linear | Conv1D) and "Router" not in type(m).__name__}


def routers(model: Any, layers: int) -> dict[str, nn.Module]:
    """The modules of the last `layers` blocks that multiply with a matrix of their own, by name."""
    known, found = linear_maps(model, layers), scoring_modules(model, layers).items()
    return {n: m for n, m in found if n not in known and getattr(m._parameters.get("weight"), "ndim", 0) == 2}


def weights(model: Any, layers: int) -> dict[str, Tensor]:
    """Every parameter that holds a matrix, or one for each expert, of the last `layers` blocks, by name."""
    found = {n: m.weight for n, m in (linear_maps(model, layers) | routers(model, layers)).items()}
    for name, module in scoring_modules(model, layers).items():
        if is_experts(module):
            found |= {f"{name}.{s}": p for s, p in module.named_parameters() if p.ndim == 3}
    return found


@dataclass
class Product:
    """One product with weights of S: h and z (..., d), the experts that were used, and whose direction it is."""

    name: str
    h: Tensor
    z: Tensor
    experts: Tensor | None

    def along(self, direction: dict[str, Tensor]) -> Tensor:
        """M h, in the shape of z."""
        if self.experts is None:
            return (self.h @ direction[self.name].t()).view_as(self.z)
        count = sum(name.startswith(f"{self.name}[") for name in direction)
        each = torch.stack([direction[f"{self.name}[{e}]"] for e in range(count)])
        return torch.einsum("tkoi,tki->tko", each[self.experts], self.h)

    def rows(self, grad: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """(map, positions (n,), h (n, d_in), delta (n, d_out)) of each map that took part, given z's gradient."""
        if self.experts is None:
            h, delta = (x.detach().reshape(-1, x.shape[-1]) for x in (self.h, grad))
            yield self.name, torch.arange(len(h)), h, delta
            return
        for expert in self.experts.unique().tolist():
            places = (self.experts == expert).nonzero(as_tuple=True)
            yield f"{self.name}[{expert}]", places[0], self.h[places].detach(), grad[places].detach()


@contextmanager
def products(model: Any, layers: int, seen: Callable[[Product], Tensor]) -> Iterator[None]:
    """Have `seen` told of every product of S, for one row at a time; the model goes on with the z it returns."""

    def told(name: str) -> Callable[..., Tensor]:
        return lambda _, args, z: seen(Product(name, args[0].detach(), z, None))

    handles = [module.register_forward_hook(told(name)) for name, module in linear_maps(model, layers).items()]
    for name, module in scoring_modules(model, layers).items():
        if is_experts(module):
            module.forward = plain_experts(module, name, seen)
    with _Routers({id(module.weight): name for name, module in routers(model, layers).items()}, seen):
        yield
    for handle in handles:
        handle.remove()


@contextmanager
def kept_products(model: Any, layers: int) -> Iterator[list[Product]]:
    """The products of S inside this block, in their order, for one row at a time."""
    seen: list[Product] = []

    def keep(product: Product) -> Tensor:
        seen.append(product)
        return product.z

    with products(model, layers, keep):
        yield seen


class _Routers(TorchFunctionMode):
    """Products with a router's weight, wherever `linear` is called."""

    def __init__(self, names: dict[int, str], seen: Callable[[Product], Tensor]) -> None:
        super().__init__()
        self.names, self.seen = names, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        z = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and id(args[1]) in self.names:
            return self.seen(Product(self.names[id(args[1])], args[0].detach(), z, None))
        return z


def plain_experts(module: Any, name: str, seen: Callable[[Product], Tensor]) -> Callable[..., Tensor]:
    """A mixture of experts as in a textbook: each token with a copy of each of its experts' matrices."""

    def product(slot: str, h: Tensor, experts: Tensor) -> Tensor:
        matrices = getattr(module, slot)[experts]
        z = torch.einsum("tkio,tki->tko" if module.is_transposed else "tkoi,tki->tko", matrices, h)
        if module.has_bias:
            z = z + getattr(module, f"{slot}_bias")[experts]
        return seen(Product(f"{name}.{slot}", h.detach(), z, experts))

    def forward(x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        h = x[:, None].expand(-1, experts.shape[1], -1)
        if module.has_gate:
            inner = module._apply_gate(product("gate_up_proj", h, experts))
        else:
            inner = module.act_fn(product("up_proj", h, experts))
        return (product("down_proj", inner, experts) * shares[..., None]).sum(1).to(x.dtype)

    return forward


def weight_of(module: nn.Module) -> Tensor:
    """W as (d_out, d_in)."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def eager(model: Any) -> Any:
    """A copy of the model that computes attention the plain way."""
    model = copy.deepcopy(model)
    if not getattr(model.config, "alibi", False):  # Falcon's eager attention adds it twice, its other one does not
        model.set_attn_implementation("eager")
    if any(is_experts(m) for m in model.modules()):
        model.set_experts_implementation("eager")
    return model


def losses(model: Any, ids: Tensor, places: list[int]) -> Tensor:
    """-log p(ids[t] | before) for t in places, (len(places),), with whatever graph the model has."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return torch.stack([-torch.log_softmax(logits[t - 1], dim=-1)[ids[t]] for t in places])


def contraction_by_backwards(
    model: Any, layers: int, direction: dict[str, Tensor], ids: Tensor, places: list[int]
) -> Tensor:
    """C[s, t] (T, len(places)): one backward per token, error signals at every position."""
    model = eager(model).requires_grad_(True)
    with kept_products(model, layers) as seen:
        token_losses = losses(model, ids, places)
    columns = []
    for loss in token_losses:
        grads = torch.autograd.grad(loss, [p.z for p in seen], retain_graph=True, allow_unused=True)
        pairs = zip(seen, grads, strict=True)
        parts = [(grad * p.along(direction)).detach().reshape(len(ids), -1) for p, grad in pairs if grad is not None]
        columns.append(sum(part.sum(1) for part in parts))
    return torch.stack(columns, dim=1)


def along_paths(c: Tensor, places: list[int]) -> Tensor:
    """Direct and causal of each place, (2, len(places)), from C[s, t]."""
    direct = [c[t - 1, i] for i, t in enumerate(places)]
    causal = [c[t - 1, i + 1 :].sum() for i, t in enumerate(places)]
    return torch.stack([torch.stack(direct), torch.stack(causal)])


def contraction_by_eps(model: Any, layers: int, direction: dict[str, Tensor], ids: Tensor, places: list[int]) -> Tensor:
    """The same without hooks on gradients: y = W h + eps[s] (M h), and the derivative of each loss in eps."""
    model = eager(model).requires_grad_(False)
    eps = torch.zeros(len(ids), dtype=next(model.parameters()).dtype, requires_grad=True)

    def moved(product: Product) -> Tensor:
        along = product.along(direction).reshape(len(ids), -1)
        return product.z + (eps[:, None] * along).view_as(product.z)

    with products(model, layers, moved):
        token_losses = losses(model, ids, places)
    return torch.stack([torch.autograd.grad(loss, eps, retain_graph=True)[0] for loss in token_losses], dim=1)


def mean_loss_gradient(model: Any, layers: int, rows: list[tuple[Tensor, list[int]]]) -> dict[str, Tensor]:
    """Gradient of the mean response loss over rows in each linear map of S, by autograd on the weights."""
    model = eager(model).requires_grad_(True)
    tokens = sum(len(places) for _, places in rows)
    return weight_gradients(model, layers, sum(losses(model, ids, places).sum() for ids, places in rows) / tokens)


def weight_gradients(model: Any, layers: int, loss: Any) -> dict[str, Tensor]:
    """Gradient of a loss in each linear map of S, (d_out, d_in), by autograd on the parameters."""
    held = weights(model, layers)
    grads = torch.autograd.grad(loss, list(held.values()), retain_graph=True)
    modules, found = scoring_modules(model, layers), {}
    for name, grad in zip(held, grads, strict=True):
        if grad.ndim == 2:
            found[name] = grad.t() if isinstance(modules[name], Conv1D) else grad
            continue
        turned = modules[name.rpartition(".")[0]].is_transposed
        found |= {f"{name}[{e}]": g.t() if turned else g for e, g in enumerate(grad)}
    return found


def published(
    model: Any, layers: int, direction: dict[str, Tensor], ids: Tensor, places: list[int], window: int, value_of: Any
) -> tuple[Tensor, Tensor]:
    """Direct and causal of the paper's Eq. 8-11, by loops. `value_of(name, z, head)` picks a head's value from z."""
    model = eager(model).requires_grad_(True)
    with kept_products(model, layers) as seen:
        out = model(input_ids=ids[None], use_cache=False, output_attentions=True)
    total = sum(-torch.log_softmax(out.logits[0, t - 1], dim=-1)[ids[t]] for t in places)
    grads = torch.autograd.grad(total, [p.z for p in seen])
    direct, causal = torch.zeros(len(places), dtype=torch.float64), torch.zeros(len(places), dtype=torch.float64)
    for p, grad in zip(seen, grads, strict=True):
        delta, product = (x.detach().reshape(len(ids), -1) for x in (grad, p.along(direction)))
        for i, t in enumerate(places):
            direct[i] += delta[t - 1] @ product[t - 1]
        rows = value_of(p.name, p.z)
        if rows is None:
            continue
        block = int(p.name.split(".h." if ".h." in p.name else ".layers.")[1].split(".")[0])
        attention = out.attentions[block][0].mean(0).detach()
        for i, t in enumerate(places):
            for k in range(t, min(len(ids), t - 1 + window + 1)):
                causal[i] += attention[k, t - 1] * (delta[k, rows] @ product[t - 1, rows])
    return direct, causal
