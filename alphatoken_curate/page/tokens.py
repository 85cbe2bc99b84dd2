"""What a report is made of: every response token of a run's newest scoring, as flat columns, and every row's own facts.

All of it is held in memory: about 80 bytes for each response token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.masks import responses
from alphatoken_curate.reading.scan import choose_generation
from alphatoken_curate.reading.words import CLASSES, Vocabulary, classes, read_vocabulary
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.manifest import Generation, Manifest, Mask
from alphatoken_curate.runs.schema import PAIR_COLUMNS, STATUSES, Components, Layout
from alphatoken_curate.signals import composite

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

NO_CLASS = -1
"""The class of tokens of a run without a vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowTable:
    """The R rows of a run, or turns of them, in order of their `keys` (R,) int64 (`schema.sequence_keys`).

    `source` (R,) int32 in `sources`; `line` (R,) int64; `own`: the rows' own ids; `status` (R,) int8 in
    `schema.STATUSES`; `omega`, `margin` (R,) float32, NaN where none.
    """

    keys: NDArray[np.int64]
    sources: tuple[str, ...]
    source: NDArray[np.int32]
    line: NDArray[np.int64]
    own: Sequence[str | None]
    status: NDArray[np.int8]
    omega: Floats
    margin: Floats

    def __len__(self) -> int:
        return len(self.keys)

    def places(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the rows these are, (N,)."""
        return np.searchsorted(self.keys, keys)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunTokens:
    """The N response tokens of the scored rows: branch by branch, each in (row, position) order.

    `starts`: where each branch begins, and N; `row` (N,) int64, which of `rows`; `position` (N,) int32 in its sequence;
    `place` (N,) int32 in its response, from 1; `token_id` (N,) int32; `kind` (N,) int8 in `words.CLASSES` or
    `NO_CLASS`; `signals`: name -> (N,) float32, those that the run computed; `weight` (N,) float32 of the newest mask,
    NaN in rows that it leaves out, None without a mask.
    """

    stored: Manifest
    layout: Layout
    components: Components
    generation: Generation
    mask: Mask | None
    vocabulary: Vocabulary
    rows: RowTable
    starts: tuple[int, ...]
    row: NDArray[np.int64]
    position: NDArray[np.int32]
    place: NDArray[np.int32]
    token_id: NDArray[np.int32]
    kind: NDArray[np.int8]
    signals: Mapping[str, Floats]
    weight: Floats | None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def kept(self) -> Bools | None:
        """(N,) bool, False in rows that the mask leaves out; None without a mask."""
        return None if self.weight is None else self.weight > 0

    def objective(self, names: Sequence[str]) -> Floats:
        """The sum of these signals, (N,)."""
        return composite.objective(self.signals, names).astype(np.float32)

    def spans(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the tokens of these rows, (R,), begin and end in each of B branches: (R, B, 2)."""
        found = []
        for start, end in pairwise(self.starts):
            rows = self.row[start:end]
            found.append(start + np.searchsorted(rows, np.stack([places, places + 1], axis=-1)))
        return np.stack(found, axis=1)


def read_tokens(run: Path) -> RunTokens:
    """The tokens of a run's newest generation, with its newest mask.

    Raises `StoredDataError` where the run has no manifest or no generation, or is damaged.
    """
    stored = manifest.read(run)
    if not stored.generations:
        raise StoredDataError(f"{run / manifest.NAME}: names no generation; run the `score` command that makes one")
    layout, components = manifest.layout(stored), manifest.components(stored)
    generation = choose_generation(run, stored, None)
    mask = stored.masks[-1] if stored.masks else None
    names = (*components.signals, "token_id")
    branches = responses.load(run, [[shard] for shard in generation.shards], names, layout).branches
    joined = {name: np.concatenate([one.columns[name] for one in branches]) for name in branches[0].columns}
    starts = (0, *np.cumsum([len(one.row) for one in branches]).tolist())
    computed = {name: joined[name] for name in components.signals if not np.isnan(joined[name]).all()}
    vocabulary, rows = read_vocabulary(run), _rows(run, generation, layout)
    return RunTokens(
        stored=stored,
        layout=layout,
        components=components,
        generation=generation,
        mask=mask,
        vocabulary=vocabulary,
        rows=rows,
        starts=starts,
        row=rows.places(joined["sequence"]),
        position=joined["position"],
        place=np.concatenate([_places(one.columns["sequence"]) for one in branches]),
        token_id=joined["token_id"].astype(np.int32),
        kind=token_classes(joined["token_id"], vocabulary),
        signals=computed,
        weight=_weights(run, mask, layout, starts, joined["sequence"], joined["position"]) if mask else None,
    )


def masked(run: Path, tokens: RunTokens, mask: Mask) -> Floats:
    """The weights that another mask gives the same tokens, (N,) float32, NaN in rows that it leaves out."""
    return _weights(run, mask, tokens.layout, tokens.starts, tokens.rows.keys[tokens.row], tokens.position)


def values_at(run: Path, tokens: RunTokens, generation: Generation) -> Floats:
    """The values that another generation gives the same tokens, (N,) float32, NaN in rows that it did not score."""
    files = [[shard] for shard in generation.shards]
    branches = responses.load(run, files, ("value",), tokens.layout).branches
    found = np.full(len(tokens), np.nan, np.float32)
    for number, one in enumerate(branches):
        part = slice(tokens.starts[number], tokens.starts[number + 1])
        mine, theirs = tokens.rows.keys[tokens.row[part]], one.columns["sequence"]
        here, there = np.isin(mine, theirs), np.isin(theirs, mine)
        if not np.array_equal(tokens.position[part][here], one.columns["position"][there]):
            raise StoredDataError(f"{run}: generation {generation.generation} holds other tokens; run `verify`")
        found[part][here] = one.columns["value"][there]
    return found


def _places(keys: NDArray[np.int64]) -> NDArray[np.int32]:
    """From 1, anew in each row."""
    number = np.arange(len(keys))
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return (number - np.repeat(first, np.diff(first, append=len(keys))) + 1).astype(np.int32)


def token_classes(token_id: NDArray[Any], vocabulary: Vocabulary) -> NDArray[np.int8]:
    """The class of each token, (n,) in `words.CLASSES`, `NO_CLASS` where it is not in the vocabulary."""
    numbers, where = np.unique(token_id, return_inverse=True)
    known = [int(number) for number in numbers]
    if vocabulary.special is None:  # then what looks like code may be the end of a turn
        return np.full(len(where), NO_CLASS, np.int8)
    texts = [vocabulary.texts.get(number, "") for number in known]
    number_of = {name: i for i, name in enumerate(CLASSES)}
    found = [number_of[name] for name in classes(texts, [number in vocabulary.special for number in known])]
    there = [number in vocabulary.texts for number in known]
    return np.where(there, found, NO_CLASS).astype(np.int8)[where]


def _weights(
    run: Path,
    mask: Mask,
    layout: Layout,
    starts: Sequence[int],
    keys: NDArray[np.int64],
    position: NDArray[np.int32],
) -> Floats:
    """Of the tokens of all branches, which begin at `starts`."""
    parts = [slice(*span) for span in pairwise(starts)]
    found = [_branch_weights(run, mask, layout, i, keys[part], position[part]) for i, part in enumerate(parts)]
    return np.concatenate(found)


def _branch_weights(
    run: Path, mask: Mask, layout: Layout, branch: int, keys: NDArray[np.int64], position: NDArray[np.int32]
) -> Floats:
    """Of the tokens (n,) of a branch, in row order; NaN in rows that the mask does not hold."""
    name = layout.branches[branch] + "loss_weight"
    found = np.full(len(keys), np.nan, np.float32)
    for shard in mask.shards:
        table = shards.read_shard(run, shard, layout.train, ["row_id", "turn", name])
        rows = responses.sequences_of(table)
        if not len(rows):
            continue
        flat, lengths = shards.entries(table[name])
        part = slice(*np.searchsorted(keys, [rows[0], rows[-1] + 1]))
        there = np.isin(keys[part], rows)
        row, place = np.searchsorted(rows, keys[part][there]), position[part][there]
        if np.any(place >= lengths[row]):
            raise StoredDataError(f"{run / shard.path}: does not hold the rows that values/ does; run `verify`")
        found[part][there] = flat[(np.cumsum(lengths) - lengths)[row] + place]
    return found


def _rows(run: Path, generation: Generation, layout: Layout) -> RowTable:
    names = [*shards.OF_ROW, *(n for n in PAIR_COLUMNS if n in layout.values.names)]
    tables = [shards.read_shard(run, shard, layout.values, names) for shard in generation.shards]
    table = pa.concat_tables(tables).combine_chunks()
    keys = responses.sequences_of(table)
    if np.any(np.diff(keys, prepend=-1) <= 0):
        raise StoredDataError(f"{run}: rows are not in order; run `verify`")
    coded = table["source"].combine_chunks().dictionary_encode()
    absent = np.full(table.num_rows, np.nan, np.float32)
    status = pc.index_in(table["status"], pa.array(STATUSES))
    return RowTable(
        keys=keys,
        sources=tuple(coded.dictionary.to_pylist()),
        source=coded.indices.to_numpy().astype(np.int32),
        line=table["line"].to_numpy(),
        own=table["id"].to_pylist(),
        status=status.to_numpy().astype(np.int8),
        **{name: table[name].to_numpy() if name in names else absent for name in PAIR_COLUMNS},
    )
