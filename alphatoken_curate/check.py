"""What scoring would do, without a model: counts, padding, shards, bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alphatoken_curate.budget import auto_tokens
from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.models import resolve_device
from alphatoken_curate.plan import by_shard, plan_batches, sequences
from alphatoken_curate.prepare import prepare
from alphatoken_curate.rows import BadRow
from alphatoken_curate.schema import SIGNALS

_TOKEN_BYTES, _LABEL_BYTES = 1.9, 1.25
"""Bytes on disk of a token's ids, and of its labels and masks: both shrink under zstd. Floats do not."""

_FREE = ("reference_nll", "stab_direct", "stab_causal")
"""Signals that are null or 0, and cost nothing, where model and reference are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSummary:
    """What was found and what `score` would make of it. Bytes are estimates; all else is exact."""

    kind: str
    """`sft` or `preference`."""
    rows_read: int
    rows: int
    target_rows: int
    held_out: bool
    bad: tuple[BadRow, ...]
    tokens: int
    response_tokens: int
    longest: int
    truncated_rows: int
    truncated_tokens: int
    batches: int
    batch_tokens: int
    padding: float
    """Share of the tokens a model would run over that are padding."""
    shards: int
    value_bytes: int
    train_bytes: int


def check(config: ScoreConfig) -> CheckSummary:
    """Read, check and tokenise DATA as `score` does. Raises InputError that names every bad row at once."""
    prepared = prepare(config)
    rows = prepared.rows
    lengths = np.array([len(one.input_ids) for one in sequences(rows)])
    responses = int(sum(one.response.sum() for one in sequences(rows)))
    budget = auto_tokens(resolve_device(config.device).type) if config.batch_tokens == "auto" else config.batch_tokens
    batches, padded = 0, 0
    dealt = by_shard(rows, prepared.rows_read, config.rows_per_shard)
    for inside in dealt:
        planned = plan_batches(inside, budget)
        batches += len(planned)
        flat = ([len(one.input_ids) for one in sequences([inside[i] for i in batch])] for batch in planned)
        padded += sum(len(widths) * max(widths) for widths in flat)
    tokens = int(lengths.sum())
    signals = len(SIGNALS) - (len(_FREE) if config.reference in (None, config.model) else 0)
    return CheckSummary(
        kind=prepared.kind,
        rows_read=prepared.rows_read,
        rows=len(rows),
        target_rows=len(prepared.target_rows),
        held_out=bool(prepared.held_out),
        bad=tuple(prepared.bad),
        tokens=tokens,
        response_tokens=responses,
        longest=int(lengths.max(initial=0)),
        truncated_rows=sum(row.truncated > 0 for row in rows),
        truncated_tokens=sum(row.truncated for row in rows),
        batches=batches,
        batch_tokens=budget,
        padding=1 - tokens / padded,
        shards=len(dealt),
        value_bytes=round(4 * signals * responses + _TOKEN_BYTES * tokens),
        train_bytes=round(4 * responses + (_TOKEN_BYTES + _LABEL_BYTES) * tokens),
    )
