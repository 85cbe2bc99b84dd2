"""Can values over the training to come, rehearsed for a few rows, be predicted for the rest from cheap columns?

    python tests/benchmarks/pays/few_to_many.py --data ../shared/data --only "A clean" "A swapped"

Needs scikit-learn. Resumable: what has a line in results/few_to_many.jsonl is not run again. A setting's values are
those of `first_look.py`, in results/values: where they are not, they are rehearsed, for an hour. `--only` takes
settings, of which both that a model is fitted on and that it predicts must be named.

Of the 64 rows of a setting 16 are held out whole, in turn, and models are fitted on some of the others: by the tool's
own columns (loss, entropy, surprise, influence along the EK-FAC direction of 64 target rows), these of the tokens
before and after and on the mean of the row, where a token stands, its class, what the same token is worth elsewhere.
`ridge` adds squares and products; `trees` are boosted; `of ranks` fits normal scores of values, whose tails are heavy.
Beside them stands each column alone, its sign chosen on the fitted rows; of `class` and `token` the mean that they have
there. The eight groups of target rows bound what can be reached: how well half of them tells the other half.

    tokens        Spearman's correlation to the values of all held tokens
    within rows   mean of that of each row
    row sums      that of sums over rows
    lowest 5%     share of the lowest values that the lowest predictions are, and the same of 10%
    loss in 5%    what these values sum to, over what the lowest do: to first order, what leaving them out would gain

N tokens of R rows; every measure is a mean over held sets.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import lines
import numpy as np
from first_look import EVERY
from grid import INFLUENCE_EKFAC, SURPRISE
from numpy.typing import NDArray
from rehearsals import COURSE, GROUP_ENDS, Place, values_of
from selections import scored
from settings import Row, Setting, about_of, setting

import alphatoken_curate as atc
from alphatoken_curate.reading.compare import spearman

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

ROWS = (8, 16, 32, 48)
HELD, DRAWS, INNER = 16, 3, 4
"""Rows that are held out at a time; how often all rows are dealt anew; parts that fitted rows are dealt into."""

NOMINAL = 0.9
"""Share of values that an interval is to hold."""

SHRUNK = 5
"""Tokens of a mean that what is known of a class or token is shrunk by."""

SHARES = (0.05, 0.1)
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
TREES = {"max_iter": 150, "learning_rate": 0.05, "max_leaf_nodes": 8, "min_samples_leaf": 20, "l2_regularization": 1.0}

TARGETS = 64
"""Target rows of the directions: the first so many of those by which values are rehearsed."""

EKFAC = {**INFLUENCE_EKFAC, "precondition_rows": 32, "batch_tokens": 512, "layers": 15}
"""Of the last 15 of 30 layers: of all, EK-FAC takes over 5 GB and several times as long."""

SCORED: dict[str, tuple[Mapping[str, Any], str]] = {
    "nll": (EKFAC, "nll"),
    "entropy": (EKFAC, "entropy"),
    "surprise": (EKFAC, SURPRISE),
    "influence ekfac": (EKFAC, "adapt_influence"),
}
"""Of each column that the tool stores: what is scored, and the expression."""

NEXT = {"before": -1, "after": 1}

OF_TOKENS = (*SCORED, "position")
"""Columns of which `ridge` has squares and products."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """`value` (N,) in nats, `columns` (N,) each; `token` and `kind` (N,) its id and class; `row` (N,) upwards."""

    value: Floats
    columns: Mapping[str, Floats]
    token: Whole
    kind: NDArray[np.str_]
    row: Whole

    def of(self, rows: Sequence[int]) -> Tokens:
        """Those of some rows."""
        at = np.isin(self.row, np.asarray(rows, np.int64))
        columns = {name: column[at] for name, column in self.columns.items()}
        same = {name: getattr(self, name)[at] for name in ("value", "token", "kind", "row")}
        return Tokens(columns=columns, **same)


def by_row(numbers: Floats, row: Whole) -> list[Floats]:
    """(N,) as one array for each row that there is."""
    return np.split(numbers, np.flatnonzero(np.diff(row)) + 1)


# ------------------------------------------------------------------------------------------------------------- columns


def tokens_of(where: Setting, place: Place) -> Tokens:
    """Values and columns of all response tokens of a setting."""
    columns = dict[str, Floats]()
    for name, (settings, expression) in SCORED.items():
        found = _scanned(where, settings, expression, place.work)
        columns[name] = found["number"].to_numpy().astype(np.float64)
    row = found["row_id"].to_numpy().astype(np.int64)
    lengths = [int(one.response.sum()) for one in where.train]
    assert np.array_equal(row, np.repeat(np.arange(len(lengths)), lengths))
    beside = {f"{name} {side}": _beside(columns[name], row, by) for name in SCORED for side, by in NEXT.items()}
    columns |= beside | {f"row {name}": _on_the_mean(columns[name], row) for name in SCORED}
    columns["position"] = np.concatenate([np.arange(n) / n for n in lengths])
    columns["length"] = np.repeat(np.array(lengths, np.float64), lengths)
    columns["prompt"] = np.repeat([float(one.response.argmax()) for one in where.train], lengths)
    value = values_of(where, place).of(GROUP_ENDS[-1], "sum").mean
    kind, token = found["class"].to_numpy().astype(np.str_), found["token_id"].to_numpy().astype(np.int64)
    return Tokens(value=value, columns=columns, token=token, kind=kind, row=row)


def _scanned(where: Setting, settings: Mapping[str, Any], expression: str, work: Path) -> Any:
    run = scored(settings, replace(where, target=where.target[:TARGETS]), work)
    return atc.scan_tokens(run).sql(f'SELECT row_id, token_id, "class", {expression} AS number FROM self').collect()


def _beside(column: Floats, row: Whole, by: int) -> Floats:
    """The column of the token before (-1) or after (1) in the same row; 0 where there is none."""
    there, theirs = np.roll(column, -by), np.roll(row, -by)
    found = np.where(theirs == row, there, 0.0)
    found[-1 if by > 0 else 0] = 0.0
    return found


def _on_the_mean(column: Floats, row: Whole) -> Floats:
    return np.concatenate([np.full(len(mine), middle) for mine, middle in ((m, m.mean()) for m in by_row(column, row))])


# --------------------------------------------------------------------------------------------------------------- folds


def held_sets(rows: int, held: int = HELD, draws: int = DRAWS) -> Iterator[tuple[list[int], list[int]]]:
    """Rows to fit on, in the order in which they are taken, and rows held out; each draw holds every row out once."""
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(rows).tolist()
        for first in range(0, rows, held):
            yield order[first + held :] + order[:first], order[first : first + held]


def unshared(pool: Sequence[int], fitted: Sequence[Row], held: Sequence[int], predicted: Sequence[Row]) -> list[int]:
    """Those rows of another setting's pool whose answer is none of a held row: its noise may have moved answers."""
    answers = {predicted[i].ids[predicted[i].response].tobytes() for i in held}
    return [i for i in pool if fitted[i].ids[fitted[i].response].tobytes() not in answers]


