"""What runs a model over rows: the reference pass, and the scorer of a shard.

Both are built from a config and from files, and load their model when first asked, so that one process, many
processes or an outside engine can run the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.config import FISHER_MODES, ScoreConfig
from alphatoken_curate.directions.drift import checked_weights, drift_direction, on_disk, read_direction, read_weights
from alphatoken_curate.directions.fisher import fisher_diagonal
from alphatoken_curate.directions.generate import answer_room, pack, sample_answers, unpack
from alphatoken_curate.directions.losses import Weigh, row_means
from alphatoken_curate.directions.parameters import rest_fisher, rest_gradient
from alphatoken_curate.directions.precondition import estimate, precondition
from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.precision import narrow
from alphatoken_curate.errors import InputError, ModelError
from alphatoken_curate.models.devices import free_memory, resolve_device, resolve_dtype
from alphatoken_curate.models.likeness import check_alike
from alphatoken_curate.models.load import ModelSource, find_model, load_model
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import artifacts
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.runs.schema import BY_ESTIMATOR
from alphatoken_curate.runs.watched import Watched
from alphatoken_curate.scoring.identity import has_drift
from alphatoken_curate.scoring.outcome import largest
from alphatoken_curate.scoring.prepare import Prepared, fingerprint_fields
from alphatoken_curate.scoring.sources import digests_of
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.signals.preference import Pairs, reference_sums
from alphatoken_curate.signals.stored import BatchScorer, RowResult, plain_losses, row_signals
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches, sequences
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, branches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec:
    """All a scorer needs to know; picklable."""

    config: ScoreConfig
    model: ModelSource
    reference: ModelSource
    dtype: str
    device: str
    store: Store
    maps: Mapping[str, tuple[int, ...]] | None = None
    """Names and shapes that the linear maps of S must have, where the run knows them already."""

    @property
    def has_reference(self) -> bool:
        """Whether the reference is another model than the one that is scored."""
        return self.store.fields["model"] != self.store.fields["reference"]

    @property
    def has_drift(self) -> bool:
        """Whether the drift from the reference is a direction of this run, and not zero."""
        return has_drift(self.store.fields)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Prefixes of the signals of each direction: adaptation, stability and, beside it, the drift."""
        stability = ["stab"] if self.config.retention is not None else []
        drift = [("drift" if stability else "stab")] if self.has_drift else []
        return ("adapt", *stability, *drift)

    @property
    def passes(self) -> int:
        """How often a gradient goes over its rows: what is no linear map takes a pass of its own."""
        return 2 if self.config.parameters == "all" else 1

    @property
    def estimates_fisher(self) -> bool:
        """Whether the Fisher is ours to estimate, rather than a file the user brings."""
        return self.config.fisher in FISHER_MODES

    def load(self, source: ModelSource) -> PreTrainedModel:
        """A model of the run."""
        return self._load(source, self.dtype, self.device)

    def _load(self, source: ModelSource, dtype: str, device: str) -> PreTrainedModel:
        trusted, place = self.config.trust_remote_code, torch.device(device)
        return load_model(source, dtype=getattr(torch, dtype), device=place, trust_remote_code=trusted)

    def capture(self, source: ModelSource, model: PreTrainedModel | None = None) -> ScoringModel:
        """A model of the run, captured; it is loaded unless it is given.

        Where it runs in less than float32, the weights of S are as its files have them nonetheless, until it settles: a
        drift of a few steps is smaller than what rounding a weight to bfloat16 changes.
        """
        scoring = self._captured(model if model is not None else self.load(source))
        if narrow(getattr(torch, self.dtype)):
            exact = read_weights(source.weight_files(), scoring) if source.tensors_on_disk else None
            if exact is None:
                exact = self._captured(self._load(source, "float32", "cpu")).weights
            for own, weight in zip(scoring.weights, exact, strict=True):
                own.copy_(weight)
        return scoring

    def _captured(self, model: PreTrainedModel) -> ScoringModel:
        return ScoringModel(model, self.config.layers, self.config.parameters)  # type: ignore[arg-type]


def spec_of(prepared: Prepared, folder: Path, reuse: Path | None = None, watched: Watched | None = None) -> ScorerSpec:
    """What scores the rows of a run whose artifacts/ are in `folder`; those in `reuse` are taken over.

    `watched`: all files it is made from, since before they were read. Raises FingerprintError where one changed since,
    UsageError and ModelError where the models, device or dtype named are not there or do not go together.
    """
    config = prepared.config
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device.type, config.parameters)
    reference = prepared.source if config.reference in (None, config.model) else find_model(str(config.reference))
    check_alike(prepared.source, reference)
    fields = fingerprint_fields(prepared, reference, dtype)
    if watched is not None:
        watched.settle(digests_of(fields, prepared.inputs))
    return ScorerSpec(
        config=config,
        model=prepared.source,
        reference=reference,
        dtype=dtype,
        device=str(device),
        store=Store(folder=folder, fields=fields, reuse=reuse, watched=watched),
    )


