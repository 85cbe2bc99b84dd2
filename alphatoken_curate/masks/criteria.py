"""What tokens are selected on: `--by`, the value, a draw, a stored column or an expression of them.

Arrays have one entry per response token of one branch, or of some shards of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.runs.schema import (
    EXPRESSIONS,
    INDEX_COLUMNS,
    NOT_COMPUTED,
    PAIR_COLUMNS,
    PREFERENCE,
    SFT,
    SIGNALS,
    Components,
    Layout,
)
from alphatoken_curate.signals import composite
from alphatoken_curate.tokens.draws import keyed_uniform, of_turn
from alphatoken_curate.wording import count, nearest

Columns = Mapping[str, NDArray[Any]]

_MAX_EXPRESSION = 10_000

_OF_ONE = re.compile(
    "ABS|AND|AS|BETWEEN|BIGINT|CASE|CAST|CEIL|COALESCE|DOUBLE|ELSE|END|EXP|FLOAT|FLOOR|GREATEST|IF|INT|INTEGER|IS|LEAST"
    "|LN|LOG|LOG10|LOG1P|LOG2|NOT|NULL|NULLIF|OR|POW|POWER|ROUND|SIGN|SQRT|THEN|WHEN",
    re.IGNORECASE,
)
"""Words and functions of SQL that look at one token alone."""


def known_columns(layout: Layout) -> tuple[str, ...]:
    """What `by` may name in a run of this layout, in stored order: ids, signals, and numbers of the pair."""
    return (*INDEX_COLUMNS, *SIGNALS, *(name for name in PAIR_COLUMNS if name in layout.values.names))


def columns_needed(by: str, components: Components, layout: Layout = SFT) -> tuple[str, ...]:
    """Stored columns that `selection(by, ...)` reads, in stored order. Raises `UsageError` as `selection` does."""
    if by == "random":
        return ("row_id", "turn", "position")
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


def is_expression(by: str) -> bool:
    """Whether `by` may look at several tokens at once, as `nll - avg(nll)` does, so that all are evaluated together."""
    alone = ("random", *known_columns(PREFERENCE))
    return by.removeprefix("-") not in EXPRESSIONS and by not in alone


def is_of_single_tokens(by: str, layout: Layout = SFT) -> bool:
    """Whether `by` can be told of each token alone: columns, numbers, arithmetic and functions of one token."""
    words = re.findall(r"[^\W\d]\w*", re.sub(r"\d[\w.]*", "", by))
    return all(word in (*known_columns(layout), *EXPRESSIONS, "random") or _OF_ONE.fullmatch(word) for word in words)


def selection(
    by: str,
    columns: Columns,
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
    draw in [0, 1] keyed by seed, row_id, turn, position and branch), a stored column, one of `EXPRESSIONS`, or a polars
    SQL expression of all these but `random`.
    `columns` holds at least `columns_needed(by, components, layout)`, each (n,), of the branch with that index in the
    layout; `components` are those of the run's estimator. Raises `UsageError` for an expression that cannot be read,
    names a column that is unknown or was not computed, or does not give one finite number per token; `StoredDataError`
    where a stored component is not finite.
    """
    if by == "random":
        return _drawn(seed, columns, branch)
    used = named_columns(
        by, columns, components=components, stability_weight=stability_weight, scales=scales, layout=layout
    )
    return evaluated(by, used)


def named_columns(
    by: str,
    columns: Columns,
    *,
    components: Components,
    stability_weight: float,
    scales: composite.Scales = composite.PUBLISHED,
    layout: Layout = SFT,
) -> dict[str, NDArray[Any]]:
    """The columns that `by` names, the value recombined: all that `evaluated` needs. Arguments as of `selection`."""
    known = known_columns(layout)
    named = _named(by, known, components)
    used = {name: columns[name] for name in known if name in named and name != "value"}
    if "value" in named:
        with np.errstate(over="ignore"):
            used["value"] = composite.value(columns, components, stability_weight=stability_weight, scales=scales)
    for name, column in used.items():
        _check_column(name, column, optional=name in NOT_COMPUTED and name not in components.always)
    return used


def evaluated(by: str, used: Columns) -> NDArray[np.float32]:
    """`by` of the columns that it names, as `named_columns` gives them: (n,) float32, finite. Raises as `selection`."""
    result = used[by].astype(np.float32, copy=False) if by in used else _evaluate(by, used)
    _check_result(by, result)
    return result


def _drawn(seed: int, columns: Columns, branch: int) -> NDArray[np.float32]:
    # The branches of a pair must not be drawn alike: no position reaches 2^32.
    place = of_turn(columns["position"].astype(np.int64) + (branch << 32), columns["turn"])
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
        near = nearest(unknown[0], (*known, *EXPRESSIONS, "random")) if unknown else ""
        raise UsageError(f"by: {by!r} {found}.{near} The columns are {', '.join((*known, *EXPRESSIONS))}")
    for name in sorted(named & (set(SIGNALS) - set(components.signals))):
        raise UsageError(f"by: {name} was not computed: {NOT_COMPUTED[name]}")
    return named


def _check_column(name: str, column: NDArray[Any], *, optional: bool) -> None:
    missing = np.isnan(column)
    if optional and len(column) and missing.all():
        raise UsageError(f"by: {name} was not computed, or not in every generation averaged: {NOT_COMPUTED[name]}")
    if missing.any():
        raise StoredDataError(
            f"column {name} has no value at {int(missing.sum())} of {count(len(column), 'response token')};"
            " run `verify`"
        )


def _evaluate(by: str, used: Columns) -> NDArray[np.float32]:
    length = len(next(iter(used.values())))
    try:
        frame = pl.DataFrame(dict(used)).select(_parse(by))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UsageError(f"by: {by!r} cannot be computed ({error}); give one number per response token") from error
    kind = frame.dtypes[0]
    if frame.shape != (length, 1) or not kind.is_numeric():
        raise UsageError(
            f"by: {by!r} gives {count(frame.height, 'entry', 'entries')} of type {kind} for"
            f" {count(length, 'response token')}; give one number per token"
        )
    return frame.to_series().cast(pl.Float64).cast(pl.Float32, strict=False).fill_null(float("nan")).to_numpy()


def _check_result(by: str, result: NDArray[np.float32]) -> None:
    bad = int((~np.isfinite(result)).sum())
    if bad:
        raise UsageError(
            f"by: {by!r} gives no finite float32 at {bad} of {count(len(result), 'response token')};"
            " guard divisions and logarithms"
        )