def inner_sets(row: Whole) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """(N,) twice: tokens to fit on and tokens of the other rows, each row among the latter once."""
    part = np.unique(row, return_inverse=True)[1] % INNER
    for n in range(INNER):
        yield part != n, part == n


# -------------------------------------------------------------------------------------------------------------- models

Fit = Callable[[Tokens, Floats, Tokens], Floats]


def ridge(fitted: Tokens, wanted: Floats, other: Tokens) -> Floats:
    """Predictions (N,) for other tokens by columns, squares, products; the penalty that serves rows left out best."""
    x, new = _designs(*_taught(fitted, wanted, other))
    errors = np.zeros(len(PENALTIES))
    for train, test in inner_sets(fitted.row):
        guesses = _ridges(x[train], wanted[train], x[test])
        errors += [float(np.square(guess - wanted[test]).sum()) for guess in guesses]
    return _ridges(x, wanted, new)[int(errors.argmin())]


def _ridges(x: Floats, wanted: Floats, new: Floats) -> list[Floats]:
    """Predictions by each penalty."""
    centre, middle = x.mean(axis=0), float(wanted.mean())
    product, right = (x - centre).T @ (x - centre), (x - centre).T @ (wanted - middle)
    ours = [np.linalg.solve(product + p * len(x) * np.eye(x.shape[1]), right) for p in PENALTIES]
    return [middle + (new - centre) @ one for one in ours]


