"""Values over the training to come, by group of target rows, and the weights that are made of them.

The derivative is linear in what it is of, so one rehearsal with an outcome for each of 8 groups of target rows gives
the values of 32, 64, 128 and 244 target rows: means over the first 1, 2, 4 and 8 groups. By the count of tokens or by
the sum of weights are of one rehearsal as well: they differ by a term that is kept apart. What a rehearsal gives, an
hour's work, is a small .npz under `results/values`, by which any mask can be tried without rehearsing again; one that
was killed goes on from the states it kept under `--work`.

A selection says `target_rows`, `denominator`, with `one_group` that no errors are wanted (a sixth of the time), and for
a second round `first`: the mask by which tokens leave before rows are rehearsed again. The package rehearses without
weights, so a second round leaves out, and does not tilt.
Pairs are rehearsed by DPO from the model that they start from; their branches are masked apart, as the tool does.
Shapes: G groups, N response tokens of all rows, R rows.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from selections import Selection, alone, digest
from settings import MODEL_NAME, TARGETED, Setting, pair_rows, rows_sha256, token_rows
from training import BETA, Weights, batches, load

from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.groups import mean_and_error
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, mean_loss
from alphatoken_curate.directions.shelves import Artefacts, Scratch
from alphatoken_curate.directions.step_losses import TOKENS, PairLoss
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.masks.choose import weighed
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.signals.student import factor
from alphatoken_curate.tokens.plan import response_tokens, token_starts
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow

Floats = NDArray[np.float64]
R = TypeVar("R", bound=AnyRow)

GROUP_ENDS = (32, 64, 96, 128, 157, 186, 215, TARGETED)
"""Target rows that the first so many groups have together."""

ORDER = 0
"""Seed of the order of rows that is rehearsed."""

BATCH_TOKENS, ROOT = 1024, 1e-12

COURSE: dict[str, Any] = {"batch_tokens": BATCH_TOKENS, "root": ROOT, "order": ORDER, "group_ends": list(GROUP_ENDS)}
"""What is rehearsed beside a setting, as result lines have it."""

COURSE_ROWS = 64
"""Rows of a rehearsal; more rows are taken in as many rehearsals as they need, each from the start."""

AT_ONCE = 2
"""Outcomes that go back together: each takes 2.2 GB of SmolLM2-135M."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where rehearsals are done: `work` for states on the way, `values` for what they give."""

    work: Path
    values: Path
    at_once: int = AT_ONCE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupValues:
    """Values in nats, (G, N) each, in parts as `directions.rehearsal.Values`; `tokens` (G,): of each group."""

    own: Floats
    denominator: Floats
    tokens: NDArray[np.int64]
    root_share: float

    def of(self, target_rows: int, denominator: str) -> GroupedNumbers:
        """Those of the first groups, by a denominator."""
        groups = _ends(len(self.tokens)).index(target_rows) + 1
        values = self.own + self.denominator if denominator == "sum" else self.own
        return GroupedNumbers(values[:groups], self.tokens[:groups])


@dataclass(frozen=True, slots=True, eq=False)
class GroupedNumbers:
    """Numbers by group (G, N), and by how many tokens each group counts."""

    values: Floats
    tokens: NDArray[np.int64]

    @property
    def mean(self) -> Floats:
        """(N,)."""
        return mean_and_error(self.values, self.tokens.tolist())[0]

    @property
    def error(self) -> Floats:
        """Standard error of the mean, (N,). Raises ValueError where there is one group."""
        if len(self.values) < 2:
            raise ValueError("one group of target rows tells no error")
        return mean_and_error(self.values, self.tokens.tolist())[1]

    @property
    def upper(self) -> Floats:
        """What the value is below with 95%, (N,): below 0 where the value is negative beyond its error."""
        return self.mean + factor(len(self.values)) * self.error

    def by_row(self, lengths: NDArray[np.int64]) -> GroupedNumbers:
        """Sums over the tokens of each row, (G, R)."""
        starts = np.cumsum(lengths) - lengths
        return GroupedNumbers(np.add.reduceat(self.values, starts, axis=1), self.tokens)


# ------------------------------------------------------------------------------------------------------- the rehearsal


def values_of(
    where: Setting, place: Place, trains: Weights | None = None, groups: int = len(GROUP_ENDS)
) -> GroupValues:
    """Values of all response tokens of a setting's rows, or of those that have a weight; made now or read."""
    parts, size = [], COURSE_ROWS * (2 if where.pairs else 1)
    for first in range(0, len(where.train), size):
        part = replace(where, train=where.train[first : first + size])
        mine = None if trains is None else trains[first : first + size]
        parts.append(_values_of_course(part, place, mine, _ends(groups)))
    return GroupValues(
        own=np.concatenate([part.own for part in parts], axis=1),
        denominator=np.concatenate([part.denominator for part in parts], axis=1),
        tokens=parts[0].tokens,
        root_share=max(part.root_share for part in parts),
    )


