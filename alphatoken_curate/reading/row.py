"""One row of a finished run, with its values, mask and the text of its tokens. No model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks import criteria, responses
from alphatoken_curate.reading.scan import choose_generation
from alphatoken_curate.reading.words import read_vocabulary, spelled
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.atomic import unread
from alphatoken_curate.runs.manifest import Generation, Manifest, Mask
from alphatoken_curate.runs.schema import NOT_COMPUTED, PAIR_COLUMNS, SFT, SIGNALS, Components, Layout, components

PARTED = components("published")

COLUMNS = (*SIGNALS, "loss_weight")
"""Of each response token."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BranchView:
    """One sequence of a row: T tokens, T = 0 where the row was rejected.

    `name`: empty in SFT rows, else `chosen` or `rejected`; `token_ids` (T,) int32; `texts`: what each adds to the
    text (`words.spelled`); `response` (T,) bool; `signals`: name -> (T,) float32, NaN off the response
    and where not computed, empty unless the row is scored; `weight` (T,) float32 of the row's mask, None without one.
    """

    name: str
    token_ids: NDArray[np.int32]
    texts: tuple[str, ...]
    response: NDArray[np.bool_]
    signals: Mapping[str, NDArray[np.float32]]
    weight: NDArray[np.float32] | None

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(T,) bool: tokens that the mask keeps; all response tokens where there is no mask."""
        return self.response if self.weight is None else self.weight > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowView:
    """One row of a run, as `generation` scored it: one branch, or chosen and rejected.

    `turns`: those of its chat that are sequences of their own, of which `turn` is the one here; `checkpoint`: the
    generation's, None where the run has only one; `omega` and `margin` (nats) of scored preference rows; `mask`: the
    number of the newest mask and `mask_generations` what it was made from, None and empty where there is none or the
    row was not scored.
    """

    row_id: int
    turn: int = 0
    source: str
    line: int
    id: str | None
    status: str
    generation: int
    checkpoint: str | None
    branches: tuple[BranchView, ...]
    mask: int | None
    mask_generations: tuple[int, ...] = ()
    omega: float | None = None
    margin: float | None = None
    turns: tuple[int, ...] = (0,)
    reason: str | None = None
    """Why a rejected row was refused, where rejects.jsonl says so."""
    layout: Layout = SFT
    components: Components = PARTED
    stability_weight: float = 1.5
    """Of the run: what an expression may name, and what its value is made of."""
    seed: int = 0
    """Of the newest mask: what `random` is drawn by."""

    @property
    def left_out(self) -> bool:
        """Whether the row was scored and is not in the mask: not each of the mask's generations scored it."""
        return self.mask is not None and all(branch.weight is None for branch in self.branches)

    def chosen_branches(self, name: str | None) -> tuple[BranchView, ...]:
        """The branch of this name, or all. Raises `UsageError` where there is none of this name."""
        found = tuple(branch for branch in self.branches if name in (None, branch.name))
        if not found:
            raise UsageError(f"branch: found {name!r}; the run holds SFT rows, which have no branches: leave it out")
        return found

    def column(self, branch: BranchView, name: str) -> NDArray[np.float32]:
        """Signal, weight or what `--by` of a mask gives, (T,) float32, NaN off the response.

        Raises `UsageError` where there are no numbers.
        """
        if not branch.signals:
            raise UsageError(f"by: row {self.row_id} has no numbers: it was not scored ({self.status})")
        if name not in COLUMNS:
            return self._selected(branch, name)
        if name == "loss_weight":
            if branch.weight is None:
                why = f"mask {self.mask} leaves row {self.row_id} out" if self.left_out else "the run has no mask yet"
                raise UsageError(f"by: {why}, so no loss_weight; make one with `mask`")
            return np.where(branch.response, branch.weight, np.float32(np.nan))
        if not self.computed(name) and name in NOT_COMPUTED:
            raise UsageError(f"by: {name} was not computed: {NOT_COMPUTED[name]}")
        return branch.signals[name]

    def _selected(self, branch: BranchView, by: str) -> NDArray[np.float32]:
        """An expression, name or draw, of single tokens: those of the whole run are not here."""
        criteria.columns_needed(by, self.components, self.layout)  # each is there
        if not criteria.is_of_single_tokens(by, self.layout):
            raise UsageError(
                f"by: {by!r} may look at several tokens at once, which for a mask are those of the whole run. Give an"
                " expression of single tokens; or make that mask, and show its loss_weight"
            )
        at = np.flatnonzero(branch.response)
        columns: dict[str, NDArray[Any]] = {"row_id": np.full(len(at), self.row_id, np.int64)}
        columns["turn"] = np.full(len(at), self.turn, np.int32)
        of_pair = {name: getattr(self, name) for name in PAIR_COLUMNS}
        columns |= {name: np.full(len(at), x, np.float32) for name, x in of_pair.items() if x is not None}
        columns |= {"position": at.astype(np.int32), "token_id": branch.token_ids[at]}
        columns |= {name: signal[at] for name, signal in branch.signals.items()}
        result = np.full(len(branch.response), np.nan, np.float32)
        result[at] = criteria.selection(
            by,
            columns,
            components=self.components,
            stability_weight=self.stability_weight,
            seed=self.seed,
            layout=self.layout,
            branch=self.branches.index(branch),
        )
        return result

    def computed(self, name: str) -> bool:
        """Whether the row has numbers of this signal."""
        return any(np.isfinite(branch.signals.get(name, np.nan)).any() for branch in self.branches)


