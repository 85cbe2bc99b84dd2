"""What values over the training to come pay, on the rows that tuning may use: training split A, measured on V.

    python tests/benchmarks/pays/first_look.py --data ../shared/data --list
    python tests/benchmarks/pays/first_look.py --data ../shared/data --jobs 2

Resumable: what has a line in results/rehearsal.jsonl is not run again. What decides most comes first. `--only` takes
settings, parts and selections; `--list` counts what each part has left to do; `--trial` runs what is asked for on a
handful of rows, with its lines under `--work`. A rehearsal of 64 rows is made once, by the first run that needs it, and
kept in results/values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lines
import numpy as np
from fidelity import area
from grid import SELECTIONS
from rehearsals import AT_ONCE, COURSE, GROUP_ENDS, Place, rehearsed_weights, values_of
from selections import Selection, counts, weights_of
from settings import Setting, about_of, setting
from training import Weights, load, train

from alphatoken_curate.reading.compare import spearman
from alphatoken_curate.signals.student import CHANCE

DIGITS, CLEAN, SWAPPED, WRONG = "A digits", "A clean", "A swapped", "A model-wrong"
EVERY = (DIGITS, CLEAN, SWAPPED, WRONG)
PAIRS = ("pairs", "pairs dpo")
NAMED_ROWS = (244, 128, 64, 32)


def use(mask: Mapping[str, Any], target_rows: int = 244, denominator: str = "sum", **more: Any) -> Selection:
    """A selection by rehearsed values."""
    return Selection(who="rehearsal", score={"target_rows": target_rows, "denominator": denominator, **more}, mask=mask)


FORMS: dict[str, Mapping[str, Any]] = {
    "lowest 10%": {"by": "value", "keep": 0.9},
    "tilt 0.5": {"by": "value", "weights": "tilt:0.5"},
    "below 0 beyond error": {"by": "value + q error", "keep": "positive"},
    "lowest 5%": {"by": "value", "keep": 0.95},
    "tilt 0.25": {"by": "value", "weights": "tilt:0.25"},
    "lowest 20%": {"by": "value", "keep": 0.8},
    "highest 10%": {"by": "-value", "keep": 0.9},
    "shrunk tilt 0.5": {"by": "shrunk value", "weights": "tilt:0.5"},
    "below 0": {"by": "value", "keep": "positive"},
    "tilt 1": {"by": "value", "weights": "tilt:1"},
    "lowest fifth of rows": {"by": "row sum", "rows": 0.8},
    "rows below 0 beyond error": {"by": "row sum + q error", "keep": "positive"},
    "tilt 0.5 by row": {"by": "row sum", "weights": "tilt:0.5"},
}
"""Masks by rehearsed values."""

MILD = ("lowest 5%", "tilt 0.25")
"""Those that gained in every setting: what else is asked is asked of them."""

ONE_GROUP = ("lowest 10%", "tilt 0.5", *MILD, "lowest fifth of rows")
"""Those that need no errors, by all target rows in one group: a sixth of the time."""

SECOND = {f"{form}, second round": use(FORMS[form], first=FORMS["lowest 5%"], one_group=True) for form in MILD}
"""Rehearsed again without the lowest 5%; then as much of what is left is cut again, or it is tilted."""

COUNTED = {f"{form}, by count": use(FORMS[form], denominator="count", one_group=True) for form in MILD}

TOOL = {
    f"tool, {name}": Selection(
        score={
            "direction": "rehearsal",
            "rehearse_lr": 3e-5,
            "rehearse_denominator": "sum",
            "target_groups": 1,
            "dtype": "float32",
            "batch_tokens": COURSE["batch_tokens"],
        },
        mask={"keep": 1.0, **FORMS[name], "by": "adapt_influence"},
    )
    for name in MILD
}
"""By `score --direction rehearsal` and `mask` themselves, in the tool's own order of rows."""

USES: dict[str, Selection] = {
    **{f"{form}, {n} target rows": use(mask, n) for form, mask in FORMS.items() for n in NAMED_ROWS},
    **{f"{name}, one group": use(FORMS[name], one_group=True) for name in ONE_GROUP},
    **SECOND,
    **COUNTED,
    **TOOL,
    **{f"random 0.9, draw {n}": Selection(mask={"by": "random", "keep": 0.9, "seed": n}) for n in (1, 2)},
}


