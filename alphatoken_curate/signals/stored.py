"""The stored signals of rows, from the paths of their batches: columns per token, and one number per pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.directions.groups import mean_and_error
from alphatoken_curate.directions.losses import Losses, at, positions, token_losses
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.runs.schema import Components
from alphatoken_curate.signals import composite
from alphatoken_curate.signals.paths import Signals
from alphatoken_curate.signals.preference import Pairs, PairTerms
from alphatoken_curate.tokens.plan import Batch, sequences
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow

RowSignals = dict[str, NDArray[np.float32]]
"""Signals of one sequence, each (T,), NaN off the response."""


class BatchScorer(Protocol):
    """What scores the response tokens of a batch along its directions (`paths`, `influence`)."""

    def score(self, batch: Batch) -> Signals:
        """Signals of the N response tokens of a batch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowResult:
    """What scoring gives of one row: the signals of each branch, and of a pair its omega and margin (Eq. 14)."""

    branches: tuple[RowSignals, ...]
    omega: float | None = None
    margin: float | None = None


def row_signals(
    scorer: BatchScorer,
    rows: Sequence[AnyRow],
    batches: Iterable[Batch],
    *,
    components: Components,
    objectives: Sequence[str],
    groups: Mapping[str, Sequence[int]] = MappingProxyType({}),
    stability_weight: float,
    reference_nll: Sequence[NDArray[np.float32]] | None,
    pairs: Pairs | None,
) -> list[RowResult | None]:
    """The stored signals of each row; None where one is not finite.

    `components`: those of the estimator that `scorer` is. `objectives`: the prefix of each of its directions, "adapt"
    first. `groups`: by these prefixes, the tokens of each group of the rows behind an objective, for which `scorer` has
    directions after those of the objectives: errors are told by them. `reference_nll`: of each sequence's response
    tokens. `pairs`: for preference rows, whose signals are those of the pair's loss (Eq. 14).
    """
    flat = sequences(rows)
    each = len(flat) // len(rows)
    found: list[RowResult | None] = [None] * len(rows)
    for batch in batches:
        signals = scorer.score(batch)
        terms = pairs.terms(batch, signals.nll.double().cpu().numpy()) if pairs is not None else None
        signs = pairs.signs(batch, terms) if pairs is not None and terms is not None else None
        columns = _columns(signals, components, objectives, stability_weight, signs)
        if groups:
            columns |= _errors(signals, components, len(objectives), groups, stability_weight, signs)
        for i in range(0, len(batch.rows), each):
            mine = []
            for branch in range(i, i + each):
                index = batch.rows[branch]
                parts = {name: values[batch.row == branch] for name, values in columns.items()}
                if reference_nll is not None:
                    parts["reference_nll"] = reference_nll[index]
                mine.append(parts)
            if all(np.isfinite(values).all() for parts in mine for values in parts.values()):
                full = (spread(parts, flat[batch.rows[i + n]]) for n, parts in enumerate(mine))
                found[batch.rows[i] // each] = _result(tuple(full), terms, i // 2)
    return found


def _result(branches: tuple[RowSignals, ...], terms: PairTerms | None, pair: int) -> RowResult:
    if terms is None:
        return RowResult(branches=branches)
    return RowResult(branches=branches, omega=float(terms.omega[pair]), margin=float(terms.margin[pair]))


def _columns(
    signals: Signals,
    components: Components,
    objectives: Sequence[str],
    stability_weight: float,
    signs: NDArray[np.float64] | None,
) -> RowSignals:
    """The stored columns of N tokens; without a direction for it, stability is exactly 0."""
    columns = {"nll": signals.nll, "entropy": signals.entropy}
    columns |= dict.fromkeys((*components.of_value, *components.upstream), torch.zeros_like(signals.nll))
    for path, along in _paths(signals).items():
        factor = 1.0 if signs is None else torch.from_numpy(signs).to(along)
        for n, objective in enumerate(objectives):
            if (name := f"{objective}_{path}") in components.signals:
                columns[name] = along[n] * factor
    stored: RowSignals = {name: tensor.float().cpu().numpy() for name, tensor in columns.items()}
    return stored | {"value": composite.value(stored, components, stability_weight=stability_weight)}


def _errors(
    signals: Signals,
    components: Components,
    first: int,
    groups: Mapping[str, Sequence[int]],
    stability_weight: float,
    signs: NDArray[np.float64] | None,
) -> RowSignals:
    """Standard errors of N tokens; the directions of groups begin at `first`."""
    found: dict[str, NDArray[np.float64]] = {}
    for prefix, tokens in groups.items():
        names = [name for name in components.of_value if name.startswith(f"{prefix}_")]
        parts = [_paths(signals)[name.removeprefix(f"{prefix}_")][first : first + len(tokens)] for name in names]
        summed = torch.stack([part.double() for part in parts]).sum(dim=0).cpu().numpy()
        found[f"{prefix}_error"] = mean_and_error(summed, tokens)[1] * (1.0 if signs is None else np.abs(signs))
        first += len(tokens)
    stored: RowSignals = {name: column.astype(np.float32) for name, column in found.items()}
    return stored | {"value_error": composite.value_error(stored, stability_weight)}


def _paths(signals: Signals) -> dict[str, Tensor]:
    """What was asked for, (n, N) each, by the name its columns end with."""
    found = {"direct": signals.direct, "causal": signals.causal}
    if signals.direct is None or signals.influence is None:
        found["influence"] = signals.influence
    else:
        found["upstream"] = (signals.influence.double() - signals.direct.double()).to(signals.influence)
    return {path: along for path, along in found.items() if along is not None}


def spread(parts: RowSignals, row: TokenRow) -> RowSignals:
    """Signals of the response tokens, laid out over the whole sequence."""
    full = {name: np.full(len(row.input_ids), np.nan, np.float32) for name in parts}
    for name, values in parts.items():
        full[name][row.response] = values
    return full


def losses_of(scoring: ScoringModel, planned: Batch) -> Losses:
    """Losses of the response tokens of a batch: one forward, no gradient."""
    # A prompt apart saves nothing here but for pairs, whose branches share it.
    batch = planned if planned.pairs else replace(planned, start=0)
    ids = torch.from_numpy(batch.input_ids).to(scoring.device)
    hidden = scoring.hidden(ids, batch.start, pairs=batch.pairs)
    chosen = at(hidden, positions(batch, hidden.device))
    targets = torch.from_numpy(batch.target).to(hidden.device)
    return token_losses(scoring.head, chosen, targets, vocabulary=scoring.vocabulary, gradient=False)


def plain_losses(
    scoring: ScoringModel, flat: Sequence[TokenRow], batches: Iterable[Batch]
) -> list[NDArray[np.float32]]:
    """-log p of the response tokens of each sequence, in nats."""
    found: dict[int, NDArray[np.float32]] = {}
    for batch in batches:
        nll = losses_of(scoring, batch).nll
        parts: tuple[Tensor, ...] = nll.float().cpu().split(batch.counts.tolist())
        found |= zip(batch.rows, (part.numpy() for part in parts), strict=True)
    return [found[i] for i in range(len(flat))]
