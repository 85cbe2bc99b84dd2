"""The response tokens of the scored rows of a run, from one generation or averaged over several. No model is needed.

Memory grows with the response tokens that are read and the columns that are asked for, not with the rows or the
generations: several are averaged shard by shard. `by_shard` holds one shard at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.manifest import Generation, Manifest
from alphatoken_curate.runs.schema import PAIR_COLUMNS, SIGNALS, Layout, sequence_keys
from alphatoken_curate.runs.shards import Shard

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """The response tokens of one branch, in (row_id, turn, position) order: N tokens of some shards.

    `row` (N,) int64 index among the scored rows; `columns`: name -> (N,); `per_shard`: tokens of each shard, in order.
    """

    row: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]]
    per_shard: tuple[int, ...]

    def lengths(self, rows: int) -> NDArray[np.int64]:
        """(R,) tokens of each of `rows` scored rows."""
        return np.bincount(self.row, minlength=rows)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """The rows that every one of some generations scored.

    `keys`: of each shard, (R,) int64, ascending (`schema.sequence_keys`); `branches`: one for each of the layout's, in
    its order; `left_out`: rows that only some of the generations scored.
    """

    keys: tuple[NDArray[np.int64], ...]
    branches: tuple[Tokens, ...]
    left_out: int


def of_run(config: MaskConfig, stored: Manifest) -> MaskConfig:
    """The settings of a mask of a run: the stability weight is that of its values where none is named."""
    if config.stability_weight is not None:
        return config
    return replace(config, stability_weight=stability_weight(stored))


def stability_weight(stored: Manifest) -> float:
    """That of the run's values."""
    return float(str(stored.settings["stability_weight"]))


def chosen_generations(run: Path, stored: Manifest, config: MaskConfig) -> tuple[Generation, ...]:
    """The generations that `--generation` and `--aggregate` name, ascending.

    Raises `UsageError` for a number that is not there, `StoredDataError` where there is none at all.
    """
    if not stored.generations or not stored.generations[-1].shards:
        raise StoredDataError(f"{run / manifest.NAME}: names no generation; run the `score` command that makes one")
    known = {one.generation: one for one in stored.generations}
    if config.generation == "latest":
        wanted = [max(known)]
    else:
        wanted = sorted(known) if config.generation == "all" else [int(part) for part in config.generation.split(",")]
    if missing := [str(number) for number in wanted if number not in known]:
        has = ", ".join(map(str, known))
        raise UsageError(f"{run}: has no generation {', '.join(missing)}; it has {has}: name those with --generation")
    chosen = tuple(known[number] for number in wanted)
    return chosen[-1:] if config.aggregate == "last" else chosen


def aligned(run: Path, generations: Sequence[Generation]) -> list[tuple[Shard, ...]]:
    """For each shard its file in each generation, oldest first: what `load` reads.

    Raises `StoredDataError` where their shards do not hold the same rows.
    """
    if len({tuple(shard.rows for shard in one.shards) for one in generations}) > 1:
        numbers = ", ".join(str(one.generation) for one in generations)
        raise StoredDataError(f"{run}: the shards of generations {numbers} do not hold the same rows; run `verify`")
    return list(zip(*(one.shards for one in generations), strict=True))


def load(run: Path, files: Sequence[Sequence[Shard]], columns: Sequence[str], layout: Layout) -> Scored:
    """Positions and these columns of each branch's response tokens, and `sequence`, the key of the one each is in.

    Columns: signals, row_id, turn, token_id, end_of_turn, omega, margin.

    `files`: for each shard its file in each generation, so `[[shard]]` is one shard of one. Of several generations only
    the rows are read that all of them scored, and each number is their mean, taken in float64 and rounded once to
    float32; NaN where null in any, but for reference_nll. Raises `StoredDataError` where a file is not the one the
    manifest names or generations do not hold the same tokens.
    """
    names = ("row", *_names(columns))
    found: list[dict[str, list[NDArray[Any]]]] = [{name: [] for name in names} for _ in layout.branches]
    keys: list[NDArray[np.int64]] = []
    rows, left_out = 0, 0
    for part in by_shard(run, files, columns, layout):
        for lists, tokens in zip(found, part.branches, strict=True):
            for name, arrays in lists.items():
                arrays.append(tokens.row + rows if name == "row" else tokens.columns[name])
        keys += part.keys
        rows, left_out = rows + len(part.keys[0]), left_out + part.left_out
    return Scored(keys=tuple(keys), branches=tuple(map(_joined, found)), left_out=left_out)


def by_shard(run: Path, files: Sequence[Sequence[Shard]], columns: Sequence[str], layout: Layout) -> Iterator[Scored]:
    """What `load` reads, one shard after the other, so that no more than one is held. `row` counts from 0 in each."""
    last = -1
    for group in files:
        part, left_out = _averaged(run, group, _names(columns), layout)
        if len(part.keys) and (part.keys[0] <= last or np.any(np.diff(part.keys) <= 0)):
            raise StoredDataError(f"{run / group[0].path}: row ids do not ascend; run `verify`")
        last = int(part.keys[-1]) if len(part.keys) else last
        tokens = tuple(
            Tokens(
                row=one["row"], columns={name: one[name] for name in one if name != "row"}, per_shard=(len(one["row"]),)
            )
            for one in part.branches
        )
        yield Scored(keys=(part.keys,), branches=tokens, left_out=left_out)


