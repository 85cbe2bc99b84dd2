"""What a scoring would take, in seconds and bytes: each of its stages is tried on two of its own batches.

Of a stage the seconds are a + b * tokens + c * sum of T^2 over its rows, T their padded length: a is what it takes
beside its batches, b and c go through one batch of shorter and one of longer rows. The peak is that of all trials, each
of which begins with the stage's largest batch. Not counted: writing, and making the mask.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions import precondition
from alphatoken_curate.directions.fisher import fisher_diagonal
from alphatoken_curate.directions.generate import answer_room, chunks, prompt_tokens, sample_answers
from alphatoken_curate.directions.losses import row_means
from alphatoken_curate.directions.parameters import rest_gradient, rest_of_batch
from alphatoken_curate.directions.sums import in_parts
from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.engine.placement import told
from alphatoken_curate.errors import CurateError
from alphatoken_curate.models.devices import devices_of, kind_of, names_of, taking_threads
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.scoring import solving
from alphatoken_curate.scoring.budget import out_of_memory
from alphatoken_curate.scoring.courses import course_of, there_and_back
from alphatoken_curate.scoring.lora import base_of, load_base, lora_trainee
from alphatoken_curate.scoring.meter import Meter
from alphatoken_curate.scoring.prepare import FISHER_DRAW, LOOKAHEAD_DRAW, PRECONDITION_DRAW, Prepared, drawn, prepare
from alphatoken_curate.scoring.probes import Size, choose, predict, size_of
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.rehearse import trainee_of
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.shelf import Place
from alphatoken_curate.scoring.spec import ScorerSpec, spec_of
from alphatoken_curate.scoring.steps import Tried, tried_steps
from alphatoken_curate.scoring.trial import blank, rehearsal_budget, sample_of, tokens_of, tried, untried
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.signals.stored import plain_losses
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, chosen
from alphatoken_curate.wording import count

_STEPS = (2, 10)
"""Tokens that are generated to find what one costs."""

T = TypeVar("T")

Batches = Callable[[], Iterator[Batch]]
"""Gives the batches of a stage, as often as it goes over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """A stage of a scoring, and the seconds it would take one process."""

    name: str
    seconds: float
    pieces: int = 1
    """That workers share: of one, the others wait, or do the same."""

    def by(self, workers: int) -> float:
        """Seconds by so many workers, each as fast as one alone: pieces are taken to be alike."""
        return self.seconds * math.ceil(self.pieces / workers) / self.pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalEstimate(StageEstimate):
    """The stage of a rehearsal, whose portions are each a training of their own: `steps` say what they take."""

    steps: Tried

    def by(self, workers: int) -> float:
        """As `StageEstimate`."""
        return self.steps.seconds(workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a scoring would take from end to end, writing apart."""

    stages: tuple[StageEstimate, ...]
    """In their order; a stage that the settings do not ask for is not there."""
    peak_bytes: int
    """Most memory in use at a time: of the card on CUDA, of the whole process elsewhere."""
    batch_tokens: int
    """The budget that was tried: what `auto` came to."""
    placement: tuple[str, ...] = ()
    """In words: where the model lies, and the directions of S beside it or what a rehearsal keeps on disk."""

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def by(self, workers: int) -> tuple[float, float]:
        """Seconds by so many workers, and the share of their time in which they are at work."""
        seconds = sum(stage.by(workers) for stage in self.stages)
        return seconds, self.seconds / (workers * seconds)

    def kept_by(self, workers: int) -> str:
        """In words: what lies on disk of a rehearsal by so many workers; empty without one."""
        kept = sum(stage.steps.kept_bytes(workers) for stage in self.stages if isinstance(stage, RehearsalEstimate))
        return f"; {kept / 2**20:,.1f} MiB of states on disk at most" if kept else ""


def estimate(
    config: ScoreConfig, progress: Progress | None = None, place: Place | None = None
) -> tuple[Prepared, Estimate]:
    """Read the rows and try every stage of their scoring. Loads each model, writes nothing but rows in `place`.

    Raises what `score` raises before it writes, and CurateError where memory does not last for a trial.
    """
    with taking_threads(config.threads):
        return _estimated(config, place, devices_of(config.device), progress or Silent())


def _estimated(
    config: ScoreConfig, place: Place | None, devices: tuple[torch.device, ...], progress: Progress
) -> tuple[Prepared, Estimate]:
    meter = Meter(*devices)
    began = meter.now()
    prepared = prepare(config, place)
    spec = spec_of(prepared, Path(os.devnull), names_of(devices))  # nothing is kept, and nothing found
    trials = _Trials(prepared, spec, meter, progress)
    trials.stages.append(StageEstimate(name="reading rows", seconds=meter.now() - began))
    try:
        return prepared, trials.run()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise CurateError(
            f"Memory ran out while batches of {trials.budget} tokens were tried. Give a smaller --batch-tokens, fewer"
            " --layers or a shorter --max-length."
        ) from error


class _Trials:
    """The stages of one scoring, in their order, and what was found of them so far."""

    def __init__(self, prepared: Prepared, spec: ScorerSpec, meter: Meter, progress: Progress) -> None:
        self.prepared, self.spec, self.config, self.meter, self.progress = prepared, spec, spec.config, meter, progress
        self.stages: list[StageEstimate] = []
        self.shards = prepared.rows.shards
        self.budget = 0 if self.config.batch_tokens == "auto" else self.config.batch_tokens

    def run(self) -> Estimate:
        """Try everything."""
        if self.spec.has_drift or self.spec.has_reference:
            self._reference()
        if self.config.rehearses_lora:
            return self._lora()
        scorer = ShardScorer(self.spec)
        scoring = self._timed("loading the model", lambda: scorer.scoring)
        placement = self._placement(scoring)
        self._find_budget(scorer)
        if self.config.rehearses:
            name = "losses before the rehearsal"
            self._try(name, self.shards, lambda batches: plain_losses(scoring, [], batches()), pieces=0)
            model = scoring.model
            scoring.release_model()
            trainee = partial(trainee_of, self.config, model, self.spec.dtype)
            placement = (*placement, self._rehearsal(self._timed("preparing the rehearsal", trainee)))
        else:
            self._directions(scoring)
            self._scoring(scoring)
        return self._found(placement)

    def _lora(self) -> Estimate:
        """The model is not captured for it."""
        spec = base_of(self.spec)
        self.budget = self.budget or rehearsal_budget(kind_of(self.spec.device))
        model = self._timed("loading the model", partial(load_base, spec))
        trainee = self._timed(
            "preparing the rehearsal", lambda: lora_trainee(self.config, model, self.spec.model, spec.dtype)
        )
        placement = (told(model, trainee.layers, spec.placement),)

        def losses(batches: Batches) -> None:
            for batch in batches():
                trainee.losses(batch)

        self._try("losses before the rehearsal", self.shards, losses, pieces=0)
        return self._found((*placement, self._rehearsal(trainee)))

    def _found(self, placement: tuple[str, ...]) -> Estimate:
        return Estimate(
            stages=tuple(self.stages),
            peak_bytes=self.meter.peak(),
            batch_tokens=self.budget,
            placement=placement,
        )

    def _placement(self, scoring: ScoringModel) -> tuple[str, ...]:
        where = told(scoring.model, scoring.layers, self.spec.placement)
        if self.config.rehearses:
            return (where,)
        each = sum(4 * w.numel() for w in scoring.weights) / 2**20  # float32, until they settle
        return (
            where,
            f"{count(self.spec.directions, 'direction')} of {each:,.1f} MiB each, beside the weights they move",
        )

    def _reference(self) -> None:
        spec, config, reference = self.spec, self.config, ReferencePass(self.spec)
        estimates = spec.has_drift and spec.estimates_fisher
        if not estimates and not spec.has_reference:
            return
        scoring = self._timed("loading the reference", lambda: reference.scoring)
        self._find_budget(reference)
        if estimates:
            of: Sequence[AnyRow] = self.prepared.prompts.rows or self.prepared.rows
            rows = [chosen(row) for row in drawn(of, config.fisher_rows, config.seed, FISHER_DRAW)]
            if config.fisher == "generate":
                rows = self._answers(reference.answering, rows)
                scoring = reference.scoring
            self._fisher(scoring, rows)
        if spec.has_reference:
            scoring.settle()
            pieces = len(self.shards)
            self._try("reference losses", self.shards, lambda batches: plain_losses(scoring, [], batches()), pieces)
        reference.close()

    def _fisher(self, scoring: ScoringModel, rows: list[TokenRow]) -> None:
        sampled, seed = self.config.fisher == "sampled", self.config.seed

        def work(batches: Batches) -> None:
            fisher_diagonal(scoring, rows, batches(), sampled=sampled, seed=seed)

        def rest(batches: Batches) -> None:
            for batch in batches():
                rest_of_batch(scoring, batch)

        self._try("Fisher of the reference", [rows], work, len(in_parts(rows)))
        if scoring.rest:  # row by row
            self._try("Fisher of all parameters", [rows], rest, len(in_parts(rows)), budget=1)

    def _directions(self, scoring: ScoringModel) -> None:
        config, prepared = self.config, self.prepared
        exact = "published" not in config.estimator
        groups = [f" of {self.spec.groups} groups"] if self.spec.groups > 1 else []
        for behind in ("", *groups):
            self._gradient(f"target gradient{behind}", scoring, prepared.target_rows, all_positions=exact)
        for behind in ("", *groups) if config.retention is not None else ():
            self._gradient(f"retention gradient{behind}", scoring, prepared.retention.rows)
        if config.drift == "lookahead":
            rows = drawn(prepared.rows, config.lookahead_rows, config.seed, LOOKAHEAD_DRAW)
            self._gradient("lookahead gradient", scoring, rows)
        if config.precondition != "none":
            kind, stored = config.precondition, dict[str, Tensor]()
            rows = drawn(prepared.rows, config.precondition_rows, config.seed, PRECONDITION_DRAW)
            pieces = len(in_parts(rows))

            def curvature(batches: Batches) -> None:
                stored.update(precondition.estimate(kind, scoring, batches, row_means))

            self._try(f"{kind} curvature", [rows], curvature, pieces)
            if kind == "astra":
                work = partial(solving.tried, self.spec, scoring, stored)
                self._try(solving.NAME, [rows], work, pieces, times=config.precondition_iterations)

    def _gradient(
        self, name: str, scoring: ScoringModel, rows: Sequence[AnyRow], *, all_positions: bool = True
    ) -> None:
        def work(batches: Batches) -> None:
            found = [target_gradient(scoring, batches(), all_positions=all_positions)]  # held beside what follows
            if scoring.rest:
                found.append(rest_gradient(scoring, batches()))

        self._try(name, [rows], work, len(in_parts(rows)))

    def _scoring(self, scoring: ScoringModel) -> None:
        scorer = make_scorer(scoring, blank(scoring, self.spec.directions), self.config.estimator, self.config.window)

        def score(batches: Batches) -> None:
            for batch in batches():
                scorer.score(batch)

        self._try("scoring", self.shards, score, len(self.shards))

    def _rehearsal(self, trainee: Trainee) -> str:
        """Its seconds; returns in words what is kept on disk."""
        course = course_of(self.config, [*self.prepared.rows], 0, self.budget)
        beside = [*self.prepared.target_rows, *self.prepared.retention.rows]
        tried = tried_steps(course, trainee, beside, self.spec, self.meter, self.progress)
        name = f"rehearsal: {there_and_back(course)}"
        self.stages.append(RehearsalEstimate(name=name, seconds=tried.seconds(), steps=tried))
        return f"states of the rehearsal on disk, {tried.kept_bytes() / 2**20:,.1f} MiB at most at a time"

    def _find_budget(self, of: ReferencePass | ShardScorer) -> None:
        """Find the budget as the run would."""
        if self.budget:
            return
        if (found := untried(self.spec, self.shards)) is None:
            self.progress.stage("trial of --batch-tokens", tokens_of(self.shards))
            found = self._timed("trial of --batch-tokens", partial(tried, of, sample_of(self.shards), self.progress))
        self.budget = found

    def _answers(self, model: Any, prompts: list[TokenRow]) -> list[TokenRow]:
        """Generating answers, none of which ends early; returns what such answers would be."""
        config = self.config
        room = answer_room(prompts, new_tokens=config.fisher_new_tokens, limit=None)
        answered = [_answered(row, int(space)) for row, space in zip(prompts, room, strict=True)]
        plan = plan_batches(answered, self.budget)
        tried = [prompts[i] for i in plan[len(plan) // 2]]
        seconds = []
        for steps in _STEPS:
            began = self.meter.now()
            sample_answers(model, tried, new_tokens=steps, seed=0, batch_tokens=self.budget, progress=Silent())
            seconds.append(self.meter.now() - began)
        each = max(0.0, seconds[1] - seconds[0]) / (_STEPS[1] - _STEPS[0])
        batch = seconds[0] + each * (float(room.mean()) - _STEPS[0])
        pieces = len(chunks(prompts))
        self.stages.append(StageEstimate(name="answers of the reference", seconds=len(plan) * batch, pieces=pieces))
        return answered

    def _timed(self, name: str, work: Callable[[], T]) -> T:
        began = self.meter.now()
        found = work()
        self.stages.append(StageEstimate(name=name, seconds=self.meter.now() - began))
        return found

    def _try(
        self,
        name: str,
        shards: Sequence[Sequence[AnyRow]],
        work: Callable[[Batches], object],
        pieces: int = 1,
        budget: int = 0,
        times: int = 1,
    ) -> None:
        """Run a stage on a few of its batches, and tell what all of them would take, so many times.

        Of 0 `pieces` workers share its batches.
        """
        plan, sizes = list[tuple[int, tuple[int, ...]]](), list[Size]()
        for number, rows in enumerate(shards):
            batches = plan_batches(rows, budget or self.budget)
            plan += [(number, indices) for indices in batches]
            sizes += [size_of(rows, indices) for indices in batches]
        first, probes = choose(sizes)
        wanted = [plan[i] for i in (*first, *probes)]
        tried = _Tried(self.meter, self.progress, [collate(shards[number], indices) for number, indices in wanted])
        self.progress.stage(f"estimate: {name}", tried.tokens)
        began = self.meter.now()
        work(tried.batches)
        beside = self.meter.now() - began - sum(tried.seconds)
        found = predict(sizes, dict(zip(probes, tried.seconds[len(first) :], strict=True)))
        self.stages.append(StageEstimate(name=name, seconds=times * (beside + found), pieces=pieces or len(plan)))


class _Tried:
    """Batches that are timed while they are worked on, however often that is done."""

    def __init__(self, meter: Meter, progress: Progress, batches: Sequence[Batch]) -> None:
        self.seconds = [0.0] * len(batches)
        self.tokens = sum(batch.input_ids.size for batch in batches)
        self._meter, self._progress, self._batches = meter, progress, batches

    def batches(self) -> Iterator[Batch]:
        """Each batch in turn; the next is asked for when one is done."""
        for index, batch in enumerate(self._batches):
            began = self._meter.now()
            yield batch
            if not self.seconds[index]:
                self._progress.advance(batch.input_ids.size)
            self.seconds[index] += self._meter.now() - began


def _answered(row: TokenRow, room: int) -> TokenRow:
    """A prompt with as long an answer as it can get."""
    length = prompt_tokens(row)
    ids = np.concatenate([row.input_ids[:length], np.zeros(room, np.int32)])
    return replace(row, input_ids=ids, response=np.arange(length + room) >= length)