def _ends(groups: int) -> tuple[int, ...]:
    """Target rows that the first so many of the groups have together: all groups, or all rows in one."""
    return GROUP_ENDS if groups == len(GROUP_ENDS) else GROUP_ENDS[-1:]


def _values_of_course(where: Setting, place: Place, trains: Weights | None, ends: tuple[int, ...]) -> GroupValues:
    rows = token_rows(where.train)
    if trains is not None and where.pairs:
        raise ValueError("a second round is of rows, and not of pairs")
    if trains is not None:
        rows = [replace(row, response=row.response & (w > 0)) for row, w in zip(rows, trains, strict=True)]
    about = {
        "model": MODEL_NAME,
        "rows": rows_sha256(where, ["train", "target"]),
        "responds": digest([np.flatnonzero(row.response).tolist() for row in rows]),
        "learning_rate": where.learning_rate,
        "batch": where.batch,
        "epochs": where.epochs,
        **({"beta": BETA, "outcome": "dpo" if where.targets_pairs else "nll"} if where.pairs else {}),
        **COURSE,
        "group_ends": list(ends),
    }
    by_group = place.values / f"{digest({**about, 'group_ends': list(GROUP_ENDS)})}.npz"
    if len(ends) == 1 and by_group.is_file():
        return _in_one(_read(by_group))
    name = digest(about)
    kept, states = place.values / f"{name}.npz", place.work / f"{name}.states"
    with alone(states):
        if not kept.is_file():
            target = pair_rows(where.target) if where.targets_pairs else token_rows(where.target)
            groups = dealt(target, ends)
            steps = batches(where, ORDER)
            optimiser = Optimiser(lr=where.learning_rate, steps=len(steps), root=ROOT)
            # What goes back together is kept together, so that another number of them begins anew.
            store = Store(folder=states, fields={**about, "at_once": place.at_once})
            trained = pair_rows(where.train) if where.pairs else rows
            found = rehearse(load(), trained, steps, groups, optimiser, store, place.at_once)
            place.values.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(".part.npz")
            stored = {name: getattr(found, name).astype(np.float32) for name in ("own", "denominator")}
            np.savez_compressed(part, **stored, tokens=found.tokens, root_share=found.root_share)
            part.rename(kept)
            shutil.rmtree(states)
        return _read(kept)


def _read(kept: Path) -> GroupValues:
    with np.load(kept) as read:
        floats = {name: read[name].astype(np.float64) for name in ("own", "denominator")}
        return GroupValues(**floats, tokens=read["tokens"], root_share=float(read["root_share"]))


def _in_one(values: GroupValues) -> GroupValues:
    """The values by all groups as one, which are what one rehearsal for all of their rows gives, but for rounding."""
    share = values.tokens[None] / values.tokens.sum()
    tokens = values.tokens.sum(keepdims=True)
    return replace(values, own=share @ values.own, denominator=share @ values.denominator, tokens=tokens)


def rehearse(
    model: Any,
    rows: Sequence[AnyRow],
    steps: Sequence[Sequence[int]],
    groups: Sequence[Sequence[AnyRow]],
    optimiser: Optimiser,
    store: Store,
    at_once: int | None = None,
) -> GroupValues:
    """Go through a training of some rows and back once. Rows without a response token take no part.

    Groups of pairs, which count by how many they are, have DPO's loss as outcome.
    """
    trained = [i for i, row in enumerate(rows) if response_tokens([row])]
    place = {i: n for n, i in enumerate(trained)}
    ours = [[place[i] for i in step if i in place] for step in steps]
    course = Course(
        rows=[rows[i] for i in trained],
        steps=[step for step in ours if step],
        optimiser=replace(optimiser, steps=sum(map(bool, ours))),
        denominator="sum",
        batch_tokens=BATCH_TOKENS,
    )
    trainee = Trainee(model, "all")
    if isinstance(rows[0], PairRow):
        course = replace(course, denominator="count", loss=dpo(trainee, course.rows))
    states, scratch = Artefacts(store, trainee.device, prefix="0"), Scratch(store.folder, trainee.device)
    rehearsal = Rehearsal(trainee, course, states, steps=scratch)
    pairs = isinstance(groups[0][0], PairRow)
    losses = [dpo(trainee, group) if pairs else TOKENS for group in groups]
    outcomes = [mean_loss(group, BATCH_TOKENS, loss) for group, loss in zip(groups, losses, strict=True)]
    found = rehearsal.run(outcomes, at_once=at_once)
    return GroupValues(
        own=found.own if found.omega is None else found.value,
        denominator=found.denominator,
        tokens=np.array([len(group) if pairs else response_tokens(group) for group in groups]),
        root_share=found.root_share,
    )


