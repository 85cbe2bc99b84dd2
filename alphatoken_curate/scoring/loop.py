"""The only loop: rows are read, models loaded, shards scored one by one. Nothing is computed or written twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.generate import answer_room, chunks
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.mask import mask_and_card, mend
from alphatoken_curate.masks.remask import check_settings
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import artifacts, manifest, shards
from alphatoken_curate.runs.atomic import one_writer
from alphatoken_curate.runs.schema import LAYOUTS, components
from alphatoken_curate.runs.shards import Footer, Shard
from alphatoken_curate.scoring.beside import write_beside
from alphatoken_curate.scoring.budget import Budget, begun_with
from alphatoken_curate.scoring.changes import told_of_data
from alphatoken_curate.scoring.folder import ScoreSummary, artifacts_of
from alphatoken_curate.scoring.identity import dated, has_stability
from alphatoken_curate.scoring.idle import idle
from alphatoken_curate.scoring.job import Job, job_of, record
from alphatoken_curate.scoring.named import told_of_models
from alphatoken_curate.scoring.outcome import check_scored, told_of
from alphatoken_curate.scoring.prepare import FISHER_DRAW, LOOKAHEAD_DRAW, PRECONDITION_DRAW, Prepared, drawn, prepare
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.rehearse import RehearsalScorer
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.sources import watch_inputs
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens, spec_of
from alphatoken_curate.scoring.trial import find_budget, first_model
from alphatoken_curate.signals.preference import Pairs
from alphatoken_curate.tokens.plan import cut_of
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, chosen
from alphatoken_curate.wording import count


def score_rows(config: ScoreConfig, folder: Path, listener: Progress) -> ScoreSummary:
    """Score every row that is not scored yet, write values/, then a mask and train/. Raises as `score`."""
    listener.note(told_of_models(config))
    listener.stage("reading rows", 0)
    watched = watch_inputs(config)
    prepared = prepare(dated(config, begun_with(folder)))
    check_settings(config, components(config.estimator), LAYOUTS[prepared.kind])
    spec = spec_of(prepared, folder / "artifacts", artifacts_of(config.reuse), watched)
    if not (folder / manifest.NAME).is_file() and config.generation not in ("latest", "all", "0"):
        raise UsageError(f"--generation {config.generation}: {folder} has no such generation yet; score makes 0.")
    with one_writer(folder, listener.warn), told_of_data(folder, prepared):
        mend(folder, listener)
        budget = Budget(folder, spec.store.fields, config.batch_tokens, listener)
        _tell(config, prepared, spec, listener)
        scored = run_generation(folder, job_of(prepared, spec), spec, budget, listener)
        if write_beside(folder, prepared, spec.dtype, budget.first) or scored:
            write_manifest(folder)
        mask, stored = mask_and_card(folder, config, stale=bool(scored))
    stable = has_stability(spec.store.fields)
    return ScoreSummary(run=folder, manifest=stored, mask=mask, shards_scored=scored, has_stability=stable)


def _tell(config: ScoreConfig, prepared: Prepared, spec: ScorerSpec, progress: Progress) -> None:
    if config.template_date is not None and prepared.config.template_date is None:
        progress.warn("Without effect here: --template-date (no chat template writes a date).")
    if (unread := idle(prepared.config, prepared.kind)) is not None:
        progress.warn(unread)
    if prepared.held_out:
        rows = count(len({row.row_id for row in prepared.held_out}), "row is", "rows are")
        progress.note(f"{rows} held out as target: not scored, not in train/. --target names rows of the task instead.")
    cut = cut_of(prepared.rows)
    if cut.rows:
        rows, tokens = count(cut.rows, "row is", "rows are"), count(cut.tokens, "token was", "tokens were")
        progress.warn(f"{rows} longer than --max-length {prepared.config.max_length}: {tokens} cut.")
    for what, rows_read in prepared.read_as.items():
        progress.note(f"{count(rows_read, 'row')}: {what}.")
    for what, rows_told in prepared.told.items():
        progress.warn(f"{count(rows_told, 'row')}: {what}.")
    if prepared.config.retention is not None and prepared.config.drift == "weights" and not spec.has_reference:
        progress.note("The reference has the same weights as the model, so there is no drift to store beside.")


def run_generation(run: Path, job: Job, spec: ScorerSpec, budget: Budget, progress: Progress) -> int:
    """Score the shards of a generation that are missing; returns how many those were.

    Raises `FingerprintError` where a file that they are computed from changes (the shards before that stay),
    `InputError` where no row can be.
    """
    number = spec.store.generation
    folder = shards.values_folder(run, number)
    done = shards.committed(folder, spec.store.fields)
    foreign = sorted(set(done) - set(range(len(job.shards))))
    if foreign:
        raise StoredDataError(f"{folder / shards.shard_name(foreign[0])}: no shard of this run. Move it away.")
    for index in done:
        of_shard = job.shards[index]
        shards.check_rows(
            folder / shards.shard_name(index), sorted(r.row_id for r in (*of_shard.rows, *of_shard.beside))
        )
    _check_stored(run, number, done)
    missing = [index for index in range(len(job.shards)) if index not in done]
    if not missing:
        check_scored(run, number, "")
        return 0
    reference = ReferencePass(spec)
    scorer = RehearsalScorer(spec, job) if spec.config.rehearses else ShardScorer(spec)
    rows = [job.shards[index].rows for index in missing]
    budget.decide(partial(find_budget, spec, rows, first_model(spec, missing, reference, scorer), progress))
    _reference_stage(job, reference, missing, budget, progress)
    if isinstance(scorer, RehearsalScorer):
        budget.spend(partial(scorer.rehearse, progress))
    else:
        _directions(job, spec, scorer, budget, progress)
        scorer.ready(progress)
    _score_shards(folder, job, scorer, missing, budget, progress)
    spec.store.check_sources(whole=True)
    check_scored(run, number, told_of(spec.config, scorer.largest))
    return len(missing)


def _score_shards(
    folder: Path, job: Job, scorer: ShardScorer, missing: Sequence[int], budget: Budget, progress: Progress
) -> None:
    """Commit the shards that are missing, one after the other."""
    store = scorer.spec.store
    progress.stage("scoring", sum(count_tokens(job.shards[index].rows) for index in missing))
    for index in missing:
        shard = job.shards[index]
        found = budget.spend(partial(scorer, index, shard.rows, progress), index)
        records = [
            record(row, "failed" if result is None else "scored", result)
            for row, result in zip(shard.rows, found, strict=True)
        ]
        told = replace(
            job.facts,
            plan=budget.plan(index),
            truncated_rows=shard.cut.rows,
            truncated_tokens=shard.cut.tokens,
        )
        # One record per row read, or turn of it, in order, whatever became of it.
        ordered = sorted([*records, *shard.beside], key=lambda one: (one.row_id, one.turn))
        footer = Footer(fields=store.fields, facts=told.as_json())
        store.check_sources()
        shards.write_values(folder / shards.shard_name(index), ordered, footer, job.layout)


def write_manifest(run: Path) -> None:
    """Commit the manifest that the files make. Raises StoredDataError where a generation it named is not whole."""
    made = manifest.rebuild(run)
    if (run / manifest.NAME).is_file():
        whole = {one.generation for one in made.generations}
        for lost in (one.generation for one in manifest.read(run).generations if one.generation not in whole):
            raise StoredDataError(
                f"{shards.values_folder(run, lost)}: the manifest names this generation, and its shards are not all"
                " there. Restore them, or delete manifest.json to go on without it."
            )
    manifest.write(run, made)


def _check_stored(run: Path, number: int, done: Mapping[int, Shard]) -> None:
    """Shards must be those of the manifest, where there is one: its digests see what a footer does not."""
    if not (run / manifest.NAME).is_file():
        return
    known = {one.generation: one.shards for one in manifest.read(run).generations}
    for index, shard in enumerate(known.get(number, ())):
        if index in done and done[index] != shard:
            raise StoredDataError(
                f"{run / shard.path}: not the file that the manifest names. Delete it and run the same command again."
            )


# --------------------------------------------------------------------------------------- what comes before the shards


def _reference_stage(
    job: Job, reference: ReferencePass, missing: Sequence[int], budget: Budget, progress: Progress
) -> None:
    spec = reference.spec
    if spec.has_drift:
        _fisher(job, spec, reference, budget, progress)
        if spec.has_reference or not spec.config.rehearses:
            reference.weights()
    if spec.has_reference:
        # The curvature and the lookahead of pairs draw from all rows.
        wanted = missing if job.layout.kind == "sft" else range(len(job.shards))
        progress.stage("reference losses", sum(count_tokens(job.shards[index].rows) for index in wanted))
        for index in wanted:
            budget.spend(partial(reference.losses, index, job.shards[index].rows, progress))
    reference.close()


def _fisher(job: Job, spec: ScorerSpec, reference: ReferencePass, budget: Budget, progress: Progress) -> None:
    """Estimate F, unless it is there or the user brings one."""
    if not spec.estimates_fisher or spec.store.has(artifacts.FISHER):
        return
    config = spec.config
    rows: list[TokenRow] = job.prompts or [chosen(row) for row in job.rows]
    rows = drawn(rows, config.fisher_rows, config.seed, FISHER_DRAW)
    if config.fisher == "generate":
        room = answer_room(rows, new_tokens=config.fisher_new_tokens, limit=None)
        progress.stage("answers of the reference", int(room.sum()))
        parts = enumerate(chunks(rows))
        rows = [row for n, part in parts for row in budget.spend(partial(reference.answers, n, part, progress))]
    budget.spend(partial(reference.fisher, rows, progress))


def _directions(job: Job, spec: ScorerSpec, scorer: ShardScorer, budget: Budget, progress: Progress) -> None:
    """Make sure that all a direction is made from is in artifacts/."""
    config = spec.config
    beside = {artifacts.TARGET: job.target} | ({artifacts.RETENTION: job.retention} if config.retention else {})
    for kind, of_kind in beside.items():
        budget.spend(partial(scorer.gradient, kind, of_kind, None, progress))
        if spec.groups > 1:
            budget.spend(partial(scorer.group_gradients, kind, of_kind, progress))
    if config.drift == "lookahead":
        rows = drawn(job.rows, config.lookahead_rows, config.seed, LOOKAHEAD_DRAW)
        pairs = _pairs(job, scorer, rows)
        budget.spend(partial(scorer.gradient, artifacts.LOOKAHEAD, rows, pairs, progress))
    if config.precondition != "none":
        rows = drawn(job.rows, config.precondition_rows, config.seed, PRECONDITION_DRAW)
        budget.spend(partial(scorer.curvature, rows, _pairs(job, scorer, rows), progress))


def _pairs(job: Job, scorer: ShardScorer, rows: Sequence[AnyRow]) -> Pairs | None:
    """What weighs these pairs (Eq. 14), wherever their shards are; None for SFT rows."""
    if job.layout.kind == "sft":
        return None
    if not scorer.spec.has_reference:
        return scorer.pairs(None)
    wanted = {row.row_id for row in rows}
    sums: list[NDArray[np.float32]] = []
    for index, shard in enumerate(job.shards):
        places = [i for i, row in enumerate(shard.rows) if row.row_id in wanted]
        if places:
            losses = scorer.reference_losses(index, shard.rows) or []
            sums += [losses[2 * i + branch] for i in places for branch in (0, 1)]
    return scorer.pairs(sums)
