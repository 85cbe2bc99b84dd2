"""The scoring set S of a model: its blocks, their linear maps, what goes into them and which error signal comes back.

The model runs as it is. Every weight is frozen and no input asks for a gradient, so nothing below S keeps a graph;
the graph begins at the outputs of the linear maps of S's first block, and a backward stops there.
Shapes: B rows, T positions, D hidden size, V vocabulary; h (B, T, d_in), delta (B, T, d_out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alphatoken_curate.attention import Tape, install
from alphatoken_curate.errors import ModelError

Direction = list[Tensor]
"""One matrix (d_out, d_in) for each linear map of S, in the order of `ScoringModel.maps`."""

OnDelta = Callable[[int, Tensor, Tensor], None]
"""Called with (index of the linear map, h, delta) while a backward runs."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """One linear map of S: z = W h (+ bias), W (d_out, d_in)."""

    name: str
    module: nn.Module
    conv1d: bool

    @property
    def parameter(self) -> str:
        """Name of its weight in the model's state dict."""
        return f"{self.name}.weight"

    @property
    def weight(self) -> Tensor:
        """W as (d_out, d_in), whichever way round the module keeps it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.t() if self.conv1d else weight


class _Trunk:
    """What a head gets in place of its trunk's output: last hidden states, and None for whatever else it looks up."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


