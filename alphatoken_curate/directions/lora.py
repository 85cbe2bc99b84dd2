"""A model beside whose linear maps a LoRA trains, and none of its own weights: y = W x + s B A x.

A is (R, d_in), drawn as peft draws it, uniform within 1 / sqrt(d_in); B (d_out, R) is 0 at first, so that the first
gradient of A is exactly 0. The weights of all linear maps of the blocks are kept in `dtype`, if one is given, and
multiply in it; else in bfloat16 where that holds them exactly, and multiply in what they meet, with the same bits.
Whatever else the model holds, A, B and every sum are float32 at least.
Values are in the space of (A, B); a direction of that space is, of a map's weight, s (B M_A + M_B A).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from alphatoken_curate.directions.losses import Losses, at, positions, token_losses
from alphatoken_curate.directions.rehearsal import Outcome
from alphatoken_curate.directions.trainee import Trainee, Weights
from alphatoken_curate.engine.blocks import LinearMap, decoder_blocks, head_logits, shapes_of_maps, trunk
from alphatoken_curate.engine.capture import Direction, ScoringModel, captured, probe_ids
from alphatoken_curate.engine.lowrank import Adapter, LowRank
from alphatoken_curate.engine.precision import narrow, wide
from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.unmerged import Lora
from alphatoken_curate.models.whole import blocks_that_score
from alphatoken_curate.tokens.draws import keyed_uniform
from alphatoken_curate.tokens.plan import Batch


class LoraTrainee(Trainee):
    """A causal language model beside whose last K blocks' linear maps a LoRA trains.

    The model may be in less than float32; it stays with the trainee, which keeps it in the dtypes named above. Raises
    ModelError where one of these maps can have no LoRA, or a LoRA that began before is of others.
    """

    def __init__(
        self, model: nn.Module, layers: int | Literal["all"], lora: Lora, *, seed: int, dtype: torch.dtype | None = None
    ) -> None:
        self.lora, self._products = lora, None
        self.adapters: dict[Tensor, Adapter] = {}
        super().__init__(model, layers, "linear")
        self._products = dtype
        for weight in _fixed(self.model):
            weight.data = _kept(weight.data, dtype)
        self.restart(seed)

    def _trains(self, below: list[nn.Module], parameters: Literal["linear", "all"]) -> Mapping[str, Tensor]:
        _widen(self.model)
        self._beside = _adapted(self.model, self.maps, self.lora)
        for m in self._beside:
            d_out, d_in = m.weight.shape
            # Where they begin is only known with a seed; none is 0 here, so that what is checked tells.
            a, b = (m.weight.new_ones(shape, dtype=wide(m.weight[:0]).dtype) for shape in _shapes(self.lora, m))
            self.adapters[m.bare] = Adapter(a=a.div_(math.sqrt(d_in)), b=b.div_(d_out), scale=self.lora.scale)
        _refuse_unmet(self.model, self._beside, LowRank(self.adapters))
        each = [(m, self.adapters[m.bare]) for m in self._beside]
        return {f"{m.owner}.{name}": x for m, own in each for name, x in (("lora_A", own.a), ("lora_B", own.b))}

    def restart(self, seed: int) -> None:
        """Go to where the training of that seed begins: to its A, and B = 0, or to what the LoRA had before."""
        for m in self._beside:
            own = self.adapters[m.bare]
            if self.lora.start is not None:
                a, b = self.lora.start[m.owner]
                own.a.copy_(a)
                own.b.copy_(b)
            else:
                own.a.copy_(torch.from_numpy(_drawn(seed, m.owner, tuple(own.a.shape))))
                own.b.zero_()

    def nll(self, batch: Batch, *, twice: bool = False, below: Tensor | None = None) -> Tensor:
        """-log p of the N response tokens of a batch, (N,) in nats, the LoRA beside the model."""
        with LowRank(self.adapters, self._products):
            return super().nll(batch, twice=twice, below=below)

    def losses(self, batch: Batch) -> Losses:
        """Losses of the response tokens of a batch: one forward, no gradient."""
        batch = replace(batch, start=0)
        ids, target = (torch.from_numpy(x).to(self.device) for x in (batch.input_ids, batch.target))
        head = partial(head_logits, self.model, self.base)
        with torch.no_grad(), LowRank(self.adapters, self._products):
            hidden = self.base(input_ids=ids, use_cache=False).last_hidden_state
            chosen = at(hidden, positions(batch, ids.device))
            return token_losses(head, chosen, target, vocabulary=self.vocabulary, gradient=False)

    def as_direction(self, weights: Weights) -> Direction:
        """What a direction of (A, B) induces of the weight (d_out, d_in) of each linear map, where A and B are now."""
        moves = dict(zip((m.bare for m in self._beside), zip(weights[::2], weights[1::2], strict=True), strict=True))
        found = []
        for m in self.maps:
            own = self.adapters.get(m.bare)
            found.append(torch.zeros_like(wide(m.weight)) if own is None else own.induced(*moves[m.bare]))
        return found

    @contextmanager
    def captured(self) -> Iterator[ScoringModel]:
        """The model as it is now, W + s B A in place of W, prepared for scoring.

        The sum is taken in float32 at least, in which all blocks then compute: twice the memory of narrow weights.
        """
        held = [(weight, weight.data) for weight in _fixed(self.model)]
        try:
            for weight, own in held:
                if narrow(own.dtype) or weight in self.adapters:
                    weight.data = own.to(wide(own[:0]).dtype, copy=True)
            for m in self._beside:
                m.weight.detach().add_(self.adapters[m.bare].product())
            with captured(self.model, self.layers) as scoring:
                yield scoring
        finally:
            for weight, own in held:
                weight.data = own

    def of_direction(self, direction: Iterable[Tensor]) -> Weights:
        """The gradients of A and B, of those of the weight (d_out, d_in) of each linear map."""
        found: Weights = []
        for m, gradient in zip(self.maps, direction, strict=True):
            if (own := self.adapters.get(m.bare)) is not None:
                found += own.pulled(gradient)
        return found

    def drift_loss(self, fisher: Direction, offset: Direction | None) -> Outcome:
        """J = 1/2 (w - w_ref)^T F (w - w_ref) of w = W + s B A: `offset` is W - w_ref of each map.

        None where the reference is what the training begins with. Then W and what A and B began with cancel.
        """
        apart: Sequence[Tensor | None] = [None] * len(fisher) if offset is None else offset

        def gradient(_: Trainee) -> Weights:
            each = zip(self.maps, fisher, apart, strict=True)
            return self.of_direction(self._drift(m, o).mul_(f.to(m.weight.device)) for m, f, o in each)

        return gradient

    def _drift(self, m: LinearMap, offset: Tensor | None) -> Tensor:
        """How far a map's weight is from the reference's, (d_out, d_in)."""
        own = self.adapters.get(m.bare)
        drift = torch.zeros_like(wide(m.weight)) if own is None else own.product()
        if offset is not None:
            return drift.add_(offset.to(drift))
        if own is not None and self.lora.start is not None:
            a, b = (x.to(drift) for x in self.lora.start[m.owner])
            drift.sub_(replace(own, a=a, b=b).product())
        return drift


def _shapes(lora: Lora, m: LinearMap) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and B."""
    d_out, d_in = m.weight.shape
    return (lora.rank, d_in), (d_out, lora.rank)


