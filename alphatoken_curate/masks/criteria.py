"""What tokens are selected on: `--by`, the value, a draw, a stored column or an expression of them.

Arrays have one entry per response token of one branch, or of some shards of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
from numpy.typing import NDArray

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks import expression
from alphatoken_curate.masks.language import Expression
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
from alphatoken_curate.wording import count

Columns = Mapping[str, NDArray[Any]]

_ERROR_PARTS = ("adapt_error", "stab_error")

_RECOMBINED = ("value", "value_error")
"""What is made of stored parts anew for the stability settings of each mask."""


def known_columns(layout: Layout) -> tuple[str, ...]:
    """What `by` may name in a run of this layout, in stored order: ids, signals, and numbers of the pair."""
    return (*INDEX_COLUMNS, *SIGNALS, *(name for name in PAIR_COLUMNS if name in layout.values.names))


def columns_needed(by: str, components: Components, layout: Layout = SFT) -> tuple[str, ...]:
    """Stored columns that `selection(by, ...)` reads, in stored order. Raises `UsageError` as `selection` does."""
    if by == "random":
        return ("row_id", "turn", "position")
    known = known_columns(layout)
    named = _named(by, layout, components)
    for made, parts in _made_of(components).items():
        if made in named:
            named = (named - {made}) | set(parts)
    return tuple(name for name in known if name in named)


def depends_on_value(by: str) -> bool:
    """Whether the stability settings change what `by` selects."""
    return not columns_named(by).isdisjoint(_RECOMBINED)


def is_readable(by: str) -> bool:
    """Whether `by`, as stored with a mask, can be read at all: other releases took any SQL."""
    try:
        depends_on_value(by)
    except UsageError:
        return False
    return True


def is_expression(by: str) -> bool:
    """Whether `by` may look at several tokens at once, as `nll - avg(nll)` does, so that all are evaluated together."""
    alone = ("random", *known_columns(PREFERENCE))
    return by.removeprefix("-") not in EXPRESSIONS and by not in alone


def is_of_single_tokens(by: str, layout: Layout = SFT) -> bool:
    """Whether `by` can be told of each token alone: columns, numbers, arithmetic and functions of one token.

    Raises `UsageError` for an expression that cannot be read.
    """
    return by in ("random", *known_columns(layout)) or not _read(by, layout).reach


def as_number(by: str, layout: Layout = SFT) -> str:
    """An expression that may be a condition as a number, 1 where it is true. Raises `UsageError` for neither."""
    is_condition = expression.is_condition(by, known_columns(layout), EXPRESSIONS)
    return f"CAST(({by}) AS INT)" if is_condition else by


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

    `by` is `value` or `value_error` (recombined from what is stored with this stability weight and these scales),
    `random` (a draw in [0, 1] keyed by seed, row_id, turn, position and branch), a stored column, one of `EXPRESSIONS`,
    or an `expression` of all these but `random`.
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
    named = _named(by, layout, components)
    used = {name: columns[name] for name in known if name in named and name not in _RECOMBINED}
    with np.errstate(over="ignore"):
        if "value" in named:
            used["value"] = composite.value(columns, components, stability_weight=stability_weight, scales=scales)
        if "value_error" in named:
            for name in _ERROR_PARTS:
                _check_whole(name, columns[name])
            used["value_error"] = composite.value_error(columns, stability_weight, scales=scales)
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


def _read(by: str, layout: Layout = PREFERENCE) -> Expression:
    return expression.read(by, known_columns(layout), EXPRESSIONS)


def columns_named(by: str, layout: Layout = PREFERENCE) -> frozenset[str]:
    """Columns that `by` names, each of them known. Raises `UsageError` as `selection` does."""
    if by == "random":
        return frozenset()
    # Names need not be expressions: `position` is none.
    return frozenset((by,)) if by in known_columns(layout) else _read(by, layout).columns


def _named(by: str, layout: Layout, components: Components) -> frozenset[str]:
    """As `columns_named`, each of them computed as far as the estimator decides it."""
    named = columns_named(by, layout)
    for name in sorted(named & (set(SIGNALS) - set(components.signals))):
        raise UsageError(f"by: {name} was not computed: {NOT_COMPUTED[name]}")
    return named


def _made_of(components: Components) -> dict[str, tuple[str, ...]]:
    """The stored columns that each of `_RECOMBINED` is made of."""
    return dict(zip(_RECOMBINED, (components.of_value, _ERROR_PARTS), strict=True))


def _check_column(name: str, column: NDArray[Any], *, optional: bool) -> None:
    if optional and len(column) and np.isnan(column).all():
        raise UsageError(f"by: {name} was not computed, or not in every generation averaged: {NOT_COMPUTED[name]}")
    _check_whole(name, column, none=False)


def _check_whole(name: str, column: NDArray[Any], *, none: bool = True) -> None:
    """Raise `StoredDataError` where only some tokens have a number; `none`: no token need have one."""
    missing = np.isnan(column)
    if missing.any() and not (none and missing.all()):
        raise StoredDataError(
            f"column {name} has no value at {int(missing.sum())} of {count(len(column), 'response token')};"
            " run `verify`"
        )


def _evaluate(by: str, used: Columns) -> NDArray[np.float32]:
    frame = pl.DataFrame(dict(used)).cast({cs.integer(): pl.Float64})  # so that nothing wraps
    read = _read(by)
    if read.across_turns and used["turn"].any():
        raise UsageError(
            f"by: {by!r} orders the tokens of a row by position, and each of its turns counts from 0 here (--turns"
            " each); write PARTITION BY row_id, turn"
        )
    try:
        found = frame.select(read.expr).to_series()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UsageError(f"by: {by!r} cannot be computed ({error}); give one number per response token") from error
    return found.cast(pl.Float64).cast(pl.Float32, strict=False).fill_null(float("nan")).to_numpy()


def _check_result(by: str, result: NDArray[np.float32]) -> None:
    bad = int((~np.isfinite(result)).sum())
    if bad:
        raise UsageError(
            f"by: {by!r} gives no finite float32 at {bad} of {count(len(result), 'response token')};"
            " guard divisions and logarithms; LAG, LEAD, NULLIF, a CASE without ELSE, and STDDEV or VARIANCE of one"
            " token may give none"
        )
