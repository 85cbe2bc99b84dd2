"""The number that each response token of a run is selected on, read shard by shard. No model is needed.

Of each token 4 bytes are held, and 1 where some are always kept; of each row 8 for itself and 8 for each branch. An
expression as `--by` may look at
many tokens at once, so the columns that it names are held as well, and what polars makes of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.masks import criteria
from alphatoken_curate.masks.always import Always
from alphatoken_curate.masks.responses import Tokens, by_shard
from alphatoken_curate.runs.schema import Components, Layout
from alphatoken_curate.runs.shards import Shard
from alphatoken_curate.signals import composite

Files = Sequence[Sequence[Shard]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankedBranch:
    """N response tokens of one branch of R scored rows, in (row_id, turn, position) order.

    `scores`: for each stability weight asked for (N,) float32; `lengths` (R,) int64 tokens of each row; `per_shard`:
    tokens of each shard, in order; `always` (N,) bool: those that are always kept, None where there are none.
    """

    scores: tuple[NDArray[np.float32], ...]
    lengths: NDArray[np.int64]
    per_shard: tuple[int, ...]
    always: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranked:
    """The rows that every one of some generations scored.

    `keys`: of each shard, (R,) int64, ascending (`schema.sequence_keys`); `branches`: one for each of the layout's, in
    its order; `left_out`: rows that only some of the generations scored.
    """

    keys: tuple[NDArray[np.int64], ...]
    branches: tuple[RankedBranch, ...]
    left_out: int


def ranked(
    run: Path,
    files: Files,
    layout: Layout,
    components: Components,
    config: MaskConfig,
    *,
    stability_weights: Sequence[float],
    scales: composite.Scales,
    always: Always | None = None,
) -> Ranked:
    """What `config.by` gives, at each of some stability weights. Raises as `responses.load` and `criteria.selection`.

    `files`: for each shard its file in each generation; `scales`: what the objectives are divided by; `always`: what is
    always kept, told with the first of the weights.
    """
    bound = sum(group[0].response_tokens for group in files)
    numbers = range(len(layout.branches))
    branches = [_Branch(config, number, len(stability_weights), bound, always) for number in numbers]
    keys: list[NDArray[np.int64]] = []
    left_out = 0
    columns = (*criteria.columns_needed(config.by, components, layout), *(always.columns if always else ()))
    for part in by_shard(run, files, columns, layout):
        for branch, tokens in zip(branches, part.branches, strict=True):
            for place, weight in enumerate(stability_weights):
                how = {"components": components, "stability_weight": weight, "scales": scales, "layout": layout}
                branch.add(place, tokens, how)
            branch.lengths.append(tokens.lengths(len(part.keys[0])))
        keys += part.keys
        left_out += part.left_out
    return Ranked(keys=tuple(keys), branches=tuple(one.ranked() for one in branches), left_out=left_out)


def sizes(run: Path, files: Files, layout: Layout, components: Components) -> composite.Sizes:
    """How large the components of the value are over all branches of all shards."""

    def branches() -> Iterator[Any]:
        for part in by_shard(run, files, components.of_value, layout):
            yield from (tokens.columns for tokens in part.branches)

    return composite.sizes(branches(), components)


class _Branch:
    """One branch, as its shards come."""

    def __init__(self, config: MaskConfig, number: int, weights: int, bound: int, always: Always | None) -> None:
        self._always, self._flags = always, _Joined(bound)
        self.lengths: list[NDArray[np.int64]] = []
        self._config, self._number = config, number
        self._whole = criteria.is_expression(config.by)
        self._columns = [defaultdict[str, _Joined](lambda: _Joined(bound)) for _ in range(weights)]

    def add(self, place: int, tokens: Tokens, how: dict[str, Any]) -> None:
        """The tokens of a shard, with the stability weight of that place."""
        by, joined = self._config.by, self._columns[place]
        if self._always is not None and not place:
            self._flags.add(self._always.of(tokens.columns, **how))
        if self._whole:
            for name, column in criteria.named_columns(by, tokens.columns, **how).items():
                joined[name].add(column)
        else:
            found = criteria.selection(by, tokens.columns, **how, seed=self._config.seed, branch=self._number)
            joined[by].add(found)

    def ranked(self) -> RankedBranch:
        """All of them."""
        return RankedBranch(
            scores=tuple(map(self._score, self._columns)),
            lengths=np.concatenate([np.empty(0, np.int64), *self.lengths]),
            per_shard=tuple(int(one.sum()) for one in self.lengths),
            always=None if self._always is None else self._flags.array.astype(np.bool_, copy=False),
        )

    def _score(self, joined: dict[str, _Joined]) -> NDArray[np.float32]:
        columns = {name: one.array for name, one in joined.items()}
        return criteria.evaluated(self._config.by, columns) if self._whole else columns[self._config.by]


class _Joined:
    """Arrays joined as they come, in memory set aside once: what is not used of it is never touched."""

    def __init__(self, bound: int) -> None:
        self._bound, self._used = bound, 0
        self._array: NDArray[Any] = np.empty(0, np.float32)

    def add(self, part: NDArray[Any]) -> None:
        """Of one dtype; no more than the bound in all."""
        if not self._used:
            self._array = np.empty(self._bound, part.dtype)
        self._array[self._used : self._used + len(part)] = part
        self._used += len(part)

    @property
    def array(self) -> NDArray[Any]:
        """What was added."""
        return self._array[: self._used]