def dpo(trainee: Trainee, pairs: Sequence[AnyRow]) -> PairLoss:
    """The loss of pairs whose reference is the model as it is now."""
    return PairLoss(beta=BETA, reference=trainee.nll_of(pairs, BATCH_TOKENS), starts=token_starts(pairs))


def dealt(target: Sequence[R], ends: Sequence[int] = GROUP_ENDS) -> list[Sequence[R]]:
    """Target rows by group, in their order; of fewer rows (a trial) each group has its share."""
    places = [0, *(round(end * len(target) / TARGETED) for end in ends)]
    return [target[first:last] for first, last in itertools.pairwise(places)]


# ------------------------------------------------------------------------------------------------------------- weights


def rehearsed_weights(chosen: Selection, where: Setting, place: Place) -> Weights:
    """The weights of each training row's tokens, of a selection by rehearsed values."""
    first: Mapping[str, Any] | None = chosen.score.get("first")
    groups = 1 if chosen.score.get("one_group") else len(GROUP_ENDS)
    trains = None if first is None else _weights(values_of(where, place, None, groups), chosen, first, where, None)
    return _weights(values_of(where, place, trains, groups), chosen, chosen.mask, where, trains)


def _weights(
    values: GroupValues, chosen: Selection, mask: Mapping[str, Any], where: Setting, trains: Weights | None
) -> Weights:
    """By a mask of values of the tokens that train, all of them or those that have a weight."""
    given = [row.response for row in where.train]
    if trains is not None:
        given = [response & (w > 0) for response, w in zip(given, trains, strict=True)]
    lengths = np.array([int(response.sum()) for response in given])
    numbers = values.of(chosen.score["target_rows"], chosen.score["denominator"])
    flat = (pair_weights if where.pairs else flat_weights)(numbers, lengths, mask)
    weights: Weights = [np.zeros(len(response), np.float32) for response in given]
    for weight, response, mine in zip(weights, given, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
        weight[response] = mine
    return weights


def flat_weights(values: GroupedNumbers, lengths: NDArray[np.int64], mask: Mapping[str, Any]) -> NDArray[np.float32]:
    """Weights (N,) by the tool's own rules: `by` one of `NUMBERS`, `keep` and `weights` as `mask` has them.

    `rows`: the share of rows to keep, those of highest `by`, which is the same for all tokens of a row then.
    """
    full = lengths[lengths > 0]
    number = NUMBERS[mask["by"]](values, full)
    keep = mask.get("keep", 1.0)
    if "rows" in mask:
        each = number[np.cumsum(full) - full]
        drop = np.argsort(each, kind="stable")[: round((1 - mask["rows"]) * len(each))]
        number, keep = np.repeat(np.where(np.isin(np.arange(len(each)), drop), -1.0, 1.0), full), "positive"
    kept = weighed(
        number, full, keep=keep, scope="global", weights=mask.get("weights", "binary"), allow_empty_rows=True
    )
    return kept.weight


def pair_weights(values: GroupedNumbers, lengths: NDArray[np.int64], mask: Mapping[str, Any]) -> NDArray[np.float32]:
    """The same of pairs, whose branches have `lengths`: whole pairs by rows, else each branch by itself."""
    if "rows" in mask:
        return flat_weights(values, lengths[0::2] + lengths[1::2], mask)
    found = np.empty(lengths.sum(), np.float32)
    branch = np.repeat(np.arange(len(lengths)) % 2, lengths)
    for n in (0, 1):
        mine = GroupedNumbers(values.values[:, branch == n], values.tokens)
        found[branch == n] = flat_weights(mine, lengths[n::2], mask)
    return found


def _shrunk(values: GroupedNumbers, _lengths: NDArray[np.int64]) -> Floats:
    """v v^2 / (v^2 + error^2): a value that is no larger than its error counts half or less."""
    mean, error = values.mean, values.error
    squares = mean**2 + error**2
    return np.where(squares > 0, mean**3 / np.where(squares > 0, squares, 1.0), 0.0)


def _of_rows(name: str) -> Callable[[GroupedNumbers, NDArray[np.int64]], Floats]:
    return lambda values, lengths: np.repeat(getattr(values.by_row(lengths), name), lengths)


NUMBERS: dict[str, Callable[[GroupedNumbers, NDArray[np.int64]], Floats]] = {
    "value": lambda values, _: values.mean,
    "-value": lambda values, _: -values.mean,
    "value + q error": lambda values, _: values.upper,
    "shrunk value": _shrunk,
    "row sum": _of_rows("mean"),
    "row mean": lambda values, lengths: np.repeat(values.by_row(lengths).mean / lengths, lengths),
    "row sum + q error": _of_rows("upper"),
}
"""What a mask is made by, (N,) from values and the tokens of each row. q: the tool's quantile of Student's t."""