class ReferencePass:
    """What is needed of the reference model: its Fisher, its weights of S and its losses. One model at a time."""

    def __init__(self, spec: ScorerSpec) -> None:
        self.spec = spec
        self._model: PreTrainedModel | None = None
        self._scoring: ScoringModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The reference, loaded when first asked for."""
        if self._model is None:
            self._model = self.spec.load(self.spec.reference)
        return self._model

    @property
    def scoring(self) -> ScoringModel:
        """The reference, captured."""
        if self._scoring is None:
            self._scoring = self.spec.capture(self.spec.reference, self.model)
        return self._scoring

    def ready(self, progress: Progress) -> ScoringModel:
        """The same; that it is being loaded is said."""
        if self._scoring is None:
            progress.stage("loading reference", 0)
        return self.scoring

    def answers(self, part: int, prompts: Sequence[TokenRow], progress: Progress, batch_tokens: int) -> list[TokenRow]:
        """Answers the reference generates to some prompts, kept in a part of their own."""
        store, config = self.spec.store, self.spec.config
        if (stored := store.find(artifacts.FISHER_SAMPLES, part)) is not None:
            progress.advance(int(answer_room(prompts, new_tokens=config.fisher_new_tokens, limit=None).sum()))
            return unpack(stored, prompts, where=store.path(artifacts.FISHER_SAMPLES, part))
        found = sample_answers(
            self.model,
            prompts,
            new_tokens=config.fisher_new_tokens,
            seed=config.seed,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        store.save(artifacts.FISHER_SAMPLES, pack(found), part)
        return found

    def fisher(self, rows: Sequence[TokenRow], progress: Progress, batch_tokens: int) -> None:
        """Estimate F from rows and keep it. Raises InputError where it is not finite."""
        sampled, seed = self.spec.config.fisher == "sampled", self.spec.config.seed
        self.ready(progress)
        progress.stage("Fisher of the reference", self.spec.passes * sum(len(row.input_ids) for row in rows))
        batches = counted(rows, batch_tokens, progress)
        found = fisher_diagonal(self.scoring, rows, batches, sampled=sampled, seed=seed)
        if self.scoring.rest:
            found += rest_fisher(self.scoring, rows, sampled=sampled, seed=seed, done=progress.advance)
        if not all(torch.isfinite(f).all() for f in found):
            raise InputError(
                "The Fisher of the reference is not finite, so stability cannot be scored: some row's loss under"
                " --reference is not, or its squared gradient overflows. Check its weights, or give a --fisher FILE."
            )
        self.spec.store.save(artifacts.FISHER, by_name(self.scoring, found))

    def weights(self) -> None:
        """Keep the reference's weights of S, unless its files give them tensor by tensor under the model's names."""
        reference, store = self.spec.reference, self.spec.store
        if store.has(artifacts.REFERENCE) or (reference.tensors_on_disk and self._model is None):
            return  # whoever needs them reads them, and no model is loaded for that alone
        if not (reference.tensors_on_disk and on_disk(reference.weight_files(), self.scoring)):
            store.save(artifacts.REFERENCE, by_name(self.scoring, self.scoring.weights))

    def losses(self, shard: int, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int) -> None:
        """Keep the reference's nll of a shard's response tokens, sequence by sequence, in one tensor."""
        if self.spec.store.has(artifacts.REFERENCE_NLL, shard):
            progress.advance(count_tokens(rows))
            return
        self.scoring.settle()  # the losses of the model that is scored are compared with these
        found = plain_losses(self.scoring, sequences(rows), counted(rows, batch_tokens, progress))
        nll = torch.cat([torch.empty(0), *map(torch.from_numpy, found)])
        self.spec.store.save(artifacts.REFERENCE_NLL, {"nll": nll}, shard)

    def close(self) -> None:
        """Drop the model."""
        self._model = self._scoring = None
        free_memory()


class ShardScorer:
    """Called with the rows of a shard, gives their signals. Loads its model once; a pickled copy loads its own."""

    def __init__(self, spec: ScorerSpec) -> None:
        self.spec, self.largest = spec, dict[str, float]()  # of each direction, once they are there
        self._scoring: ScoringModel | None = None
        self._scorer: BatchScorer | None = None

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
        self.spec.store.save(kind, by_name(self.scoring, found))

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
            self._scorer = make_scorer(scoring, [*made.values()], self.spec.config.estimator, self.spec.config.window)
        return self._scorer

    def _direction(self, objective: str) -> Direction:
        if objective == "adapt":
            found = self._stored(artifacts.TARGET)
        elif objective == "stab" and self.spec.config.retention is not None:
            found = self._stored(artifacts.RETENTION)
        else:
            found = self._drift()
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
        scoring, config = self.scoring, self.spec.config
        if self.spec.estimates_fisher:
            fisher = self._stored(artifacts.FISHER)
        else:
            fisher = read_direction(Path(config.fisher).expanduser(), scoring, flag="--fisher")
        step = None
        if config.drift == "lookahead" and config.lookahead_lr is not None:
            step = [config.lookahead_lr * g for g in self._stored(artifacts.LOOKAHEAD)]
        return drift_direction(scoring, fisher, self._reference_weights(), step)

    def _reference_weights(self) -> Direction:
        scoring, reference = self.scoring, self.spec.reference
        kept = self.spec.store.load(artifacts.REFERENCE, scoring.device)
        if kept is not None:
            return checked_weights(scoring, [kept[name] for name in scoring.names])
        found = read_weights(reference.weight_files(), scoring) if reference.tensors_on_disk else None
        if found is None:  # renamed or merged on loading, and nothing else needed the reference so far
            found = [w.to(scoring.device) for w in self.spec.capture(reference).weights]
        return checked_weights(scoring, found)


def count_tokens(rows: Sequence[AnyRow]) -> int:
    """Tokens of all sequences of rows: what progress is told in."""
    return sum(len(sequence.input_ids) for sequence in sequences(rows))


def counted(rows: Sequence[AnyRow], batch_tokens: int, progress: Progress) -> Iterator[Batch]:
    """The planned batches of rows, each reported when it is done."""
    for indices in plan_batches(rows, batch_tokens):
        yield collate(rows, indices)
        progress.advance(count_tokens([rows[i] for i in indices]))


def by_name(scoring: ScoringModel, direction: Direction) -> dict[str, Tensor]:
    """A direction under the names of its weights."""
    return dict(zip(scoring.names, direction, strict=True))