def named(*forms: str, target_rows: int = 244) -> list[str]:
    """Names of uses."""
    return [f"{form}, {target_rows} target rows" for form in forms]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a training differs from the one that is rehearsed; `size`: what the name of its setting ends with."""

    change: Mapping[str, Any] = field(default_factory=dict)
    size: str = ""
    seed: int = 0
    rehearsed: bool = False
    """Whether it is rehearsed as it is, in place of the other."""


TRAININGS = {
    "as rehearsed": Training(),
    "order 1": Training(seed=1),
    "two epochs": Training(change={"epochs": 2}),
    "two epochs, rehearsed": Training(change={"epochs": 2}, rehearsed=True),
    "rate 1e-4": Training(change={"learning_rate": 1e-4}),
    "rate 1e-5": Training(change={"learning_rate": 1e-5}),
    "128 rows": Training(size=" 128"),
}
"""`128 rows`: values of two rehearsals of 64 rows each, each from the start, used in one training on all."""

PLAIN = ["all tokens", "oracle", "random 0.9"]
MILD_ONE_GROUP = [f"{form}, one group" for form in MILD]
TRANSFERRED = ["all tokens", "oracle", *MILD_ONE_GROUP]
DRAWS = ["random 0.9, draw 1", "random 0.9, draw 2"]
BESIDE = ["surprise under 7", "excess loss over target rows 0.9"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of the list: in each setting each selection, in each training."""

    settings: Sequence[str] = EVERY
    selections: Sequence[str]
    trainings: Sequence[str] = ("as rehearsed",)


VALUES = "values"
"""In place of a selection: what the values of a setting look like, without a training."""

PARTS: dict[str, Part] = {
    "forms": Part(selections=[*PLAIN, VALUES, *named(*FORMS)]),
    "targets": Part(selections=[name for n in NAMED_ROWS[1:] for name in named(*MILD, target_rows=n)]),
    "rows": Part(settings=(SWAPPED, WRONG), selections=named("lowest fifth of rows", target_rows=64)),
    "beside": Part(selections=[*BESIDE, *DRAWS]),
    "curvature": Part(settings=(DIGITS,), selections=["influence ekfac 0.9", "influence astra 0.9"]),
    "orders": Part(selections=TRANSFERRED, trainings=["order 1"]),
    "longer": Part(selections=TRANSFERRED, trainings=["two epochs"]),
    "longer, rehearsed": Part(settings=(CLEAN, WRONG), selections=MILD_ONE_GROUP, trainings=["two epochs, rehearsed"]),
    "rates": Part(settings=(DIGITS, CLEAN), selections=TRANSFERRED, trainings=["rate 1e-4", "rate 1e-5"]),
    "second": Part(settings=(DIGITS, CLEAN), selections=[*SECOND]),
    "more rows": Part(settings=(DIGITS,), selections=TRANSFERRED, trainings=["128 rows"]),
    "count": Part(settings=(DIGITS, CLEAN), selections=[*COUNTED]),
    "tool": Part(settings=(DIGITS,), selections=[*TOOL]),
    "pairs": Part(
        settings=PAIRS[:1],
        selections=["all tokens", "random 0.9", *(f"{name}, one group" for name in ONE_GROUP)],
    ),
    "pairs dpo": Part(settings=PAIRS[1:], selections=["all tokens", "lowest 10%, one group", *MILD_ONE_GROUP]),
}
"""What decides most comes first."""


def configs_of(part: Part, data: Path, *, few: bool) -> list[dict[str, Any]]:
    """What its lines say, setting by setting."""
    found = []
    for name in part.settings:
        has_bad = setting(name, data).has_oracle
        for how in part.trainings:
            where = trained(f"{name}{' few' if few else TRAININGS[how].size}", how, data)
            found += [
                config_of(where, selection, how) for selection in part.selections if has_bad or selection != "oracle"
            ]
    return found


def trained(name: str, how: str, data: Path) -> Setting:
    """A setting, with what a training changes."""
    return replace(setting(name, data), **TRAININGS[how].change)


