"""What the scoring blocks compute in, where the model is in less than float32.

Their weights, activations, error signals and tangents are float32: what a token adds is small beside what it is added
to. The operands of a matrix product alone may be rounded, whose sums stay float32: to bfloat16 on a CPU, as the trunk
below has them anyway, to tf32 on a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def narrow(module: nn.Module) -> bool:
    """Whether a module's parameters are in less than float32."""
    return torch.finfo(next(module.parameters()).dtype).bits < torch.finfo(torch.float32).bits


def widen(base: Any, blocks: list[nn.Module], ids: Tensor) -> Callable[[], None]:
    """Have the last blocks of a trunk, and what follows them in it, compute in float32. Returns what undoes it.

    `ids`: some tokens, to see what follows.
    """
    kind = next(blocks[0].parameters()).dtype
    wide = [*blocks, *_after(base, blocks[-1], ids)]
    for module in wide:
        module.float()
    hook = blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: (tuple(_wider(a) for a in args), {k: _wider(v) for k, v in kwargs.items()}),
        with_kwargs=True,
    )

    def undo() -> None:
        hook.remove()
        for module in wide:
            module.to(kind)

    return undo


def rounded_products() -> AbstractContextManager[None]:
    """Float32 matrix products round their operands inside this block."""
    return _products("bf16", "tf32")


def plain_products() -> AbstractContextManager[None]:
    """They do not inside this one: where a product reads more than it computes, rounding costs more than it saves."""
    return _products("ieee", "ieee")


@contextmanager
def _products(cpu: str, cuda: str) -> Iterator[None]:
    backends: Any = torch.backends  # whose settings torch does not type
    settings = ((backends.mkldnn.matmul, cpu), (backends.cuda.matmul, cuda))
    before = [place.fp32_precision for place, _ in settings]
    try:
        for place, precision in settings:
            place.fp32_precision = precision
        yield
    finally:
        for (place, _), precision in zip(settings, before, strict=True):
            place.fp32_precision = precision


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
