"""What the scoring blocks compute in, where the model is in less than float32.

While directions are made their weights, activations and error signals are float32: a drift of a few steps is smaller
than what rounding a weight changes. Scoring along directions then computes as the model itself does, whose trunk has
rounded what comes in as much. Of float16, in which error signals vanish, S stays float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def narrow(dtype: torch.dtype) -> bool:
    """Whether numbers are in less than float32."""
    return torch.finfo(dtype).bits < torch.finfo(torch.float32).bits


def narrow_kind(name: str) -> torch.dtype | None:
    """The dtype of a name, where it is less than float32."""
    kind: torch.dtype = getattr(torch, name)
    return kind if narrow(kind) else None


def wide(x: Tensor) -> Tensor:
    """A tensor in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide_zeros(x: Tensor) -> Tensor:
    """Zeros of a tensor's shape, float32 at least: what its gradients are summed in."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32), requires_grad=False)


def widen(base: Any, blocks: list[nn.Module], ids: Tensor) -> Callable[[], None]:
    """Have the last blocks of a trunk, and what follows them in it, compute in float32. Returns what undoes it.

    `ids`: some tokens, to see what follows.
    """
    modules = [*blocks, *_after(base, blocks[-1], ids)]
    kinds = {
        (module, name): tensor.dtype
        for top in modules
        for module in top.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    for module in modules:
        module.float()
    hook = blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: (tuple(_wider(a) for a in args), {k: _wider(v) for k, v in kwargs.items()}),
        with_kwargs=True,
    )

    def undo() -> None:
        hook.remove()
        for (module, name), kind in kinds.items():
            if name in module._parameters:
                getattr(module, name).data = getattr(module, name).data.to(kind)
            else:
                setattr(module, name, getattr(module, name).to(kind))

    return undo


def _after(base: Any, block: nn.Module, ids: Tensor) -> list[nn.Module]:
    """Modules of the trunk with parameters of their own that run after a block: its final norm, mostly."""
    order: list[nn.Module] = []
    own = [m for m in base.modules() if m is block or any(True for _ in m.parameters(recurse=False))]
    hooks = [module.register_forward_hook(lambda m, *_: order.append(m)) for module in own]
    try:
        with torch.no_grad():
            base(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return order[order.index(block) + 1 :]


def _wider(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
