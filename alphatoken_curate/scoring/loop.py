"""The only loop: rows are read, models loaded, shards scored one by one. Nothing is computed or written twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.mask import mask_and_card, mend
from alphatoken_curate.masks.remask import check_settings
from alphatoken_curate.models.devices import kind_of
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.atomic import one_writer
from alphatoken_curate.runs.documents import decode
from alphatoken_curate.runs.manifest import Facts, Plan
from alphatoken_curate.runs.schema import LAYOUTS, components
from alphatoken_curate.runs.shards import Footer, Shard, ValueRow
from alphatoken_curate.scoring.beside import write_beside
from alphatoken_curate.scoring.budget import LEAST, Budget, begun_with
from alphatoken_curate.scoring.changes import told_of_data
from alphatoken_curate.scoring.engines import Engine, Here
from alphatoken_curate.scoring.folder import ScoreSummary, artifacts_of
from alphatoken_curate.scoring.identity import dated, has_stability
from alphatoken_curate.scoring.idle import idle
from alphatoken_curate.scoring.job import Job, job_of, record
from alphatoken_curate.scoring.named import told_of_models
from alphatoken_curate.scoring.outcome import check_scored, told_of
from alphatoken_curate.scoring.prepare import Prepared, prepare
from alphatoken_curate.scoring.rehearse import RehearsalScorer
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.sources import watch_inputs
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens, spec_of
from alphatoken_curate.scoring.stages import Stages
from alphatoken_curate.scoring.trial import needed_first, sampled, tokens_of, tried, untried
from alphatoken_curate.scoring.worker import Stage, Task
from alphatoken_curate.signals.stored import RowResult
from alphatoken_curate.tokens.plan import cut_of
from alphatoken_curate.wording import count


def score_rows(config: ScoreConfig, folder: Path, listener: Progress, engine: Engine) -> ScoreSummary:
    """Score every row that is not scored yet, write values/, then a mask and train/. Raises as `score`."""
    prepared, spec = read_all(config, folder, engine, listener)
    with one_writer(folder, listener.warn), told_of_data(folder, prepared):
        mend(folder, listener)
        job, threads = job_of(prepared, spec), config.threads
        about, made_by = spec.store.fields, job.facts.versions
        budget = Budget(folder, about, config.batch_tokens, listener, threads=threads, versions=made_by)
        tell(prepared, spec, listener, config)
        scored = run_generation(folder, job, spec, engine, budget, listener)
        if write_beside(folder, prepared, spec.dtype, budget) or scored:
            write_manifest(folder)
        mask, stored = mask_and_card(folder, config, stale=bool(scored))
    stable = has_stability(spec.store.fields)
    return ScoreSummary(run=folder, manifest=stored, mask=mask, shards_scored=scored, has_stability=stable)


def read_all(config: ScoreConfig, folder: Path, engine: Engine, listener: Progress) -> tuple[Prepared, ScorerSpec]:
    """All rows that a run is made of, and what scores them. Nothing is written."""
    device = engine.device(config.device)
    listener.note(told_of_models(config, device))
    listener.stage("reading rows", 0)
    watched = watch_inputs(config)
    prepared = prepare(dated(config, begun_with(folder)))
    check_settings(config, components(config.estimator), LAYOUTS[prepared.kind])
    spec = spec_of(prepared, folder / "artifacts", device, artifacts_of(config.reuse), watched)
    if not (folder / manifest.NAME).is_file() and config.generation not in ("latest", "all", "0"):
        raise UsageError(f"--generation {config.generation}: {folder} has no such generation yet; score makes 0.")
    return prepared, spec


def tell(prepared: Prepared, spec: ScorerSpec, progress: Progress, config: ScoreConfig) -> None:
    """What a user should know of the rows and settings before they are scored."""
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


def run_generation(run: Path, job: Job, spec: ScorerSpec, engine: Engine, budget: Budget, progress: Progress) -> int:
    """Score the shards of a generation that are missing; returns how many those were.

    Raises `FingerprintError` where a file that they are computed from changes (the shards before that stay),
    `InputError` where no row can be.
    """
    missing = missing_shards(run, job, spec)
    _note_plans(run, job, missing, budget)
    if not missing:
        check_scored(run, spec.store.generation, "")
        return 0
    stages = Stages(job=job, spec=spec, engine=engine, budget=budget, progress=progress)
    settle(stages, missing)
    stages.reference(missing)
    with directed(stages) as ready:
        largest = score_shards(run, ready, missing)
    spec.store.check_sources(whole=True)
    check_scored(run, spec.store.generation, told_of(spec.config, largest))
    return len(missing)


def _note_plans(run: Path, job: Job, missing: Sequence[int], budget: Budget) -> None:
    """Have the plans of shards that parts scored written down as those of all others."""
    for index in set(range(len(job.shards))) - set(missing):
        path = shards.values_folder(run, budget.generation) / shards.shard_name(index)
        budget.note(index, decode(Facts, dict(shards.read_footer(path).facts)).plan)


def settle(stages: Stages, missing: Sequence[int]) -> None:
    """Begin with an engine, and settle the budget by what it can do."""
    if odd := stages.budget.odd_versions:
        stages.progress.warn(f"Computed with {odd}: values may round otherwise than those that are there.")
    stages.engine.begin(stages.spec, stages.budget.threads_to_take)
    stages.budget.decide(partial(_budget, stages, missing))


@contextmanager
def directed(stages: Stages, *, made: bool = False) -> Iterator[Stages]:
    """The stages that shards are scored in, once all is `made` that they are scored by.

    A rehearsal goes step by step, in this process.
    """
    if not stages.spec.config.rehearses:
        if not made:
            stages.directions()
        yield stages
        return
    stages.engine.close()
    with closing(Here(RehearsalScorer(stages.spec, stages.job))) as here:
        here.begin(stages.spec, stages.budget.threads_to_take)
        rehearsed = replace(stages, engine=here)
        if not made:
            rehearsed.rehearsal()
        yield rehearsed


def missing_shards(run: Path, job: Job, spec: ScorerSpec) -> list[int]:
    """The shards of a generation that are not committed. Raises StoredDataError where others are not as they should."""
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
    return [index for index in range(len(job.shards)) if index not in done]


def _budget(stages: Stages, missing: Sequence[int]) -> int:
    """What `--batch-tokens auto` comes to, by a trial where one pays."""
    rows = [stages.job.shards[index].rows for index in missing]
    if (found := untried(stages.spec, rows)) is not None:
        return found
    what = "trial of --batch-tokens"
    sample = sampled(rows, kind_of(stages.spec.device))
    task = Task(what=what, call=tried, arguments=(sample,), plan=Plan(batch_tokens=LEAST))
    stage = Stage(name=what, tokens=tokens_of(rows), of=needed_first(stages.spec, missing), tasks=[task])
    [(_, done)] = stages.engine.run(stage, stages.progress)
    return int(done.result)


def score_shards(run: Path, stages: Stages, missing: Sequence[int]) -> Mapping[str, float]:
    """Commit the shards that are missing, as they are done; returns the largest number of each direction."""
    job, spec, budget = stages.job, stages.spec, stages.budget
    folder = shards.values_folder(run, spec.store.generation)
    tasks = (
        Task(
            what=f"shard {index}",
            call=ShardScorer.score,
            arguments=(index, job.shards[index].rows),
            plan=budget.plan(index),
        )
        for index in missing
    )
    tokens = sum(count_tokens(job.shards[index].rows) for index in missing)
    largest: Mapping[str, float] = {}
    for n, done in stages.engine.run(Stage(name="scoring", tokens=tokens, of="model", tasks=tasks), stages.progress):
        index, (found, largest) = missing[n], done.result
        budget.note(index, done.plan)
        spec.store.check_sources()
        records, footer = recorded(job, spec, index, found, done.plan)
        shards.write_values(folder / shards.shard_name(index), records, footer, job.layout)
    return largest


def recorded(
    job: Job, spec: ScorerSpec, index: int, found: Sequence[RowResult | None], plan: Plan
) -> tuple[list[ValueRow], Footer]:
    """What is stored of a shard: one record per row read, or turn of it, in order, whatever became of it."""
    shard = job.shards[index]
    records = [
        record(row, "failed" if result is None else "scored", result)
        for row, result in zip(shard.rows, found, strict=True)
    ]
    told = replace(job.facts, plan=plan, truncated_rows=shard.cut.rows, truncated_tokens=shard.cut.tokens)
    ordered = sorted([*records, *shard.beside], key=lambda one: (one.row_id, one.turn))
    return ordered, Footer(fields=spec.store.fields, facts=told.as_json())


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
