"""What scoring would do: counts, padding, shards and bytes without a model; seconds and memory by a trial of it."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.rows.read import BadRow
from alphatoken_curate.runs.schema import components
from alphatoken_curate.scoring.idle import idle
from alphatoken_curate.scoring.named import check_named, told_of_models
from alphatoken_curate.scoring.prepare import Prepared, prepare
from alphatoken_curate.scoring.shelf import Place
from alphatoken_curate.tokens.dealt import Shards, tokens_in
from alphatoken_curate.tokens.plan import response_tokens, sequences

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

    ModelError says that a reference is not there, or does not go with the model.
    `estimated`: load the models as well, try each stage on a few batches, and tell what the scoring would take.
    """
    listener = progress or Silent()
    with closing(Place()) as place:
        prepared, found = _tried(config, listener, place, estimated=estimated)
        if (unread := idle(prepared.config, prepared.kind)) is not None:
            listener.warn(unread)
        rows = prepared.rows
        budget = _budget(config, rows.shards, found)
        sizes = _sizes(rows.shards, budget)
    responses = sizes.responses
    tokens, cut = tokens_in(rows.shards), rows.cut()
    stored = components(config.estimator)
    # Where model and reference are the same, stability is 0 and costs nothing.
    same = config.reference in (None, config.model)
    signals = [name for name in stored.always if not (same and name.startswith("stab_"))]
    return CheckSummary(
        kind=prepared.kind,
        rows_read=prepared.rows_read,
        rows=len(np.unique(rows.columns["row_id"])),
        sequences=len(rows),
        target_rows=len({row.row_id for row in prepared.target_rows}),
        held_out=bool(prepared.held_out),
        bad=tuple(prepared.bad),
        tokens=tokens,
        response_tokens=responses,
        longest=sizes.longest,
        truncated_rows=cut.rows,
        truncated_tokens=cut.tokens,
        told=prepared.told,
        read_as=prepared.read_as,
        template_date=prepared.config.template_date,
        batches=sizes.batches,
        batch_tokens=budget,
        padding=1 - tokens / sizes.padded,
        shards=len(rows.shards),
        value_bytes=round(4 * (len(signals) + (not same)) * responses + _TOKEN_BYTES * tokens),
        train_bytes=round(4 * responses + (_TOKEN_BYTES + _LABEL_BYTES) * tokens),
        estimate=found,
    )


def _tried(
    config: ScoreConfig, progress: Progress, place: Place, *, estimated: bool
) -> tuple[Prepared, Estimate | None]:
    """The rows as `score` would have them, and what scoring them would take where that is asked."""
    began = time.perf_counter()
    check_named(config)
    progress.stage("starting", 0)

    from alphatoken_curate.models.devices import resolve_device
    from alphatoken_curate.scoring.estimate import StageEstimate, estimate
    from alphatoken_curate.scoring.spec import reference_of

    device = str(resolve_device("auto")) if config.device == "auto" else config.device  # it need not be here
    progress.note(told_of_models(config, device))
    progress.stage("reading rows", 0)
    if not estimated:
        prepared = prepare(config, place)
        reference_of(prepared)
        return prepared, None
    started = StageEstimate(name="starting", seconds=time.perf_counter() - began)
    prepared, found = estimate(config, progress, place)
    return prepared, replace(found, stages=(started, *found.stages))


def _budget(config: ScoreConfig, shards: Shards, found: Estimate | None) -> int:
    """Tokens of a batch."""
    from alphatoken_curate.models.devices import resolve_device
    from alphatoken_curate.scoring.trial import rehearsal_budget, usual_budget

    if found is not None:
        return found.batch_tokens
    if config.batch_tokens != "auto":
        return config.batch_tokens
    kind = resolve_device(config.device).type
    return rehearsal_budget(kind) if config.rehearses else usual_budget(shards, kind)


@dataclass(slots=True, kw_only=True)
class _Sizes:
    """Of all rows: the longest sequence, response tokens, and batches with their tokens, padding included."""

    longest: int = 0
    responses: int = 0
    batches: int = 0
    padded: int = 0


def _sizes(shards: Shards, budget: int) -> _Sizes:
    from alphatoken_curate.scoring.trial import planned

    found = _Sizes()
    for rows in shards:
        found.longest = max([found.longest, *(len(one.input_ids) for one in sequences(rows))])
        found.responses += response_tokens(rows)
        batches, padded = planned(rows, budget)
        found.batches += batches
        found.padded += padded
    return found
