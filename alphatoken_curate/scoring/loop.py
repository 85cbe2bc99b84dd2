"""The only loop: rows are read, models loaded, shards scored one by one. Nothing is computed or written twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.mask import mask_and_card, mend
from alphatoken_curate.masks.remask import check_settings
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
from alphatoken_curate.scoring.folder import ScoreSummary, artifacts_of, counts_of, is_as_named, of_its_own
from alphatoken_curate.scoring.identity import dated, has_stability
from alphatoken_curate.scoring.idle import idle
from alphatoken_curate.scoring.job import Job, job_of, record
from alphatoken_curate.scoring.named import told_of_models
from alphatoken_curate.scoring.outcome import check_scored, told_of, told_of_failed
from alphatoken_curate.scoring.prepare import Prepared, prepare
from alphatoken_curate.scoring.rehearsing import ColumnScorer, rehearse
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.shelf import Place
from alphatoken_curate.scoring.solving import residuals_of
from alphatoken_curate.scoring.sources import watch_inputs
from alphatoken_curate.scoring.spec import ScorerSpec, spec_of
from alphatoken_curate.scoring.stages import Stages
from alphatoken_curate.scoring.trial import needed_first, sample_of, tokens_of, tried, untried
from alphatoken_curate.scoring.worker import Stage, Task
from alphatoken_curate.signals.stored import RowResult
from alphatoken_curate.tokens.dealt import Shards, tokens_in
from alphatoken_curate.wording import count


def score_rows(config: ScoreConfig, folder: Path, listener: Progress, engine: Engine) -> ScoreSummary:
    """Score every row that is not scored yet, write values/, then a mask and train/. Raises as `score`."""
    with ExitStack() as held:
        place = kept_in(folder, held, listener)
        prepared, spec = read_all(config, folder, engine, listener, place)
        place.hold()
        held.enter_context(told_of_data(folder, prepared))
        mend(folder, listener)
        job, threads = job_of(prepared, spec), config.threads
        about, made_by = spec.store.fields, job.facts.versions
        budget = Budget(folder, about, config.batch_tokens, listener, threads=threads, versions=made_by)
        tell(prepared, spec, listener, config)
        scored = run_generation(folder, job, spec, engine, budget, listener)
        if write_beside(folder, prepared, spec.dtype, budget) or scored:
            write_manifest(folder, scored, place.remove)
        place.remove()  # values/ has them all
        mask, stored = mask_and_card(folder, of_its_own(folder, config), stale=bool(scored))
    return ScoreSummary(
        run=folder,
        manifest=stored,
        counts=counts_of(folder, stored, 0),
        mask=mask,
        shards_scored=len(scored),
        has_stability=has_stability(about),
    )


def kept_in(folder: Path, held: ExitStack, listener: Progress, *, shared: bool = False) -> Place:
    """Where the rows of a run are kept. The run is held, as by `one_writer`, from when it is first looked into."""
    writer = one_writer(folder, listener.warn, shared=shared)
    place = Place(folder, lambda: held.enter_context(writer), writes=not shared)
    held.callback(place.close)
    return place


def read_all(
    config: ScoreConfig, folder: Path, engine: Engine, listener: Progress, place: Place
) -> tuple[Prepared, ScorerSpec]:
    """All rows that a run is made of, and what scores them. Nothing but rows is written."""
    device = engine.device(config.device)
    listener.note(told_of_models(config, device))
    listener.stage("reading rows", 0)
    watched = watch_inputs(config)
    if not (folder / manifest.NAME).is_file() and config.generation not in ("latest", "all", "0"):
        raise UsageError(f"--generation {config.generation}: {folder} has no such generation yet; score makes 0.")
    with place.begun():
        prepared = prepare(dated(config, begun_with(folder)), place, engine.readers())
        check_settings(config, components(config.estimator), LAYOUTS[prepared.kind])
        return prepared, spec_of(prepared, folder / "artifacts", device, artifacts_of(config.reuse), watched)


def tell(prepared: Prepared, spec: ScorerSpec, progress: Progress, config: ScoreConfig) -> None:
    """What a user should know of the rows and settings before they are scored."""
    if config.template_date is not None and prepared.config.template_date is None:
        progress.warn("Without effect here: --template-date (no chat template writes a date).")
    if (unread := idle(prepared.config, prepared.kind)) is not None:
        progress.warn(unread)
    if prepared.held_out:
        rows = count(len({row.row_id for row in prepared.held_out}), "row is", "rows are")
        progress.note(f"{rows} held out as target: not scored, not in train/. --target names rows of the task instead.")
    cut = prepared.rows.cut()
    if cut.rows:
        rows, tokens = count(cut.rows, "row is", "rows are"), count(cut.tokens, "token was", "tokens were")
        progress.warn(f"{rows} longer than --max-length {prepared.config.max_length}: {tokens} cut.")
    for what, rows_read in prepared.read_as.items():
        progress.note(f"{count(rows_read, 'row')}: {what}.")
    for what, rows_told in prepared.told.items():
        progress.warn(f"{count(rows_told, 'row')}: {what}.")
    if prepared.config.retention is not None and prepared.config.drift == "weights" and not spec.has_drift:
        progress.note("The reference has the same weights as the model, so there is no drift to store beside.")


def run_generation(
    run: Path, job: Job, spec: ScorerSpec, engine: Engine, budget: Budget, progress: Progress
) -> dict[str, Shard]:
    """Score the shards of a generation that are missing; returns those, by path.

    Raises `FingerprintError` where a file that they are computed from changes (the shards before that stay),
    `InputError` where no row can be. Tells of those that were not.
    """
    missing = missing_shards(run, job, spec, budget)
    if not missing:
        check_scored(run, spec.store.generation, "")
        return {}
    stages = Stages(job=job, spec=spec, engine=engine, budget=budget, progress=progress)
    settle(stages, missing)
    stages.reference(missing)
    with directed(stages) as ready:
        written, largest = score_shards(run, ready, missing)
    spec.store.check_sources(whole=True)
    check_scored(run, spec.store.generation, told_of(spec.config, largest))
    if told := told_of_failed(run, spec.store.generation, len(job.rows), spec.config.turns):
        progress.warn(told)
    return written


def settle(stages: Stages, missing: Sequence[int]) -> None:
    """Begin with an engine, and settle the budget by what it can do."""
    if odd := stages.budget.odd_versions:
        stages.progress.warn(f"Computed with {odd}: values may round otherwise than those that are there.")
    stages.engine.begin(stages.spec, stages.budget.threads_to_take)
    stages.budget.decide(partial(_budget, stages, missing))


@contextmanager
def directed(stages: Stages, *, made: bool = False) -> Iterator[Stages]:
    """The stages that shards are scored in, once all is `made` that they are scored by.

    Of a rehearsal nothing is computed then: this process writes them.
    """
    if not stages.spec.config.rehearses:
        if not made:
            stages.directions()
        yield stages
        return
    if not made:
        rehearse(stages)
    stages.engine.begin(stages.spec, stages.budget.threads_to_take)  # models are dropped
    with closing(Here(ColumnScorer(stages.spec, stages.job))) as here:
        here.begin(stages.spec, stages.budget.threads_to_take)
        yield replace(stages, engine=here)


def missing_shards(run: Path, job: Job, spec: ScorerSpec, budget: Budget) -> list[int]:
    """The shards of a generation that are not committed. Raises StoredDataError where others are not as they should.

    Of those that are, only the footers are read here, each once: all bytes are when they are named in a manifest, or
    where they were touched since. Their plans are noted: parts scored them, or a process that was killed.
    """
    number = spec.store.generation
    named = _named(run).get(number, ())
    done = shards.listed(shards.values_folder(run, number))
    for index, path in done.items():
        if index >= len(job.shards):
            shards.check_fields(path, shards.read_footer(path), spec.store.fields)
            raise StoredDataError(f"{path}: no shard of this run. Move it away.")
        footer = shards.check_rows(path, job.ends(index), spec.store.fields)
        if index < len(named):
            _check_named(run, path, named[index])
        budget.note(index, decode(Facts, dict(footer.facts)).plan)
    budget.flush()
    return [index for index in range(len(job.shards)) if index not in done]


def _budget(stages: Stages, missing: Sequence[int]) -> int:
    """What `--batch-tokens auto` comes to, by a trial where one pays."""
    rows = Shards(stages.job.rows, missing)
    if (found := untried(stages.spec, rows)) is not None:
        return found
    what = "trial of --batch-tokens"
    task = Task(what=what, call=tried, arguments=(sample_of(rows),), plan=Plan(batch_tokens=LEAST))
    stage = Stage(name=what, tokens=tokens_of(rows), of=needed_first(stages.spec, missing), tasks=[task])
    [(_, done)] = stages.engine.run(stage, stages.progress)
    return int(done.result)


def score_shards(run: Path, stages: Stages, missing: Sequence[int]) -> tuple[dict[str, Shard], Mapping[str, float]]:
    """Commit the shards that are missing, as they are done; returns them, and the largest number of each direction."""
    job, spec, budget = stages.job, stages.spec, stages.budget
    folder = shards.values_folder(run, spec.store.generation)
    tasks = (
        Task(
            what=f"shard {index}",
            call=ShardScorer.score,
            arguments=(index, job.shards[index]),
            plan=budget.plan(index),
        )
        for index in missing
    )
    tokens = tokens_in(Shards(job.rows, missing))
    written: dict[str, Shard] = {}
    largest: Mapping[str, float] = {}
    for n, done in stages.engine.run(Stage(name="scoring", tokens=tokens, of="model", tasks=tasks), stages.progress):
        index, (found, largest) = missing[n], done.result
        budget.note(index, done.plan)
        spec.store.check_sources()
        records, footer = recorded(job, spec, index, found, done.plan)
        shard = shards.write_values(folder / shards.shard_name(index), records, footer, job.layout)
        written[shard.path] = shard
    budget.flush()
    return written, largest


def recorded(
    job: Job, spec: ScorerSpec, index: int, found: Sequence[RowResult | None], plan: Plan
) -> tuple[list[ValueRow], Footer]:
    """What is stored of a shard: one record per row read, or turn of it, in order, whatever became of it."""
    records = [
        record(row, "failed" if result is None else "scored", result)
        for row, result in zip(job.shards[index], found, strict=True)
    ]
    cut = job.cuts[index]
    told = replace(
        job.facts,
        settings={**job.facts.settings, **residuals_of(spec)},
        plan=plan,
        truncated_rows=cut.rows,
        truncated_tokens=cut.tokens,
    )
    ordered = sorted([*records, *job.beside(index)], key=lambda one: (one.row_id, one.turn))
    return ordered, Footer(fields=spec.store.fields, facts=told.as_json())


def write_manifest(
    run: Path, written: Mapping[str, Shard] = {}, once_whole: Callable[[], object] = lambda: None
) -> None:
    """Commit the manifest that the files make. Raises StoredDataError where a generation it named is not whole.

    `once_whole`: what is done when they are found to be, and may not be done sooner.
    `written`: shards by path that this process wrote. Of these, and of those that the last manifest named and nobody
    touched since, the bytes are known and not read again.
    """
    named = _named(run)
    before = {one.path: one for group in named.values() for one in group}
    known = {path: one for path, one in before.items() if shards.untouched(run / path, one, run / manifest.NAME)}
    made = manifest.rebuild(run, {**known, **written})
    whole = {one.generation for one in made.generations}
    for lost in (number for number in named if number not in whole):
        raise StoredDataError(
            f"{shards.values_folder(run, lost)}: the manifest names this generation, and its shards are not all"
            " there. Restore them, run the command that made it again, or delete manifest.json to go on without it."
        )
    once_whole()
    manifest.write(run, made)


def _named(run: Path) -> dict[int, tuple[Shard, ...]]:
    """The shards that the manifest names, by generation; none where there is no manifest."""
    if not (run / manifest.NAME).is_file():
        return {}
    return {one.generation: one.shards for one in manifest.read(run).generations}


def _check_named(run: Path, path: Path, named: Shard) -> None:
    """A shard must be that of the manifest, where there is one: its digest sees what a footer does not."""
    if not is_as_named(run, path, named):
        raise StoredDataError(
            f"{path}: not the file that the manifest names. Delete it and run the same command again."
        )
