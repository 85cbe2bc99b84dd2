"""Who leads a rehearsal: deals its portions out, keeps what comes of them, and makes the columns of all tokens.

Nothing is exchanged between portions. What comes of each is kept at once, so that whoever goes on, with more workers,
fewer or none, does only the rest; the columns are kept until the run is deleted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alphatoken_curate.directions.rehearsal import Values
from alphatoken_curate.engine.precision import narrow_kind
from alphatoken_curate.errors import InputError
from alphatoken_curate.models.load import config_of
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.artifacts import REHEARSAL, Store
from alphatoken_curate.runs.atomic import sweep
from alphatoken_curate.runs.manifest import Plan
from alphatoken_curate.runs.schema import BY_ESTIMATOR, ERRORS
from alphatoken_curate.scoring.job import Job
from alphatoken_curate.scoring.material import Training, material_of
from alphatoken_curate.scoring.portions import DONE, Portion, deal, known
from alphatoken_curate.scoring.rehearse import LOSSES, RehearsalScorer, of_budget
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import ScorerSpec, count_tokens
from alphatoken_curate.scoring.stages import Stages
from alphatoken_curate.scoring.worker import Stage, Task
from alphatoken_curate.signals import composite
from alphatoken_curate.signals.preference import pair_terms
from alphatoken_curate.signals.rehearsed import columns
from alphatoken_curate.signals.stored import RowResult, spread
from alphatoken_curate.tokens.plan import plan_batches, response_tokens, token_starts
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, branches
from alphatoken_curate.wording import count

COLUMNS = "columns"
"""The part of what a rehearsal keeps that has what came of it."""

NAME = "the rehearsal"
"""By which its plan is kept: all portions have one token budget."""

SMALL_BETA = 1.0
"""A --beta below this is rather one of DPO than of SimPO."""

FEW_ROWS = 100
"""Target rows of which fewer are warned of: a cut by their values learns them by heart."""

MUCH_OF_A_STEP = 0.05
"""What the root term may change of the steps before it is warned of."""


def rehearse(stages: Stages) -> None:
    """Make sure the columns of all response tokens are in artifacts/, and nothing else that a rehearsal keeps.

    Raises InputError where the training or an outcome is not finite.
    """
    store = stages.spec.store
    if not store.is_made(REHEARSAL, COLUMNS):
        found = _Led(stages).columns()
        store.save(REHEARSAL, {name: torch.from_numpy(column) for name, column in found.items()}, COLUMNS)
    for path in store.parts(REHEARSAL):
        if path != store.path(REHEARSAL, COLUMNS):
            path.unlink()
    sweep(store.folder)  # what workers that died were writing


class _Led:
    """One rehearsal, and who does it. Without workers beside this process, this one does."""

    def __init__(self, stages: Stages) -> None:
        self.stages, self.spec, self.config, self.engine = stages, stages.spec, stages.spec.config, stages.engine
        self.store = stages.spec.store
        self.material = material_of(stages.job, stages.spec)
        self.given = None if self.engine.workers else self.material
        if self.engine.workers:
            self.material.put_away(self.store)
        self.groups = self.material.groups(self.spec)
        self.outcomes = sum(map(len, self.groups.values())) + self.spec.has_drift

    def columns(self) -> dict[str, NDArray[np.float32]]:
        """(N,) of each column; NaN, but for the loss, in rows whose loss is not finite, and which do not train."""
        self._tell()
        self._tell_of_model()
        while True:
            plan = self.stages.budget.plan(NAME)
            if (losses := self._losses(plan)) is None:
                continue
            training = self.material.training(self.config, losses["nll"])
            self._tell_of_warmup(training)
            if not training.rows or self._named(plan, training):
                return losses | (self._values(plan, training) if training.rows else {})

    def _losses(self, plan: Plan) -> dict[str, NDArray[np.float32]] | None:
        """Loss (nll) and entropy of all response tokens where the training begins, (N,) each; None for another plan."""
        own = self._own(plan)
        if (kept := own.load(REHEARSAL, part=LOSSES)) is None:
            name, rows = "losses before the rehearsal", self.material.rows
            found = np.empty((2, int(token_starts(rows)[-1])), np.float32)
            shares = max(1, min(self.engine.workers, len(plan_batches(rows, plan.batch_tokens))))
            tasks = [
                self._task(f"{name}, share {n}", plan, RehearsalScorer.losses, self.given, n, shares)
                for n in range(shares)
            ]

            def keep(_: int, result: Any, __: Plan) -> None:
                found[:, result[0]] = result[1]

            if not self._done(name, count_tokens(rows), tasks, plan, keep):
                return None
            kept = {"nll": torch.from_numpy(found[0]), "entropy": torch.from_numpy(found[1])}
            own.save(REHEARSAL, kept, LOSSES)
        return {name: tensor.numpy() for name, tensor in kept.items()}

    def _named(self, plan: Plan, training: Training) -> bool:
        """As `_rehearsed`; where that fails for a row that an outcome is of, it is named."""
        try:
            return self._rehearsed(plan, training)
        except InputError as error:
            failed = error.with_traceback(None)  # which holds what was trained
        self.stages.check_finite("target or retention", [*self.material.target, *self.material.retention])
        raise failed

    def _rehearsed(self, plan: Plan, training: Training) -> bool:
        """See that what comes of all portions is there; whether it is, by this plan."""
        workers, orders = max(1, self.engine.workers), self.config.rehearse_seeds
        ready = self._ready(plan)
        there = {piece for portion in ready for piece in portion.pieces}
        missing = [piece for piece in itertools.product(range(orders), range(self.outcomes)) if piece not in there]
        begun = dict.fromkeys(portion for _, portion, what in known(self.store, self.outcomes) if what != DONE)
        dealt = deal(missing, self.outcomes, orders, workers, begun)
        for path, portion, what in known(self.store, self.outcomes):
            if portion not in (ready if what == DONE else dealt):
                path.unlink()
        sharing = min(self.engine.sharing(), len(dealt))
        tasks = [
            self._task(f"{NAME}{one.told(orders)}", plan, RehearsalScorer.rehearse, one, self.given, sharing)
            for one in dealt
        ]

        def keep(n: int, found: Values, done: Plan) -> None:
            self._own(done).save(REHEARSAL, _tensors(found), f"{dealt[n].name}-{DONE}")
            for path in dealt[n].kept(self.store):
                if path != self.store.path(REHEARSAL, f"{dealt[n].name}-{DONE}"):
                    path.unlink()

        tokens = 2 * self.config.rehearse_epochs * count_tokens(training.rows) * len(dealt)
        return self._done("rehearsal", tokens, tasks, plan, keep)

    def _ready(self, plan: Plan) -> list[Portion]:
        """The portions of which it is kept what came of them."""
        found = (portion for _, portion, what in known(self.store, self.outcomes) if what == DONE)
        return [one for one in found if self._own(plan).is_made(REHEARSAL, f"{one.name}-{DONE}")]

    def _values(self, plan: Plan, training: Training) -> dict[str, NDArray[np.float32]]:
        """The columns of all response tokens, over all orders; NaN where they do not train."""
        ready, own = sorted(self._ready(plan), key=lambda one: (one.order, one.first)), self._own(plan)
        by_order = itertools.groupby(ready, lambda one: one.order)
        orders = [
            _joined([own.require(REHEARSAL, part=f"{one.name}-{DONE}") for one in group]) for _, group in by_order
        ]
        self._tell_of_root(orders)
        counts = {name: [response_tokens(group) for group in groups] for name, groups in self.groups.items()}
        errors = {f"{name}_error" for name, groups in self.groups.items() if len(groups) > 1}
        if self.spec.has_drift:
            counts["drift" if self.material.retention else "stab"] = [1]
        estimator = BY_ESTIMATOR[self.config.estimator]
        wanted, found = (set(estimator.signals) - set(ERRORS)) | errors, dict[str, NDArray[np.float32]]()
        for name, column in columns(orders, counts, estimator).items():
            if name in wanted:
                found[name] = np.full(int(token_starts(self.material.rows)[-1]), np.nan, np.float32)
                found[name][training.places] = column.astype(np.float32)
        return found

    # -------------------------------------------------------------------------------------------------- tasks, done

    def _task(self, what: str, plan: Plan, call: Any, *arguments: Any) -> Task:
        return Task(what=what, call=call, arguments=arguments, plan=plan)

    def _done(
        self, name: str, tokens: int, tasks: Sequence[Task], plan: Plan, keep: Callable[[int, Any, Plan], object]
    ) -> bool:
        """Have tasks done and kept; whether all were, by their plan.

        Where memory ran out for one, it and all others go by that one's plan from now on: sums in other batches round
        otherwise. In this process a task tells of itself.
        """
        stage = Stage(name=name, tokens=tokens if self.engine.workers else 0, of="model", tasks=tasks)
        with closing(self.engine.run(stage, self.stages.progress)) as running:
            for n, done in running:
                keep(n, done.result, done.plan)
                if done.plan != plan:
                    self.stages.budget.note(NAME, done.plan)
                    return False
        return True

    def _own(self, plan: Plan) -> Store:
        return of_budget(self.store, plan.batch_tokens)

    # --------------------------------------------------------------------------------------------------- told of it

    def _tell(self) -> None:
        progress, config = self.stages.progress, self.config
        if self.engine.workers > (pieces := self.outcomes * config.rehearse_seeds):
            progress.note(
                f"The rehearsal has {count(pieces, 'piece')}, one for each outcome of each order: so many workers have"
                " something to do in it, and the others wait."
            )
        if len(self.material.target) < FEW_ROWS:
            progress.warn(
                f"{count(len(self.material.target), 'target row')}: a cut by rehearsed values learns so few by heart."
                " Hundreds of --target rows serve, or a mild use: --weights tilt:0.25."
            )
        pairs = self.stages.job.layout.kind == "preference"
        if pairs and config.rehearse_simpo is not None and config.beta < SMALL_BETA:
            progress.warn(
                f"--rehearse-simpo by --beta {config.beta:g}: SimPO's margins are of means, and its beta is mostly 2 or"
                " more; 0.1 is one of DPO, whose margins are of sums."
            )
        if narrow_kind(self.spec.dtype) is not None and config.rehearse_optimizer == "adamw":
            progress.warn(
                f"--dtype {self.spec.dtype}: AdamW steps along the sign of a gradient near 0, which is rounding here."
                f" Values are off by much at --rehearse-root {config.root:g}: give --dtype float32."
            )

    def _tell_of_model(self) -> None:
        if self.spec.model.gguf:
            return  # of which transformers reads all to tell
        config = config_of(self.spec.model, trust_remote_code=self.config.trust_remote_code)
        found = config.get_text_config().to_dict()
        if (coefficient := found.get("router_aux_loss_coef") or 0) > 0:
            self.stages.progress.warn(
                f"The model's router_aux_loss_coef is {coefficient:g}: trainers add the loss that balances its experts"
                " to each step, TRL's by default, and a rehearsal does not. Train with router_aux_loss_coef=0.0, or"
                " these values are of another training."
            )
        drops = [f"{name} {share:g}" for name, share in sorted(found.items()) if _drops(name, share)]
        if drops and self.stages.job.layout.kind == "sft":  # of pairs TRL trains without
            self.stages.progress.warn(
                f"The model drops out as it trains ({', '.join(drops)}), and a rehearsal does not. Train with 0 there,"
                " or these values are of another training."
            )

    def _tell_of_warmup(self, training: Training) -> None:
        each = math.ceil(len(training.rows) / self.config.rehearse_rows_per_step)
        if 0 < (steps := each * self.config.rehearse_epochs) <= self.config.rehearse_warmup:
            self.stages.progress.warn(
                f"--rehearse-warmup {self.config.rehearse_warmup}: the training has {count(steps, 'step')}, so its rate"
                f" ends at {(steps - 1) / self.config.rehearse_warmup:.0%} of --rehearse-lr."
            )

    def _tell_of_root(self, orders: Sequence[Values]) -> None:
        share = max(order.root_share for order in orders)
        if share > MUCH_OF_A_STEP:
            self.stages.progress.warn(
                f"--rehearse-root {self.config.root:g} changes the steps by {share:.0%} of their length: values are of"
                " a smoother training than the one to come. A smaller one is nearer to it, and lets more rounding in."
            )


def _drops(name: str, share: object) -> bool:
    """Whether a setting of a model's config is a dropout that a language model trains with."""
    if "drop" not in name or name.startswith(("classifier", "summary")):
        return False
    return isinstance(share, float) and share > 0


