"""A training step as a function of what it starts from, and its derivative: AdamW and SGD as torch has them.

A step takes the weights theta, the optimiser's slots (of AdamW the moments m and v, of SGD with momentum its buffer)
and a gradient g to theta' and slots'. `step` does it in place; `pull_back` takes the cotangents of what it gave to
those of what it took, by hand:

    g~ = g min(1, clip / (|g| + 1e-6))          m' = b1 m + (1 - b1) g~         v' = b2 v + (1 - b2) g~^2
    theta' = (1 - lr wd) theta - lr (m' / c1) / (sqrt(v' / c2 + root) + eps)    c = 1 - b^k

The root term makes Adam's step differentiable where v is near 0, with a slope of at most 1 / sqrt(root) there. Without
it (root 0) a step is torch's own.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from alphatoken_curate.runs.tensor_file import raw

Kind = Literal["adamw", "sgd"]
Schedule = Literal["constant", "linear", "cosine"]

_CLIP_EPS = 1e-6
"""What torch's `clip_grad_norm_` adds to the norm."""

_PIECE = 1 << 18
"""Elements whose step is taken at once: what it needs beside them lies in the cache, and no new pages are asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Weights and the optimiser's slots, or cotangents of them: lists of tensors of the weights' shapes."""

    weights: list[Tensor]
    slots: tuple[list[Tensor], ...]

    def clone(self) -> State:
        """A copy that shares no memory."""
        return State([w.clone() for w in self.weights], tuple([s.clone() for s in slot] for slot in self.slots))

    def copy_(self, other: State) -> None:
        """Take over another's numbers, in the memory there is."""
        for own, new in zip(self.tensors, other.tensors, strict=True):
            own.copy_(new)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them: the weights, then slot after slot."""
        return [*self.weights, *(tensor for slot in self.slots for tensor in slot)]

    def digest(self) -> Tensor:
        """sha256 of all numbers, (32,) uint8."""
        found = hashlib.sha256()
        for tensor in self.tensors:
            found.update(raw(tensor.detach().cpu().contiguous()))
        return torch.tensor(list(found.digest()), dtype=torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimiser:
    """How a training steps: `steps` steps in all, counted from 0."""

    lr: float
    """Largest rate, in units of the weights."""
    steps: int
    """Steps of the training, by which the schedule goes down."""
    kind: Kind = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    root: float = 1e-12
    """Added to the second moment under AdamW's square root."""
    weight_decay: float = 0.0
    """Of AdamW apart from the gradient, of SGD added to it; of the weights that decay (`decays`)."""
    decaying: tuple[bool, ...] | None = None
    """Of each weight whether it decays; None: those of two dimensions or more do."""
    momentum: float = 0.0
    schedule: Schedule = "constant"
    """After the warm-up; linear and cosine end at 0 after the last step."""
    warmup: int = 0
    """Steps in which the rate rises; the first has a rate of 0, as transformers has it."""
    clip: float | None = None
    """Largest norm of the gradient over all weights."""

    def rate(self, k: int) -> float:
        """The rate of step k, by transformers' schedules."""
        if k < self.warmup:
            return self.lr * k / self.warmup
        done = (k - self.warmup) / max(1, self.steps - self.warmup)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.lr * factor[self.schedule]

    def start(self, weights: list[Tensor]) -> State:
        """These weights (not copied) and slots of zeros, as a training begins."""
        count = 2 if self.kind == "adamw" else int(self.momentum != 0)
        return State(weights, tuple([torch.zeros_like(w) for w in weights] for _ in range(count)))

    def step(self, state: State, grads: Sequence[Tensor], k: int) -> None:
        """Take step k along the gradients, in place."""
        (_, factor), lr = self._clipping(grads), self.rate(k)
        for i, own in enumerate(state.weights):
            decay = self._decay(i, own)
            for weight, g, *before in _pieces(own, grads[i], *(slot[i] for slot in state.slots)):
                slots = self._slots_after(weight, before, g, factor, decay)
                for slot, after in zip(before, slots, strict=False):
                    slot.copy_(after)
                if self.kind == "adamw":
                    weight.mul_(1 - lr * decay)
                    c1, _ = self._corrections(k)
                    weight.sub_(slots[0].div_(self._divisor(slots[1], k)[1]), alpha=lr / c1)
                else:
                    weight.sub_(slots[0], alpha=lr)

    def root_shift(self, after: State, k: int) -> tuple[float, float]:
        """Squared lengths of what the root term took from step k, which led to `after`, and of the step itself."""
        if self.kind == "sgd" or self.root == 0:
            return 0.0, 0.0
        (c1, c2), lr = self._corrections(k), self.rate(k)
        taken, whole = 0.0, 0.0
        for first, second in zip(*after.slots, strict=True):
            for m, v in _pieces(first, second):
                step = m / self._divisor(v, k)[1]
                # Where m is 0 the step is, whatever the divisor.
                plain = (m / (v / c2).sqrt_().add_(self.eps)).nan_to_num_(nan=0.0)
                taken, whole = taken + _square(plain.sub_(step)), whole + _square(step)
        return taken * (lr / c1) ** 2, whole * (lr / c1) ** 2

    def pull_back(self, before: State, grads: Sequence[Tensor], k: int, adjoint: State) -> list[Tensor]:
        """Take the cotangents of what step k gave to those of what it took, `before`, in place.

        Returns a, the cotangents of the gradients, by which the weights' own lack the part that came through g: H a.
        """
        norm, factor = self._clipping(grads)
        found = [torch.empty_like(g) for g in grads]
        for i, own in enumerate(grads):
            given = (before.weights[i], *(slot[i] for slot in before.slots))
            cotangents = (adjoint.weights[i], *(slot[i] for slot in adjoint.slots))
            decay = self._decay(i, own)
            for a, g, *rest in _pieces(found[i], own, *given, *cotangents):
                state, to = rest[: len(given)], rest[len(given) :]
                if self.kind == "adamw":
                    self._adamw_back(a, g, factor, state, to, k, decay)
                else:
                    self._sgd_back(a, to, k, decay)
        if factor == 1.0:
            return found
        # g~ = factor g, and the factor depends on g through its norm.
        along = sum(_dot(g, a) for g, a in zip(grads, found, strict=True)) / (norm * (norm + _CLIP_EPS))
        return [a.sub_(g, alpha=along).mul_(factor) for g, a in zip(grads, found, strict=True)]

    def _adamw_back(
        self,
        a: Tensor,
        g: Tensor,
        factor: float,
        before: Sequence[Tensor],
        to: Sequence[Tensor],
        k: int,
        decay: float,
    ) -> None:
        weight, to_m, to_v = to
        m, v = self._slots_after(before[0], before[1:], g, factor, decay)
        (b1, b2), (c1, c2), lr = self.betas, self._corrections(k), self.rate(k)
        rooted, divisor = self._divisor(v, k)
        along = weight / divisor
        to_m.sub_(along, alpha=lr / c1)
        to_v.add_(along.mul_(m).div_(divisor).div_(rooted), alpha=lr / (2 * c1 * c2))
        weight.mul_(1 - lr * decay)
        torch.mul(to_m, 1 - b1, out=a)
        a.addcmul_(g, to_v, value=2 * (1 - b2) * factor)
        to_m.mul_(b1)
        to_v.mul_(b2)

    def _sgd_back(self, a: Tensor, to: Sequence[Tensor], k: int, decay: float) -> None:
        weight, *slots = to
        torch.mul(weight, -self.rate(k), out=a)
        for slot in slots:
            a.add_(slot)
            torch.mul(a, self.momentum, out=slot)
        weight.add_(a, alpha=decay)

    def _slots_after(
        self, weight: Tensor, slots: Sequence[Tensor], g: Tensor, factor: float, decay: float
    ) -> list[Tensor]:
        """What one tensor's slots are after the step; of SGD always the buffer, kept or not."""
        clipped = g * factor
        if self.kind == "sgd":
            clipped.add_(weight, alpha=decay)
            return [clipped.add_(slot, alpha=self.momentum) for slot in slots] or [clipped]
        b1, b2 = self.betas
        m, v = slots
        return [(m * b1).add_(clipped, alpha=1 - b1), (v * b2).addcmul_(clipped, clipped, value=1 - b2)]

    def _divisor(self, v: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """sqrt(v / c2 + root), and that plus eps."""
        rooted = (v / self._corrections(k)[1]).add_(self.root).sqrt_()
        return rooted, rooted + self.eps

    def _corrections(self, k: int) -> tuple[float, float]:
        return 1 - self.betas[0] ** (k + 1), 1 - self.betas[1] ** (k + 1)

    def _decay(self, i: int, weight: Tensor) -> float:
        told = weight.ndim > 1 if self.decaying is None else self.decaying[i]
        return self.weight_decay if told else 0.0

    def _clipping(self, grads: Sequence[Tensor]) -> tuple[float, float]:
        """Norm of the gradient, and what clipping multiplies it with."""
        if self.clip is None:
            return 0.0, 1.0
        norm = math.sqrt(sum(map(_square, grads)))
        return norm, min(1.0, self.clip / (norm + _CLIP_EPS))


_STILL = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""In names of what transformers' Trainer leaves without decay."""


def decays(model: nn.Module, names: Sequence[str]) -> tuple[bool, ...]:
    """Of each weight whether it decays in transformers' Trainer: no LayerNorm's, nor by name of a norm or a bias."""
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    return tuple(name.rpartition(".")[0] not in norms and not _STILL.search(name.lower()) for name in names)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views of the same elements of each, few enough for a core's cache; tensors as they are where not dense."""
    if not all(x.is_contiguous() for x in tensors):
        yield tensors
        return
    for first in range(0, tensors[0].numel(), _PIECE):
        yield tuple(x.view(-1)[first : first + _PIECE] for x in tensors)


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten().double(), other.flatten().double()))