def trees(fitted: Tokens, wanted: Floats, other: Tokens) -> Floats:
    """Predictions (N,) for other tokens by boosted trees of the columns."""
    from sklearn.ensemble import HistGradientBoostingRegressor  # needed here alone

    fitted, other = _taught(fitted, wanted, other)
    scale = float(wanted.std()) or 1.0
    model = HistGradientBoostingRegressor(random_state=0, early_stopping=False, **TREES)
    model.fit(_plain(fitted), wanted / scale)
    found: Floats = model.predict(_plain(other)) * scale
    return found


def mean(_fitted: Tokens, wanted: Floats, other: Tokens) -> Floats:
    """The same (N,) for all tokens: what errors of predictions stand beside."""
    return np.full(len(other.value), wanted.mean())


def _plain(tokens: Tokens) -> Floats:
    return np.column_stack([*tokens.columns.values(), *_kinds(tokens)])


def _kinds(tokens: Tokens) -> list[Floats]:
    """Of each class whether a token is of it."""
    return [
        (tokens.kind == name).astype(np.float64) for name in ("digits", "words", "punctuation", "whitespace", "code")
    ]


def _taught(fitted: Tokens, wanted: Floats, other: Tokens) -> tuple[Tokens, Tokens]:
    """Both with what the same token is worth elsewhere: in fitted rows, of these in the other parts of them."""
    mine = np.empty(len(wanted))
    for train, test in inner_sets(fitted.row):
        mine[test] = known(fitted.token[train], wanted[train], fitted.token[test])
    theirs = known(fitted.token, wanted, other.token)
    pair = ((fitted, mine), (other, theirs))
    first, second = (replace(tokens, columns={**tokens.columns, "worth": worth}) for tokens, worth in pair)
    return first, second


def known(labels: Any, wanted: Floats, asked: Any) -> Floats:
    """Mean of what is wanted by label, less that of all and shrunk, for the labels asked for; 0 of an unknown one."""
    names, where = np.unique(labels, return_inverse=True)
    sums = np.bincount(where, weights=wanted - wanted.mean())
    means = dict(zip(names.tolist(), (sums / (np.bincount(where) + SHRUNK)).tolist(), strict=True))
    return np.array([means.get(label, 0.0) for label in asked.tolist()])


def _designs(fitted: Tokens, other: Tokens) -> tuple[Floats, Floats]:
    """Columns with their tails drawn in, then squares and products of those of tokens, and these by class.

    Standardised, as the fitted tokens are.
    """
    ours = {name: _drawn_in(fitted.columns[name], other.columns[name]) for name in fitted.columns}
    found = []
    for n, tokens in enumerate((fitted, other)):
        mine = [ours[name][n] for name in OF_TOKENS if name in ours]
        kinds = _kinds(tokens)
        pairs = [a * b for a, b in itertools.combinations_with_replacement(mine, 2)]
        by_kind = [kind * one for kind in kinds for one in mine]
        found.append(np.column_stack([*(both[n] for both in ours.values()), *kinds, *pairs, *by_kind]))
    centre, spread = found[0].mean(axis=0), found[0].std(axis=0)
    x, new = ((one - centre) / np.where(spread > 0, spread, 1.0) for one in found)
    return x, new


def _drawn_in(fitted: Floats, other: Floats) -> tuple[Floats, Floats]:
    """asinh of a column in units of its median size, standardised by the fitted tokens."""
    scale = float(np.median(np.abs(fitted))) or 1.0
    mine, new = np.arcsinh(fitted / scale), np.arcsinh(other / scale)
    spread = float(mine.std()) or 1.0
    return (mine - mine.mean()) / spread, (new - mine.mean()) / spread