def read_row(
    run: Path,
    *,
    row: int | None = None,
    id: str | None = None,
    turn: int | None = None,
    generation: int | None = None,
) -> RowView:
    """A row by its number or its own `id`, with the newest mask, as the newest generation or the one given scored it.

    Of a chat whose turns are sequences of their own that `turn`, or the first that was scored. Only the shards that
    hold it are read. Raises `UsageError` for a row, turn or generation that is not there or an id that several rows
    have, `StoredDataError` for damage.
    """
    stored = manifest.read(run)
    if not stored.generations:
        raise StoredDataError(f"{run / manifest.NAME}: names no generation; run the `score` command that makes one")
    layout = manifest.layout(stored)
    scoring = choose_generation(run, stored, generation)
    number = _number(run, scoring, layout, row, id)
    index = _shard_of(run, stored, scoring, number)
    path = run / scoring.shards[index].path
    table = shards.read_shard(run, scoring.shards[index], layout.values)
    found = {record["turn"]: record for record in table.filter(pc.equal(table["row_id"], number)).to_pylist()}
    if not found:
        raise StoredDataError(f"{path}: does not hold row {number}; run `verify`")
    if turn is None:
        turn = next((at for at, record in found.items() if record["status"] == "scored"), min(found))
    if turn not in found:
        has = ", ".join(map(str, found))
        raise UsageError(
            f"{run}: row {number} has no turn {turn}; it has {has} (--turns each makes one of each answer)"
        )
    return replace(_view(run, stored, scoring, index, found[turn]), turns=tuple(found))


def _number(run: Path, generation: Generation, layout: Layout, row: int | None, id: str | None) -> int:
    if (row is None) == (id is None):
        raise UsageError("give one of --row N, --id ID and --search TEXT")
    if row is not None:
        return row
    numbers: list[int] = []
    for shard in generation.shards:
        table = shards.read_shard(run, shard, layout.values, ["row_id", "id"])
        numbers += table.filter(pc.equal(table["id"], id))["row_id"].unique().to_pylist()
    if len(numbers) != 1:
        have = f"rows {', '.join(map(str, numbers[:20]))} have" if numbers else "no row has"
        raise UsageError(f"{run}: {have} the id {id!r}; give --row N")
    return numbers[0]


