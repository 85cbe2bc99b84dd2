"""Weights inside TRL: its fused heads return log-probabilities of tokens, which are weighed on their way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from alphatoken_curate.errors import UsageError


@contextlib.contextmanager
def weighted_log_probs(models: Iterable[nn.Module], weight: Tensor) -> Iterator[None]:
    """While open, log-probabilities (B, T - 1) that these models' fused heads return are times `weight` (B, T).

    `weight` is token-aligned; prompt tuning puts virtual tokens before the sequence, which weigh nothing. Raises
    `UsageError` where no head returned any, since then the weights had no effect.
    """
    seen = 0

    def weigh(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal seen
        if getattr(output, "log_probs", None) is None:
            return None
        seen += 1
        own = weight[:, 1:].to(output.log_probs)
        output.log_probs = output.log_probs * pad(own, (output.log_probs.shape[1] - own.shape[1], 0))
        return output

    hooks = [model.register_forward_hook(weigh) for model in {id(model): model for model in models}.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise UsageError("this release of TRL gives no log-probabilities of tokens to weigh; install trl>=1.16")
