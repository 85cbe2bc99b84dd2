"""What runs a model over rows: the reference pass, and the scorer of a shard.

Both are built from a config and from files, and load their model when first asked, so that one process, many
processes or an outside engine can run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate import artifacts, composite
from alphatoken_curate.artifacts import Store
from alphatoken_curate.capture import Direction, ScoringModel
from alphatoken_curate.config import FISHER_MODES
from alphatoken_curate.drift import checked_weights, drift_direction, read_direction, read_weights
from alphatoken_curate.errors import InputError, ModelError
from alphatoken_curate.fisher import fisher_diagonal
from alphatoken_curate.losses import at, positions, token_losses
from alphatoken_curate.models import ModelSource, free_memory, load_model
from alphatoken_curate.paths import Estimator, PathScorer, Signals
from alphatoken_curate.plan import Batch, collate, plan_batches
from alphatoken_curate.progress import Progress
from alphatoken_curate.schema import COMPONENTS
from alphatoken_curate.target import target_gradient
from alphatoken_curate.tokens import TokenRow

RowSignals = dict[str, NDArray[np.float32]]
"""Signals of one row, each (T,), NaN off the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec:
    """All a scorer needs to know; picklable."""

    model: ModelSource
    reference: ModelSource
    estimator: Estimator
    layers: int | Literal["all"]
    window: int
    stability_weight: float
    fisher: str
    seed: int
    dtype: str
    device: str
    trust_remote_code: bool
    store: Store

    @property
    def has_drift(self) -> bool:
        """Whether the reference is another model than the one that is scored."""
        return self.store.fields["model"] != self.store.fields["reference"]

    @property
    def estimates_fisher(self) -> bool:
        """Whether the Fisher is ours to estimate, rather than a file the user brings."""
        return self.fisher in FISHER_MODES

    def load(self, source: ModelSource) -> ScoringModel:
        """A model of the run, captured."""
        model = load_model(
            source,
            dtype=getattr(torch, self.dtype),
            device=torch.device(self.device),
            trust_remote_code=self.trust_remote_code,
        )
        return ScoringModel(model, self.layers)


class ReferencePass:
    """What is needed of the reference model: its Fisher, its weights of S and its losses. One model at a time."""

    def __init__(self, spec: ScorerSpec) -> None:
        self.spec = spec
        self._scoring: ScoringModel | None = None

    @property
    def scoring(self) -> ScoringModel:
        """The reference, loaded when first asked for."""
        if self._scoring is None:
            self._scoring = self.spec.load(self.spec.reference)
        return self._scoring

    def fisher(self, rows: Callable[[], Sequence[TokenRow]], batch_tokens: int, progress: Progress) -> None:
        """Estimate F and keep it, unless it is there or the user brings one."""
        if not self.spec.estimates_fisher or self.spec.store.has(artifacts.FISHER):
            return
        chosen = rows()
        progress.stage("Fisher of the reference", sum(len(row.input_ids) for row in chosen))
        found = fisher_diagonal(
            self.scoring,
            chosen,
            counted(chosen, batch_tokens, progress),
            sampled=self.spec.fisher == "sampled",
            seed=self.spec.seed,
        )
        if not all(torch.isfinite(f).all() for f in found):
            raise InputError(
                "The Fisher of the reference is not finite, so stability cannot be scored: some row's loss under"
                " --reference is not finite. Check its weights, or give a --fisher FILE."
            )
        self.spec.store.save(artifacts.FISHER, by_name(self.scoring, found))

    def weights(self) -> None:
        """Keep the reference's weights of S where its files do not give them tensor by tensor (GGUF)."""
        if self.spec.reference.gguf and not self.spec.store.has(artifacts.REFERENCE):
            found = by_name(self.scoring, [m.weight for m in self.scoring.maps])
            self.spec.store.save(artifacts.REFERENCE, found)

    def losses(self, shard: int, rows: Sequence[TokenRow], progress: Progress, batch_tokens: int) -> None:
        """Keep the reference's nll of a shard's response tokens, row by row, in one tensor."""
        name = artifacts.reference_nll(shard)
        if self.spec.store.has(name):
            progress.advance(sum(len(row.input_ids) for row in rows))
            return
        found = plain_losses(self.scoring, rows, counted(rows, batch_tokens, progress))
        self.spec.store.save(name, {"nll": torch.cat([torch.empty(0), *map(torch.from_numpy, found)])})

    def close(self) -> None:
        """Drop the model."""
        self._scoring = None
        free_memory()


