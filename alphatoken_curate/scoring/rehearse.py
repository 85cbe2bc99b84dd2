"""The scorer of a rehearsal: all rows are rehearsed before the first shard is written, and each shard takes its part.

What the rehearsal keeps among the artefacts while it lasts (`directions.rehearsal`) is of one token budget: another
would round otherwise. What it gives, the columns of all response tokens, is kept until the run is deleted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.lora import LoraTrainee
from alphatoken_curate.directions.losses import Losses
from alphatoken_curate.directions.rehearsal import (
    Course,
    Outcome,
    Rehearsal,
    Values,
    drift_loss,
    mean_loss,
)
from alphatoken_curate.directions.shelves import Artefacts, Scratch
from alphatoken_curate.directions.step_losses import TOKENS, StepLoss
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.directions.waypoints import VALUES
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.precision import narrow_kind
from alphatoken_curate.models.devices import free_memory
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.artifacts import REHEARSAL, Store
from alphatoken_curate.runs.schema import BY_ESTIMATOR, ERRORS
from alphatoken_curate.scoring.courses import course_of, kept_room, optimiser_of, pair_loss, there_and_back
from alphatoken_curate.scoring.job import Job
from alphatoken_curate.scoring.lora import base_of, load_base, lora_trainee
from alphatoken_curate.scoring.meter import Meter
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens, counted
from alphatoken_curate.signals import composite
from alphatoken_curate.signals.preference import pair_terms
from alphatoken_curate.signals.rehearsed import columns, exact_paths
from alphatoken_curate.signals.stored import RowResult, losses_of, spread
from alphatoken_curate.tokens.plan import Batch, response_tokens, token_places, token_starts
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow, branches
from alphatoken_curate.wording import count

ROOM = 0.4
"""Share of the free memory that adjoints going back together may take: as much goes to the graph of a batch."""

FEW_ROWS = 100
"""Target rows of which fewer are warned of: a cut by their values learns them by heart."""

MUCH_OF_A_STEP = 0.05
"""What the root term may change of the steps before it is warned of."""

COLUMNS, _LOSSES, _PLAN = "columns", "losses", "plan"
"""Parts of what a rehearsal keeps: what came of it, and what it keeps while it lasts."""

_ADJOINTS, _VALUES = "-adjoint-", f"-{VALUES.format('')}"
"""In the names of its adjoints, and of the values of some outcomes, of any order and window."""


class RehearsalScorer(ShardScorer):
    """Gives the signals of a shard's rows from a rehearsal of all rows of a job."""

    loads_itself = True

    def __init__(self, spec: ScorerSpec, job: Job) -> None:
        super().__init__(base_of(spec) if spec.config.rehearses_lora else spec)
        self._start = spec.model  # of a LoRA that goes on, the adapter
        self._begun: tuple[LoraTrainee, Outcome | None] | None = None
        self.rows, self.shards, self.target, self.retention = [*job.rows], job.shards, job.target, job.retention
        self._paired, self._starts = job.layout.kind == "preference", token_starts(self.rows)
        keys = [(row.row_id, row.turn) for row in self.rows]
        ends = self._starts[:: len(job.layout.branches)].tolist()
        self._places = {key: slice(*both) for key, both in zip(keys, itertools.pairwise(ends), strict=True)}

    def rehearse(self, progress: Progress, batch_tokens: int) -> None:
        """Make sure the columns of all response tokens are in artifacts/.

        Raises InputError where the training or an outcome is not finite.
        """
        store = self.spec.store
        if not store.is_made(REHEARSAL, COLUMNS):
            found = self._made(progress, batch_tokens)
            store.save(REHEARSAL, {name: torch.from_numpy(column) for name, column in found.items()}, COLUMNS)
        for path in store.parts(REHEARSAL):
            if path != store.path(REHEARSAL, COLUMNS):
                path.unlink()

    def __call__(
        self, shard: int, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int
    ) -> list[RowResult | None]:
        """Signals of each row of a shard; None where its loss is not finite. Nothing is computed here."""
        kept = self.spec.reference_losses(shard, rows)
        reference = iter(kept or ())
        progress.advance(count_tokens(rows))
        return [self._result(row, None if kept is None else [next(reference) for _ in branches(row)]) for row in rows]

    def _result(self, row: AnyRow, reference_nll: Sequence[NDArray[np.float32]] | None) -> RowResult | None:
        """Of its columns, and the reference's nll of each branch."""
        parts = {name: column[self._place(row)] for name, column in self._columns.items()}
        if reference_nll is not None:
            parts["reference_nll"] = np.concatenate(reference_nll)
        if not all(np.isfinite(column).all() for column in parts.values()):
            return None
        starts = token_starts([row])
        found, gain = [], []
        for branch, (first, end) in zip(branches(row), itertools.pairwise(starts.tolist()), strict=True):
            mine = {name: column[first:end] for name, column in parts.items()}
            gain.append((mine.get("reference_nll", mine["nll"]).astype(np.float64) - mine["nll"]).sum())
            found.append(spread(mine, branch))
        if not isinstance(row, PairRow):
            return RowResult(branches=tuple(found))
        terms = pair_terms(self.spec.config.beta, np.array(gain))
        return RowResult(branches=tuple(found), omega=float(terms.omega[0]), margin=float(terms.margin[0]))

    def _place(self, row: AnyRow) -> slice:
        """Where its tokens are among those of all rows; of a pair those of both branches."""
        return self._places[row.row_id, row.turn]

    @cached_property
    def _columns(self) -> dict[str, NDArray[np.float32]]:
        """(N,) each, by the names they are stored under."""
        config = self.spec.config
        kept = self.spec.store.require(REHEARSAL, part=COLUMNS)
        found = {name: tensor.numpy() for name, tensor in kept.items()}
        if "adapt_error" in found:
            found["value_error"] = composite.value_error(found, config.stability_weight)
        known = BY_ESTIMATOR[config.estimator]
        if known.adaptation[0] in found:
            found["value"] = composite.value(found, known, stability_weight=config.stability_weight)
        return found

    # ------------------------------------------------------------------------------------------------ before shards

    def _made(self, progress: Progress, batch_tokens: int) -> dict[str, NDArray[np.float32]]:
        """(N,) of each column; NaN, but for the loss, in rows whose loss is not finite, and which do not train."""
        if len(self.target) < FEW_ROWS:
            progress.warn(
                f"{count(len(self.target), 'target row')}: a cut by rehearsed values learns so few by heart."
                " Hundreds of --target rows serve, or a mild use: --weights tilt:0.25."
            )
        config = self.spec.config
        if narrow_kind(self.spec.dtype) is not None and config.rehearse_optimizer == "adamw":
            progress.warn(
                f"--dtype {self.spec.dtype}: AdamW steps along the sign of a gradient near 0, which is rounding here."
                f" Values are off by much at --rehearse-root {config.root:g}: give --dtype float32."
            )
        own = replace(self.spec.store, fields={**self.spec.store.fields, "batch_tokens": batch_tokens})
        found = self._losses(own, progress, batch_tokens)
        reference = self._reference_nll() if self._paired and self.spec.has_reference else found["nll"]
        known = np.isfinite(found["nll"]) & np.isfinite(reference)
        finite = [row for row in self.rows if known[self._place(row)].all()]
        if finite:
            mine = np.concatenate([np.arange(s.start, s.stop) for s in map(self._place, finite)])
            loss = pair_loss(config, finite, reference[mine]) if self._paired else TOKENS
            for name, column in self._rehearsed(finite, loss, own, progress, batch_tokens).items():
                found[name] = np.full(len(found["nll"]), np.nan, np.float32)
                found[name][mine] = column
        return found

    def _reference_nll(self) -> NDArray[np.float32]:
        """That of all response tokens, (N,)."""
        kept = (self.spec.reference_losses(n, rows) for n, rows in enumerate(self.shards) if rows)
        return np.concatenate([part for parts in kept for part in parts or ()])

    def _losses(self, own: Store, progress: Progress, batch_tokens: int) -> dict[str, NDArray[np.float32]]:
        """Loss (nll) and entropy of all response tokens where the training begins, (N,) each."""
        if (kept := own.load(REHEARSAL, part=_LOSSES)) is None:
            losses = self._losses_by(progress)
            progress.stage("losses before the rehearsal", count_tokens(self.rows))
            found = np.empty((2, self._starts[-1]), np.float32)
            for batch in counted(self.rows, batch_tokens, progress):
                made, places = losses(batch), token_places(batch, self._starts)
                found[:, places] = torch.stack([made.nll, made.entropy]).float().cpu().numpy()
            kept = {"nll": torch.from_numpy(found[0]), "entropy": torch.from_numpy(found[1])}
            own.save(REHEARSAL, kept, _LOSSES)
        return {name: tensor.numpy() for name, tensor in kept.items()}

    def _rehearsed(
        self, rows: Sequence[AnyRow], loss: StepLoss, own: Store, progress: Progress, batch_tokens: int
    ) -> dict[str, NDArray[np.float32]]:
        """The columns of the response tokens of some rows, over all orders."""
        config, known = self.spec.config, BY_ESTIMATOR[self.spec.config.estimator]
        trainee, drift = self._begin_lora(progress) if config.rehearses_lora else self._begin(progress)
        self._begun = None
        trainee.shelve_below(Scratch(own.folder, trainee.device))
        groups = {"adapt": self._dealt(self.target)}
        if self.retention:
            groups["stab"] = self._dealt(self.retention)
        outcomes: list[Outcome] = [mean_loss(group, batch_tokens) for dealt in groups.values() for group in dealt]
        counts = {name: [response_tokens(group) for group in dealt] for name, dealt in groups.items()}
        if drift is not None:
            outcomes.append(drift)
            counts["drift" if self.retention else "stab"] = [1]
        together = self._at_once(trainee, len(outcomes), own)
        orders = []
        for n in range(config.rehearse_seeds):
            course = course_of(config, rows, n, batch_tokens, loss)
            trainee.restart(config.seed + n)
            rehearsal = rehearsal_in(own, str(n), trainee, course, config)
            each = [count_tokens([rows[i] for i in step]) for step in course.steps]
            order = f", order {n + 1} of {config.rehearse_seeds}" if config.rehearse_seeds > 1 else ""
            turns = 1 + math.ceil(len(outcomes) / together)
            progress.stage(f"rehearsal{order}: {there_and_back(course)}", turns * sum(each))
            orders.append(rehearsal.run(outcomes, partial(_advance, progress, each), at_once=together))
        trainee.forget_below()
        _tell_of_root(orders, config, progress)
        found = columns(orders, counts, known)
        errors = {f"{name}_error" for name, dealt in groups.items() if len(dealt) > 1}
        kept = (set(known.signals) - set(ERRORS)) | errors
        return {name: column.astype(np.float32) for name, column in found.items() if name in kept}

    def _losses_by(self, progress: Progress) -> Callable[[Batch], Losses]:
        """What gives the losses of a batch where the training begins."""
        if self.spec.config.rehearses_lora:
            return self._begin_lora(progress)[0].losses
        return partial(losses_of, self.ready(progress))

    def _begin(self, progress: Progress) -> tuple[Trainee, Outcome | None]:
        """What trains, and the drift."""
        scoring = self.ready(progress)
        drift = self._drift_parts(scoring) if self.spec.has_drift else None
        trainee = trainee_of(self.spec.config, self._released(scoring), self.spec.dtype)
        return trainee, drift and drift_loss(*(trainee.of_direction(part) for part in drift))

    def _begin_lora(self, progress: Progress) -> tuple[LoraTrainee, Outcome | None]:
        """The same of a LoRA. Nothing is widened to float32 on the way but for the drift, whose Fisher is as large."""
        if self._begun is None:
            config, parts = self.spec.config, None
            if self.spec.has_drift:
                scoring = self.ready(progress)
                parts = self._fisher(), self._offset(scoring)
                model: Any = self._released(scoring)
            else:
                progress.stage("loading model", 0)
                model = load_base(self.spec)
            trainee = lora_trainee(config, model, self._start, self.spec.dtype)
            self._begun = trainee, parts and trainee.drift_loss(*parts)
        return self._begun

    def _released(self, scoring: ScoringModel) -> Any:
        """The model as it was before it was captured."""
        self._scoring = None
        scoring.release_model()
        free_memory()
        return scoring.model

    def _offset(self, scoring: ScoringModel) -> Direction | None:
        """How far the model's weights are from the reference's; None where that is what the training begins with."""
        if not self.spec.has_reference:
            return None
        found = zip(scoring.weights, self._reference_weights(), strict=True)
        return [w.detach() - r.to(w) for w, r in found]

    def _dealt(self, rows: Sequence[TokenRow]) -> list[list[TokenRow]]:
        """Rows in the groups that errors are told by; all in one without errors."""
        return deal(rows, self.spec.groups, self.spec.config.seed)

    def _drift_parts(self, scoring: ScoringModel) -> tuple[Direction, Direction]:
        """The Fisher, and the weights that the drift is counted from."""
        if self.spec.has_reference:
            return self._fisher(), self._reference_weights()
        return self._fisher(), [w.detach().clone() for w in scoring.weights]

    def _at_once(self, trainee: Trainee, outcomes: int, own: Store) -> int:
        """How many outcomes go back together: what memory there was for when the rehearsal began.

        Where there is less now, as for one that was killed for what it took, it goes back anew by fewer; but not once
        some outcomes have come back, with which the others go on.
        """
        fits, kept = at_once(trainee, outcomes, self.spec.config), own.load(REHEARSAL, part=_PLAN)
        if kept is not None and (int(kept["at_once"]) <= fits or self._came_back(own)):
            return int(kept["at_once"])
        # Backwards by name: what says that adjoints are there goes before they do.
        for path in reversed(own.parts(REHEARSAL)):
            if _ADJOINTS in path.name:
                path.unlink()
        own.save(REHEARSAL, {"at_once": torch.tensor([fits])}, _PLAN)
        return fits

    def _came_back(self, own: Store) -> bool:
        """Whether the values of some outcomes are there, of any order."""
        return any(_VALUES in path.name for path in own.parts(REHEARSAL))