class ScoringModel:
    """A causal language model prepared for scoring on its last K blocks.

    Raises ModelError, naming the module, where anything in S cannot be captured exactly.
    """

    def __init__(self, model: nn.Module, layers: int | Literal["all"]) -> None:
        self.model: Any = model
        self.base: Any = _base_model(model)
        blocks = _decoder_blocks(model, self.base)
        self.layers = len(blocks) if layers == "all" else layers
        if not 1 <= self.layers <= len(blocks):
            raise ModelError(
                f"--layers {layers}: the model has {len(blocks)} decoder blocks. Give 1 to {len(blocks)}, or all."
            )
        self.depth = len(blocks)
        self.blocks = blocks[-self.layers :]
        self.tape = Tape()
        self.maps = [m for block in self.blocks for m in _linear_maps(model, block)]
        self._trained = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self._inputs: dict[int, Tensor] = {}
        self._leaves: list[Tensor] = []
        self._on_delta: OnDelta | None = None
        self._widened: list[tuple[RemovableHandle, torch.dtype]] = []
        self._uninstall: Callable[[], None] = lambda: None
        try:
            with ExitStack() as undo:
                undo.callback(self.release_model)
                expected = probe_logits(model)
                if not expected.isfinite().all():
                    raise ModelError(
                        f"{type(model).__name__}: its logits are not finite: some weight is NaN or infinite."
                    )
                self._widen()
                self._uninstall = install(self.blocks, self.tape)
                check_capture(self, expected)
                self.value_rows = find_value_rows(self)
                undo.pop_all()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ModelError(f"{type(model).__name__}: it does not run under capture: {error}") from error

    def release_model(self) -> None:
        """Give the model back as it was: its own attention, dtypes and trainable parameters."""
        self._uninstall()
        for hook, kind in self._widened:
            hook.remove()
            for block in self.blocks:
                block.to(kind)
        self._widened.clear()
        for parameter in self._trained:
            parameter.requires_grad_(True)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def vocabulary(self) -> int:
        """Number of logits a position has."""
        size: int = self.model.config.get_text_config().vocab_size
        return size

    def zeros(self) -> Direction:
        """A matrix of zeros for each linear map, float32 at least: what directions are summed in."""
        return [
            torch.zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
            for w in (m.weight for m in self.maps)
        ]

    def _widen(self) -> None:
        """S computes in float32 at least: differences of error signals drown in bfloat16."""
        kind = next(self.blocks[0].parameters()).dtype
        if torch.finfo(kind).bits >= torch.finfo(torch.float32).bits:
            return
        for block in self.blocks:
            block.float()
        hook = self.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: (tuple(_wider(a) for a in args), {k: _wider(v) for k, v in kwargs.items()}),
            with_kwargs=True,
        )
        self._widened.append((hook, kind))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of last hidden states (n, D): the model's own forward with its trunk replaced by `hidden`."""
        weight = self.model.get_output_embeddings().weight
        states = hidden.to(weight.dtype).unsqueeze(0)
        given = _Trunk(states)
        trunk, self.base.forward = self.base.forward, lambda *_, **__: given
        try:
            logits: Tensor = self.model(inputs_embeds=states, use_cache=False).logits
        finally:
            self.base.forward = trunk
        return logits.squeeze(0)

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
        hooks = [m.module.register_forward_hook(self._capture(i)) for i, m in enumerate(self.maps)]
        try:
            with torch.enable_grad():
                yield self._forward(input_ids, start, pairs)
        finally:
            for hook in hooks:
                hook.remove()
            self._inputs.clear()
            self._leaves.clear()
            self.tape.clear()

    def _forward(self, input_ids: Tensor, start: int, pairs: bool) -> Tensor:
        cache = None
        if start:
            with torch.no_grad():
                cache = self.base(input_ids=input_ids[:: 2 if pairs else 1, :start], use_cache=True).past_key_values
                if pairs:
                    cache.batch_repeat_interleave(2)
            self.tape.clear()
        out = self.base(input_ids=input_ids[:, start:], past_key_values=cache, use_cache=cache is not None)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _capture(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            self._inputs[index] = args[0].detach()
            replaced = None
            if not output.requires_grad:
                replaced = output = output.detach().requires_grad_()
                self._leaves.append(output)
            output.register_hook(lambda delta: self._deliver(index, delta))
            return replaced

        return note

    def _deliver(self, index: int, delta: Tensor) -> None:
        if self._on_delta is not None:
            self._on_delta(index, self._inputs[index], delta)

    def release(self, index: int) -> None:
        """Let go of a map's input once nothing more will be asked of it."""
        self._inputs.pop(index, None)

    def input(self, index: int) -> Tensor:
        """H of a map in the forward under way, (B, T - start, d_in)."""
        return self._inputs[index]

    def backward(self, outputs: list[Tensor], grads: list[Tensor], on_delta: OnDelta, *, again: bool = False) -> None:
        """Send error signals down to S's entry. `again`: keep the graph for one more backward."""
        self._on_delta = on_delta
        try:
            torch.autograd.grad(outputs, self._leaves, grads, retain_graph=again, allow_unused=True)
        finally:
            self._on_delta = None


@contextmanager
def captured(model: nn.Module, layers: int | Literal["all"]) -> Iterator[ScoringModel]:
    """A model prepared for scoring, given back as it was afterwards."""
    scoring = ScoringModel(model, layers)
    try:
        yield scoring
    finally:
        scoring.release_model()


def _wider(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _base_model(model: Any) -> nn.Module:
    base = getattr(model, "base_model", None)
    if base is None or base is model or not hasattr(model, "get_output_embeddings"):
        raise ModelError(
            f"{type(model).__name__}: not a causal language model of transformers (no trunk under a head)."
        )
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__}: it has no output embeddings; only causal language models can be scored."
        )
    assert isinstance(base, nn.Module)
    return base


def _decoder_blocks(model: Any, base: nn.Module) -> list[nn.Module]:
    count = model.config.get_text_config().num_hidden_layers
    stacks = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise ModelError(f"{type(model).__name__}: found no list of {count} decoder blocks in it.")
    return list(stacks[0])


def _linear_maps(model: nn.Module, block: nn.Module) -> list[LinearMap]:
    """Every linear map of a block; anything else that owns a matrix is refused by name."""
    from transformers.pytorch_utils import Conv1D

    names = {module: name for name, module in model.named_modules()}
    maps = []
    for module in block.modules():
        kind = type(module)
        if kind in (nn.Linear, Conv1D):
            maps.append(LinearMap(names[module], module, kind is Conv1D))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                shape = "x".join(map(str, parameter.shape))
                raise ModelError(
                    f"{type(model).__name__}: {names[module]}.{name} ({shape}) is a weight of"
                    f" {kind.__module__}.{kind.__name__}, which cannot be captured, and scoring the rest would be a"
                    " score in part."
                )
    return maps


