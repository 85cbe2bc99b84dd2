"""What runs the model over rows: the directions it is scored along, and the scorer of a shard.

It is built from a config and from files, and loads its model when first asked, so that one process, many processes or
an outside engine can run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.directions.drift import checked_weights, drift_direction, read_direction, read_weights
from alphatoken_curate.directions.losses import Losses, Weigh, row_means
from alphatoken_curate.directions.parameters import rest_sums
from alphatoken_curate.directions.precondition import (
    Factors,
    factor_bases,
    factor_sums,
    moment_sums,
    precondition,
    second_moments,
)
from alphatoken_curate.directions.sums import Sums, sums_of
from alphatoken_curate.directions.target import target_sums
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.moving import Moving
from alphatoken_curate.errors import ModelError
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import artifacts
from alphatoken_curate.runs.schema import BY_ESTIMATOR
from alphatoken_curate.scoring.outcome import largest
from alphatoken_curate.scoring.spec import ScorerSpec, counted, loading
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.signals.preference import Pairs, reference_sums
from alphatoken_curate.signals.stored import BatchScorer, RowResult, losses_of, row_signals
from alphatoken_curate.tokens.plan import Batch
from alphatoken_curate.tokens.tokenise import AnyRow, branches
from alphatoken_curate.urls import expanded

_INPUTS, _OUTPUTS = "inputs", "outputs"


class ShardScorer:
    """Called with the rows of a shard, gives their signals. Loads its model once; a pickled copy loads its own."""

    loads_itself = False
    """Whether it loads its model only where it needs it, and not before its first task."""

    def __init__(self, spec: ScorerSpec) -> None:
        self.spec, self.largest = spec, dict[str, float]()  # of each direction, once they are there
        self._scoring: ScoringModel | None = None
        self._scorer: BatchScorer | None = None
        self._groups: dict[str, list[int]] = {}  # by the prefix of its objective, the tokens of each
        self._kept_bases: dict[str, Tensor] | None = None
        self.moving: tuple[int, list[str], Moving] | None = None
        """While the iterations of --precondition astra go on: of which, along which directions (`solving`)."""

    def __reduce__(self) -> tuple[type[ShardScorer], tuple[ScorerSpec]]:
        """Pickle what it was built from, never the model."""
        return ShardScorer, (self.spec,)

    @property
    def scoring(self) -> ScoringModel:
        """The model that scores, captured; loaded when first asked for."""
        if self._scoring is None:
            self._scoring = self.spec.capture(self.spec.model)
            self._check_maps(self._scoring)
        return self._scoring

    def ready(self, progress: Progress) -> ScoringModel:
        """The same; that it is being loaded is said."""
        if self._scoring is None:
            progress.stage("loading model", 0)
        return self.scoring

    def gradient(
        self, kind: str, rows: Sequence[AnyRow], pairs: Pairs | None, progress: Progress, batch_tokens: int
    ) -> Sums:
        """The loss gradients whose mean over response tokens is the direction of that kind, of some of its rows."""
        scoring, weigh = self.scoring, pairs.weigh if pairs is not None else None
        # Retention and lookahead are true gradients; the published G is not.
        true = kind != artifacts.TARGET or self.spec.config.estimator != "published"
        batches = counted(rows, batch_tokens, progress)
        found, tokens = target_sums(scoring, batches, all_positions=true, weigh=weigh)
        if scoring.rest:
            found += rest_sums(scoring, counted(rows, batch_tokens, progress), weigh)[0]
        return sums_of(scoring.names, found, {"tokens": tokens})

    def infinite(self, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int) -> list[int]:
        """Which of some rows have a loss that is not finite, upwards."""
        losses, each, found = self.losses_by(progress), len(branches(rows[0])), set[int]()
        for batch in counted(rows, batch_tokens, progress):
            parts: tuple[Tensor, ...] = losses(batch).nll.split(batch.counts.tolist())
            found |= {n // each for n, nll in zip(batch.rows, parts, strict=True) if not nll.isfinite().all()}
        return sorted(found)

    def losses_by(self, progress: Progress) -> Callable[[Batch], Losses]:
        """What gives the losses of a batch."""
        return partial(losses_of, self.scoring)

    def factors(self, rows: Sequence[AnyRow], pairs: Pairs | None, progress: Progress, batch_tokens: int) -> Sums:
        """What the bases of --precondition kfac, ekfac and astra are made of, of some of its rows."""
        found = factor_sums(self.scoring, counted(rows, batch_tokens, progress), _weigh(pairs))
        names = [m.parameter for m in self.scoring.maps]
        sums = sums_of([f"{name}.{_INPUTS}" for name in names], found.inputs, {"units": found.units})
        sums.arrays.update(sums_of([f"{name}.{_OUTPUTS}" for name in names], found.outputs, {}).arrays)
        sums.counts.update(zip(names, found.seen, strict=True))
        return sums

    def bases(self, sums: Sums, progress: Progress, _batch_tokens: int) -> dict[str, NDArray[Any]]:
        """Those bases, of sums over all rows; for `kfac` all of its curvature."""
        maps, tensors = self.scoring.maps, self.scoring.near(sums.tensors())
        factors = Factors(
            inputs=[tensors[f"{m.parameter}.{_INPUTS}"] for m in maps],
            outputs=[tensors[f"{m.parameter}.{_OUTPUTS}"] for m in maps],
            seen=[sums.counts[m.parameter] for m in maps],
            units=sums.counts["units"],
        )
        sums.arrays.clear()
        return _arrays(factor_bases(self.spec.config.precondition, self.scoring, factors, progress.note))

    def moments(self, rows: Sequence[AnyRow], pairs: Pairs | None, progress: Progress, batch_tokens: int) -> Sums:
        """What the second moments of --precondition adam, ekfac and astra are made of, of some of its rows."""
        batches = counted(rows, batch_tokens, progress)
        found, units = moment_sums(self.scoring, batches, _weigh(pairs), self._bases())
        return sums_of([m.parameter for m in self.scoring.maps], found, {"units": units})

    def curvature(self, sums: Sums, progress: Progress, _batch_tokens: int) -> dict[str, NDArray[Any]]:
        """The curvature of those, of sums over all rows."""
        tensors = self.scoring.near(sums.tensors())
        found = [tensors[m.parameter] for m in self.scoring.maps]
        kind, units = self.spec.config.precondition, sums.counts["units"]
        made = second_moments(kind, self.scoring, found, units, self._bases(), progress.note)
        return _arrays(made)

    def _bases(self) -> dict[str, Tensor] | None:
        """The bases that second moments are along, where there are any."""
        if self.spec.config.precondition == "adam":
            return None
        if self._kept_bases is None:
            kept = self.spec.store.require(artifacts.PRECONDITION, part=artifacts.BASES)
            self._kept_bases = self.scoring.near(kept)
        return self._kept_bases

    def __call__(
        self, shard: int, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int
    ) -> list[RowResult | None]:
        """Signals of each row of a shard; None where one is not finite."""
        if not rows:
            return []
        reference, self._kept_bases, self.moving = self.spec.reference_losses(shard, rows), None, None
        return row_signals(
            self._batch_scorer(progress),
            rows,
            counted(rows, batch_tokens, progress),
            components=BY_ESTIMATOR[self.spec.config.estimator],
            objectives=self.spec.objectives,
            groups=self._groups,
            stability_weight=self.spec.config.stability_weight,
            reference_nll=reference,
            pairs=self.pairs(reference) if len(branches(rows[0])) > 1 else None,
        )

    def score(
        self, shard: int, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int
    ) -> tuple[list[RowResult | None], Mapping[str, float]]:
        """The same, and the largest number of each direction."""
        return self(shard, rows, progress, batch_tokens), self.largest

    def pairs(self, reference: Sequence[NDArray[np.float32]] | None) -> Pairs:
        """Eq. 14 for pairs of which the reference's nll is given sequence by sequence."""
        return Pairs(beta=self.spec.config.beta, reference=reference_sums(reference))

    def _check_maps(self, scoring: ScoringModel) -> None:
        found = {name: tuple(weight.shape) for name, weight in zip(scoring.names, scoring.weights, strict=True)}
        if self.spec.maps is not None and found != self.spec.maps:
            odd = sorted(found.items() ^ self.spec.maps.items())[0][0]
            raise ModelError(
                f"{self.spec.model.name}: its scoring blocks are not those the run was scored with ({odd} is missing or"
                " of another shape). A checkpoint must come from the run's model."
            )

    def _batch_scorer(self, progress: Progress) -> BatchScorer:
        if self._scorer is None:
            with loading("the directions that rows are scored along were made"):
                self._scorer = self._along_directions(progress)
        return self._scorer

    def _along_directions(self, progress: Progress) -> BatchScorer:
        scoring = self.scoring
        solved: Mapping[str, Tensor] = {}
        if self.spec.config.precondition == "astra":
            solved = scoring.near(self.spec.store.require(artifacts.SOLVED))
        made = {name: self._scaled(name, self._plain(name), solved) for name in self.spec.objectives}
        self.largest = {name: largest(self.spec.config, name, found) for name, found in made.items()}
        if not all(any(matrix.any() for matrix in direction) for direction in [*made.values()][1:]):
            progress.warn("Stability is 0: the blocks that score have the weights of the reference.")
        along = [*made.values(), *(self._scaled(name, found, solved) for name, found in self._of_groups())]
        return make_scorer(scoring, along, self.spec.config.estimator, self.spec.config.window)

    def unscaled(self) -> Iterator[tuple[str, Direction]]:
        """Each direction that curvature is to scale, as it is before: of an objective, or of one of its groups."""
        for objective in filter(self._is_scaled, self.spec.objectives):
            yield objective, self._plain(objective)
        yield from ((name, found) for name, found in self._of_groups() if self._is_scaled(name))

    def _of_groups(self) -> Iterator[tuple[str, Direction]]:
        """The directions of groups of rows, objective by objective, as they are before curvature scales them."""
        kinds = {"adapt": artifacts.TARGET_GROUPS}
        if self.spec.config.retention is not None:
            kinds["stab"] = artifacts.RETENTION_GROUPS
        for objective, kind in kinds.items() if self.spec.groups > 1 else ():
            stored = self.scoring.near(self.spec.store.require(kind))
            tokens = stored["tokens"].tolist()
            if len(tokens) == 1:
                continue  # of a single row
            self._groups[objective] = tokens
            for n in range(len(tokens)):
                yield f"{objective} {n}", [stored[f"{n} {name}"] for name in self.scoring.names]

    def _plain(self, objective: str) -> Direction:
        if objective == "adapt":
            return self._stored(artifacts.TARGET)
        if objective == "stab" and self.spec.config.retention is not None:
            return self._stored(artifacts.RETENTION)
        return self._drift()

    def _is_scaled(self, name: str) -> bool:
        """Whether the direction of an objective, or of a group of one, is scaled by curvature."""
        config = self.spec.config
        return config.precondition != "none" and (name.startswith("adapt") or config.precondition_stability)

    def _scaled(self, name: str, found: Direction, solved: Mapping[str, Tensor]) -> Direction:
        """By the curvature, where it was asked for; what iterations `solved` is there."""
        config = self.spec.config
        if not self._is_scaled(name):
            return found
        if solved:
            return [solved[f"{name} {m.parameter}"] for m in self.scoring.maps]
        return precondition(
            config.precondition,
            self.spec.store.require(artifacts.PRECONDITION),
            self.scoring,
            found,
            eps=config.precondition_eps,
            damping=config.precondition_damping,
        )

    def _stored(self, kind: str) -> Direction:
        stored, names = self.scoring.near(self.spec.store.require(kind)), self.scoring.names
        missing = [name for name in names if name not in stored]
        if missing:
            raise ModelError(
                f"{self.spec.store.path(kind)}: has no {missing[0]}: the reference has other blocks than the model."
                " It must be the model that was tuned."
            )
        return [stored[name] for name in names]

    def _drift(self) -> Direction:
        config, step = self.spec.config, None
        if config.drift == "lookahead" and config.lookahead_lr is not None:
            step = [config.lookahead_lr * g for g in self._stored(artifacts.LOOKAHEAD)]
        return drift_direction(self.scoring, self._fisher(), self._reference_weights(), step)

    def _fisher(self) -> Direction:
        if self.spec.estimates_fisher:
            return self._stored(artifacts.FISHER)
        return read_direction(expanded(self.spec.config.fisher), self.scoring, flag="--fisher")

    def _reference_weights(self) -> Direction:
        scoring, reference = self.scoring, self.spec.reference
        kept = self.spec.store.load(artifacts.REFERENCE)
        if kept is not None:
            return checked_weights(scoring, [kept[name] for name in scoring.names])
        found = read_weights(reference.files_read(), scoring) if reference.tensors_on_disk else None
        if found is None:  # renamed or merged on loading, and nothing else needed the reference so far
            found = self.spec.capture(reference).weights
        return checked_weights(scoring, found)


def _weigh(pairs: Pairs | None) -> Weigh:
    """How the losses of a unit become one: that of a row's mean, or of a pair."""
    return row_means if pairs is None else pairs.weigh


def _arrays(found: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors by name, as numpy has them."""
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}
