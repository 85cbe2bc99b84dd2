"""Which response tokens train, and with what weight (paper arXiv 2606.01635, Eq. 13).

Everything here is a pure function of flat arrays with one entry per response token, in ascending (row, position):

    score     (n,) floating, finite     the number to select on; the highest are kept
    row       (n,) int64                0-based index of the token's row among the *scored* rows, in row_id order
    position  (n,) integer              index of the token in its row's `input_ids`

Of preference rows each branch is masked by itself: its tokens alone are what a call is given.

Ties: of equal scores the one with the lower row goes first, then the one with the lower position. With the arrays in
that order this is "the lower index first", which is what every sort here does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from alphatoken_curate import composite
from alphatoken_curate.draws import keyed_uniform
from alphatoken_curate.errors import CurateError, StoredDataError, UsageError
from alphatoken_curate.schema import NOT_COMPUTED, PAIR_COLUMNS, PREFERENCE, SFT, SIGNALS, Components, Layout

Scores = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]

INDEX_COLUMNS = ("row_id", "position", "token_id")
"""Columns that an expression may name besides those of values/; int64, int32, int32."""

EXPRESSIONS = {"surprise": "(nll / (entropy + 0.1))"}
"""Names that `by` may use for an expression. `surprise` is what a token cost over what the model expected any to cost:
about 1 on average, high where the model was sure of another token, as it is at a wrong label. The 0.1 nats keep a
token that the model was sure of from being judged by the rounding of its entropy."""

_MAX_EXPRESSION = 10_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weighed:
    """`weight` (n,) float32, mean 1 where above 0; `given_back`: rows that got their best token back."""

    weight: NDArray[np.float32]
    given_back: int


# ---------------------------------------------------------------------------------------------------- settings, read


def parse_keep(keep: float | str) -> Fraction | None:
    """The exact share that the decimal text of `keep` names, or None for `positive`.

    0.1 is one tenth, not the double next to it, so that ceil(0.1 * 10) is 1.
    """
    if keep == "positive":
        return None
    try:
        share = Fraction(str(keep))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise UsageError(f"keep: found {keep!r}; give a share above 0 and up to 1, such as 0.5, or `positive`")
    return share


def parse_scope(scope: str) -> int:
    """Rows that share one quota: 0 for `global` (all of them), 1 for `row`, N for `batch:N`."""
    if scope in ("global", "row"):
        return int(scope == "row")
    kind, _, size = scope.partition(":")
    if kind == "batch" and size.isascii() and size.isdecimal() and len(size) <= 18 and int(size) > 0:
        return int(size)
    raise UsageError(f"scope: found {scope!r}; give `global`, `row` or `batch:N` with N rows, such as `batch:16`")


# ---------------------------------------------------------------------------------------------------------- the mask


def kept(
    score: Scores, row: Ints, position: Ints, *, keep: float | str, scope: str, allow_empty_rows: bool = False
) -> Bools:
    """Eq. 13: exactly ceil(keep * n) tokens of each scope, the highest first, or those whose score is above 0.

    Then, unless `allow_empty_rows`, each row that lost every token gets its best one back. (n,) bool.
    Raises `UsageError` for a share or scope that cannot be used, `CurateError` for NaN, infinity or unsorted arrays.
    """
    _check(score, row, position)
    chosen = _choose(score, row, parse_keep(keep), parse_scope(scope))
    if not allow_empty_rows:
        chosen[_best_of_lost_rows(score, row, chosen)] = True
    return chosen


def weighed(
    score: Scores,
    row: Ints,
    position: Ints,
    *,
    keep: float | str,
    scope: str,
    weights: str = "binary",
    allow_empty_rows: bool = False,
) -> Weighed:
    """Loss weights of the kept tokens, 0 elsewhere, with mean 1 over the weights above 0 of the whole data set.

    | weights | of a kept token |
    |---|---|
    | binary | 1 |
    | rank | its ascending rank among all n response tokens of its scope (1 .. n), divided by n |
    | sigmoid | 1 / (1 + exp(-score / RMS)), RMS of the score over all response tokens (0.5 where RMS is 0) |
    | relu | max(score, 0) |

    A row left without any weight above 0 gets its best token back (unless `allow_empty_rows`): with that token's weight
    by the formula, or where that is 0 the smallest weight above 0 of the run, or 1 if there is none. No weight above 0
    is stored as less than the smallest normal float32. Raises as `kept`.
    """
    _check(score, row, position)
    size = parse_scope(scope)
    if weights not in _FORMULAS:
        raise UsageError(f"weights: found {weights!r}; give one of {', '.join(_FORMULAS)}")
    formula = _FORMULAS[weights](score, row, size)
    raw = np.where(_choose(score, row, parse_keep(keep), size), formula, 0.0)
    best = np.empty(0, np.int64) if allow_empty_rows else _best_of_lost_rows(score, row, raw > 0)
    raw[best] = formula[best]
    raw[best[formula[best] == 0]] = np.min(raw, where=raw > 0, initial=np.inf) if np.any(raw > 0) else 1.0
    return Weighed(weight=_mean_one(raw), given_back=len(best))


def _check(score: Scores, row: Ints, position: Ints) -> None:
    if not np.isfinite(score).all():
        at = int(np.flatnonzero(~np.isfinite(score))[0])
        raise CurateError(f"scored row {int(row[at])}, token {int(position[at])}: its score is {float(score[at])}")
    later = (row[1:] > row[:-1]) | ((row[1:] == row[:-1]) & (position[1:] > position[:-1]))
    if not later.all():
        raise CurateError("response tokens are not in ascending (row, position), which the rule for ties needs")


def _choose(score: Scores, row: Ints, share: Fraction | None, size: int) -> Bools:
    if share is None:
        return np.greater(score, 0)
    if size == 0:
        return _top(score, _quota(len(score), share))
    order, place, count = _places(score, row, size)
    sizes, which = np.unique(count, return_inverse=True)
    quota = np.array([_quota(int(n), share) for n in sizes], np.int64)[which]
    chosen = np.empty(len(score), np.bool_)
    chosen[order] = place < quota
    return chosen


def _quota(n: int, share: Fraction) -> int:
    return -(-n * share.numerator // share.denominator)


def _top(score: Scores, k: int) -> Bools:
    """The k highest of all, without a full sort."""
    if k == 0:
        return np.zeros(len(score), np.bool_)
    threshold = np.partition(score, len(score) - k)[len(score) - k]
    chosen: Bools = np.greater(score, threshold)
    ties = np.flatnonzero(score == threshold)
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen


def _places(score: Scores, row: Ints, size: int) -> tuple[Ints, Ints, Ints]:
    """`order` (n,): tokens by scope, best first; in that order `place` in the scope, from 0, and its size `count`."""
    if size == 0:
        n = len(score)
        return np.argsort(-score, kind="stable"), np.arange(n), np.full(n, n)
    scope = row // size
    order = np.lexsort((-score, scope))
    starts = np.flatnonzero(np.diff(scope, prepend=-1))
    counts = np.diff(starts, append=len(scope))
    return order, np.arange(len(scope)) - np.repeat(starts, counts), np.repeat(counts, counts)


def _best_of_lost_rows(score: Scores, row: Ints, alive: Bools) -> NDArray[np.int64]:
    """Index of the best token of each row in which no token is alive."""
    if not len(row):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    counts = np.diff(starts, append=len(row))
    best = np.repeat(np.maximum.reduceat(score, starts), counts) == score
    lost = np.repeat(~np.logical_or.reduceat(alive, starts), counts)
    candidates = np.flatnonzero(best & lost)
    return candidates[np.flatnonzero(np.diff(row[candidates], prepend=-1))]


def _mean_one(raw: NDArray[np.float64]) -> NDArray[np.float32]:
    positive = raw > 0
    if not positive.any():
        return np.zeros(len(raw), np.float32)
    scaled = raw / raw.max()  # first, so that the sum of the mean cannot overflow
    normal = (scaled / scaled[positive].mean()).astype(np.float32)
    # A weight must not round to 0: a kept token would stop being trained without a word.
    return np.where(positive, np.maximum(normal, np.finfo(np.float32).tiny), np.float32(0))


def _binary(score: Scores, _row: Ints, _size: int) -> NDArray[np.float64]:
    return np.ones(len(score))


def _rank(score: Scores, row: Ints, size: int) -> NDArray[np.float64]:
    order, place, count = _places(score, row, size)
    weight = np.empty(len(score))
    weight[order] = (count - place) / count
    return weight


def _sigmoid(score: Scores, _row: Ints, _size: int) -> NDArray[np.float64]:
    z = score.astype(np.float64) / (composite.rms(score) or 1.0)
    return np.maximum(np.exp(-np.logaddexp(0.0, -z)), np.finfo(np.float64).tiny)  # a sigmoid is never 0


def _relu(score: Scores, _row: Ints, _size: int) -> NDArray[np.float64]:
    return np.maximum(score, 0).astype(np.float64)


_FORMULAS: dict[str, Callable[[Scores, Ints, int], NDArray[np.float64]]] = {
    "binary": _binary,
    "rank": _rank,
    "sigmoid": _sigmoid,
    "relu": _relu,
}


# ------------------------------------------------------------------------------------------------ what to select on


def known_columns(layout: Layout) -> tuple[str, ...]:
    """What `by` may name in a run of this layout, in stored order: ids, signals, and numbers of the pair."""
    return (*INDEX_COLUMNS, *SIGNALS, *(name for name in PAIR_COLUMNS if name in layout.values.names))


def columns_needed(by: str, components: Components, layout: Layout = SFT) -> tuple[str, ...]:
    """Stored columns that `selection(by, ...)` reads, in stored order. Raises `UsageError` as `selection` does."""
    if by == "random":
        return ("row_id", "position")
    known = known_columns(layout)
    named = _named(by, known, components)
    if "value" in named:
        named = (named - {"value"}) | set(components.of_value)
    return tuple(name for name in known if name in named)


def depends_on_value(by: str) -> bool:
    """Whether the stability settings change what `by` selects."""
    if by == "random" or by in known_columns(PREFERENCE):  # names that need not be expressions: `position` is none
        return by == "value"
    return "value" in _parse(by).meta.root_names()


def units_of(by: str, stability_scale: str) -> str:
    """Units of the number that `selection` gives."""
    if by == "value" and stability_scale == "rms":
        return "multiples of the RMS of an objective"
    if by == "random":
        return "0 to 1"
    if by.removeprefix("-") == "surprise":
        return "ratio"
    schema = PREFERENCE.values if by in PAIR_COLUMNS else SFT.values
    if by in (*PAIR_COLUMNS, *SIGNALS):
        return str(schema.field(by).metadata[b"units"].decode())
    return by.removesuffix("_id") if by in INDEX_COLUMNS else "those of the --by expression"


def selection(
    by: str,
    columns: Mapping[str, NDArray[Any]],
    *,
    components: Components,
    stability_weight: float,
    scales: composite.Scales = composite.PUBLISHED,
    seed: int = 0,
    layout: Layout = SFT,
    branch: int = 0,
) -> NDArray[np.float32]:
    """The number to select on, one per response token: (n,) float32, finite.

    `by` is `value` (recombined from the stored components with this stability weight and these scales), `random` (a
    draw in [0, 1] keyed by seed, row_id, position and branch), a stored column, one of `EXPRESSIONS`, or a polars SQL
    expression of all these but `random`.
    `columns` holds at least `columns_needed(by, components, layout)`, each (n,), of the branch with that index in the
    layout; `components` are those of the run's estimator. Raises `UsageError` for an expression that cannot be read,
    names a column that is unknown or was not computed, or does not give one finite number per token; `StoredDataError`
    where a stored component is not finite.
    """
    if by == "random":
        return _drawn(seed, columns, branch)
    known = known_columns(layout)
    named = _named(by, known, components)
    used = {name: columns[name] for name in known if name in named and name != "value"}
    if "value" in named:
        with np.errstate(over="ignore"):
            used["value"] = composite.value(columns, components, stability_weight=stability_weight, scales=scales)
    for name, column in used.items():
        _check_column(name, column, optional=name in NOT_COMPUTED and name not in components.always)
    result = used[by].astype(np.float32) if by in used else _evaluate(by, used)
    _check_result(by, result)
    return result


def _drawn(seed: int, columns: Mapping[str, NDArray[Any]], branch: int) -> NDArray[np.float32]:
    # The branches of a pair must not be drawn alike: no position reaches 2^32.
    place = columns["position"].astype(np.int64) + (branch << 32)
    return keyed_uniform(seed, columns["row_id"], place).astype(np.float32)


def _parse(by: str) -> pl.Expr:
    if len(by) > _MAX_EXPRESSION:
        raise UsageError(f"by: an expression of {len(by)} characters; at most {_MAX_EXPRESSION} are read")
    expanded = by
    for name, expression in EXPRESSIONS.items():
        expanded = re.sub(rf"\b{name}\b", expression, expanded)
    try:
        return pl.sql_expr(expanded)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UsageError(
            f"by: {by!r} is not a polars SQL expression ({error}); give `value`, `random`, a column or an expression"
            ' of columns, such as "nll - reference_nll"'
        ) from error


def _named(by: str, known: Sequence[str], components: Components) -> set[str]:
    """Columns that `by` names, each of them known and, as far as the estimator decides it, computed."""
    named = {by} if by in known else set(_parse(by).meta.root_names())
    unknown = sorted(named - set(known))
    if unknown or not named:
        found = f"names no column {', '.join(map(repr, unknown))}" if unknown else "names no column at all"
        raise UsageError(f"by: {by!r} {found}; the columns are {', '.join((*known, *EXPRESSIONS))}")
    for name in sorted(named & (set(SIGNALS) - set(components.signals))):
        raise UsageError(f"by: {name} was not computed: {NOT_COMPUTED[name]}")
    return named


def _check_column(name: str, column: NDArray[Any], *, optional: bool) -> None:
    missing = np.isnan(column)
    if optional and len(column) and missing.all():
        raise UsageError(f"by: {name} was not computed, or not in every generation averaged: {NOT_COMPUTED[name]}")
    if missing.any():
        raise StoredDataError(
            f"column {name} has no value at {int(missing.sum())} of {len(column)} response tokens; run `verify`"
        )


def _evaluate(by: str, used: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    length = len(next(iter(used.values())))
    try:
        frame = pl.DataFrame(dict(used)).select(_parse(by))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UsageError(f"by: {by!r} cannot be computed ({error}); give one number per response token") from error
    kind = frame.dtypes[0]
    if frame.shape != (length, 1) or not kind.is_numeric():
        raise UsageError(
            f"by: {by!r} gives {frame.height} entries of type {kind} for {length} response tokens;"
            " give one number per token"
        )
    return frame.to_series().cast(pl.Float64).cast(pl.Float32, strict=False).fill_null(float("nan")).to_numpy()


def _check_result(by: str, result: NDArray[np.float32]) -> None:
    bad = int((~np.isfinite(result)).sum())
    if bad:
        raise UsageError(
            f"by: {by!r} gives no finite float32 at {bad} of {len(result)} response tokens;"
            " guard divisions and logarithms"
        )
