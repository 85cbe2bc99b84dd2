"""What runs the model over rows: the directions it is scored along, and the scorer of a shard.

It is built from a config and from files, and loads its model when first asked, so that one process, many processes or
an outside engine can run the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from alphatoken_curate.directions.drift import checked_weights, drift_direction, read_direction, read_weights
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.losses import Weigh, row_means
from alphatoken_curate.directions.parameters import rest_gradient
from alphatoken_curate.directions.precondition import estimate, precondition
from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.errors import InputError, ModelError
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import artifacts
from alphatoken_curate.runs.schema import BY_ESTIMATOR
from alphatoken_curate.scoring.outcome import largest
from alphatoken_curate.scoring.spec import ScorerSpec, by_name, count_tokens, counted
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.signals.preference import Pairs, reference_sums
from alphatoken_curate.signals.stored import BatchScorer, RowResult, row_signals
from alphatoken_curate.tokens.plan import response_tokens, sequences
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, branches

_GROUPED = {artifacts.TARGET: artifacts.TARGET_GROUPS, artifacts.RETENTION: artifacts.RETENTION_GROUPS}


class ShardScorer:
    """Called with the rows of a shard, gives their signals. Loads its model once; a pickled copy loads its own."""

    def __init__(self, spec: ScorerSpec) -> None:
        self.spec, self.largest = spec, dict[str, float]()  # of each direction, once they are there
        self._scoring: ScoringModel | None = None
        self._scorer: BatchScorer | None = None
        self._groups: dict[str, list[int]] = {}  # by the prefix of its objective, the tokens of each

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
    ) -> None:
        """Make sure a mean loss gradient is in artifacts/. Raises InputError where the rows' loss is not finite."""
        if self.spec.store.has(kind):
            return
        self.ready(progress)
        progress.stage(f"{kind} gradient", count_tokens(rows) * self.spec.passes)
        self.spec.store.save(kind, by_name(self.scoring, self._gradient(kind, rows, pairs, progress, batch_tokens)))

    def group_gradients(self, kind: str, rows: Sequence[TokenRow], progress: Progress, batch_tokens: int) -> None:
        """The same of each group of target or retention rows."""
        if self.spec.store.has(_GROUPED[kind]):
            return
        self.ready(progress)
        dealt = deal(rows, self.spec.groups, self.spec.config.seed)
        progress.stage(f"{kind} gradient of {len(dealt)} groups", count_tokens(rows) * self.spec.passes)
        found = {"tokens": torch.tensor([response_tokens(group) for group in dealt])}
        for n, group in enumerate(dealt):
            each = by_name(self.scoring, self._gradient(kind, group, None, progress, batch_tokens))
            found |= {f"{n} {name}": tensor for name, tensor in each.items()}
        self.spec.store.save(_GROUPED[kind], found)

    def _gradient(
        self, kind: str, rows: Sequence[AnyRow], pairs: Pairs | None, progress: Progress, batch_tokens: int
    ) -> Direction:
        scoring, weigh = self.scoring, pairs.weigh if pairs is not None else None
        # Retention and lookahead are true gradients; the published G is not.
        true = kind != artifacts.TARGET or self.spec.config.estimator != "published"
        found = target_gradient(scoring, counted(rows, batch_tokens, progress), all_positions=true, weigh=weigh)
        if scoring.rest:
            found += rest_gradient(scoring, counted(rows, batch_tokens, progress), weigh)
        if not all(torch.isfinite(g).all() for g in found):
            raise InputError(
                f"The loss of the {kind} rows has no finite gradient, so it gives no direction to score by."
            )
        return found

    def curvature(self, rows: Sequence[AnyRow], pairs: Pairs | None, progress: Progress, batch_tokens: int) -> None:
        """Make sure the training curvature of --precondition is in artifacts/."""
        if self.spec.store.has(artifacts.PRECONDITION):
            return
        kind = self.spec.config.precondition
        self.ready(progress)
        progress.stage(f"{kind} curvature", count_tokens(rows) * (2 if kind == "ekfac" else 1))
        weigh: Weigh = pairs.weigh if pairs is not None else row_means
        found = estimate(kind, self.scoring, lambda: counted(rows, batch_tokens, progress), weigh, progress.note)
        self.spec.store.save(artifacts.PRECONDITION, found)

    def __call__(
        self, shard: int, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int
    ) -> list[RowResult | None]:
        """Signals of each row of a shard; None where one is not finite."""
        if not rows:
            return []
        reference = self.reference_losses(shard, rows)
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

    def pairs(self, reference: Sequence[NDArray[np.float32]] | None) -> Pairs:
        """Eq. 14 for pairs of which the reference's nll is given sequence by sequence."""
        return Pairs(beta=self.spec.config.beta, reference=reference_sums(reference))

    def reference_losses(self, shard: int, rows: Sequence[AnyRow]) -> list[NDArray[np.float32]] | None:
        """The reference's nll of each sequence's response tokens; None where it is the model itself."""
        if not self.spec.has_reference:
            return None
        stored = self.spec.store.require(artifacts.REFERENCE_NLL, part=shard)["nll"]
        return [part.numpy() for part in stored.split([int(row.response.sum()) for row in sequences(rows)])]

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
            scoring = self.scoring
            made = {objective: self._direction(objective) for objective in self.spec.objectives}
            self.largest = {name: largest(self.spec.config, name, found) for name, found in made.items()}
            if not all(any(matrix.any() for matrix in direction) for direction in [*made.values()][1:]):
                progress.warn("Stability is 0: the blocks that score have the weights of the reference.")
            along = [*made.values(), *self._of_groups()]
            self._scorer = make_scorer(scoring, along, self.spec.config.estimator, self.spec.config.window)
        return self._scorer

    def _of_groups(self) -> Iterator[Direction]:
        """The directions of groups of rows, objective by objective."""
        kinds = {"adapt": artifacts.TARGET_GROUPS}
        if self.spec.config.retention is not None:
            kinds["stab"] = artifacts.RETENTION_GROUPS
        for objective, kind in kinds.items() if self.spec.groups > 1 else ():
            stored = self.spec.store.require(kind, self.scoring.device)
            tokens = stored["tokens"].tolist()
            if len(tokens) == 1:
                continue  # of a single row
            self._groups[objective] = tokens
            for n in range(len(tokens)):
                yield self._scaled(objective, [stored[f"{n} {name}"] for name in self.scoring.names])

    def _direction(self, objective: str) -> Direction:
        if objective == "adapt":
            found = self._stored(artifacts.TARGET)
        elif objective == "stab" and self.spec.config.retention is not None:
            found = self._stored(artifacts.RETENTION)
        else:
            found = self._drift()
        return self._scaled(objective, found)

    def _scaled(self, objective: str, found: Direction) -> Direction:
        """By the curvature, where it was asked for."""
        config = self.spec.config
        if config.precondition == "none" or (objective != "adapt" and not config.precondition_stability):
            return found
        stored = self.spec.store.require(artifacts.PRECONDITION, self.scoring.device)
        return precondition(
            config.precondition,
            stored,
            self.scoring,
            found,
            eps=config.precondition_eps,
            damping=config.precondition_damping,
        )

    def _stored(self, kind: str) -> Direction:
        stored, names = self.spec.store.require(kind, self.scoring.device), self.scoring.names
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
        return read_direction(Path(self.spec.config.fisher).expanduser(), self.scoring, flag="--fisher")

    def _reference_weights(self) -> Direction:
        scoring, reference = self.scoring, self.spec.reference
        kept = self.spec.store.load(artifacts.REFERENCE, scoring.device)
        if kept is not None:
            return checked_weights(scoring, [kept[name] for name in scoring.names])
        found = read_weights(reference.weight_files(), scoring) if reference.tensors_on_disk else None
        if found is None:  # renamed or merged on loading, and nothing else needed the reference so far
            found = [w.to(scoring.device) for w in self.spec.capture(reference).weights]
        return checked_weights(scoring, found)