def config_of(where: Setting, selection: str, how: str) -> dict[str, Any]:
    """What a line says. A setting's name says its rows alone."""
    about = {"setting": where.name, "about": about_of(where), "training": how, "seed": TRAININGS[how].seed}
    chosen = None if selection == VALUES else {**SELECTIONS, **USES}[selection]
    told = {} if chosen is None else chosen.about()
    course = {"course": COURSE} if chosen is None or chosen.who == "rehearsal" else {}
    return {**about, "selection": selection, **told, **course}


def one(data: str, place: Place, config: dict[str, Any]) -> dict[str, Any]:
    """Train once, or describe values."""
    base = setting(config["setting"], Path(data))
    if config["selection"] == VALUES:
        return described(base, place)
    where = trained(config["setting"], config["training"], Path(data))
    chosen = {**SELECTIONS, **USES}[config["selection"]]
    if chosen.who == "rehearsal":
        rehearsed = where if TRAININGS[config["training"]].rehearsed else base
        weights = rehearsed_weights(chosen, rehearsed, place)
    else:
        weights = weights_of(chosen, base, place.work, config["seed"])
    curve = train(load(), where, weights, seed=config["seed"], measure_every=10**9, measure_start=chosen.who == "all")
    return {"curve": curve, "weight": total(weights), **counts(where, weights)}


def total(weights: Weights) -> float:
    """The sum of all weights."""
    return float(sum(weight.sum(dtype=np.float64) for weight in weights))


def described(where: Setting, place: Place) -> dict[str, Any]:
    """Of values by so many target rows: how they find what is bad, how many are negative, and how they agree."""
    values = values_of(where, place)
    lengths = np.array([int(row.response.sum()) for row in where.train])
    good = np.concatenate([row.good[row.response] for row in where.train])
    row_good = np.array([bool(row.good.any()) for row in where.train])
    whole = values.of(GROUP_ENDS[-1], "sum").mean
    found: dict[str, Any] = {"root_share": values.root_share, "tokens": len(good)}
    for n in NAMED_ROWS:
        mine = values.of(n, "sum")
        told = {"below_0": int((mine.mean < 0).sum()), "spearman_with_all": spearman(mine.mean, whole)}
        if n > GROUP_ENDS[0]:
            told |= {"beyond_error": int((mine.upper < 0).sum()), "by_chance": CHANCE * len(good)}
            told["rows_beyond_error"] = int((mine.by_row(lengths).upper < 0).sum())
        if not good.all():
            told["area"] = area(mine.mean, good)
            if not row_good.all():
                told["row_area"] = area(mine.by_row(lengths).mean, row_good)
        found[str(n)] = told
    return found


def asked(only: Sequence[str], part: str, config: Mapping[str, Any]) -> bool:
    """Whether `--only` lets this one pass: parts, settings, trainings and selections narrow apart."""
    each = (
        (part, set(PARTS)),
        (config["setting"].removesuffix(" few").removesuffix(" 128"), {*EVERY, *PAIRS}),
        (config["training"], set(TRAININGS)),
        (config["selection"], {VALUES, *SELECTIONS, *USES}),
    )
    return lines.narrowed(only, each)


def main() -> None:
    """Run what has no line yet."""
    parser = lines.parser(__doc__)
    parser.add_argument("--list", action="store_true", help="count what is left to do, and run nothing")
    parser.add_argument("--trial", action="store_true", help="16 rows, 2 steps; lines under --work")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="groups that go back together: 2.2 GB each")
    args = parser.parse_args()
    known = {*PARTS, *EVERY, *PAIRS, *TRAININGS, VALUES, *SELECTIONS, *USES}
    if strange := set(args.only) - known:
        parser.error(f"--only: no part, setting, training or selection {', '.join(sorted(strange))}")
    folder = args.work if args.trial else lines.RESULTS
    done = [line["config"] for line in lines.read("rehearsal", folder)]
    configs = []
    for name, part in PARTS.items():
        mine = [c for c in configs_of(part, Path(args.data), few=args.trial) if asked(args.only, name, c)]
        print(f"{name}: {len(mine)} runs, {sum(c not in done for c in mine)} to do")
        configs += mine
    if not args.list:
        place = Place(work=args.work.resolve(), values=folder.resolve() / "values", at_once=args.at_once)
        lines.run("rehearsal", configs, partial(one, args.data, place), args.jobs, folder)


if __name__ == "__main__":
    main()
