"""The iterations of --precondition astra as tasks: where they begin, products over some rows, and what comes of all.

An iterate is kept among the artefacts until the next one is, so that a run that was killed goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.astra import KIND, Iterate, Solver
from alphatoken_curate.directions.gauss_newton import product_sums
from alphatoken_curate.directions.precondition import Batches
from alphatoken_curate.directions.sums import Sums
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.moving import Moving
from alphatoken_curate.engine.tangents import NoTangentError
from alphatoken_curate.errors import ModelError
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.artifacts import PRECONDITION, SOLVED, Store
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import ScorerSpec, counted
from alphatoken_curate.signals.preference import Pairs
from alphatoken_curate.tokens.tokenise import AnyRow
from alphatoken_curate.wording import count

STATE, ALONG = "state-{}", "along-{}"
"""Parts of what is kept: an iterate, by its number, and what the products after it are with."""

NAME = "astra iterations"
"""The stage of all of them."""

RESIDUALS = "residuals"
"""The part that tells how far each iterate was from the solution, and stays."""

FAR = 0.5
"""What may be left of a right-hand side before it is warned of."""

_X, _LEFT, _ALONG, _NUMBERS = "x", "left", "along", "numbers"

Arrays = dict[str, NDArray[Any]]
"""By what it is, whose direction it is of, and the weight: `x adapt model.layers...`; `numbers adapt`, float64."""


def begin(scorer: ShardScorer, _: Progress, _batch_tokens: int) -> Arrays:
    """What EK-FAC gives of each direction that is scaled."""
    solver, found = _solver(scorer), Arrays()
    for name, v in scorer.unscaled():
        found |= _arrays(scorer, name, solver.begin(v))
    return found


def products(
    scorer: ShardScorer, k: int, rows: Sequence[AnyRow], pairs: Pairs | None, progress: Progress, batch_tokens: int
) -> Sums:
    """Those of the Gauss-Newton matrix of some rows with what iterate `k` goes along."""
    if scorer.moving is None or scorer.moving[0] != k:
        scorer.moving = None  # one at a time
        along = _directions(scorer, scorer.spec.store.require(SOLVED, part=ALONG.format(k)), _ALONG)
        scorer.moving = k, list(along), Moving(scorer.scoring, list(along.values()))
    _, names, moving = scorer.moving
    bend = None if pairs is None else pairs.bend
    try:
        made = product_sums(scorer.scoring, moving, len(names), counted(rows, batch_tokens, progress), bend)
    except NoTangentError as error:
        raise ModelError(
            f"{type(scorer.scoring.model).__name__}: --precondition {KIND} cannot solve by it: no forward-mode formula"
            f" for {error}. Use --precondition ekfac."
        ) from error
    found: Arrays = {"forms": made.forms.numpy(), "shares": np.array([made.shares])}
    for name, product in zip(names, made.along, strict=True):
        found |= _named(scorer, _ALONG, name, product)
    return Sums(arrays=found, counts={"units": made.units})


def step(scorer: ShardScorer, k: int, sums: Sums, _: Progress, _batch_tokens: int) -> Arrays:
    """Iterate `k` + 1, of products over all rows."""
    scorer.moving = None
    store, solver = scorer.spec.store, _solver(scorer)
    scale = float(sums.arrays["shares"][0]) / sums.counts["units"] ** 2
    forms = (scale * sums.arrays["forms"]).tolist()
    made = _directions(scorer, sums.tensors(), _ALONG)
    sums.arrays.clear()
    kept = store.require(SOLVED, part=STATE.format(k)) | store.require(SOLVED, part=ALONG.format(k))
    x, left, along = (_directions(scorer, kept, what) for what in (_X, _LEFT, _ALONG))
    found = Arrays()
    for name, form in zip(list(made), forms, strict=True):
        norm, *residuals = kept[f"{_NUMBERS} {name}"].tolist()
        at = Iterate(x=x.pop(name), left=left.pop(name), along=along.pop(name), norm=norm, residuals=tuple(residuals))
        product = [h.mul_(scale) for h in made.pop(name)]
        found |= _arrays(scorer, name, solver.step(at, product, form))
    return found


def tried(spec: ScorerSpec, scoring: ScoringModel, stored: Mapping[str, Tensor], batches: Batches) -> None:
    """An iteration along nothing over some batches, which takes what one takes; `stored`: their curvature."""
    config, scaled = spec.config, 1 + (spec.config.retention is not None) * spec.config.precondition_stability
    objectives = len(spec.objectives) if config.precondition_stability else 1
    solver = Solver(scoring, stored, config.precondition_damping)
    at = [solver.begin(scoring.zeros()) for _ in range(objectives + scaled * spec.groups * (spec.groups > 1))]
    bend = Pairs(beta=config.beta, reference=None).bend if spec.store.fields["kind"] == "preference" else None
    made = product_sums(scoring, Moving(scoring, [one.along for one in at]), len(at), batches(), bend)
    for one, product, form in zip(at, made.along, made.forms.tolist(), strict=True):
        solver.step(one, product, form)


def parts_of(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An iterate as it is kept: itself, and what the products after it are with."""
    along = {key: tensor for key, tensor in found.items() if key.startswith(f"{_ALONG} ")}
    return {key: tensor for key, tensor in found.items() if key not in along}, along


