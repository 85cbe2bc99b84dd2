"""One generation as a piece of work: which rows are scored with which model, and what its shards will say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alphatoken_curate.rows.read import BadRow
from alphatoken_curate.runs.manifest import Facts, Input, Plan
from alphatoken_curate.runs.schema import LAYOUTS, Layout
from alphatoken_curate.runs.shards import Branch, ValueRow
from alphatoken_curate.scoring.identity import versions
from alphatoken_curate.scoring.prepare import Prepared
from alphatoken_curate.scoring.spec import ScorerSpec
from alphatoken_curate.signals.stored import RowResult
from alphatoken_curate.tokens.dealt import Rows, Shards
from alphatoken_curate.tokens.plan import Cut, by_shard, shard_ranges
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, branches

_DIGESTED = ("model", "reference", "tokenizer", "template", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """The rows of a run, dealt out to its shards, and the rows its directions are made from."""

    rows: Rows
    """All rows to score, by row_id; those of a shard are read when they are asked for."""
    beside: Callable[[int], list[ValueRow]]
    """By shard: the records of rows that were read and are not scored."""
    cuts: list[Cut]
    """By shard: what was cut off its rows."""
    target: list[TokenRow]
    retention: list[TokenRow]
    prompts: list[TokenRow]
    """Of --fisher-prompts; empty where the prompts of the rows themselves are taken."""
    facts: Facts
    """What every shard tells along, before its own plan and counts."""

    @property
    def layout(self) -> Layout:
        """The columns of its shards."""
        settings = self.facts.settings
        return LAYOUTS[str(settings["kind"])].along(settings.get("direction"))

    @property
    def shards(self) -> Shards:
        """The rows to score of each shard."""
        return self.rows.shards

    def ends(self, shard: int) -> tuple[int, int]:
        """The first and the last row_id of a shard: each row that was read is in one."""
        first, behind = shard_ranges(self.rows.read, self.rows.per_shard)[shard]
        return first, behind - 1


def job_of(prepared: Prepared, spec: ScorerSpec) -> Job:
    """The first scoring of what a user named."""
    layout, rows = LAYOUTS[prepared.kind], prepared.rows
    held_out = by_shard(prepared.held_out, rows.read, rows.per_shard)
    bad = by_shard(prepared.bad, rows.read, rows.per_shard)

    def beside(shard: int) -> list[ValueRow]:
        targets = [record(row, "target") for row in held_out[shard]]
        return targets + [_rejected(one, layout) for one in bad[shard]]

    return Job(
        rows=rows,
        beside=beside,
        cuts=[rows.cut(shard) for shard in range(len(rows.shards))],
        target=prepared.target_rows,
        retention=prepared.retention.rows,
        prompts=prepared.prompts.rows,
        facts=_facts(prepared, spec),
    )


def record(row: AnyRow, status: str, result: RowResult | None = None) -> ValueRow:
    """What is stored of a row that could be read."""
    first, parts = branches(row)[0], branches(row)
    signals = result.branches if result is not None else tuple({} for _ in parts)
    return ValueRow(
        row_id=first.row_id,
        turn=first.turn,
        source=first.source,
        line=first.line,
        id=first.id,
        status=status,
        branches=tuple(
            Branch(input_ids=part.input_ids, response=part.response, end_of_turn=part.end_of_turn, signals=mine)
            for part, mine in zip(parts, signals, strict=True)
        ),
        omega=result.omega if result is not None else None,
        margin=result.margin if result is not None else None,
    )


def _rejected(bad: BadRow, layout: Layout) -> ValueRow:
    none = np.empty(0, np.bool_)
    empty = Branch(input_ids=np.empty(0, np.int32), response=none, end_of_turn=none)
    return ValueRow(
        row_id=bad.row_id,
        source=bad.source,
        line=bad.line,
        id=None,
        status="rejected",
        branches=(empty,) * len(layout.branches),
    )


def _facts(prepared: Prepared, spec: ScorerSpec) -> Facts:
    """Nothing of time, place or path."""
    about = spec.store.fields
    return Facts(
        inputs=tuple(_inputs(prepared)),
        digests={name: about[name] for name in _DIGESTED},  # type: ignore[misc]
        settings={name: value for name, value in about.items() if name not in (*_DIGESTED, "data", "schema_version")},
        versions=versions(spec.device),
        checkpoint=Path(prepared.source.name).name,
        plan=Plan(batch_tokens=0),
        told=prepared.told,
    )


def _inputs(prepared: Prepared) -> Sequence[Input]:
    read = Counter(prepared.good) + Counter(bad.source for bad in prepared.bad)
    return [Input(source=f.source, digest=f.digest, bytes=f.bytes, rows=read[f.source]) for f in prepared.files]
