"""The scoring set S of a model: its blocks, their linear maps, what goes into them and which error signal comes back.

The model runs as it is. Every weight is frozen and no input asks for a gradient, so nothing below S keeps a graph;
the graph begins at the outputs of the linear maps of S's first block, and a backward stops there.
Shapes: B rows, T positions, D hidden size, V vocabulary; h (B, T, d_in), delta (B, T, d_out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphatoken_curate.engine import attention, experts, foreign
from alphatoken_curate.engine.attention import Tape
from alphatoken_curate.engine.blocks import (
    LinearMap,
    decoder_blocks,
    embeddings,
    head_logits,
    in_memory,
    linear_maps,
    refuse_odd,
    trunk,
    unwrapped,
)
from alphatoken_curate.engine.caches import cache_of, forward_with_cache, repeated
from alphatoken_curate.engine.precision import narrow, widen
from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.whole import blocks_that_score

Direction = list[Tensor]
"""One matrix (d_out, d_in) for each linear map of S, in the order of `ScoringModel.maps`."""

OnDelta = Callable[[int, Tensor, Tensor, Tensor | None], None]
"""Called while a backward runs with (index of the linear map, h (n, d_in), delta (n, d_out), where): `where` (n,) int64
are the flat positions in (B, T - start) the rows belong to, rising; None where they are all, in order."""


class ScoringModel:
    """A causal language model prepared for scoring on its last K blocks.

    With `parameters` "all" S takes in what those blocks hold beside linear maps, and whatever lies around the blocks:
    embeddings, final norm and head (only `influence` scores these). Raises ModelError, naming the module, where
    anything in S cannot be captured exactly.
    """

    def __init__(
        self, model: nn.Module, layers: int | Literal["all"], parameters: Literal["linear", "all"] = "linear"
    ) -> None:
        model = unwrapped(model)
        self.model: Any = model
        self.base: Any = trunk(model)
        blocks = decoder_blocks(model, self.base)
        self.layers = blocks_that_score(layers, len(blocks))
        in_memory(type(model).__name__, "the weight of its embeddings", embeddings(model))
        self.depth = len(blocks)
        self._all_blocks = blocks
        self.blocks = blocks[-self.layers :]
        self.tape = Tape()
        self.maps = [m for block in self.blocks for m in linear_maps(model, block)]
        self.rest = _rest(model, self.maps, blocks[: self.depth - self.layers]) if parameters == "all" else {}
        """The other parameters of S, by name. A direction holds their tensors after the matrices of `maps`."""
        for name, parameter in self.rest.items():
            refuse_odd(type(model).__name__, name, parameter)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self._index = {(m.module, m.slot, m.expert): i for i, m in enumerate(self.maps)}
        self._inputs: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._leaves: list[Tensor] = []
        self._length = 0
        self._on_delta: OnDelta | None = None
        self._dtype = next(self.blocks[0].parameters()).dtype
        self.narrow = narrow(self._dtype)
        """Whether the model is in less than float32, which S is widened to until it is told to `settle`."""
        self._undo_widening: Callable[[], None] | None = None
        self._installed = ExitStack()
        try:
            with ExitStack() as undo:
                undo.callback(self.release_model)
                expected = probe_logits(model)
                if not expected.isfinite().all():
                    raise ModelError(
                        f"{type(model).__name__}: its logits are not finite: some weight is NaN or infinite."
                    )
                self.logits_dtype = expected.dtype
                check_capture(self, expected, self._install())
                undo.pop_all()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ModelError(f"{type(model).__name__}: it does not run under capture: {error}") from error

    def release_model(self) -> None:
        """Give the model back as it was: its own attention, dtypes and trainable parameters."""
        self._installed.close()
        for parameter in self._trained:
            parameter.requires_grad_(True)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return embeddings(self.model).device

    @property
    def vocabulary(self) -> int:
        """Number of logits a position has."""
        size: int = self.model.config.get_text_config().vocab_size
        return size

    @property
    def names(self) -> list[str]:
        """Names of the tensors of a direction, as they are stored."""
        return [*(m.parameter for m in self.maps), *self.rest]

    @property
    def weights(self) -> list[Tensor]:
        """The weights a direction moves, each (d_out, d_in) or of its parameter's own shape."""
        return [*(m.weight for m in self.maps), *self.rest.values()]

    def near(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors, each on the device of the weight that it is named after; of others' names, as they are.

        Names are those of `names`, with `3 ` before or `.part` behind where there are several of a weight.
        """
        homes = {name: weight.device for name, weight in zip(self.names, self.weights, strict=True)}
        found = {}
        for key, tensor in tensors.items():
            own = key.rpartition(" ")[2]
            home = homes.get(own, homes.get(own.rpartition(".")[0]))
            found[key] = tensor if home is None else tensor.to(home)
        return found

    def zeros(self) -> Direction:
        """A matrix of zeros for each linear map, float32 at least: what directions are summed in."""
        return [
            torch.zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
            for w in (m.weight for m in self.maps)
        ]

    def _logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        return self.head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)

    def _install(self) -> dict[int, Tensor]:
        """Have S's blocks compute in float32, and attend and route by functions that can be listened to.

        Of a narrow model returns logits of the probe by its `start`, taken when S was wide and listened to no more than
        attention on its own needs in order to run so.
        """
        ids = probe_ids(self.model)
        if self.narrow:
            self._undo_widening = widen(self.base, self.blocks, ids)
            self._installed.callback(self._undo_widening)
        self._installed.callback(foreign.install(self.blocks, self.tape))
        widened = {n: self._logits(self.hidden(ids, n)) for n in _STARTS} if self.narrow else {}
        self._installed.callback(attention.install(self.blocks, self.tape))
        # Where embeddings move, tangents pass through the experts below S too.
        self._installed.callback(experts.install(self._all_blocks if self.rest else self.blocks))
        return widened

    def settle(self) -> None:
        """Have S compute in bfloat16 from here on where the model does: directions are made of its exact weights."""
        if self._undo_widening is not None and self._dtype == torch.bfloat16:
            self._undo_widening()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of last hidden states (n, D) (`blocks.head_logits`)."""
        return head_logits(self.model, self.base, hidden)

    def hidden(self, input_ids: Tensor, start: int = 0, *, pairs: bool = False) -> Tensor:
        """Last hidden states (B, T - start, D) of right-padded `input_ids` (B, T), without a graph."""
        with torch.no_grad():
            out = self._forward(input_ids, start, pairs)
        self.tape.clear()
        return out

    @contextmanager
    def graph(self, input_ids: Tensor, start: int = 0, *, pairs: bool = False) -> Iterator[Tensor]:
        """The same, with a graph from S on; inside the block `backward` may be called.

        Columns before `start` run without a graph, as a key-value prefix: no error signal is asked for there. In
        `pairs` they are the same in rows 2i and 2i + 1, and run once for both.
        """
        with ExitStack() as undo:
            self._attach(undo)
            try:
                with torch.enable_grad():
                    yield self._forward(input_ids, start, pairs)
            finally:
                self._inputs.clear()
                self._leaves.clear()
                self.tape.clear()

    def _forward(self, input_ids: Tensor, start: int, pairs: bool) -> Tensor:
        self._length = input_ids.shape[1] - start
        if start:
            with torch.no_grad():
                cache = self._prefix(input_ids[:: 2 if pairs else 1, :start])
                if pairs and not repeated(cache, 2):
                    cache = self._prefix(input_ids[:, :start])
            self.tape.clear()
            out = forward_with_cache(self.base, cache, input_ids=input_ids[:, start:])
        else:
            out = self.base(input_ids=input_ids, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _prefix(self, input_ids: Tensor) -> Any:
        return cache_of(self.base, forward_with_cache(self.base, None, input_ids=input_ids))

    def _attach(self, undo: ExitStack) -> None:
        """Listen to every linear map of S until `undo` is closed."""
        undo.callback(self.model.get_input_embeddings().register_forward_hook(_without_graph).remove)
        for index, m in enumerate(self.maps):
            if m.called:
                undo.callback(m.module.register_forward_hook(self._listener(index)).remove)
        for module in dict.fromkeys(m.module for m in self.maps if not m.called):
            undo.callback(experts.watch(module, self._watcher(module)))

    def _listener(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            replaced = self._note(index, args[0], output, None)
            return None if replaced is output else replaced

        return note

    def _watcher(self, module: nn.Module) -> experts.Watch:
        def note(slot: str, expert: int | None, h: Tensor, z: Tensor, where: Tensor | None) -> Tensor:
            return self._note(self._index[module, slot, expert], h, z, where) if torch.is_grad_enabled() else z

        return note

    def _note(self, index: int, h: Tensor, output: Tensor, where: Tensor | None) -> Tensor:
        """Keep what goes into a map, and have its error signal delivered. The graph begins where there is none yet."""
        if index in self._inputs:
            raise ModelError(
                f"{type(self.model).__name__}: the linear map {self.maps[index].name} is called more than once in a"
                " forward, so it cannot be captured."
            )
        self._inputs[index] = h.detach(), where
        if not output.requires_grad:
            output = output.detach().requires_grad_()
            self._leaves.append(output)
        output.register_hook(lambda delta: self._deliver(index, delta))
        return output

    def _deliver(self, index: int, delta: Tensor) -> None:
        if self._on_delta is not None:
            h, where = self._inputs[index]
            self._on_delta(index, self._flat(index, h), self._flat(index, delta), where)

    def release(self, index: int) -> None:
        """Let go of a map's input once nothing more will be asked of it."""
        self._inputs.pop(index, None)

    def input(self, index: int) -> tuple[Tensor, Tensor | None]:
        """What went into a map in the forward under way, (n, d_in), and the flat positions of its rows (`OnDelta`)."""
        h, where = self._inputs[index]
        return self._flat(index, h), where

    def _flat(self, index: int, x: Tensor) -> Tensor:
        """(B, T - start, d) or what is flat already -> (n, d), in the dtype of the map's weight.

        A map after the cache (of latent keys and values) gets (B, 1, T, d); the first `start` have no gradient.
        Some routers compute in another dtype.
        """
        if x.ndim == 4:
            x = x[:, 0, x.shape[2] - self._length :]
        return (x if x.ndim == 2 else x.flatten(0, 1)).to(self.maps[index].bare.dtype)

    def backward(self, outputs: list[Tensor], grads: list[Tensor], on_delta: OnDelta, *, again: bool = False) -> None:
        """Send error signals down to S's entry. `again`: keep the graph for one more backward."""
        self._on_delta = on_delta
        try:
            torch.autograd.grad(outputs, self._leaves, grads, retain_graph=again, allow_unused=True)
        finally:
            self._on_delta = None


@contextmanager
def captured(
    model: nn.Module, layers: int | Literal["all"], parameters: Literal["linear", "all"] = "linear"
) -> Iterator[ScoringModel]:
    """A model prepared for scoring, given back as it was afterwards."""
    scoring = ScoringModel(model, layers, parameters)
    try:
        yield scoring
    finally:
        scoring.release_model()


def _without_graph(embedding: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Trainings that check-point gradients have embeddings ask for one (`enable_input_require_grads`), by a hook."""
    moves = any(weight.requires_grad for weight in embedding.parameters())
    return output.detach() if output.requires_grad and not moves else None


def _rest(model: nn.Module, maps: list[LinearMap], below: list[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters that are neither linear maps of S nor part of the blocks below it; tied ones once."""
    apart = {m.bare for m in maps}.union(p for block in below for p in block.parameters())
    return {name: p for name, p in model.named_parameters() if p not in apart}


def probe_ids(model: Any) -> Tensor:
    """A few tokens to try a model on, (2, 12) int64."""
    size = model.config.get_text_config().vocab_size
    ids: Tensor = (torch.arange(2 * 12, device=embeddings(model).device).reshape(2, 12) * 7919 + 11) % size
    return ids


def probe_logits(model: Any) -> Tensor:
    """Logits of the untouched model on a few tokens, (2, 12, V)."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=probe_ids(model), use_cache=False).logits
    return logits


_STARTS = (0, 5)
"""Columns of the probe that run as a prefix."""


def check_capture(scoring: ScoringModel, expected: Tensor, widened: dict[int, Tensor]) -> None:
    """Refuse a model whose logits change under capture, or whose blocks escape it.

    `expected`: logits of the untouched model. Of a narrow one these hold its own rounding, a tenth of the largest logit
    and more; there `widened` decides, by `start`, for which the dtype of S was changed and little else.
    """
    name = type(scoring.model).__name__
    ids = probe_ids(scoring.model)
    for start in _STARTS:
        with scoring.graph(ids, start) as hidden:
            _check_maps(scoring, hidden, ids.shape[1], name)
            if len(scoring.tape.calls) != len(scoring.blocks):
                raise ModelError(
                    f"{name}: {len(scoring.tape.calls)} of {len(scoring.blocks)} scoring blocks use transformers'"
                    " attention interface; the others compute attention on their own and cannot be captured."
                )
            _check_positions(scoring, hidden, name)
        logits = scoring._logits(hidden.detach())
        _check_logits(name, logits, expected[:, start:], 0.3 if scoring.narrow else 1e-4)
        if scoring.narrow:
            _check_logits(name, logits, widened[start], 2e-2)


def _check_logits(name: str, logits: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (logits - expected).float().abs().max().item()
    scale = expected.float().abs().max().item()
    if not error <= tolerance * max(scale, 1e-30):
        raise ModelError(f"{name}: its logits change by {error:.3g} (of {scale:.3g}) under capture, so it is refused.")


def _check_maps(scoring: ScoringModel, hidden: Tensor, width: int, name: str) -> None:
    """Every map was called (of experts, those that were hit), on one vector for each position."""
    seen = {scoring.maps[i]: (h, where) for i, (h, where) in scoring._inputs.items()}
    missed = [m.name for m in scoring.maps if m not in seen and m.expert is None]
    if missed or not hidden.requires_grad:
        raise ModelError(f"{name}: the linear map {(missed or ['?'])[0]} is not called by its block's forward.")
    rows, length = hidden.shape[:-1]
    for m, (h, where) in seen.items():
        if where is None and h.shape[:-1] not in ((rows, length), (rows * length,), (rows, 1, width)):
            raise ModelError(f"{name}: what goes into {m.name} is not one vector for each position.")


def _check_positions(scoring: ScoringModel, hidden: Tensor, name: str) -> None:
    """What the first row's first half loses depends on nothing else: else some map keeps its positions otherwise."""
    rows, length, _ = hidden.shape
    half = length // 2
    grad = torch.zeros_like(hidden)
    grad[0, :half] = 1
    strays: set[str] = set()

    def look(index: int, _: Tensor, delta: Tensor, where: Tensor | None) -> None:
        flat = torch.arange(rows * length, device=delta.device) if where is None else where
        if delta[flat >= half].any():
            strays.add(scoring.maps[index].name)

    scoring.backward([hidden], [grad], look)
    if strays:
        raise ModelError(f"{name}: what goes into {min(strays)} is not one vector for each position.")