def _shard_of(run: Path, stored: Manifest, generation: Generation, number: int) -> int:
    """Index of the shard that holds a row: each but the last holds as many of those that were read."""
    if not 0 <= number < stored.counts.read:
        raise UsageError(f"{run}: has no row {number}; its rows are 0 to {stored.counts.read - 1}")
    if stored.settings.get("turns") == "each":
        return number // int(str(stored.settings["rows_per_shard"]))
    ends = np.cumsum([shard.rows for shard in generation.shards])
    return int(np.searchsorted(ends, number, side="right"))


def _view(run: Path, stored: Manifest, scoring: Generation, index: int, record: Mapping[str, Any]) -> RowView:
    layout, number = manifest.layout(stored), record["row_id"]
    mask = stored.masks[-1] if stored.masks and record["status"] == "scored" else None
    weights = _weights(run, mask, index, layout, record, scoring.generation) if mask else None
    branches = tuple(_branch(run, prefix, record, weights[prefix] if weights else None) for prefix in layout.branches)
    return RowView(
        **{name: record[name] for name in shards.OF_ROW},
        **{name: record[name] for name in PAIR_COLUMNS if name in record},
        generation=scoring.generation,
        checkpoint=scoring.checkpoint if len(stored.generations) > 1 else None,
        branches=branches,
        mask=mask.mask if mask else None,
        mask_generations=mask.generations if mask else (),
        reason=_reason(run, stored, number) if record["status"] == "rejected" else None,
        layout=layout,
        components=manifest.components(stored),
        stability_weight=responses.stability_weight(stored),
        seed=int(str(mask.settings.get("seed", 0))) if mask else 0,
    )


def _branch(run: Path, prefix: str, record: Mapping[str, Any], weight: NDArray[np.float32] | None) -> BranchView:
    ids = np.array(record[f"{prefix}input_ids"], np.int32)
    scored = record["status"] == "scored"
    return BranchView(
        name=prefix.rstrip("_"),
        token_ids=ids,
        texts=tuple(spelled(ids, read_vocabulary(run, ids))),
        response=np.array(record[f"{prefix}response"], np.bool_),
        signals={name: np.array(record[prefix + name], np.float32) for name in SIGNALS} if scored else {},
        weight=weight,
    )


def _weights(
    run: Path, mask: Mask, index: int, layout: Layout, record: Mapping[str, Any], generation: int
) -> dict[str, NDArray[np.float32]] | None:
    """Weights of each branch by its prefix; None where another generation of the mask did not score the row."""
    number, path = record["row_id"], run / mask.shards[index].path
    names = {prefix: f"{prefix}loss_weight" for prefix in layout.branches}
    table = shards.read_shard(run, mask.shards[index], layout.train, ["row_id", "turn", *names.values()])
    same = pc.and_(pc.equal(table["row_id"], number), pc.equal(table["turn"], record["turn"]))
    found = table.filter(same).to_pylist()
    if not found and mask.generations != (generation,):
        return None
    weights = [{prefix: np.array(row[name], np.float32) for prefix, name in names.items()} for row in found]
    if len(weights) != 1 or any(len(weights[0][p]) != len(record[f"{p}input_ids"]) for p in names):
        raise StoredDataError(f"{path}: does not hold row {number} as values/ does; run `verify`")
    return weights[0]


def rejects(run: Path, stored: Manifest) -> list[dict[str, Any]]:
    """The lines of rejects.jsonl, none where there is no such file.

    Raises `StoredDataError` where it is not the file that the run wrote.
    """
    path = run / "rejects.jsonl"
    if not path.is_file():
        return []
    manifest.check_file(run, stored, path.name)
    try:
        found = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, orjson.JSONDecodeError) as error:
        raise unread(path, error) or StoredDataError(f"{path}: damaged ({error}); run `verify`") from error
    return [record for record in found if isinstance(record, dict)]


def _reason(run: Path, stored: Manifest, number: int) -> str | None:
    return next((str(one.get("message")) for one in rejects(run, stored) if one.get("row_id") == number), None)