def _probe_ids(model: Any) -> Tensor:
    size = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    ids: Tensor = (torch.arange(2 * 12, device=device).reshape(2, 12) * 7919 + 11) % size
    return ids


def probe_logits(model: Any) -> Tensor:
    """Logits of the untouched model on a few tokens, (2, 12, V)."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=_probe_ids(model), use_cache=False).logits
    return logits


def check_capture(scoring: ScoringModel, expected: Tensor) -> None:
    """Refuse a model whose logits change under capture, or whose blocks escape it."""
    name = type(scoring.model).__name__
    ids = _probe_ids(scoring.model)
    for start in (0, 5):
        with scoring.graph(ids, start) as hidden:
            missed = [m.name for i, m in enumerate(scoring.maps) if i not in scoring._inputs]
            odd = [scoring.maps[i].name for i, h in scoring._inputs.items() if h.shape[:-1] != hidden.shape[:-1]]
            seen = len(scoring.tape.calls)
            unlinked = not hidden.requires_grad
        if missed or unlinked:
            raise ModelError(f"{name}: the linear map {(missed or ['?'])[0]} is not called by its block's forward.")
        if odd:
            raise ModelError(f"{name}: what goes into {odd[0]} is not one vector for each position.")
        if seen != len(scoring.blocks):
            raise ModelError(
                f"{name}: {seen} of {len(scoring.blocks)} scoring blocks use transformers' attention interface;"
                " the others compute attention on their own and cannot be captured."
            )
        logits = scoring.head(hidden.detach().flatten(0, 1)).view(*hidden.shape[:2], -1)
        error = (logits - expected[:, start:]).float().abs().max().item()
        scale = expected.float().abs().max().item()
        tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 5e-2
        if not error <= tolerance * max(scale, 1e-30):
            raise ModelError(
                f"{name}: its logits change by {error:.3g} (of {scale:.3g}) under capture, so it is refused."
            )


def find_value_rows(scoring: ScoringModel) -> list[tuple[int, Tensor] | str]:
    """For each block of S, (index of the map that makes the values, its rows in the order of heads), or why not.

    Found by looking: a row of a linear map's output that carries, bit for bit, what attention received as values.
    Head h, feature j of the values is row `rows[h * D + j]`.
    """
    outputs: dict[int, Tensor] = {}
    hooks = [
        m.module.register_forward_hook(lambda _, __, z, i=i: outputs.__setitem__(i, z.detach()))
        for i, m in enumerate(scoring.maps)
    ]
    try:
        with torch.no_grad():
            scoring._forward(_probe_ids(scoring.model), 0, False)
        values = {id(call.module): call.value for call in scoring.tape.calls}
    finally:
        for hook in hooks:
            hook.remove()
        scoring.tape.clear()
    return [_match_values(scoring, block, outputs, values) for block in scoring.blocks]


def _match_values(
    scoring: ScoringModel, block: nn.Module, outputs: dict[int, Tensor], values: dict[int, Tensor]
) -> tuple[int, Tensor] | str:
    inside = set(block.modules())
    value = next(values[id(m)] for m in inside if id(m) in values)
    wanted = [bytes(v) for v in value.permute(1, 3, 0, 2).flatten(0, 1).flatten(1).contiguous().cpu().numpy()]
    for index, linear in enumerate(scoring.maps):
        if linear.module not in inside:
            continue
        found = {bytes(z): row for row, z in enumerate(outputs[index].flatten(0, 1).t().contiguous().cpu().numpy())}
        rows = [found.get(key, -1) for key in wanted]
        if min(rows) < 0:
            continue
        if len(set(rows)) < len(rows):
            return f"{linear.name}: its values are shared between heads"
        if linear.weight.shape[1] != scoring.model.config.get_text_config().hidden_size:
            return f"{linear.name}: it makes values from a latent, not from the block's input"
        return index, torch.tensor(rows, device=value.device)
    return "attention does not receive the plain output of one linear map as its values"