def normal_scores(numbers: Floats) -> Floats:
    """(N,): what a normal distribution has at the rank of each."""
    ranks = np.argsort(np.argsort(numbers, kind="stable"), kind="stable")
    return np.array([NormalDist().inv_cdf((rank + 0.5) / len(numbers)) for rank in ranks.tolist()])


MEANS = {"class": "kind", "token": "token"}
"""Columns that are no number: alone, they rank by the mean of scores that fitted tokens have."""

MODELS: dict[str, Fit] = {"ridge": ridge, "trees": trees}


def signed(column: str, fitted: Tokens, other: Tokens) -> Floats:
    """A column of other tokens, with the sign by which it ranks the fitted values upwards."""
    along = spearman(fitted.columns[column], fitted.value) or 0.0
    return other.columns[column] * (-1.0 if along < 0 else 1.0)


def predictions(fitted: Tokens, other: Tokens) -> dict[str, Floats]:
    """Of other tokens (N,) by each model, of values or of their ranks, and by each column alone."""
    scores = normal_scores(fitted.value)
    found = {name: fit(fitted, fitted.value, other) for name, fit in MODELS.items()}
    found |= {f"{name} of ranks": fit(fitted, scores, other) for name, fit in MODELS.items()}
    found |= {name: signed(name, fitted, other) for name in fitted.columns}
    return found | {name: known(getattr(fitted, of), scores, getattr(other, of)) for name, of in MEANS.items()}


# ------------------------------------------------------------------------------------------------------------ measures


def measures(predicted: Floats, value: Floats, row: Whole) -> dict[str, float]:
    """How a prediction of tokens ranks them."""
    both = list(zip(by_row(predicted, row), by_row(value, row), strict=True))
    within = [spearman(p, v) or 0.0 for p, v in both]
    sums = np.array([(p.sum(), v.sum()) for p, v in both])
    found = {
        "tokens": spearman(predicted, value) or 0.0,
        "within rows": float(np.mean(within)),
        "row sums": spearman(sums[:, 0], sums[:, 1]) or 0.0,
    }
    found |= {f"lowest {share:.0%}": overlap(predicted, value, share) for share in SHARES}
    return found | {f"loss in {share:.0%}": caught(predicted, value, share) for share in SHARES}


def overlap(predicted: Floats, value: Floats, share: float) -> float:
    """Share of the lowest values that is among as many lowest predictions."""
    mine, true = _lowest(predicted, share), _lowest(value, share)
    return len(np.intersect1d(mine, true)) / len(true)


def caught(predicted: Floats, value: Floats, share: float) -> float:
    """Sum of the values that have the lowest predictions over the lowest sum that as many can have."""
    return float(value[_lowest(predicted, share)].sum() / value[_lowest(value, share)].sum())


def _lowest(numbers: Floats, share: float) -> Whole:
    return np.argsort(numbers, kind="stable")[: round(share * len(numbers))]


def error(fit: Fit, fitted: Tokens, other: Tokens, predicted: Floats) -> dict[str, float]:
    """What a prediction is off by, in standard deviations of the values, and what share an interval holds.

    The interval is as wide as `NOMINAL` of what rows left out of the fit are off by.
    """
    off = np.empty(len(fitted.value))
    for train, test in inner_sets(fitted.row):
        mine, left = (fitted.of(np.unique(fitted.row[at]).tolist()) for at in (train, test))
        off[test] = np.abs(left.value - fit(mine, mine.value, left))
    width = float(np.quantile(off, NOMINAL))
    residual, spread = other.value - predicted, float(other.value.std())
    return {
        "residual": float(residual.std()) / spread,
        "width": width / spread,
        "covered": float((np.abs(residual) <= width).mean()),
    }