def save(store: Store, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Keep the directions of the last iterate and, before them, the residuals of each, which are returned."""
    x = {key.removeprefix(f"{_X} "): tensor for key, tensor in found.items() if key.startswith(f"{_X} ")}
    numbers = (key for key in found if key.startswith(f"{_NUMBERS} "))
    residuals = {key.removeprefix(f"{_NUMBERS} "): found[key][1:].clone() for key in numbers}
    store.save(SOLVED, residuals, RESIDUALS)
    store.save(SOLVED, x)
    return residuals


def tell(residuals: Mapping[str, Tensor], config: ScoreConfig, progress: Progress) -> None:
    """How far the iterations came, for the direction of which least is solved."""
    worst = max(residuals.values(), key=lambda one: float(one[-1]))
    several = f" at most, of {count(len(residuals), 'direction')}" if len(residuals) > 1 else ""
    progress.note(
        f"--precondition {KIND}: {count(len(worst) - 1, 'iteration')} leave {float(worst[-1]):.2g} of what is to be"
        f" solved for{several}; EK-FAC {float(worst[0]):.2g}."
    )
    if float(worst[-1]) > FAR:
        progress.warn(
            f"--precondition {KIND} is far from solved: a --precondition-damping above {config.precondition_damping:g}"
            f" takes fewer iterations, or give more --precondition-iterations than {config.precondition_iterations}."
        )


def residuals_of(spec: ScorerSpec) -> dict[str, Json]:
    """What a run tells of its iterations beside its settings: |v - (H + lambda) x| / |v| of EK-FAC and each iterate."""
    if spec.config.precondition != KIND:
        return {}
    kept = spec.store.require(SOLVED, part=RESIDUALS)
    return {"precondition_residuals": {name: numbers.tolist() for name, numbers in kept.items()}}


def _solver(scorer: ShardScorer) -> Solver:
    stored = scorer.spec.store.require(PRECONDITION)
    return Solver(scorer.scoring, stored, scorer.spec.config.precondition_damping)


def _arrays(scorer: ShardScorer, name: str, at: Iterate) -> Arrays:
    found: Arrays = {f"{_NUMBERS} {name}": np.array([at.norm, *at.residuals])}
    for what, direction in ((_X, at.x), (_LEFT, at.left), (_ALONG, at.along)):
        found |= _named(scorer, what, name, direction)
    return found


def _named(scorer: ShardScorer, what: str, name: str, direction: Direction) -> Arrays:
    named = zip(scorer.scoring.maps, direction, strict=True)
    return {f"{what} {name} {m.parameter}": matrix.cpu().numpy() for m, matrix in named}


def _directions(scorer: ShardScorer, found: Mapping[str, Tensor], what: str) -> dict[str, Direction]:
    """By name, in the order of names."""
    near = scorer.scoring.near({key: tensor for key, tensor in found.items() if key.startswith(f"{what} ")})
    names = sorted({key.removeprefix(f"{what} ").rpartition(" ")[0] for key in near})
    return {name: [near[f"{what} {name} {m.parameter}"] for m in scorer.scoring.maps] for name in names}
