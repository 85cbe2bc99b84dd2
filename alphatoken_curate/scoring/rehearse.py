"""The scorer of a rehearsal: what its portions owe to all response tokens, wherever they are done.

What a portion keeps among the artefacts while it lasts (`directions.rehearsal`) is of one token budget: another would
round otherwise. What comes of it is handed to whoever leads (`scoring.rehearsing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.lora import LoraTrainee
from alphatoken_curate.directions.losses import Losses
from alphatoken_curate.directions.rehearsal import Outcome, Rehearsal, Values, drift_loss, mean_loss
from alphatoken_curate.directions.shelves import Artefacts, Scratch
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.precision import narrow_kind
from alphatoken_curate.models.devices import free_memory
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.artifacts import REHEARSAL, Store
from alphatoken_curate.runs.atomic import in_place
from alphatoken_curate.scoring.courses import course_of, kept_room, optimiser_of, there_and_back
from alphatoken_curate.scoring.lora import base_of, load_base, lora_trainee
from alphatoken_curate.scoring.material import Material, put_away_in
from alphatoken_curate.scoring.meter import Meter
from alphatoken_curate.scoring.portions import Portion
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens
from alphatoken_curate.signals.rehearsed import exact_paths
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches, token_places, token_starts

ROOM = 0.4
"""Share of the free memory that adjoints going back together may take: as much goes to the graph of a batch."""

LOSSES = "losses"
"""The part of what a rehearsal keeps that has the losses of all tokens where the training begins."""

_ADJOINTS, _VALUES, _PLAN = "adjoint-", "values-", "plan"
"""Of a portion: how far the way back has come, what came of some outcomes, and how many go back together."""


class RehearsalScorer(ShardScorer):
    """Rehearses trainings of all rows: of those it is given, or of those put away among the artefacts."""

    loads_itself = True

    def __init__(self, spec: ScorerSpec) -> None:
        super().__init__(base_of(spec) if spec.config.rehearses_lora else spec)
        self._start = spec.model  # of a LoRA that goes on, the adapter
        self._begun: tuple[Trainee, Outcome | None] | None = None
        self._material: Material | None = None

    def losses(
        self, given: Material | None, share: int, of: int, progress: Progress, batch_tokens: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Loss (nll) and entropy of the response tokens of every `of`-th batch, where the training begins: (2, n).

        With where they are among those of all rows, (n,).
        """
        rows, losses = self._given(given).rows, self.losses_by(progress)
        plan, starts = plan_batches(rows, batch_tokens)[share::of], token_starts(rows)
        progress.stage("losses before the rehearsal", count_tokens([rows[i] for batch in plan for i in batch]))
        places, found = [np.empty(0, np.int64)], [np.empty((2, 0), np.float32)]
        for indices in plan:
            batch = collate(rows, indices)
            made = losses(batch)
            places.append(token_places(batch, starts))
            found.append(torch.stack([made.nll, made.entropy]).float().cpu().numpy())
            progress.advance(count_tokens([rows[i] for i in indices]))
        return np.concatenate(places), np.concatenate(found, axis=1)

    def rehearse(
        self, portion: Portion, given: Material | None, sharing: int, progress: Progress, batch_tokens: int
    ) -> Values:
        """What the outcomes of a portion owe to the response tokens of the rows that train.

        `sharing`: how many do as much with the same memory at the same time. Raises InputError where the training or an
        outcome is not finite.
        """
        material, config, own = self._given(given), self.spec.config, of_budget(self.spec.store, batch_tokens)
        training = material.training(config, self._nll(own, material, progress, batch_tokens))
        begun, self._begun = self._begin(progress), None  # what fails leaves it anywhere
        trainee, drift = begun
        outcomes = [mean_loss(rows, batch_tokens) for dealt in material.groups(self.spec).values() for rows in dealt]
        outcomes += [] if drift is None else [drift]
        mine = outcomes[portion.first : portion.end]
        with in_place(own.folder.parent):
            _sweep(own, portion)
            trainee.shelve_below(scratch_in(own, portion.name, trainee))
            together = self._at_once(trainee, own, portion, sharing)
            course = course_of(
                config, training.rows, portion.order, batch_tokens, training.loss, begins=training.begins
            )
            trainee.restart(config.seed + portion.order)
            rehearsal = rehearsal_in(own, portion.name, trainee, course, config)
            # There once, and back for each part of the outcomes: told as once there and once back.
            turns = 1 + math.ceil(len(mine) / together)
            each = [2 * count_tokens([training.rows[i] for i in step]) for step in course.steps]
            left = list(rehearsal.left(len(mine), at_once=together))
            told = f"rehearsal{portion.told(config.rehearse_seeds)}: {there_and_back(course)}"
            told += ", gone on with" if len(left) < turns * len(course.steps) else ""
            progress.stage(told, sum(each[k] // turns for k in left))
            found = rehearsal.run(mine, lambda k: progress.advance(each[k] // turns), at_once=together)
            trainee.forget_below()
        self._begun = begun
        return found

    def _given(self, given: Material | None) -> Material:
        if given is None:
            given = self._material = self._material or put_away_in(self.spec.store)
        return given

    def _nll(self, own: Store, material: Material, progress: Progress, batch_tokens: int) -> NDArray[np.float32]:
        """That of all response tokens, (N,): as whoever leads keeps it, but for where memory ran out since."""
        if (kept := own.load(REHEARSAL, part=LOSSES)) is not None:
            nll: NDArray[np.float32] = kept["nll"].numpy()
        else:
            places, found = self.losses(material, 0, 1, progress, batch_tokens)
            nll = found[0][np.argsort(places)]
        return nll

    def losses_by(self, progress: Progress) -> Callable[[Batch], Losses]:
        """What gives the losses of a batch where the training begins."""
        if self.spec.config.rehearses_lora:
            trainee, _ = self._begin(progress)
            trainee.restart(self.spec.config.seed)
            assert isinstance(trainee, LoraTrainee)
            return trainee.losses
        self._begun = None
        return super().losses_by(progress)

    def _begin(self, progress: Progress) -> tuple[Trainee, Outcome | None]:
        """What trains, and the drift."""
        if self._begun is None:
            self._begun = (self._lora if self.spec.config.rehearses_lora else self._whole)(progress)
        return self._begun

    def _whole(self, progress: Progress) -> tuple[Trainee, Outcome | None]:
        scoring = self.ready(progress)
        drift = self._drift_parts(scoring) if self.spec.has_drift else None
        trainee = trainee_of(self.spec.config, self._released(scoring), self.spec.dtype)
        return trainee, drift and drift_loss(*(trainee.of_direction(part) for part in drift))

    def _lora(self, progress: Progress) -> tuple[Trainee, Outcome | None]:
        """The same of a LoRA. Nothing is widened to float32 on the way but for the drift, whose Fisher is as large."""
        config, parts = self.spec.config, None
        if self.spec.has_drift:
            scoring = self.ready(progress)
            parts = self._fisher(), self._offset(scoring)
            model: Any = self._released(scoring)
        else:
            progress.stage("loading model", 0)
            model = load_base(self.spec)
        trainee = lora_trainee(config, model, self._start, self.spec.dtype)
        return trainee, parts and trainee.drift_loss(*parts)

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

    def _drift_parts(self, scoring: ScoringModel) -> tuple[Direction, Direction]:
        """The Fisher, and the weights that the drift is counted from."""
        if self.spec.has_reference:
            return self._fisher(), self._reference_weights()
        return self._fisher(), [w.detach().clone() for w in scoring.weights]

    def _at_once(self, trainee: Trainee, own: Store, portion: Portion, sharing: int) -> int:
        """How many outcomes of a portion go back together: what memory there was for when it began.

        Where there is less now, as for one that was killed for what it took, it goes back anew by fewer; but not once
        some outcomes have come back, with which the others go on.
        """
        part = f"{portion.name}-{_PLAN}"
        fits, kept = at_once(trainee, len(portion), self.spec.config, sharing), own.load(REHEARSAL, part=part)
        if kept is not None and (int(kept["at_once"]) <= fits or portion.kept(own, _VALUES)):
            return int(kept["at_once"])
        for path in portion.kept(own, _ADJOINTS):
            path.unlink()
        own.save(REHEARSAL, {"at_once": torch.tensor([fits])}, part)
        return fits


def trainee_of(config: ScoreConfig, model: Any, dtype: str) -> Trainee:
    """What trains in the rehearsal of a config, in a run of that dtype."""
    return Trainee(model, config.layers, config.parameters, dtype=narrow_kind(dtype))  # type: ignore[arg-type]


def of_budget(store: Store, batch_tokens: int) -> Store:
    """The same store of what is of one token budget alone."""
    return replace(store, fields={**store.fields, "batch_tokens": batch_tokens})


def rehearsal_in(store: Store, prefix: str, trainee: Trainee, course: Course, config: ScoreConfig) -> Rehearsal:
    """A rehearsal that keeps its states in a store, with the paths that a config asks for.

    Those of a LoRA are small: where all have room no step is taken twice.
    """
    paths = None if config.estimator == "influence" else exact_paths(trainee, course.loss)
    states, steps = Artefacts(store, trainee.device, prefix=prefix), scratch_in(store, prefix, trainee)
    return Rehearsal(trainee, course, states, steps=steps, paths=paths, room=kept_room(config))


def scratch_in(store: Store, prefix: str, trainee: Trainee) -> Scratch:
    """Where it keeps what none goes on from."""
    return Scratch(store.folder, trainee.device, name=f"{REHEARSAL}.{prefix}")


def at_once(trainee: Trainee, outcomes: int, config: ScoreConfig, sharing: int = 1) -> int:
    """How many of so many outcomes there is memory for together; parts of about equal number.

    `sharing`: how many such rehearsals have the memory that is free.
    """
    return together(outcomes, int(fitting(trainee, config) / sharing))


def fitting(trainee: Trainee, config: ScoreConfig) -> float:
    """How many outcomes the free memory has room for."""
    held = 2 + len(optimiser_of(config, 1).start([w.detach() for w in trainee.weights[:1]]).slots)
    each = held * sum(w.numel() * w.element_size() for w in trainee.weights)
    return ROOM * Meter(trainee.device).room() / each


def together(outcomes: int, fits: int) -> int:
    """How many of so many outcomes go back together where so many fit: parts of about equal number."""
    return math.ceil(outcomes / math.ceil(outcomes / max(1, fits)))


def _sweep(store: Store, portion: Portion) -> None:
    """Take away what one that was killed at a portion was writing, or kept for itself."""
    stem = store.path(REHEARSAL).stem
    for pattern in (f".{stem}-{portion.name}-*.tmp", f".{REHEARSAL}.{portion.name}.{'?' * 16}.tmp"):
        for path in [*store.folder.glob(pattern)]:
            path.unlink(missing_ok=True)
