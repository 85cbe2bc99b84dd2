"""Padding rows of embeddings, which torch gives no gradient, as tensors that have one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class PaddingRows(TorchFunctionMode):
    """Takes the padding rows of embeddings from tensors of their own.

    As an input such a row gets no gradient of torch, which says nothing of what the loss does when it moves: where
    embedding and head are one it does move, and where it is the token that ends a turn (SmolLM2) it is everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.apart: dict[Tensor, Tensor] = {}
        """The same memory as an embedding's weight, and a leaf of the graph apart from it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        padding = kwargs.get("padding_idx") if func is nn.functional.embedding else None
        if padding is None or not args[1].requires_grad:
            return func(*args, **kwargs)
        ids, weight = args[:2]
        own = self.apart.setdefault(weight, weight.detach().requires_grad_())
        padded = (ids == padding % len(weight)).unsqueeze(-1)
        return torch.where(padded, nn.functional.embedding(ids, own), nn.functional.embedding(ids, weight))
