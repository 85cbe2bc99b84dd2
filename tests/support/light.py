"""Scoring that costs nothing and makes whole runs: signals drawn by row and checkpoint, rows that fail among them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np

from alphatoken_curate.directions.sums import Sums
from alphatoken_curate.runs.schema import components
from alphatoken_curate.scoring import reference, scorer, solving
from alphatoken_curate.signals import composite
from alphatoken_curate.signals.stored import RowResult
from alphatoken_curate.tokens.plan import response_tokens
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, branches

_ITERATE = {"numbers adapt": np.ones(3), **{f"{what} adapt fake": np.zeros(8) for what in ("x", "along")}}
"""In place of an iterate of --precondition astra."""
_FAILS = 0.04
"""The share of rows whose loss is not finite."""
_ROUGH = 0.3
"""The share of rows whose signals have one decimal, so that many are equal."""


@contextlib.contextmanager
def light_scorer() -> Iterator[None]:
    """Score without a model, in this process, until the block ends: small arrays in place of directions."""

    changes: dict[Any, dict[str, Any]] = {
        scorer.ShardScorer: {
            "__call__": lambda self, shard, rows, *_: _scored(self.spec, rows),
            "ready": lambda self, _: None,
            "gradient": lambda *_: fake_sums("tokens"),
            "factors": lambda *_: fake_sums("units"),
            "bases": lambda *_: fake_sums("units").arrays,
            "moments": lambda *_: fake_sums("units"),
            "curvature": lambda *_: fake_sums("units").arrays,
        },
        solving: {
            "begin": lambda *_: dict(_ITERATE),
            "products": lambda *_: fake_sums("units"),
            "step": lambda *_: dict(_ITERATE),
        },
        reference.ReferencePass: {
            "ready": lambda self, _: None,
            "weights": lambda *_: None,
            "fisher": lambda *_: fake_sums("rows"),
            "answers": lambda self, rows, *_: list(rows),
            "losses": lambda self, rows, *_: np.zeros(response_tokens(rows), np.float32),
        },
    }
    with contextlib.ExitStack() as stack:
        for place, methods in changes.items():
            for name, method in methods.items():
                stack.enter_context(mock.patch.object(place, name, method))
        yield


def fake_sums(counted: str) -> Sums:
    """A small array in place of those of a model's parameters."""
    return Sums(arrays={"fake": np.zeros(8, np.float32)}, counts={counted: 1})


def _scored(spec: Any, rows: Sequence[AnyRow]) -> list[RowResult | None]:
    return [_row(spec, row) for row in rows]


def _row(spec: Any, row: AnyRow) -> RowResult | None:
    draws = np.random.default_rng((spec.config.seed % 2**32, spec.store.generation, row.row_id, row.turn))
    if draws.random() < _FAILS:
        return None
    rough = bool(draws.random() < _ROUGH)
    found = tuple(_signals(spec, one, draws, rough) for one in branches(row))
    if len(found) == 1:
        return RowResult(branches=found)
    beta = spec.config.beta
    ratios = [_log_ratio(signals, one.response) for signals, one in zip(found, branches(row), strict=True)]
    margin = np.float32(beta * (ratios[0] - ratios[1]))
    omega = np.float32(beta * np.exp(-np.logaddexp(0.0, np.float64(margin))))
    return RowResult(branches=found, omega=float(omega), margin=float(margin))


def _signals(spec: Any, one: TokenRow, draws: np.random.Generator, rough: bool) -> dict[str, np.ndarray]:
    about, length, found = components(spec.config.estimator), len(one.input_ids), {}
    made = {name for part in spec.objectives for name in about.signals if name.startswith(f"{part}_")}
    made |= {"nll", "entropy"} | ({"reference_nll"} if spec.has_reference else set())
    for name in (name for name in about.signals if name in made or name in about.always):
        drawn = draws.normal(size=length) if name in made else np.zeros(length)
        drawn = np.abs(drawn) if name in ("nll", "entropy", "reference_nll") else drawn
        found[name] = np.where(one.response, np.round(drawn, 1) if rough else drawn, np.nan).astype(np.float32)
    return found | {"value": composite.value(found, about, stability_weight=spec.config.stability_weight)}


def _log_ratio(signals: dict[str, np.ndarray], response: np.ndarray) -> float:
    if "reference_nll" not in signals:
        return 0.0
    return float((signals["reference_nll"] - signals["nll"])[response].sum(dtype=np.float64))