def trainee_of(config: ScoreConfig, model: Any, dtype: str) -> Trainee:
    """What trains in the rehearsal of a config, in a run of that dtype."""
    return Trainee(model, config.layers, config.parameters, dtype=narrow_kind(dtype))  # type: ignore[arg-type]


def rehearsal_in(store: Store, prefix: str, trainee: Trainee, course: Course, config: ScoreConfig) -> Rehearsal:
    """A rehearsal that keeps its states in a store, with the paths that a config asks for.

    Those of a LoRA are small: where all have room no step is taken twice.
    """
    paths = None if config.estimator == "influence" else exact_paths(trainee, course.loss)
    states, steps = Artefacts(store, trainee.device, prefix=prefix), Scratch(store.folder, trainee.device)
    return Rehearsal(trainee, course, states, steps=steps, paths=paths, room=kept_room(config))


def at_once(trainee: Trainee, outcomes: int, config: ScoreConfig) -> int:
    """How many of so many outcomes there is memory for together; parts of about equal number."""
    held = 2 + len(optimiser_of(config, 1).start([w.detach() for w in trainee.weights[:1]]).slots)
    each = held * sum(w.numel() * w.element_size() for w in trainee.weights)
    fits = max(1, int(ROOM * Meter(trainee.device).room() / each))
    return math.ceil(outcomes / math.ceil(outcomes / fits))


def _advance(progress: Progress, each: Sequence[int], k: int) -> None:
    progress.advance(each[k])


def _tell_of_root(orders: Sequence[Values], config: ScoreConfig, progress: Progress) -> None:
    share = max(order.root_share for order in orders)
    if share > MUCH_OF_A_STEP:
        progress.warn(
            f"--rehearse-root {config.root:g} changes the steps by {share:.0%} of their length: another"
            " training than the one to come. Give a smaller one."
        )
