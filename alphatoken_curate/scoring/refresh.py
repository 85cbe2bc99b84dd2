"""A run scored again at a checkpoint: the same rows and shards, as a new generation that is never rewritten.

Everything but the checkpoint comes from the run folder: rows and target as tokens, settings, plan, artefacts of the
reference. The manifest names a generation once all of its shards are there; then its mask is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from alphatoken_curate.config import MaskConfig, ScoreConfig, checked, settings_of_mask
from alphatoken_curate.errors import FingerprintError, InputError, ModelError, StoredDataError
from alphatoken_curate.masks.mask import mask_and_card, mend
from alphatoken_curate.masks.remask import MaskSummary
from alphatoken_curate.models.checkpoints import Checkpoint, find_checkpoints
from alphatoken_curate.models.likeness import check_alike
from alphatoken_curate.models.load import ModelSource, find_model, load_tokenizer, model_digest, tokenizer_digest
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.artifacts import OF_MODEL, PRECONDITION, REHEARSAL, SOLVED, TARGET, Store
from alphatoken_curate.runs.atomic import one_writer
from alphatoken_curate.runs.documents import decode
from alphatoken_curate.runs.fingerprint import Json, fingerprint
from alphatoken_curate.runs.manifest import Counts, Facts, Generation, Manifest
from alphatoken_curate.runs.records import read_records
from alphatoken_curate.runs.schema import SCHEMA_VERSION
from alphatoken_curate.runs.shards import Shard, ValueRow
from alphatoken_curate.runs.watched import Watched
from alphatoken_curate.scoring import beside
from alphatoken_curate.scoring.budget import Budget, older
from alphatoken_curate.scoring.engines import Engine, Here
from alphatoken_curate.scoring.folder import counts_of, is_as_named, marks, written
from alphatoken_curate.scoring.identity import has_stability, versions
from alphatoken_curate.scoring.job import Job
from alphatoken_curate.scoring.loop import run_generation, write_manifest
from alphatoken_curate.scoring.named import check_blocks
from alphatoken_curate.scoring.sources import digests_of, of_fisher, of_model
from alphatoken_curate.scoring.spec import ScorerSpec
from alphatoken_curate.settings import load_settings
from alphatoken_curate.tokens.dealt import Rows, alone
from alphatoken_curate.tokens.likeness import check_same_tokens
from alphatoken_curate.tokens.packed import columns_of_rows
from alphatoken_curate.tokens.plan import Cut, sequences
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow, chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshSummary:
    """What `refresh` did at one checkpoint. `shards_scored` is 0 where its generation was there already.

    `counts`: of that generation. `has_stability` is False where the checkpoint is the reference, and every stability is
    0. `beside`: names of the files written that lie beside values/ and train/.
    """

    run: Path
    checkpoint: str
    generation: int
    manifest: Manifest
    counts: Counts
    mask: MaskSummary
    shards_scored: int
    has_stability: bool
    beside: tuple[str, ...] = ()


def refresh(
    run: Path | str,
    checkpoint: Path | str,
    *,
    base: str | None = None,
    reference: str | None = None,
    device: str | None = None,
    trunk_device: str | None = None,
    progress: Progress | None = None,
    told: Callable[[RefreshSummary], object] = lambda _: None,
    engine: Engine | None = None,
) -> list[RefreshSummary]:
    """Score the rows of a finished run again at a checkpoint, each as a new generation, then make the mask anew.

    `checkpoint`: a model folder, an adapter folder of PEFT, or a folder of `checkpoint-*` folders, all of which are
    scored in step order. `base` and `reference` say where those models lie now, `device` and `trunk_device` where to
    compute, a `trunk_device` of "none" with the device alone; by default as the run was told. The mask is made by the
    settings of the run's newest one. `told` of each checkpoint when it is done. `engine`: as in `score`.

    The same call resumes, and leaves what is there alone. Raises UsageError, ModelError, FingerprintError (another
    reference than the run's), StoredDataError (no finished run, or damage).
    """
    listener = progress or Silent()
    places = {"base": base, "reference": reference, "device": device, "trunk_device": trunk_device}
    known, summaries = Rescored(Path(run), listener, **places), []
    with closing(engine or Here()) as running:
        for one in find_checkpoints(Path(checkpoint), base=known.base):
            summaries.append(known.refresh(one, running, listener))
            told(summaries[-1])
    return summaries


class Rescored:
    """A finished run, and the models that go with it."""

    def __init__(
        self,
        folder: Path,
        progress: Progress,
        *,
        base: str | None,
        reference: str | None,
        device: str | None,
        trunk_device: str | None,
    ) -> None:
        self.folder = folder
        stored = _read(folder, progress)
        first = shards.read_footer(folder / stored.generations[0].shards[0].path)
        self.fields: Mapping[str, Json] = first.fields
        _check_config(folder, stored)
        config = checked(ScoreConfig, load_settings(folder / beside.CONFIG), str(folder / beside.CONFIG))
        trunk = trunk_device or config.trunk_device
        self.config = replace(config, trunk_device=None if trunk == "none" else trunk)
        self.base = find_model(base) if base is not None else _found(self.config.model)
        moved = base if self.config.reference in (None, self.config.model) else None
        self._reference_name = reference or moved or self.config.reference or self.config.model
        self._device = device or self.config.device
        self._reference: ModelSource | None = None
        self._kept = Watched([])
        self._own_threads = torch.get_num_threads()

    def refresh(self, checkpoint: Checkpoint, engine: Engine, progress: Progress) -> RefreshSummary:
        """Score the rows at a checkpoint, but for shards that are there from before, and make the mask anew."""
        watched, model = _looked_at(checkpoint)
        about = {**self.fields, "model": model}
        with one_writer(self.folder, progress.warn):
            before, stored = marks(self.folder), manifest.read(self.folder)
            # Generation 0 is what `score` wrote: a checkpoint equal to it is still a generation of its own.
            made = [one for one in stored.generations[1:] if one.fingerprint == fingerprint(about)]
            number = made[0].generation if made else _number(self.folder, stored, about)
            scored: dict[str, Shard] = {}
            if not made or not _is_whole(self.folder, made[0]):
                scored = self._score(number, checkpoint, about, watched, engine, progress)
                write_manifest(self.folder, scored)
            mask, now = mask_and_card(self.folder, _mask_config(stored, self.config), stale=bool(scored))
        return RefreshSummary(
            run=self.folder,
            checkpoint=checkpoint.name,
            generation=number,
            manifest=now,
            counts=counts_of(self.folder, now, number),
            mask=mask,
            shards_scored=len(scored),
            has_stability=has_stability(about),
            beside=written(self.folder, before),
        )

    def _score(
        self,
        number: int,
        checkpoint: Checkpoint,
        about: Mapping[str, Json],
        watched: Watched,
        engine: Engine,
        progress: Progress,
    ) -> dict[str, Shard]:
        stored = manifest.read(self.folder)
        reference = self._checked_reference()
        check_alike(checkpoint.source, reference)
        check_blocks(self.config, checkpoint.source)
        watched.include(self._kept)
        spec = ScorerSpec(
            config=self.config,
            model=checkpoint.source,
            reference=reference,
            dtype=str(self.fields["dtype"]),
            device=engine.device(self._device),
            store=Store(folder=self.folder / "artifacts", fields=about, generation=number, watched=watched),
        )
        job = _job(self.folder, stored, spec, checkpoint)
        store = replace(spec.store, rows=job.rows.numbered(job.layout.kind))
        spec = replace(spec, store=store, maps=replace(store, fields=self.fields, generation=0).shapes(TARGET))
        self._check_tokens(checkpoint, job)  # before anything is written
        budget = Budget(
            self.folder,
            about,
            self.config.batch_tokens,
            progress,
            threads=self.config.threads,
            versions=job.facts.versions,
            own_threads=self._own_threads,
            generation=number,
            plans=stored.generations[0].plan,
        )
        progress.note(f"{checkpoint.name} becomes generation {number}")
        try:
            return run_generation(self.folder, job, spec, engine, budget, progress)
        except (ModelError, InputError):
            named = number in {one.generation for one in stored.generations}
            if not named and not shards.listed(shards.values_folder(self.folder, number)):
                _forget(budget, spec.store)
                write_manifest(self.folder)  # what was computed of the reference is kept
            raise

    def _check_tokens(self, checkpoint: Checkpoint, job: Job) -> None:
        """Refuse a checkpoint whose tokenizer, where it has one, gives other tokens than the rows are made of."""
        if tokenizer_digest(checkpoint.source) == self.fields["tokenizer"]:
            return
        try:
            found = load_tokenizer(checkpoint.source, trust_remote_code=self.config.trust_remote_code)
        except ModelError:  # one that cannot be read is not needed: the rows are tokens
            return
        if found is None:
            return
        ids = np.empty(0, np.int32)
        for rows in (*job.shards, job.target):
            ids = np.unique(np.concatenate([ids, *(row.input_ids for row in sequences(rows))]))
        do = "A checkpoint must come from the run's model. To score the rows with another, name it as `score --model`."
        check_same_tokens(self.folder, ids, found, checkpoint.name, do=do)

    def _checked_reference(self) -> ModelSource:
        """The run's reference, known to be the same weights still."""
        if self._reference is None:
            try:
                found = find_model(self._reference_name)
            except ModelError as error:
                raise ModelError(f"{error} Say where the run's reference lies now with --reference.") from error
            kept = Watched([of_model(found, "reference"), *of_fisher(self.config)])
            if model_digest(found) != self.fields["reference"]:
                raise FingerprintError(
                    f"{self._reference_name}: not the reference that {self.folder} was scored with: its files are"
                    " others. Say where that model lies now with --reference.",
                    ("reference",),
                )
            for fisher in of_fisher(self.config):
                if fisher.files[0].is_file() and fisher.digest(fisher.files) != self.fields["fisher"]:
                    raise FingerprintError(
                        f"{fisher.files[0]}: not the Fisher that {self.folder} was scored with: its bytes are others."
                        " Put that file back.",
                        ("fisher",),
                    )
            kept.settle(digests_of(self.fields))
            self._reference, self._kept = found, kept
        self._kept.check()
        return self._reference


def _read(run: Path, progress: Progress) -> Manifest:
    """The manifest, made anew where it is damaged. Raises `StoredDataError` for a run that cannot be gone on with."""
    try:
        stored = manifest.read(run)
    except StoredDataError:
        with one_writer(run):
            mend(run, progress)
        stored = manifest.read(run)
    if stored.schema_version != SCHEMA_VERSION:
        raise older(run, stored.schema_version)
    return stored


def _check_config(run: Path, stored: Manifest) -> None:
    """What decides values is read from config.yaml: it must be as the run wrote it."""
    written = [file for file in stored.files if file.path == beside.CONFIG]
    if not written or manifest.file_of(run, beside.CONFIG) != written[0]:
        raise StoredDataError(
            f"{run / beside.CONFIG}: not as the run wrote it, and its settings decide values. Restore it, or score"
            " again into another folder with the settings you want."
        )


def _forget(budget: Budget, store: Store) -> None:
    """Take away what was made for a checkpoint that cannot be scored."""
    parts = (path for kind in (PRECONDITION, REHEARSAL, SOLVED) for path in store.parts(kind))
    for path in (budget.path, *parts, *(store.path(kind) for kind in OF_MODEL)):
        path.unlink(missing_ok=True)


def _found(name: str) -> ModelSource | None:
    """A model that only adapters need; where it is gone, they say so."""
    try:
        return find_model(name)
    except ModelError:
        return None


def _looked_at(checkpoint: Checkpoint) -> tuple[Watched, str]:
    """A checkpoint's files, watched from now on, and their digest."""
    try:
        watched = Watched([of_model(checkpoint.source)])
        found = model_digest(checkpoint.source)
        watched.settle({"model": found})
        return watched, found
    except FileNotFoundError as error:
        raise ModelError(
            f"{checkpoint.name}: {error.filename} was deleted after the checkpoint was found."
            " Run the same command again to score those that are left."
        ) from error


def _is_whole(run: Path, made: Generation) -> bool:
    """Whether its shards are there, each as the manifest names it."""
    return all((run / one.path).is_file() and is_as_named(run, run / one.path, one) for one in made.shards)


def _number(run: Path, stored: Manifest, about: Mapping[str, Json]) -> int:
    """That of the generation begun at the same checkpoint and not finished; else the first that no folder has."""
    taken = {one.generation for one in stored.generations}
    begun = {}
    for folder in (run / "values").glob("generation=*"):
        name, paths = folder.name.removeprefix("generation="), shards.listed(folder)
        if name.isdecimal() and paths and int(name) not in taken:
            begun[int(name)] = shards.read_footer(next(iter(paths.values()))).fingerprint
    same = [number for number, mark in sorted(begun.items()) if mark == fingerprint(about)]
    return same[0] if same else max(taken | begun.keys()) + 1


def _mask_config(stored: Manifest, config: ScoreConfig) -> MaskConfig:
    """The settings of the newest mask; one that was made from generations by number now takes the latest."""
    told = {item.name: getattr(config, item.name) for item in fields(MaskConfig)}
    wanted = settings_of_mask(stored.masks[-1].settings if stored.masks else told)
    return wanted if wanted.generation == "all" else replace(wanted, generation="latest")


def _job(run: Path, stored: Manifest, spec: ScorerSpec, checkpoint: Checkpoint) -> Job:
    """The rows of the first generation, as they were before they were scored."""
    layout, named = manifest.layout(stored), stored.generations[0].shards

    def records(shard: int, *statuses: str) -> list[ValueRow]:
        return [one for one in read_records(run, named[shard], layout, signals=False) if one.status in statuses]

    def load(shard: int) -> list[AnyRow]:
        return [_row(one) for one in records(shard, "scored", "failed")]

    columns, held_out, told = [], list[AnyRow](), list[Facts]()
    for number, shard in enumerate(named):
        told.append(decode(Facts, dict(shards.read_footer(run / shard.path).facts)))
        columns.append(columns_of_rows(load(number)))
        held_out += [alone(_row(one)) for one in records(number, "target")]
    config = spec.config
    digests = {**told[0].digests, "model": str(spec.store.fields["model"])}
    read = sum(one.rows for one in told[0].inputs)
    return Job(
        rows=Rows(np.concatenate(columns), load, read=read, per_shard=config.rows_per_shard),
        beside=lambda shard: records(shard, "target", "rejected"),
        cuts=[Cut(rows=one.truncated_rows, tokens=one.truncated_tokens) for one in told],
        target=[chosen(row) for row in held_out] or beside.read_side_rows(run, stored, beside.TARGET_ROWS),
        retention=beside.read_side_rows(run, stored, beside.RETENTION_ROWS) if config.retention else [],
        prompts=beside.read_side_rows(run, stored, beside.PROMPT_ROWS) if config.fisher_prompts else [],
        facts=replace(told[0], digests=digests, checkpoint=checkpoint.name, versions=versions(spec.device)),
    )


def _row(record: ValueRow) -> AnyRow:
    parts = [
        TokenRow(
            row_id=record.row_id,
            turn=record.turn,
            source=record.source,
            line=record.line,
            id=record.id,
            input_ids=branch.input_ids,
            response=branch.response,
            end_of_turn=branch.end_of_turn,
            truncated=0,
        )
        for branch in record.branches
    ]
    return parts[0] if len(parts) == 1 else PairRow(chosen=parts[0], rejected=parts[1])