def _drawn(seed: int, name: str, shape: tuple[int, ...]) -> Any:
    """A as peft begins it (kaiming uniform, a = sqrt 5), by the seed and the name of the map: float64."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    uniform = keyed_uniform(seed, key, np.arange(math.prod(shape)))
    return ((2 * uniform - 1) / math.sqrt(shape[1])).reshape(shape)


def _fixed(model: Any) -> list[nn.Parameter]:
    """The weights of all plain linear maps of the blocks: what may be kept narrow."""
    blocks = decoder_blocks(model, model.base_model)
    modules: list[Any] = [module for block in blocks for module in block.modules()]
    return [m.weight for m in modules if type(m) is nn.Linear or type(m).__name__ == "Conv1D"]


def _kept(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in `dtype`; by default in bfloat16 where that holds every number of it, as files mostly have them."""
    if weight.is_meta:
        return weight  # its numbers are on disk
    kept = weight.to(dtype or torch.bfloat16)
    return kept if dtype is not None or torch.equal(kept.to(weight.dtype), weight) else weight


def _widen(model: Any) -> None:
    """Have a model hold in float32 at least what is no weight of a plain linear map of a block."""
    fixed = set(_fixed(model))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor not in fixed and tensor.is_floating_point():
            tensor.data = wide(tensor.data)


def check_beside(model: Any, layers: int | Literal["all"], lora: Lora) -> None:
    """Raise ModelError where a LoRA cannot train beside a model, of which no weight need be there."""
    blocks = decoder_blocks(model, trunk(model))
    scoring = blocks[-blocks_that_score(layers, len(blocks)) :]
    _adapted(model, [m for block in scoring for m in shapes_of_maps(model, block)], lora)


def _adapted(model: Any, maps: Sequence[LinearMap], lora: Lora) -> list[LinearMap]:
    """The maps beside which it trains. Raises ModelError, by name, for what can have no LoRA, or is not there."""
    name = type(model).__name__
    if lora.start is None:
        if odd := next((m for m in maps if not m.called), None):
            raise ModelError(
                f"{name}: {odd.name} is no linear layer of its own (an expert, or a router), so no LoRA can be"
                " rehearsed beside it. Rehearse without --rehearse-lora, or go on from an adapter that leaves it alone."
            )
        return list(maps)
    known = {m.owner: m for m in maps if m.called}
    for module, (a, b) in lora.start.items():
        if module not in known:
            raise ModelError(
                f"{name}: the adapter stands beside {module}, which is no linear map of the blocks that score. Give"
                " --layers all if it is one of an earlier block; else merge it, and name the merged model."
            )
        if (tuple(a.shape), tuple(b.shape)) != _shapes(lora, known[module]):
            raise ModelError(f"{name}: the adapter's {module} is of another shape: it was trained from another model.")
    return [m for m in maps if m.called and m.owner in lora.start]


def _refuse_unmet(model: Any, maps: Sequence[LinearMap], mode: LowRank) -> None:
    """A weight that is multiplied in another way than linear maps do would train without its LoRA."""
    with torch.no_grad(), mode:
        model(input_ids=probe_ids(model), use_cache=False)
    if odd := next((m for m in maps if m.bare not in mode.met), None):
        raise ModelError(
            f"{type(model).__name__}: {odd.name} is not multiplied as linear maps are, so a LoRA cannot be rehearsed"
            " beside it. Rehearse without --rehearse-lora."
        )
