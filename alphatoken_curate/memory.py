"""Scoring in memory: a loaded model, rows as dictionaries, a data frame back. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from alphatoken_curate.capture import captured
from alphatoken_curate.drift import checked_weights, drift_direction
from alphatoken_curate.errors import InputError
from alphatoken_curate.fisher import fisher_diagonal
from alphatoken_curate.paths import Estimator, PathScorer
from alphatoken_curate.plan import Batch, collate, plan_batches
from alphatoken_curate.rows import refuse, rows_of
from alphatoken_curate.score import record
from alphatoken_curate.scorer import plain_losses, row_signals
from alphatoken_curate.shards import values_table
from alphatoken_curate.target import target_gradient
from alphatoken_curate.tokens import TokenRow, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def score_tokens(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    *,
    target: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: PreTrainedModel | None = None,
    estimator: Estimator = "published",
    layers: int | Literal["all"] = 3,
    window: int = 32,
    stability_weight: float = 1.5,
    fisher: Literal["sampled", "empirical"] = "sampled",
    max_length: int = 2048,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> pl.DataFrame:
    """Signals and values of every response token of `rows`, a row per row, columns named as in values/.

    `rows` and `target` are dictionaries of any shape that `score` reads (`tokenizer` may be left out for pre-tokenised
    ones). `reference` is a second loaded model of the same shape; without it stability is 0. The model is given back
    as it was. Raises InputError that names every bad row, ModelError where the model cannot be captured exactly.
    """

    def read(records: Sequence[Mapping[str, Any]], name: str) -> list[TokenRow]:
        return _tokens(records, name, tokenizer, max_length, model.config.get_text_config().vocab_size)

    def batches(of: Sequence[TokenRow]) -> list[Batch]:
        return [collate(of, indices) for indices in plan_batches(of, batch_tokens)]

    wanted, task = read(rows, "rows"), read(target, "target")
    anchor = None
    if reference is not None:
        with _evaluating(reference), captured(reference, layers) as scoring:
            diagonal = fisher_diagonal(scoring, wanted, batches(wanted), sampled=fisher == "sampled", seed=seed)
            weights = [m.weight.detach().clone() for m in scoring.maps]
            anchor = diagonal, weights, plain_losses(scoring, wanted, batches(wanted))
    with _evaluating(model), captured(model, layers) as scoring:
        directions = [target_gradient(scoring, batches(task), all_positions=estimator == "exact")]
        if anchor is not None:
            directions.append(drift_direction(scoring, anchor[0], checked_weights(scoring, anchor[1])))
        paths = PathScorer(scoring, directions, estimator, window)
        found = row_signals(paths, wanted, batches(wanted), stability_weight, anchor[2] if anchor else None)
    records = [record(row, "scored" if s else "failed", s or {}) for row, s in zip(wanted, found, strict=True)]
    frame = pl.from_arrow(values_table(records))
    assert isinstance(frame, pl.DataFrame)
    return frame


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout; modules that were in training are put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tokens(
    records: Sequence[Mapping[str, Any]], name: str, tokenizer: Any, max_length: int, vocabulary: int
) -> list[TokenRow]:
    read = rows_of(records, name)
    found, unusable = tokenise(read.rows, tokenizer, max_length=max_length, turns="all", vocab_size=vocabulary)
    if read.bad or unusable:
        raise refuse(sorted([*read.bad, *unusable], key=lambda bad: bad.row_id))
    if not found:
        raise InputError(f"{name}: no rows. Give at least one.")
    return found