class ShardScorer:
    """Called with the rows of a shard, gives their signals. Loads its model once; a pickled copy loads its own."""

    def __init__(self, spec: ScorerSpec) -> None:
        self.spec = spec
        self._scoring: ScoringModel | None = None
        self._paths: PathScorer | None = None

    def __reduce__(self) -> tuple[type[ShardScorer], tuple[ScorerSpec]]:
        """Pickle what it was built from, never the model."""
        return ShardScorer, (self.spec,)

    def prepare(self, target: Sequence[TokenRow], batch_tokens: int, progress: Progress) -> None:
        """Make sure G is in artifacts/. Raises InputError where the target's loss is not finite."""
        if self.spec.store.has(artifacts.TARGET):
            return
        progress.stage("target gradient", sum(len(row.input_ids) for row in target))
        scoring = self._load()
        found = target_gradient(
            scoring, counted(target, batch_tokens, progress), all_positions=self.spec.estimator == "exact"
        )
        if not all(torch.isfinite(g).all() for g in found):
            raise InputError("The loss of the target rows has no finite gradient, so there is nothing to adapt to.")
        self.spec.store.save(artifacts.TARGET, by_name(scoring, found))

    def __call__(
        self, shard: int, rows: Sequence[TokenRow], progress: Progress, batch_tokens: int
    ) -> list[RowSignals | None]:
        """Signals of each row of a shard; None where one is not finite."""
        if not rows:
            return []
        paths, reference = self._path_scorer(), self._reference_losses(shard, rows)
        return row_signals(paths, rows, counted(rows, batch_tokens, progress), self.spec.stability_weight, reference)

    def _load(self) -> ScoringModel:
        if self._scoring is None:
            self._scoring = self.spec.load(self.spec.model)
        return self._scoring

    def _path_scorer(self) -> PathScorer:
        if self._paths is None:
            scoring = self._load()
            target = self.spec.store.require(artifacts.TARGET, scoring.device)
            directions = [[target[m.parameter] for m in scoring.maps]]
            if self.spec.has_drift:
                directions.append(self._stability(scoring))
            self._paths = PathScorer(scoring, directions, self.spec.estimator, self.spec.window)
        return self._paths

    def _stability(self, scoring: ScoringModel) -> Direction:
        if self.spec.estimates_fisher:
            stored = self.spec.store.require(artifacts.FISHER, scoring.device)
            fisher = [stored[m.parameter] for m in scoring.maps]
        else:
            fisher = read_direction(Path(self.spec.fisher).expanduser(), scoring, flag="--fisher")
        return drift_direction(scoring, fisher, self._reference_weights(scoring))

    def _reference_weights(self, scoring: ScoringModel) -> Direction:
        kept = self.spec.store.load(artifacts.REFERENCE, scoring.device)
        if kept is not None:
            return checked_weights(scoring, [kept[m.parameter] for m in scoring.maps])
        found = read_weights(self.spec.reference.weight_files(), scoring)
        if found is None:
            raise ModelError(f"{self.spec.reference.name}: its files do not name the weights of the scoring blocks.")
        return found

    def _reference_losses(self, shard: int, rows: Sequence[TokenRow]) -> list[NDArray[np.float32]] | None:
        if not self.spec.has_drift:
            return None
        stored = self.spec.store.require(artifacts.reference_nll(shard))["nll"]
        return [part.numpy() for part in stored.split([int(row.response.sum()) for row in rows])]


def counted(rows: Sequence[TokenRow], batch_tokens: int, progress: Progress) -> Iterator[Batch]:
    """The planned batches of rows, each reported when it is done."""
    for indices in plan_batches(rows, batch_tokens):
        yield collate(rows, indices)
        progress.advance(sum(len(rows[i].input_ids) for i in indices))


def by_name(scoring: ScoringModel, direction: Direction) -> dict[str, Tensor]:
    """A direction under the names of its weights."""
    return {m.parameter: tensor for m, tensor in zip(scoring.maps, direction, strict=True)}


def plain_losses(
    scoring: ScoringModel, rows: Sequence[TokenRow], batches: Iterable[Batch]
) -> list[NDArray[np.float32]]:
    """-log p of each row's response tokens, in nats: one forward, no gradient."""
    found: dict[int, NDArray[np.float32]] = {}
    for batch in batches:
        hidden = scoring.hidden(torch.from_numpy(batch.input_ids).to(scoring.device))
        chosen = at(hidden, positions(replace(batch, start=0), hidden.device))
        targets = torch.from_numpy(batch.target).to(hidden.device)
        losses = token_losses(scoring.head, chosen, targets, vocabulary=scoring.vocabulary, gradient=False)
        parts = losses.nll.float().cpu().split(batch.counts.tolist())
        found |= zip(batch.rows, (part.numpy() for part in parts), strict=True)
    return [found[i] for i in range(len(rows))]


def row_signals(
    paths: PathScorer,
    rows: Sequence[TokenRow],
    batches: Iterable[Batch],
    stability_weight: float,
    reference_nll: Sequence[NDArray[np.float32]] | None,
) -> list[RowSignals | None]:
    """The stored signals of each row; None where one is not finite."""
    found: list[RowSignals | None] = [None] * len(rows)
    for batch in batches:
        columns = _columns(paths.score(batch), stability_weight)
        for i, index in enumerate(batch.rows):
            mine = {name: values[batch.row == i] for name, values in columns.items()}
            if reference_nll is not None:
                mine["reference_nll"] = reference_nll[index]
            if all(np.isfinite(values).all() for values in mine.values()):
                found[index] = {name: _spread(values, rows[index]) for name, values in mine.items()}
    return found


def _columns(signals: Signals, stability_weight: float) -> RowSignals:
    """The stored columns of N tokens; without a drift, stability is exactly 0."""
    columns: dict[str, Any] = {"nll": signals.nll, "entropy": signals.entropy}
    zeros = torch.zeros_like(signals.direct[0])
    for n, objective in enumerate(("adapt", "stab")):
        there = n < len(signals.direct)
        columns[f"{objective}_direct"] = signals.direct[n] if there else zeros
        columns[f"{objective}_causal"] = signals.causal[n] if there else zeros
    stored: RowSignals = {name: tensor.float().cpu().numpy() for name, tensor in columns.items()}
    components = (stored[name] for name in COMPONENTS)
    return stored | {"value": composite.value(*components, stability_weight=stability_weight)}


def _spread(values: NDArray[np.float32], row: TokenRow) -> NDArray[np.float32]:
    full = np.full(len(row.input_ids), np.nan, np.float32)
    full[row.response] = values
    return full
