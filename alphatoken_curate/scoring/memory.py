"""Scoring in memory: a loaded model, rows as dictionaries, a data frame back. Nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.drift import checked_weights, drift_direction
from alphatoken_curate.directions.fisher import fisher_diagonal
from alphatoken_curate.directions.parameters import rest_fisher, rest_gradient
from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.engine.blocks import unwrapped
from alphatoken_curate.engine.capture import Direction, ScoringModel, captured
from alphatoken_curate.errors import InputError, ModelError, UsageError
from alphatoken_curate.models.adapters import layers_of_peft
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.rows.read import kind_of, refuse, rows_of
from alphatoken_curate.runs.schema import LAYOUTS, components
from alphatoken_curate.runs.shards import values_table
from alphatoken_curate.scoring.job import record
from alphatoken_curate.scoring.reader import stop_ids, stop_texts
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.signals.preference import Pairs, reference_sums
from alphatoken_curate.signals.stored import RowResult, plain_losses, row_signals
from alphatoken_curate.tokens.chat import ChatSettings
from alphatoken_curate.tokens.plan import Batch, batches_of, sequences
from alphatoken_curate.tokens.tokenise import AnyRow, chosen, tokenise
from alphatoken_curate.wording import count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def score_tokens(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    *,
    target: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: PreTrainedModel | None = None,
    estimator: Literal["published", "exact", "influence", "exact+influence"] = "published",
    layers: int | Literal["all"] = 3,
    parameters: Literal["linear", "all"] = "linear",
    window: int = 32,
    stability_weight: float = 1.5,
    fisher: Literal["sampled", "empirical"] = "sampled",
    beta: float = 0.1,
    max_length: int = 2048,
    batch_tokens: int = 2048,
    seed: int = 0,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Signals and values of every response token of `rows`, a row per row, columns named as in values/.

    `rows` and `target` are dictionaries of any shape that `score` reads (`tokenizer` may be left out for pre-tokenised
    ones), SFT rows or preference rows; of preference rows as target the chosen branch is taken. `reference` is a second
    loaded model of the same shape; without it stability is 0. The model is given back as it was. Raises InputError that
    names every bad row, ModelError where the model cannot be captured exactly. `progress` hears of rows that are not
    tokenised as they were given, or cut at the end to `max_length` tokens. Adapters of peft have to be merged.
    """
    if fisher not in ("sampled", "empirical"):
        raise UsageError(f"fisher: found {fisher!r}; score_tokens takes sampled or empirical, `score` others too")
    config = ScoreConfig(
        data=("rows",),
        estimator=estimator,
        layers=layers,
        parameters=parameters,
        window=window,
        stability_weight=stability_weight,
        fisher=fisher,
        beta=beta,
        max_length=max_length,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    _refuse_adapters(model, reference)
    both = (("rows", rows), ("target", target))
    (kind, wanted), (_, task) = (_tokens(*some, model, tokenizer, max_length, progress or Silent()) for some in both)
    return _frame(wanted, _found(model, reference, wanted, task, kind, config), kind)


def _found(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    rows: Sequence[AnyRow],
    task: Sequence[AnyRow],
    kind: Literal["sft", "preference"],
    config: ScoreConfig,
) -> Sequence[RowResult | None]:
    estimator, size, parameters = config.estimator, int(config.batch_tokens), cast(Any, config.parameters)
    anchor = None
    if reference is not None:
        with _evaluating(reference), captured(reference, config.layers, parameters) as scoring:
            anchor = _anchor(scoring, rows, size, sampled=config.fisher == "sampled", seed=config.seed)
    losses = anchor.losses if anchor is not None else None
    with _evaluating(model), captured(model, config.layers, parameters) as scoring:
        learnt = [*batches_of([chosen(row) for row in task], size)]
        directions = _directions(scoring, learnt, anchor, all_positions=estimator != "published")
        return row_signals(
            make_scorer(scoring, directions, estimator, config.window),
            rows,
            batches_of(rows, size),
            components=components(estimator),
            objectives=("adapt", "stab")[: len(directions)],
            stability_weight=config.stability_weight,
            reference_nll=losses,
            pairs=Pairs(beta=config.beta, reference=reference_sums(losses)) if kind == "preference" else None,
        )


def _refuse_adapters(*models: PreTrainedModel | None) -> None:
    """Raise ModelError where peft's layers stand in a model's: their matrices would be maps of S beside its own."""
    for model in models:
        if model is not None and (layers := layers_of_peft(unwrapped(model))):
            raise ModelError(
                f"{type(model).__name__}: its adapter is not merged ({layers[0]} is of peft), and `score` values tokens"
                " by merged weights. Give copy.deepcopy(model).merge_and_unload()."
            )


def _frame(
    rows: Sequence[AnyRow], found: Sequence[RowResult | None], kind: Literal["sft", "preference"]
) -> pl.DataFrame:
    records = [record(row, "scored" if one else "failed", one) for row, one in zip(rows, found, strict=True)]
    return pl.DataFrame(pl.from_arrow(values_table(records, LAYOUTS[kind])))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Anchor:
    """What is needed of a reference: F and W_ref over S, and its nll of each sequence's response tokens."""

    fisher: Direction
    weights: Direction
    losses: list[NDArray[np.float32]]


def _anchor(scoring: ScoringModel, rows: Sequence[AnyRow], batch_tokens: int, *, sampled: bool, seed: int) -> _Anchor:
    learnt = [chosen(row) for row in rows]
    fisher = fisher_diagonal(scoring, learnt, batches_of(learnt, batch_tokens), sampled=sampled, seed=seed)
    if scoring.rest:
        fisher += rest_fisher(scoring, learnt, sampled=sampled, seed=seed)
    weights = [w.detach().clone() for w in scoring.weights]
    scoring.settle()
    return _Anchor(
        fisher=fisher,
        weights=weights,
        losses=plain_losses(scoring, sequences(rows), batches_of(rows, batch_tokens)),
    )


def _directions(
    scoring: ScoringModel, learnt: list[Batch], anchor: _Anchor | None, *, all_positions: bool
) -> list[Direction]:
    """Adaptation and, where there is a reference, stability."""
    task = target_gradient(scoring, learnt, all_positions=all_positions)
    if scoring.rest:
        task += rest_gradient(scoring, learnt)
    if anchor is None:
        return [task]
    return [task, drift_direction(scoring, anchor.fisher, checked_weights(scoring, anchor.weights))]


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
    name: str,
    records: Sequence[Mapping[str, Any]],
    model: PreTrainedModel,
    tokenizer: Any,
    max_length: int,
    progress: Progress,
) -> tuple[Literal["sft", "preference"], list[AnyRow]]:
    read, told = rows_of(records, name), Counter[str]()
    config, stops = model.config.get_text_config(), getattr(model.generation_config, "eos_token_id", None)
    found, unusable = tokenise(
        read.rows,
        tokenizer,
        max_length=max_length,
        turns="all",
        vocab_size=config.vocab_size,
        chats=ChatSettings(stops=stop_texts(stops, tokenizer)),
        stop_ids=stop_ids(stops, config.eos_token_id, tokenizer),
        told=told,
    )
    if read.bad or unusable:
        bad = sorted([*read.bad, *unusable], key=lambda one: one.row_id)
        raise refuse(bad, advice="Correct them, or leave them out.")
    if not found:
        raise InputError(f"{name}: no rows. Give at least one.")
    if cut := [row.truncated for row in found if row.truncated]:
        progress.warn(f"{name}: {count(len(cut), 'row')} cut to {max_length} tokens, {sum(cut):,} tokens in all.")
    for note, rows in told.items():
        progress.warn(f"{name}: {count(rows, 'row')}: {note}.")
    return kind_of(read.rows), found
