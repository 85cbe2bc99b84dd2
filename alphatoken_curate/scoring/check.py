"""What scoring would do: counts, padding, shards and bytes without a model; seconds and memory by a trial of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.rows.read import BadRow
from alphatoken_curate.runs.schema import components
from alphatoken_curate.scoring.named import check_named, told_of_models
from alphatoken_curate.scoring.prepare import Prepared, prepare
from alphatoken_curate.tokens.plan import by_shard, cut_of, response_tokens, sequences
from alphatoken_curate.tokens.tokenise import AnyRow

if TYPE_CHECKING:
    from alphatoken_curate.scoring.estimate import Estimate

_TOKEN_BYTES, _LABEL_BYTES = 1.9, 1.25
"""Bytes on disk of a token's ids, and of its labels and masks: both shrink under zstd. Floats do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSummary:
    """What was found and what `score` would make of it. Bytes are estimates; all else is exact."""

    kind: str
    """`sft` or `preference`."""
    rows_read: int
    rows: int
    sequences: int
    """Of these rows: --turns each makes several of a chat."""
    target_rows: int
    held_out: bool
    bad: tuple[BadRow, ...]
    tokens: int
    response_tokens: int
    longest: int
    truncated_rows: int
    truncated_tokens: int
    told: dict[str, int]
    """How many rows are not as they were given, by what the chat template did."""
    read_as: dict[str, int]
    """How many rows were read in a way that a user may not expect, by that."""
    template_date: str | None
    """The day that templates are told, where one writes it."""
    batches: int
    batch_tokens: int
    padding: float
    """Share of the tokens a model would run over that are padding."""
    shards: int
    value_bytes: int
    train_bytes: int
    estimate: Estimate | None
    """Seconds and peak memory, where they were asked for."""


def check(config: ScoreConfig, *, estimated: bool = False, progress: Progress | None = None) -> CheckSummary:
    """Read, check and tokenise DATA as `score` does. Raises InputError that names every bad row at once.

    `estimated`: load the models as well, try each stage on a few batches, and tell what the scoring would take.
    """
    prepared, found = _tried(config, progress or Silent(), estimated=estimated)
    rows = prepared.rows
    lengths = np.array([len(one.input_ids) for one in sequences(rows)])
    responses = response_tokens(rows)
    dealt = by_shard(rows, prepared.rows_read, config.rows_per_shard)
    budget, batches, padded = _planned(config, dealt, found)
    tokens, cut = int(lengths.sum()), cut_of(rows)
    stored = components(config.estimator)
    # Where model and reference are the same, stability is 0 and costs nothing.
    same = config.reference in (None, config.model)
    signals = [name for name in stored.always if not (same and name.startswith("stab_"))]
    return CheckSummary(
        kind=prepared.kind,
        rows_read=prepared.rows_read,
        rows=len({row.row_id for row in rows}),
        sequences=len(rows),
        target_rows=len({row.row_id for row in prepared.target_rows}),
        held_out=bool(prepared.held_out),
        bad=tuple(prepared.bad),
        tokens=tokens,
        response_tokens=responses,
        longest=int(lengths.max(initial=0)),
        truncated_rows=cut.rows,
        truncated_tokens=cut.tokens,
        told=prepared.told,
        read_as=prepared.read_as,
        template_date=prepared.config.template_date,
        batches=batches,
        batch_tokens=budget,
        padding=1 - tokens / padded,
        shards=len(dealt),
        value_bytes=round(4 * (len(signals) + (not same)) * responses + _TOKEN_BYTES * tokens),
        train_bytes=round(4 * responses + (_TOKEN_BYTES + _LABEL_BYTES) * tokens),
        estimate=found,
    )


def _tried(config: ScoreConfig, progress: Progress, *, estimated: bool) -> tuple[Prepared, Estimate | None]:
    """The rows as `score` would have them, and what scoring them would take where that is asked."""
    began = time.perf_counter()
    check_named(config)
    progress.stage("starting", 0)

    from alphatoken_curate.models.devices import resolve_device
    from alphatoken_curate.scoring.estimate import StageEstimate, estimate

    device = str(resolve_device("auto")) if config.device == "auto" else config.device  # it need not be there
    progress.note(told_of_models(config, device))
    progress.stage("reading rows", 0)
    if not estimated:
        return prepare(config), None
    started = StageEstimate(name="starting", seconds=time.perf_counter() - began)
    prepared, found = estimate(config, progress)
    return prepared, replace(found, stages=(started, *found.stages))


def _planned(config: ScoreConfig, dealt: Sequence[Sequence[AnyRow]], found: Estimate | None) -> tuple[int, int, int]:
    """Tokens of a batch, how many batches there are, and their tokens with padding."""
    from alphatoken_curate.models.devices import resolve_device
    from alphatoken_curate.scoring.trial import planned, usual_budget

    if found is not None:
        budget = found.batch_tokens
    elif config.batch_tokens == "auto":
        budget = usual_budget(dealt, resolve_device(config.device).type)
    else:
        budget = config.batch_tokens
    batches, padded = (sum(counts) for counts in zip(*(planned(inside, budget) for inside in dealt), strict=True))
    return budget, batches, padded