def ceiling(where: Setting, place: Place) -> dict[str, float]:
    """How half of the groups of target rows rank the values by the other half: means over all ways to halve them."""
    groups = values_of(where, place).of(GROUP_ENDS[-1], "sum")
    lengths = [int(one.response.sum()) for one in where.train]
    row = np.repeat(np.arange(len(lengths)), lengths)
    every = range(len(groups.tokens))
    found = []
    for rest in itertools.combinations(every[1:], len(every) // 2 - 1):
        mine = [0, *rest]
        halves = [mine, [n for n in every if n not in mine]]
        a, b = (np.average(groups.values[h], axis=0, weights=groups.tokens[h]) for h in halves)
        found.append(measures(a, b, row))
    return _means(found)


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}


def compared(found: Mapping[str, Sequence[Mapping[str, float]]], columns: Sequence[str]) -> dict[str, Any]:
    """Means of all measures, and by how much each model ranks tokens better than the best column does.

    The best is the one that turns out so: no user could know it, so the margin is a careful one.
    """
    means = {name: _means(each) for name, each in found.items()}
    best = max(columns, key=lambda name: means[name]["tokens"])
    margin = {}
    for name in means:
        if name not in columns:
            each = [a["tokens"] - b["tokens"] for a, b in zip(found[name], found[best], strict=True)]
            margin[name] = {"mean": round(float(np.mean(each)), 4), "least": round(min(each), 4)}
    return {"measures": means, "best column": best, "margin": margin}


# ------------------------------------------------------------------------------------------------------------ the runs


@cache
def _of(name: str, data: Path, place: Place) -> Tokens:
    return tokens_of(setting(name, data), place)


def one(data: str, place: Place, config: dict[str, Any]) -> dict[str, Any]:
    """Fit on some rows of one setting, and predict held rows of it or of another."""
    names = config["fit"], config["setting"]
    source, where = (setting(name, Path(data)) for name in names)
    theirs, ours = (_of(name, Path(data), place) for name in names)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    errors: dict[str, list[dict[str, float]]] = defaultdict(list)
    used = []
    for pool, held in held_sets(len(where.train)):
        rows = unshared(pool[: config["rows"]], source.train, held, where.train)
        used.append(len(rows))
        fitted, other = theirs.of(rows), ours.of(held)
        told = predictions(fitted, other)
        for name, predicted in told.items():
            found[name].append(measures(predicted, other.value, other.row))
        told["mean"] = mean(fitted, fitted.value, other)
        for name, fit in {**MODELS, "mean": mean}.items():
            errors[name].append(error(fit, fitted, other, told[name]))
    return {
        **compared(found, [*ours.columns, *MEANS]),
        "error": {name: _means(each) for name, each in errors.items()},
        "ceiling": ceiling(where, place),
        "fitted rows": float(np.mean(used)),
    }


def config_of(fit: str, predicted: str, rows: int, data: Path) -> dict[str, Any]:
    """What a line says."""
    about = {name: about_of(setting(name, data)) for name in sorted({fit, predicted})}
    columns = {name: {"score": dict(settings), "by": by} for name, (settings, by) in SCORED.items()}
    how = {"targets": TARGETS, "held": HELD, "draws": DRAWS, "trees": TREES, "penalties": list(PENALTIES)}
    return {"fit": fit, "setting": predicted, "rows": rows, "about": about, "columns": columns, **how, "course": COURSE}


def main() -> None:
    """Run what has no line yet."""
    parser = lines.parser(__doc__)
    args = parser.parse_args()
    if strange := set(args.only) - set(EVERY):
        parser.error(f"--only: no setting {', '.join(sorted(strange))}")
    names, data = [name for name in EVERY if name in args.only or not args.only], Path(args.data)
    wanted = [(name, name, rows) for name in names for rows in ROWS]
    wanted += [(fit, name, ROWS[-1]) for fit in names for name in names if fit != name]
    place = Place(work=args.work.resolve(), values=lines.RESULTS.resolve() / "values")
    lines.run("few_to_many", [config_of(*each, data) for each in wanted], partial(one, args.data, place), args.jobs)


if __name__ == "__main__":
    main()
