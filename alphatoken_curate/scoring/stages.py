"""What comes before the shards: what of the reference and which directions are in artifacts/, and who makes the rest.

Each stage is cut into tasks, which an engine has done; what they give back is kept here, in the order of tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alphatoken_curate.directions.generate import answer_room, chunks, pack, unpack
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.sums import Sums, in_parts, tensors_of, total
from alphatoken_curate.errors import InputError
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import artifacts
from alphatoken_curate.scoring import solving
from alphatoken_curate.scoring.budget import Budget
from alphatoken_curate.scoring.engines import Engine
from alphatoken_curate.scoring.job import Job
from alphatoken_curate.scoring.prepare import FISHER_DRAW, LOOKAHEAD_DRAW, PRECONDITION_DRAW, drawn
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens
from alphatoken_curate.scoring.worker import Stage, Task, Which
from alphatoken_curate.signals.preference import Pairs, reference_sums
from alphatoken_curate.tokens.dealt import Shards, tokens_in
from alphatoken_curate.tokens.plan import response_tokens, sequences
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, chosen
from alphatoken_curate.wording import count

_MOST_NAMED = 5
"""Rows that an error names one by one."""

_GROUPED = {artifacts.TARGET: artifacts.TARGET_GROUPS, artifacts.RETENTION: artifacts.RETENTION_GROUPS}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stages:
    """The stages of a generation, in the order they are called in."""

    job: Job
    spec: ScorerSpec
    engine: Engine
    budget: Budget
    progress: Progress

    # --------------------------------------------------------------------------------------------- of the reference

    def reference(self, missing: Sequence[int]) -> None:
        """Keep what is needed of the reference to make directions, and to score the shards that are missing."""
        spec = self.spec
        if spec.has_drift:
            if spec.has_reference or not spec.config.rehearses:
                self._reference_weights()
            if spec.estimates_fisher and not spec.store.has(artifacts.FISHER):
                self._fisher()
        if spec.has_reference:
            of_all = {artifacts.LOOKAHEAD, artifacts.PRECONDITION, artifacts.REHEARSAL} & self.needed()
            # What is made of pairs of all shards takes the reference's losses.
            every = self.job.layout.kind != "sft" and bool(of_all)
            self.reference_losses(range(len(self.job.shards)) if every else missing)

    def needed(self) -> set[str]:
        """The kinds of artefacts that any shard is scored by, losses of the reference apart."""
        spec, config = self.spec, self.spec.config
        found = {artifacts.FISHER} if spec.has_drift and spec.estimates_fisher else set()
        if config.rehearses:
            return found | {artifacts.REHEARSAL}
        grouped = spec.groups > 1
        for kind in (artifacts.TARGET, *((artifacts.RETENTION,) if config.retention else ())):
            found |= {kind, *((_GROUPED[kind],) if grouped else ())}
        found |= {artifacts.LOOKAHEAD} if config.drift == "lookahead" else set()
        found |= {artifacts.SOLVED} if config.precondition == "astra" else set()
        return found | ({artifacts.PRECONDITION} if config.precondition != "none" else set())

    def _reference_weights(self) -> None:
        """The reference's weights of S, unless its files give them tensor by tensor under the model's names.

        It is not loaded for that alone: they are kept before a Fisher is, so that who finds one finds them too.
        """
        spec, store = self.spec, self.spec.store
        settled = not spec.estimates_fisher or store.has(artifacts.FISHER)
        if store.has(artifacts.REFERENCE) or (spec.reference.tensors_on_disk and settled):
            return
        if (found := self._one("weights of the reference", "reference", ReferencePass.weights)) is not None:
            store.save(artifacts.REFERENCE, tensors_of(found))

    def _fisher(self) -> None:
        config = self.spec.config
        of: Sequence[AnyRow] = self.job.prompts or self.job.rows
        rows = [chosen(row) for row in drawn(of, config.fisher_rows, config.seed, FISHER_DRAW)]
        if config.fisher == "generate":
            rows = self._answers(rows)
        name = "Fisher of the reference"
        tasks = [self._task(f"the {name}, part {n}", ReferencePass.fisher, part) for n, part in _parts(rows)]
        tokens = self.spec.passes * count_tokens(rows)
        found = self._total(Stage(name=name, tokens=tokens, of="reference", tasks=tasks))
        if not found.counts["rows"] or not found.is_finite:
            raise InputError(
                "The Fisher of the reference is not finite, so stability cannot be scored: no row's loss under it is,"
                " or a squared gradient overflows. Check its weights, or give a --fisher FILE."
            )
        if left_out := len(rows) - found.counts["rows"]:
            named = f"{count(left_out, 'row')} of the {len(rows):,} of the Fisher"
            has, is_ = ("has", "is") if left_out == 1 else ("have", "are")
            self.progress.warn(f"{named} {has} no finite loss under the reference, and {is_} left out of it.")
        self.spec.store.save(artifacts.FISHER, found.mean("rows"))

    def _answers(self, prompts: Sequence[TokenRow]) -> list[TokenRow]:
        """Answers of the reference, kept in a part for each chunk of prompts."""
        store, parts, new_tokens = self.spec.store, chunks(prompts), self.spec.config.fisher_new_tokens
        kept = [store.find(artifacts.FISHER_SAMPLES, n) for n in range(len(parts))]
        missing = [n for n, found in enumerate(kept) if found is None]
        room = sum(int(answer_room(parts[n], new_tokens=new_tokens, limit=None).sum()) for n in missing)
        name = "answers of the reference"
        tasks = [self._task(f"{name}, part {n}", ReferencePass.answers, parts[n]) for n in missing]
        stage = Stage(name=name, tokens=room, of="reference", tasks=tasks)
        for i, answered in self._each(stage) if missing else ():
            kept[missing[i]] = packed = pack(answered)
            store.save(artifacts.FISHER_SAMPLES, packed, missing[i])
        return [
            row
            for n, (part, tensors) in enumerate(zip(parts, kept, strict=True))
            for row in unpack(tensors or {}, part, where=store.path(artifacts.FISHER_SAMPLES, n))
        ]

    def reference_losses(self, wanted: Sequence[int]) -> None:
        """The reference's nll of the response tokens of shards, sequence by sequence, in one tensor for each.

        None where the reference is the model itself.
        """
        store, shards = self.spec.store, self.job.shards
        if not self.spec.has_reference:
            return
        kind = artifacts.REFERENCE_NLL
        # Those that are there are seen to be whole when they are read.
        missing = [n for n in wanted if not store.is_made(kind, n) and not store.has(kind, n)]
        if not missing:
            return
        name = "reference losses"
        tasks = (self._task(f"{name} of shard {n}", ReferencePass.losses, shards[n]) for n in missing)
        tokens = tokens_in(Shards(self.job.rows, missing))
        for i, nll in self._each(Stage(name=name, tokens=tokens, of="reference", tasks=tasks)):
            store.save(kind, tensors_of({"nll": nll}), missing[i])

    # ---------------------------------------------------------------------------------------------- of the directions

    def directions(self) -> None:
        """Keep all that a direction is made from."""
        config, job = self.spec.config, self.job
        beside = {artifacts.TARGET: job.target} | ({artifacts.RETENTION: job.retention} if config.retention else {})
        for kind, of_kind in beside.items():
            self._gradient(kind, of_kind)
            if self.spec.groups > 1:
                self._group_gradients(kind, of_kind)
        if config.drift == "lookahead":
            self._gradient(artifacts.LOOKAHEAD, drawn(job.rows, config.lookahead_rows, config.seed, LOOKAHEAD_DRAW))
        if config.precondition != "none":
            rows = drawn(job.rows, config.precondition_rows, config.seed, PRECONDITION_DRAW)
            if not self.spec.store.has(artifacts.PRECONDITION):
                self._curvature(rows)
            self._tidy(artifacts.PRECONDITION)
            if config.precondition == "astra":
                if not self.spec.store.is_made(artifacts.SOLVED):
                    self._iterations(rows)
                self._tidy(artifacts.SOLVED, but=solving.RESIDUALS)

    def _gradient(self, kind: str, rows: Sequence[AnyRow]) -> None:
        """A mean loss gradient; of pairs, weighed as training weighs them. The target's are plain rows."""
        if self.spec.store.has(kind):
            return
        tasks = [
            self._task(f"the {kind} gradient, part {n}", ShardScorer.gradient, kind, part, pairs)
            for n, (part, pairs) in enumerate(self._with_pairs(rows))
        ]
        tokens = count_tokens(rows) * self.spec.passes
        found = self._total(Stage(name=f"{kind} gradient", tokens=tokens, of="model", tasks=tasks))
        self.spec.store.save(kind, self._mean(kind, rows, found))

    def _group_gradients(self, kind: str, rows: Sequence[TokenRow]) -> None:
        """The same of each group of target or retention rows."""
        if self.spec.store.has(_GROUPED[kind]):
            return
        dealt = deal(rows, self.spec.groups, self.spec.config.seed)
        name = f"{kind} gradient of {len(dealt)} groups"
        parts = [(group, *one) for group, of_group in enumerate(dealt) for one in _parts(of_group)]
        tasks = [
            self._task(f"the {name}, part {n} of group {group}", ShardScorer.gradient, kind, part, None)
            for group, n, part in parts
        ]
        sums: dict[int, Sums] = {}
        tokens = count_tokens(rows) * self.spec.passes
        for i, found in self._in_order(Stage(name=name, tokens=tokens, of="model", tasks=tasks)):
            n = parts[i][0]
            if n in sums:
                sums[n].add(found)
            else:
                sums[n] = found
        kept = {"tokens": torch.tensor([response_tokens(group) for group in dealt])}
        for n, of_group in sums.items():
            mean = self._mean(kind, dealt[n], of_group)
            kept |= {f"{n} {key}": tensor for key, tensor in mean.items()}
        self.spec.store.save(_GROUPED[kind], kept)

    def _mean(self, kind: str, rows: Sequence[AnyRow], sums: Sums) -> dict[str, torch.Tensor]:
        """The mean over the tokens of some rows. Raises InputError where it is not finite."""
        mean = sums.mean("tokens")
        if not all(torch.isfinite(g).all() for g in mean.values()):
            self.check_finite(kind, rows)
            raise InputError(
                f"The loss of the {kind} rows has no finite gradient, so it gives no direction to score by."
            )
        return mean

    def check_finite(self, kind: str, rows: Sequence[AnyRow]) -> None:
        """Raise InputError that names those of some rows whose loss is not finite where scoring begins, if any is."""
        name = f"losses of the {kind} rows"
        parts = [*in_parts(rows)]
        tasks = [self._task(f"the {name}, part {n}", ShardScorer.infinite, part) for n, part in enumerate(parts)]
        found = self._in_order(Stage(name=name, tokens=count_tokens(rows), of="model", tasks=tasks))
        bad = [chosen(parts[n][i]) for n, places in found for i in places]
        if bad:
            named = ", ".join(f"{row.source}:{row.line}" for row in bad[:_MOST_NAMED])
            more = f" and {len(bad) - _MOST_NAMED:,} more" if len(bad) > _MOST_NAMED else ""
            raise InputError(
                f"{named}{more}: {count(len(bad), f'{kind} row')} to which the model gives no finite loss, so that"
                " nothing is there to value tokens by. Leave such rows out, or look for what is not finite in it."
            )

    def _curvature(self, rows: Sequence[AnyRow]) -> None:
        """The training curvature of --precondition: the bases first, where it has some; then moments along them."""
        store, kind = self.spec.store, self.spec.config.precondition
        parts = list(self._with_pairs(rows))

        def summed(call: Any, times: int) -> Sums:
            what = f"the {kind} {call.__name__}"
            tasks = [self._task(f"{what}, part {n}", call, *part) for n, part in enumerate(parts)]
            tokens = times * count_tokens(rows)
            return self._total(Stage(name=f"{kind} curvature", tokens=tokens, of="model", tasks=tasks))

        bare = kind != "adam" and store.load(artifacts.PRECONDITION, part=artifacts.BASES) is None
        if bare:
            sums = summed(ShardScorer.factors, 1 if kind == "kfac" else 2)
            found = self._one(f"{kind} bases", "model", ShardScorer.bases, sums)
            store.save(artifacts.PRECONDITION, tensors_of(found), None if kind == "kfac" else artifacts.BASES)
        if kind != "kfac":
            sums = summed(ShardScorer.moments, 0 if bare else 1)  # told of with the bases
            found = self._one(f"{kind} curvature", "model", ShardScorer.curvature, sums)
            store.save(artifacts.PRECONDITION, tensors_of(found))

    def _iterations(self, rows: Sequence[AnyRow]) -> None:
        """The directions of --precondition astra. Each iterate is kept once what comes after it can be made of it."""
        store, last, kind = self.spec.store, self.spec.config.precondition_iterations, artifacts.SOLVED
        parts = list(self._with_pairs(rows))
        first = next((k for k in range(last - 1, 0, -1) if store.is_made(kind, solving.STATE.format(k))), 0)
        if not store.is_made(kind, solving.STATE.format(first)):
            self._keep(first, self._one("where astra begins", "model", solving.begin))
        tokens = (last - first) * count_tokens(rows)
        for k in range(first, last):
            # A part is cut into batches alike each time, also where memory ran out.
            tasks = [
                self._task(f"the astra products, part {n}", solving.products, k, *part) for n, part in enumerate(parts)
            ]
            sums = self._total(Stage(name=solving.NAME, tokens=tokens if k == first else 0, of="model", tasks=tasks))
            found = self._one(f"astra iteration {k + 1}", "model", solving.step, k, sums)
            if k + 1 < last:
                self._keep(k + 1, found)
        solving.tell(solving.save(store, tensors_of(found)), self.spec.config, self.progress)

    def _keep(self, k: int, found: Mapping[str, NDArray[Any]]) -> None:
        """Keep an iterate in the place of the one before."""
        store, (state, along) = self.spec.store, solving.parts_of(tensors_of(found))
        store.save(artifacts.SOLVED, along, solving.ALONG.format(k))
        store.save(artifacts.SOLVED, state, solving.STATE.format(k))
        for part in (solving.STATE, solving.ALONG) if k else ():
            store.path(artifacts.SOLVED, part.format(k - 1)).unlink(missing_ok=True)

    def _tidy(self, kind: str, but: str | None = None) -> None:
        """Take away the parts of what is whole now."""
        for path in self.spec.store.parts(kind):
            if but is None or path != self.spec.store.path(kind, but):
                path.unlink()

    def _with_pairs(self, rows: Sequence[AnyRow]) -> Iterator[tuple[Sequence[AnyRow], Pairs | None]]:
        """Rows in parts, each with what weighs its pairs (Eq. 14), wherever their shards are; None for plain rows."""
        if len(sequences(rows[:1])) == 1:
            yield from ((part, None) for part in in_parts(rows))
            return
        reference = self._losses_of(rows) if self.spec.has_reference else None
        for part in in_parts(rows):
            mine = None if reference is None else [reference[row.row_id, row.turn] for row in part]
            sums = None if mine is None else reference_sums([nll for pair in mine for nll in pair])
            yield part, Pairs(beta=self.spec.config.beta, reference=sums)

    def _losses_of(self, rows: Sequence[AnyRow]) -> dict[tuple[int, int], Sequence[NDArray[np.float32]]]:
        """The reference's nll of both branches of some pairs, by row_id and turn."""
        wanted = {(row.row_id, row.turn) for row in rows}
        found: dict[tuple[int, int], Sequence[NDArray[np.float32]]] = {}
        for index in sorted({row.row_id // self.job.rows.per_shard for row in rows}):
            shard = self.job.shards[index]
            places = {i: key for i, row in enumerate(shard) if (key := (row.row_id, row.turn)) in wanted}
            losses = self.spec.reference_losses(index, shard)
            found |= {key: losses[2 * i : 2 * i + 2] for i, key in places.items()} if losses else {}
        return found

    # --------------------------------------------------------------------------------------------------- tasks, done

    def _task(self, what: str, call: Any, *arguments: Any) -> Task:
        """`what` names no other task of a run: its plan is kept by that."""
        return Task(what=what, call=call, arguments=arguments, plan=self.budget.plan(what))

    def _one(self, name: str, of: Which, call: Any, *arguments: Any) -> Any:
        """What comes of a stage of one task."""
        task = replace(self._task(name, call, *arguments), halves=False)  # what it is given is used up
        stage = Stage(name=name, tokens=0, of=of, tasks=[task])
        [(_, found)] = self._each(stage)
        return found

    def _each(self, stage: Stage) -> Iterator[tuple[int, Any]]:
        """The number of each task and what came of it, as they are done; where memory ran out, its plan is noted."""
        names: list[str] = []

        def named() -> Iterator[Task]:
            for task in stage.tasks:  # each has its rows: one is made when it is handed out
                names.append(task.what)
                yield task

        for n, done in self.engine.run(replace(stage, tasks=named()), self.progress):
            self.budget.note(names[n], done.plan)
            yield n, done.result

    def _in_order(self, stage: Stage) -> Iterator[tuple[int, Any]]:
        """The same, in the order of tasks."""
        waiting: dict[int, Any] = {}
        wanted = 0
        for n, result in self._each(replace(stage, in_order=True)):
            waiting[n] = result
            while wanted in waiting:
                yield wanted, waiting.pop(wanted)
                wanted += 1

    def _total(self, stage: Stage) -> Sums:
        """The sums of all parts."""
        return total(part for _, part in self._in_order(stage))


def _parts(rows: Sequence[TokenRow]) -> Iterator[tuple[int, Sequence[TokenRow]]]:
    """The parts of rows that sums are made of, numbered."""
    return enumerate(in_parts(rows))