def _names(columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("sequence", "position", *columns)))


_LISTS = (*SIGNALS, "end_of_turn")
"""Columns of values/ with an entry for each token, beside its id."""

_SAME = "reference_nll"
"""The same number in all generations, and null in those whose model is the reference: it is taken where it is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """Scored rows of one shard, (R,) int64, and columns of their response tokens: `row` counts from 0."""

    keys: NDArray[np.int64]
    branches: list[Columns]

    def only(self, keys: NDArray[np.int64]) -> _Part:
        """The same without rows that are not among these."""
        stays = np.isin(self.keys, keys)
        number = np.cumsum(stays) - 1
        branches = []
        for columns in self.branches:
            tokens = stays[columns["row"]]
            kept = {name: column[tokens] for name, column in columns.items()}
            branches.append(kept | {"row": number[kept["row"]]})
        return _Part(keys=self.keys[stays], branches=branches)


def _joined(lists: dict[str, list[NDArray[Any]]]) -> Tokens:
    per_shard = tuple(map(len, lists["row"]))
    joined = {name: np.concatenate(lists.pop(name)) for name in list(lists)}  # pop: one column at a time is held twice
    return Tokens(row=joined.pop("row"), columns=joined, per_shard=per_shard)


def _averaged(run: Path, files: Sequence[Shard], names: Sequence[str], layout: Layout) -> tuple[_Part, int]:
    """One shard over all generations, which are read one after the other, and how many rows that leaves out."""
    total = _part(run, files[0], names, layout)
    if len(files) == 1:
        return total, 0
    real = [name for name in names if (name in SIGNALS and name != _SAME) or name in PAIR_COLUMNS]
    for columns in total.branches:
        columns |= {name: columns[name].astype(np.float64) for name in real}
    seen = total.keys
    for file in files[1:]:
        part = _part(run, file, names, layout)
        seen = np.union1d(seen, part.keys)
        total, part = total.only(part.keys), part.only(total.keys)
        for sums, columns in zip(total.branches, part.branches, strict=True):
            if not all(np.array_equal(sums[name], columns[name]) for name in ("sequence", "position")):
                raise StoredDataError(f"{run / file.path}: its tokens are not those of {files[0].path}; run `verify`")
            for name in real:
                sums[name] += columns[name]
            if _SAME in names:
                sums[_SAME] = np.where(np.isnan(sums[_SAME]), columns[_SAME], sums[_SAME])
    for columns in total.branches:
        columns |= {name: (columns[name] / len(files)).astype(np.float32) for name in real}
    return total, len(seen) - len(total.keys)


def _part(run: Path, shard: Shard, names: Sequence[str], layout: Layout) -> _Part:
    lists = [name for name in names if name in _LISTS]
    lists += ["response", *(["input_ids"] if "token_id" in names else [])]
    wanted = [prefix + name for prefix in layout.branches for name in lists]
    table = table_of(run, shard, layout, ["status", *wanted, *(name for name in names if name in PAIR_COLUMNS)])
    table = table.filter(pc.equal(table["status"], "scored"))
    return _Part(
        keys=sequences_of(table),
        branches=[_flat(run / shard.path, table, names, prefix) for prefix in layout.branches],
    )


def table_of(run: Path, shard: Shard, layout: Layout, columns: Sequence[str]) -> pa.Table:
    """`row_id`, `turn` and these columns of a values shard. Raises `StoredDataError` where it is another file."""
    return shards.read_shard(run, shard, layout.values, ["row_id", "turn", *columns])


def sequences_of(table: pa.Table) -> NDArray[np.int64]:
    """The key of each row of a shard that has `row_id` and `turn`, (R,)."""
    return sequence_keys(table["row_id"].to_numpy(), table["turn"].to_numpy())


def _flat(path: Path, table: pa.Table, names: Sequence[str], prefix: str) -> Columns:
    """Columns of the response tokens of one branch in one shard; `row` counts from 0."""
    response, lengths = shards.entries(table[prefix + "response"])
    rows = np.repeat(np.arange(len(lengths)), lengths)[response]
    starts = np.cumsum(lengths) - lengths
    flat: Columns = {"row": rows}
    for name in names:
        if name == "position":
            flat[name] = (np.flatnonzero(response) - starts[rows]).astype(np.int32)
        elif name == "sequence":
            flat[name] = sequences_of(table)[rows]
        elif name in table.column_names and name not in _LISTS:  # one number for each row
            flat[name] = table[name].to_numpy()[rows]
        else:
            column = prefix + ("input_ids" if name == "token_id" else name)
            values, ends = shards.entries(table[column])
            if not np.array_equal(ends, lengths):
                raise StoredDataError(f"{path}: `{column}` is not aligned with `{prefix}response`; run `verify`")
            flat[name] = values[response]
    return flat
