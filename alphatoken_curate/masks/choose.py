"""Which response tokens train, and with what weight (paper arXiv 2606.01635, Eq. 13).

Everything here is a pure function of flat arrays with one entry per response token, in ascending (row, position):

    score     (n,) floating, finite     the number to select on; the highest are kept
    lengths   (r,) integer              response tokens of each *scored* row, in row_id order; n is their sum

    always    (n,) bool, or None        tokens that stay whatever their score (`always`); they count in the share

Of preference rows each branch is masked by itself: its tokens alone are what a call is given.

Ties: of equal scores the one with the lower row goes first, then the one with the lower position. With the arrays in
that order this is "the lower index first", which is what every sort here does.

Beside its arguments and its result a call holds 5 bytes per token (`rank`: 20; with `always` one or two more), and what
a block of about a million tokens takes: a scope that is larger, such as `batch:N` of all rows, is one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.errors import CurateError, UsageError
from alphatoken_curate.masks import formulas
from alphatoken_curate.masks.formulas import Bools, Formula, Ints, Scores, blocks_of, places_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weighed:
    """`weight` (n,) float32, mean 1 where above 0; `given_back`: rows that got their best token back.

    `over_share`: by how many tokens those that are always kept exceed the shares of their scopes by themselves.
    """

    weight: NDArray[np.float32]
    given_back: int
    over_share: int


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
    score: Scores,
    lengths: Ints,
    *,
    keep: float | str,
    scope: str,
    allow_empty_rows: bool = False,
    always: Bools | None = None,
) -> Bools:
    """Eq. 13: exactly ceil(keep * n) tokens of each scope, the highest first, or those whose score is above 0.

    Those that are `always` kept are among them, and stay where they alone are more. Then each row that lost every other
    token gets its best one back, or with `allow_empty_rows` loses the rest too. (n,) bool.
    Raises `UsageError` for a share or scope that cannot be used, `CurateError` for NaN, infinity or other lengths.
    """
    _check(score, lengths, always)
    chosen, _ = _choose(score, lengths, parse_keep(keep), parse_scope(scope), always)
    for part, rows in blocks_of(lengths):
        mine = None if always is None else always[part]
        alive = chosen[part] if mine is None else chosen[part] & ~mine
        if not allow_empty_rows:
            chosen[part][_best_of_lost_rows(score[part], lengths[rows], alive, mine)] = True
        if mine is not None:
            stays = mine & ~_in_lost_rows(lengths[rows], alive) if allow_empty_rows else mine
            chosen[part] = (chosen[part] & ~mine) | stays
    return chosen


def weighed(
    score: Scores,
    lengths: Ints,
    *,
    keep: float | str,
    scope: str,
    weights: str = "binary",
    allow_empty_rows: bool = False,
    always: Bools | None = None,
) -> Weighed:
    """Loss weights of the kept tokens, 0 elsewhere, with mean 1 over the weights above 0 of the whole data set.

    | weights | of a kept token |
    |---|---|
    | binary | 1 |
    | rank | its ascending rank among all n response tokens of its scope (1 .. n), divided by n |
    | sigmoid | 1 / (1 + exp(-score / RMS)), RMS of the score over all response tokens (0.5 where RMS is 0) |
    | relu | max(score, 0) |
    | tilt:C | 1 + C score / sd, sd the standard deviation of the score over all response tokens, clipped to [0, 3] |

    A row left without any weight above 0 gets its best token back (unless `allow_empty_rows`): with that token's weight
    by the formula, or where that is 0 the smallest weight above 0 of the run, or 1 if there is none. No weight above 0
    is stored as less than the smallest normal float32.

    A token that is `always` kept, and that by its score would have none, has the mean weight of its row's other tokens
    above 0; where there is none, 1, the mean of all. A row of which only such tokens are left counts as left without:
    with `allow_empty_rows` they weigh nothing either. Raises as `kept`, and `UsageError` where nothing is left at all.
    """
    _check(score, lengths, always)
    size, share = parse_scope(scope), parse_keep(keep)
    formula = formulas.named(weights)
    chosen, over = _choose(score, lengths, share, size, always)
    given = formula(score, lengths, size)
    raw = _Raw(given, chosen, always)
    for part, rows in blocks_of(lengths):
        if allow_empty_rows:
            raw.leave_empty(part, lengths[rows])
        else:
            mine = None if always is None else always[part]
            raw.give_back(part, _best_of_lost_rows(score[part], lengths[rows], raw.others(part), mine))
    weight = _mean_one(raw, lengths)
    if len(weight) and not weight.any():
        raise _nothing_left(keep, weights, any(given(part).any() for part, _ in blocks_of(lengths)))
    return Weighed(weight=weight, given_back=raw.given_back, over_share=over)


def _nothing_left(keep: float | str, weights: str, weighs: bool) -> UsageError:
    if not weighs:
        return UsageError(
            f"weights: {weights} gives every token 0, and nothing is left to train. Give another --by or --weights"
        )
    if keep == "positive":
        return UsageError(
            "keep: with positive nothing is left to train: no token's --by is above 0, and rows stay empty by"
            " --allow-empty-rows. Give another --by or --keep, or leave --allow-empty-rows out"
        )
    return UsageError(
        f"keep: with {keep} nothing is left to train: what is kept weighs nothing or is always kept, and rows of which"
        " only that is left stay empty by --allow-empty-rows. Give a larger share, or --always-keep none"
    )


def _check(score: Scores, lengths: Ints, always: Bools | None) -> None:
    ends = np.cumsum(lengths)
    if len(score) != (ends[-1] if len(ends) else 0) or np.any(lengths < 0):
        raise CurateError(f"{len(score)} scores of {len(lengths)} rows, whose lengths say otherwise")
    if always is not None and len(always) != len(score):
        raise CurateError(f"{len(score)} scores, and {len(always)} flags of what is always kept")
    finite = np.isfinite(score)
    if not finite.all():
        at = int(np.argmin(finite))
        row = int(np.searchsorted(ends, at, side="right"))
        token = at - int(ends[row] - lengths[row])
        raise CurateError(f"scored row {row}, response token {token}: its score is {float(score[at])}")


def _choose(score: Scores, lengths: Ints, share: Fraction | None, size: int, always: Bools | None) -> tuple[Bools, int]:
    """(n,) which tokens are kept by their score, and by how many those that are `always` kept exceed the shares alone.

    Of the others: as many as the share leaves beside those. Of those themselves: whether they would be kept anyway.
    """
    if share is None:
        return np.greater(score, 0), 0
    chosen, over = np.zeros(len(score), np.bool_), 0
    if size == 0:
        quota = _quota(len(score), share)
        _add_top(chosen, score, quota)
        if always is not None:
            taken = int(np.count_nonzero(always))
            chosen &= always
            _add_top(chosen, score, quota - taken, ~always)
            over = max(0, taken - quota)
        return chosen, over
    for part, rows in blocks_of(lengths, size):
        order, place, count = places_of(score[part], lengths[rows], size)
        sizes, which = np.unique(count, return_inverse=True)
        quotas = np.array([_quota(int(n), share) for n in sizes], np.int64)[which]
        stays: Bools = place < quotas
        if always is not None:
            others = ~always[part][order]
            through, first = np.cumsum(others), np.arange(len(order)) - place
            before = through[first] - others[first]
            taken = count - (through[first + count - 1] - before)
            stays = np.where(others, through - before <= quotas - taken, stays)
            over += int(np.maximum(taken - quotas, 0)[place == 0].sum())
        chosen[part][order] = stays
    return chosen, over


def _quota(n: int, share: Fraction) -> int:
    return -(-n * share.numerator // share.denominator)


def _add_top(chosen: Bools, score: Scores, k: int, may: Bools | None = None) -> None:
    """Choose the k highest of all, or of those that `may` be, besides. Without a full sort."""
    if k <= 0:
        return
    among = score.copy() if may is None else score[may]
    among.partition(len(among) - k)
    threshold = among[len(among) - k]
    del among
    for best in (np.greater, np.equal):  # of those at the threshold the first ones, as many as there is room for
        for start in range(0, len(score), formulas.BLOCK):
            part = slice(start, start + formulas.BLOCK)
            found = best(score[part], threshold)
            places = np.flatnonzero(found if may is None else found & may[part])[:k]
            chosen[start + places] = True
            k -= len(places)


def _in_lost_rows(lengths: Ints, alive: Bools) -> Bools:
    """(n,) the tokens of rows of which none is alive."""
    counts = lengths[lengths > 0]
    if not len(counts):
        return np.empty(0, np.bool_)
    return np.repeat(~np.logical_or.reduceat(alive, np.cumsum(counts) - counts), counts)


def _best_of_lost_rows(score: Scores, lengths: Ints, alive: Bools, always: Bools | None) -> NDArray[np.int64]:
    """Index of the best token of each row of which none is alive, if there is one that is not always kept."""
    counts = lengths[lengths > 0]
    if not len(counts):
        return np.empty(0, np.int64)
    may = _in_lost_rows(lengths, alive)
    if always is not None:
        may &= ~always
    best = np.maximum.reduceat(np.where(may, score, -np.inf), np.cumsum(counts) - counts)
    number = np.repeat(np.arange(len(counts)), counts)
    candidates = np.flatnonzero(may & (best[number] == score))
    return candidates[np.flatnonzero(np.diff(number[candidates], prepend=-1))]


class _Raw:
    """Weights before they are scaled, float64, made anew for each block that is asked for.

    Tokens that are kept only since they are `always` kept have none: see `added`.
    """

    def __init__(self, formula: Formula, chosen: Bools, always: Bools | None) -> None:
        self._formula, self._chosen, self._always = formula, chosen, always
        self._weightless: list[NDArray[np.int64]] = []
        self._owns = False
        self.given_back = 0

    def of(self, part: slice, least: float = 0.0) -> NDArray[np.float64]:
        """Of the tokens of a block; `least`: of those that were given back and that the formula gives none."""
        raw = np.where(self._chosen[part], self._formula(part), 0.0)
        for places in self._weightless if least else ():
            raw[places[(places >= part.start) & (places < part.stop)] - part.start] = least
        return raw

    def others(self, part: slice) -> Bools:
        """The tokens of a block that weigh something and are not among those that are always kept."""
        alive = self.of(part) > 0
        return alive if self._always is None else alive & ~self._always[part]

    def added(self, part: slice, found: NDArray[np.float64]) -> Bools:
        """The tokens of a block that are always kept, and have no weight among these."""
        return np.zeros(len(found), np.bool_) if self._always is None else self._always[part] & (found == 0)

    def leave_empty(self, part: slice, lengths: Ints) -> None:
        """Keep nothing of rows of which only such tokens are left."""
        if self._always is None:
            return
        if not self._owns:
            self._always, self._owns = self._always.copy(), True
        lost = _in_lost_rows(lengths, self.others(part))
        self._always[part] &= ~lost
        self._chosen[part] &= ~lost

    def give_back(self, part: slice, places: NDArray[np.int64]) -> None:
        """Choose these tokens of a block too."""
        self._chosen[part][places] = True
        self._weightless.append(part.start + places[self._formula(part)[places] == 0])
        self.given_back += len(places)


def _mean_one(raw: _Raw, lengths: Ints) -> NDArray[np.float32]:
    blocks = list(blocks_of(lengths))
    weight = np.zeros(blocks[-1][0].stop if blocks else 0, np.float32)
    least, largest, total, count = np.inf, 0.0, 0.0, 0
    for part, _ in blocks:
        found = raw.of(part)
        least = min(least, float(np.min(found, where=found > 0, initial=np.inf)))
        largest = max(largest, float(found.max(initial=0.0)))
    if not largest:
        least = largest = 1.0

    def scaled(part: slice, rows: slice) -> tuple[NDArray[np.float64], Bools]:
        """Weights, NaN where only the mean of all can be told, and which tokens have one."""
        found = raw.of(part, least)
        added = raw.added(part, found)
        # Divided first, so that the sum of the mean cannot overflow.
        return _with_row_means(found / largest, added, lengths[rows]), (found > 0) | added

    for part, rows in blocks:
        found, trains = scaled(part, rows)
        total += float(np.nansum(found))
        count += int(np.count_nonzero(trains & ~np.isnan(found)))
    for part, rows in blocks:
        found, trains = scaled(part, rows)
        normal = (found / (total / max(1, count) or 1.0)).astype(np.float32)
        normal[np.isnan(normal)] = 1.0
        # A weight must not round to 0: a kept token would stop being trained without a word.
        weight[part] = np.where(trains, np.maximum(normal, np.finfo(np.float32).tiny), np.float32(0))
    return weight


def _with_row_means(found: NDArray[np.float64], added: Bools, lengths: Ints) -> NDArray[np.float64]:
    """The weights of whole rows with those that are added: the mean of their row's above 0, NaN where it has none."""
    if added.any():
        row = np.repeat(np.arange(len(lengths)), lengths)
        totals = np.bincount(row, weights=found, minlength=len(lengths))
        counts = np.bincount(row, weights=found > 0, minlength=len(lengths))
        found[added] = np.divide(totals, counts, out=np.full(len(lengths), np.nan), where=counts > 0)[row[added]]
    return found