class ColumnScorer(ShardScorer):
    """Gives the signals of a shard's rows from the columns of a rehearsal. Nothing is computed here."""

    loads_itself = True

    def __init__(self, spec: ScorerSpec, job: Job) -> None:
        super().__init__(spec)
        keys, ends = list[tuple[int, int]](), [0]
        for row in job.rows:
            keys.append((row.row_id, row.turn))
            ends.append(ends[-1] + response_tokens([row]))
        self._places = {key: slice(*both) for key, both in zip(keys, itertools.pairwise(ends), strict=True)}

    def __call__(
        self, shard: int, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int
    ) -> list[RowResult | None]:
        """Signals of each row of a shard; None where its loss is not finite."""
        kept = self.spec.reference_losses(shard, rows)
        reference = iter(kept or ())
        progress.advance(count_tokens(rows))
        return [self._result(row, None if kept is None else [next(reference) for _ in branches(row)]) for row in rows]

    def _result(self, row: AnyRow, reference_nll: Sequence[NDArray[np.float32]] | None) -> RowResult | None:
        """Of its columns, and the reference's nll of each branch."""
        mine = self._places[row.row_id, row.turn]
        parts = {name: column[mine] for name, column in self._columns.items()}
        if reference_nll is not None:
            parts["reference_nll"] = np.concatenate(reference_nll)
        if not all(np.isfinite(column).all() for column in parts.values()):
            return None
        found, gain = [], []
        for branch, ends in zip(branches(row), itertools.pairwise(token_starts([row]).tolist()), strict=True):
            here = {name: column[slice(*ends)] for name, column in parts.items()}
            gain.append((here.get("reference_nll", here["nll"]).astype(np.float64) - here["nll"]).sum())
            found.append(spread(here, branch))
        if not isinstance(row, PairRow):
            return RowResult(branches=tuple(found))
        terms = pair_terms(self.spec.config.beta, np.array(gain))
        return RowResult(branches=tuple(found), omega=float(terms.omega[0]), margin=float(terms.margin[0]))

    @cached_property
    def _columns(self) -> dict[str, NDArray[np.float32]]:
        """(N,) each, by the names they are stored under."""
        config = self.spec.config
        kept = self.spec.store.require(REHEARSAL, part=COLUMNS)
        found = {name: tensor.numpy() for name, tensor in kept.items()}
        if "adapt_error" in found:
            found["value_error"] = composite.value_error(found, config.stability_weight)
        estimator = BY_ESTIMATOR[config.estimator]
        if estimator.adaptation[0] in found:
            found["value"] = composite.value(found, estimator, stability_weight=config.stability_weight)
        return found


def _tensors(values: Values) -> dict[str, torch.Tensor]:
    """What came of a portion, as it is kept."""
    parts = {field.name: getattr(values, field.name) for field in fields(values)}
    share = torch.tensor([parts.pop("root_share")], dtype=torch.float64)
    found = {name: torch.tensor(array) for name, array in parts.items() if array is not None}  # Ray's cannot be written
    return found | {"root_share": share}


def _joined(kept: Sequence[Mapping[str, torch.Tensor]]) -> Values:
    """What came of an order, of the portions of it that were kept, in the order of their outcomes."""
    parts = {name: torch.cat([one[name] for one in kept]).numpy() for name in kept[0] if name != "root_share"}
    return Values(**parts, root_share=float(kept[0]["root_share"]))
