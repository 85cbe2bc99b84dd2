"""A model whose weights train: gradients of its token losses, and products with their second derivative.

What trains is what scores: the linear maps of the last K blocks, or with `parameters` "all" all that these blocks and
their surroundings hold (`engine.capture`). It runs in evaluation mode, without dropout, and attends by plain products,
which torch can differentiate twice.
Shapes: N response tokens of a batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alphatoken_curate.directions.losses import at, positions
from alphatoken_curate.directions.step_losses import TOKENS, StepLoss
from alphatoken_curate.engine.below import Below, Shelf
from alphatoken_curate.engine.blocks import LinearMap, decoder_blocks, head_logits, linear_maps, trunk, unwrapped
from alphatoken_curate.engine.capture import Direction, ScoringModel, captured, probe_ids
from alphatoken_curate.engine.padding_rows import PaddingRows
from alphatoken_curate.engine.precision import narrow, wide
from alphatoken_curate.engine.twice import Twice, token_nll
from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.whole import blocks_that_score
from alphatoken_curate.tokens.plan import Batch, batches_of, token_places, token_starts
from alphatoken_curate.tokens.tokenise import AnyRow

Weights = list[Tensor]
"""A tensor for each parameter that trains, in the order of `Trainee.names`."""

AGREEMENT = 2e-2
"""How far the second derivative may be from a difference of gradients on the probe, relative to their size, in float32.
What torch does not know to be differentiable twice is left out in silence; a part that is left out is no small one."""


class Trainee:
    """A causal language model whose last K blocks, or all of it, train.

    `dtype`: what linear maps that train multiply in, where it is not that of the weights (as autocast has it).
    Raises ModelError where the weights are in less than float32, or torch cannot differentiate the model twice.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: int | Literal["all"],
        parameters: Literal["linear", "all"] = "all",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model: Any = unwrapped(model).eval()
        self.base: Any = trunk(self.model)
        blocks = decoder_blocks(self.model, self.base)
        layers = blocks_that_score(layers, len(blocks))
        self.maps = [m for block in blocks[-layers:] for m in linear_maps(self.model, block)]
        self.layers = layers
        _plain(self.model)
        wanted = self._trains(blocks[: len(blocks) - layers], parameters)
        self.names, self.weights = list(wanted), list(wanted.values())
        below = blocks[: len(blocks) - layers] if parameters == "linear" else []
        self._below = Below(below)
        self._trained_in: Sequence[Batch] = ()
        if odd := next((p.dtype for p in self.weights if narrow(p.dtype)), None):
            raise ModelError(f"{type(model).__name__}: its weights are {odd}, and a rehearsal trains in float32.")
        self.dtype: torch.dtype | None = None  # differences of gradients tell more without
        if not _same_from_above(self):
            self._below = Below([])
        _check(self)
        self.forget_below()
        self.dtype = dtype

    def _trains(self, below: list[nn.Module], parameters: Literal["linear", "all"]) -> Mapping[str, Tensor]:
        """What trains, by name; `below` are the blocks that do not."""
        return _trained(self.model, self.maps, below, parameters)

    def restart(self, seed: int) -> None:
        """Go to where the training of that seed begins: here where the model is."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights[0].device

    @property
    def vocabulary(self) -> int:
        """Number of logits a position has."""
        size: int = self.model.config.get_text_config().vocab_size
        return size

    def as_direction(self, weights: Weights) -> Direction:
        """The same numbers as a matrix (d_out, d_in) for each linear map, then the rest (`ScoringModel.names`)."""
        by_weight = dict(zip(self.weights, weights, strict=True))
        rest = [x for w, x in by_weight.items() if w not in self._matrices]
        return [*(m.matrix(by_weight[m.bare]) for m in self.maps), *rest]

    def of_direction(self, direction: Direction) -> Weights:
        """A direction's numbers, laid out as the weights are."""
        found = [torch.empty_like(w, requires_grad=False) for w in self.weights]
        for own, given in zip(self.as_direction(found), direction, strict=True):
            own.copy_(given)
        return found

    @contextmanager
    def captured(self) -> Iterator[ScoringModel]:
        """The model as it is now, prepared for scoring along what `as_direction` gives."""
        with captured(self.model, self.layers) as scoring:
            yield scoring

    @property
    def _matrices(self) -> set[Tensor]:
        return {m.bare for m in self.maps}

    def nll(self, batch: Batch, *, twice: bool = False, below: Tensor | None = None) -> Tensor:
        """-log p of the N response tokens of a batch, (N,) in nats, with whatever graph the weights ask for.

        `twice`: it is to be differentiated twice. `below`: what lies below the blocks that train gives.
        """
        batch = replace(batch, start=0)  # prompts take part in the second derivative
        ids = torch.from_numpy(batch.input_ids).to(self.device)
        with self._below.kept(_key(batch), new=not twice) if below is None else self._below.given(below):
            hidden = self.base(input_ids=ids, use_cache=False).last_hidden_state
        logits = wide(head_logits(self.model, self.base, at(hidden, positions(batch, ids.device))))
        target = torch.from_numpy(batch.target).to(ids.device)
        return token_nll(logits, target) if twice else nn.functional.cross_entropy(logits, target, reduction="none")

    def nll_of(self, rows: Sequence[AnyRow], batch_tokens: int) -> NDArray[np.float32]:
        """-log p of the response tokens of all rows at the weights as they are, (N,) in nats."""
        starts = token_starts(rows)
        found = np.empty(starts[-1], np.float32)
        with torch.no_grad():
            for batch in batches_of(rows, batch_tokens):
                found[token_places(batch, starts)] = self.nll(batch).cpu().numpy()
        return found

    def shelve_below(self, shelf: Shelf) -> None:
        """Put away on a shelf what lies below what trains gives for a batch, where memory has no room to keep it."""
        self._below.shelf = shelf

    def forget_below(self, batches: Iterable[Batch] | None = None) -> None:
        """Keep nothing of what lies below gave for some batches, or for any."""
        if self._below.blocks:
            self._below.forget(None if batches is None else map(_key, batches))

    @property
    def below_bytes(self) -> int:
        """What is kept of each token below what trains."""
        config = self.model.config.get_text_config()
        return int(config.hidden_size) * self.weights[0].element_size() if self._below.blocks else 0

    @contextmanager
    def trained_in(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Inside this block, below what trains, rows that `products` is given come out as in these batches."""
        self._trained_in = batches
        try:
            yield
        finally:
            self._trained_in = ()

    def _rows_below(self, batch: Batch) -> Tensor | None:
        """(B, T, D) what lies below gives for a batch; None where it has to run for it.

        What pads a row there is its last position: numbers as they occur, which nothing that is asked for sees.
        """
        at = {row: (whole, i) for whole in self._trained_in for i, row in enumerate(whole.rows)}
        if not self._below.blocks or not all(row in at for row in batch.rows):
            return None
        found = []
        for whole, i in (at[row] for row in batch.rows):
            if self._below.output(_key(whole)) is None:
                with self._training(), self._maps(None):
                    self.nll(whole)
            output = self._below.output(_key(whole))
            if not isinstance(output, Tensor) or output.shape[:2] != whole.input_ids.shape:
                return None
            positions = torch.arange(batch.input_ids.shape[1], device=output.device)
            found.append(output[i].index_select(0, positions.clamp_(max=output.shape[1] - 1)))
        return torch.stack(found)

    def gradient(
        self, batches: Iterable[Batch], *, whole: bool = False, loss: StepLoss = TOKENS
    ) -> tuple[Weights, float, int]:
        """Gradient of the mean loss over all units of the batches (response tokens), that mean in nats, their number.

        It is what a training takes, without what torch leaves out of an embedding's padding row; `whole` is with it.
        """
        sums, total, units = [torch.zeros_like(w, requires_grad=False) for w in self.weights], 0.0, 0
        for batch in batches:
            with self._training(), PaddingRows() as rows, self._maps(sums):
                nll = self.nll(batch)
                alone = nll.detach()
                inputs, places = self._inputs(rows if whole else None)
                weighed = loss.weigh(batch, alone, [torch.ones_like(alone)] * loss.ways)
                found = torch.autograd.grad(nll, inputs, weighed, allow_unused=True)
            for place, grad in zip(places, found, strict=True):
                if grad is not None:
                    sums[place].add_(grad)
            total, units = total + float(loss.total(batch, alone)), units + loss.units(batch)
        return [s.div_(units) for s in sums], total / units, units

    def products(
        self,
        batch: Batch,
        along: Sequence[Weights],
        into: Sequence[Weights],
        scale: float,
        loss: StepLoss = TOKENS,
    ) -> Tensor:
        """Add H a of a batch's summed loss times `scale` to `into`, for each a of `along`, at the weights as they are.

        Returns (ways, n, N): what each token's weight does to scale <a, gradient of the loss> in each of its ways, of
        plain losses the one scale <a, gradient of l_t>. One backward with the tokens' weights as inputs is
        differentiated once for each a; its graph is shared, and holds no gradient of a linear map (`engine.twice`).
        """
        below = self._rows_below(batch)
        with self._training(), PaddingRows() as rows, Twice(self.weights, self.dtype) as maps:
            nll = self.nll(batch, twice=True, below=below)
            ones = [torch.ones_like(nll, requires_grad=True) for _ in range(loss.ways)]
            weighed = loss.weigh(batch, nll, ones) * scale
            found = torch.autograd.grad(nll, self.weights, weighed, create_graph=True, allow_unused=True)
            used = [i for i, grad in enumerate(found) if grad is not None]
            grads, (inputs, places) = [found[i] for i in used], self._inputs(rows)
            parts = []
            for n, (a, sums) in enumerate(zip(along, into, strict=True)):
                maps.into = dict(zip(self.weights, sums, strict=True))
                every = torch.autograd.grad(
                    grads, [*ones, *inputs], [a[i] for i in used], retain_graph=n + 1 < len(along), allow_unused=True
                )
                parts.append(torch.stack(every[: loss.ways]))
                for place, product in zip(places, every[loss.ways :], strict=True):
                    if product is not None:
                        sums[place].add_(product)
        return torch.stack(parts, dim=1)

    @contextmanager
    def _maps(self, sums: Weights | None) -> Iterator[None]:
        """Inside this block maps multiply in `dtype`, and add their gradients to `sums`."""
        if self.dtype is None:
            yield
            return
        with Twice(self.weights, self.dtype) as maps:
            maps.into = {} if sums is None else dict(zip(self.weights, sums, strict=True))
            yield

    def _inputs(self, rows: PaddingRows | None) -> tuple[list[Tensor], list[int]]:
        """What to differentiate by, and which of the weights each is: padding rows stand apart."""
        apart = {} if rows is None else rows.apart
        extra = [(apart[w], i) for i, w in enumerate(self.weights) if w in apart]
        return [*self.weights, *(x for x, _ in extra)], [*range(len(self.weights)), *(i for _, i in extra)]

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The weights that train ask for gradients inside this block, and no others do."""
        held = [(p, p.requires_grad) for p in (*self.model.parameters(), *self.weights)]
        self.model.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter, asked in held:
                parameter.requires_grad_(asked)


def _trained(
    model: nn.Module, maps: list[LinearMap], below: list[nn.Module], parameters: Literal["linear", "all"]
) -> dict[str, nn.Parameter]:
    """What trains, by name, in the model's order; tied weights once."""
    if parameters == "linear":
        matrices = {m.bare for m in maps}
        return {name: p for name, p in model.named_parameters() if p in matrices}
    fixed = {p for block in below for p in block.parameters()}
    return {name: p for name, p in model.named_parameters() if p not in fixed}


def _plain(model: Any) -> None:
    """Attention and experts by functions that can be differentiated twice."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def _same_from_above(trainee: Trainee) -> bool:
    """Whether what lies below the blocks that train reaches them by their input alone (not so of shared keys).

    And whether a row of it is a row of the batch, which may run among others.
    """
    batch = _probe(trainee.model)
    mine = batch.row == 1
    alone = replace(
        batch,
        rows=(1,),
        input_ids=batch.input_ids[1:2],
        row=batch.row[mine] - 1,
        position=batch.position[mine],
        target=batch.target[mine],
    )
    with torch.no_grad():
        whole = trainee.nll(batch)
        try:
            from_above = trainee.nll(batch)
            with trainee.trained_in([batch]):
                of_row = trainee.nll(alone, below=trainee._rows_below(alone))
        except (RuntimeError, LookupError, TypeError, AttributeError):  # it looks for what was not computed
            return False
    same_row = torch.allclose(of_row, whole[torch.from_numpy(mine)], rtol=1e-3, atol=1e-4)
    return torch.equal(whole, from_above) and same_row


def _check(trainee: Trainee) -> None:
    """Refuse a model whose second derivative is not that of its gradients on a few tokens, or not to be had."""
    name, batch = type(trainee.model).__name__, _probe(trainee.model)
    gradient, loss, tokens = trainee.gradient([batch])
    if not math.isfinite(loss):
        raise ModelError(f"{name}: its logits are not finite: some weight is NaN or infinite.")
    product = [torch.zeros_like(g) for g in gradient]
    try:
        trainee.products(batch, [gradient], [product], 1 / tokens)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(f"{name}: it cannot be rehearsed: torch does not differentiate it twice: {error}") from error
    size, off = _norm(product), math.inf
    # Where a loss bends within a step, shorter ones tell; a part that is missing is missing from all of them.
    for share in _STEPS:
        off = min(off, _difference(trainee, batch, gradient, product, share * _norm(gradient) / max(size, 1e-30)))
        if off <= AGREEMENT * size:
            return
    raise ModelError(
        f"{name}: it cannot be rehearsed: the second derivative of its loss is off by {off:.3g} (of {size:.3g}) from a"
        " difference of gradients, so some function in it hides a part."
    )


_STEPS = (1e-2, 1e-3, 1e-1, 1e-4, 1e-5)
"""By how much of itself the gradient changes."""


def _difference(trainee: Trainee, batch: Batch, along: Weights, product: Weights, step: float) -> float:
    """Norm of the central difference of gradients, less the product it should be."""
    ahead, behind = (_gradient_at(trainee, batch, along, by) for by in (step, -step))
    return _norm([(a - b).div_(2 * step).sub_(p) for a, b, p in zip(ahead, behind, product, strict=True)])


def _gradient_at(trainee: Trainee, batch: Batch, along: Weights, by: float) -> Weights:
    """The gradient with the weights moved for as long as it is taken."""
    held = [w.detach().clone() for w in trainee.weights]
    for weight, direction in zip(trainee.weights, along, strict=True):
        weight.detach().add_(direction, alpha=by)
    found = trainee.gradient([batch])[0]
    for weight, own in zip(trainee.weights, held, strict=True):
        weight.detach().copy_(own)
    return found


def _key(batch: Batch) -> Hashable:
    """What a batch is known by: its tokens, as they are padded."""
    return batch.input_ids.shape, sha256(batch.input_ids.tobytes()).digest()


def _probe(model: Any) -> Batch:
    """A batch of rows all of whose tokens but the first respond.

    None is the padding token: its row is zeros in an untrained model, where norms bend more than a difference shows.
    """
    ids = probe_ids(model).cpu().numpy()
    ids[ids == getattr(model.get_input_embeddings(), "padding_idx", None)] += 1
    rows, width = ids.shape
    row, position = np.divmod(np.arange(rows * (width - 1)), width - 1)
    return Batch(
        rows=tuple(range(rows)),
        pairs=False,
        input_ids=ids[:, :-1],
        start=0,
        row=row,
        position=position,
        target=ids[row, position + 1],
    )


def _norm(tensors: Weights) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors))
