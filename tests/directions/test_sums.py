"""Sums over rows in parts are those over all rows at once, and the same bits whoever made a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from daily import daily
from tiny_files import pair_records, token_records, write_jsonl

from alphatoken_curate import ScoreConfig, score
from alphatoken_curate.directions import sums
from alphatoken_curate.directions.sums import PART_ROWS, Sums, in_parts, sums_of, total


def part(*numbers: float, rows: int = 1) -> Sums:
    return sums_of(["a", "b"], [torch.tensor(numbers), torch.ones(2, 1)], {"rows": rows})


def test_rows_are_in_one_part_each_in_their_order() -> None:
    rows = list(range(2 * PART_ROWS + 5))
    parts = in_parts(rows)
    assert [len(one) for one in parts] == [PART_ROWS, PART_ROWS, 5]
    assert [row for one in parts for row in one] == rows and in_parts([]) == []


def test_parts_add_up_in_their_order() -> None:
    """In another order float32 rounds otherwise: 1 is lost beside 1e8, and not between the two."""
    big, small = part(1e8, 3.0), part(1.0, 4.0, rows=2)
    found = total([part(1e8, 3.0), part(-1e8, 0.0), small])
    assert found.arrays["a"].tolist() == [1.0, 7.0] and found.counts == {"rows": 4}
    assert total([big, small, part(-1e8, 0.0)]).arrays["a"].tolist() == [0.0, 7.0]
    mean = found.mean("rows")
    assert mean["a"].tolist() == [0.25, 1.75] and mean["b"].tolist() == [[0.75], [0.75]]
    assert mean["a"].dtype == torch.float32


def test_parts_that_may_only_be_read_are_added_too() -> None:
    """As those are that another process holds in memory."""
    first = part(1.0, 2.0)
    for array in first.arrays.values():
        array.flags.writeable = False
    kept = first.arrays["a"]
    assert total([first, part(1.0, 1.0)]).mean("rows")["a"].tolist() == [1.0, 1.5]
    assert kept.tolist() == [1.0, 2.0]


CASES: dict[str, dict[str, Any]] = {
    "adam": {"precondition": "adam", "target_groups": 2},
    "ekfac": {"precondition": "ekfac", "estimator": "exact+influence", "fisher": "generate", "fisher_new_tokens": 4},
    "all": {"estimator": "influence", "parameters": "all", "layers": "all", "fisher": "empirical"},
    "lookahead": {"drift": "lookahead", "lookahead_lr": 0.1, "estimator": "exact", "precondition": "kfac"},
}
_OFTEN = (("sft", "all"), ("preference", "ekfac"))
_EACH = [(kind, name) for kind in ("sft", "preference") for name in CASES]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("kind", "name"), daily(_EACH, _OFTEN))
def test_values_are_those_of_sums_over_all_rows_at_once(
    kind: str, name: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 2 * PART_ROWS + 5
    records = token_records(rows, longest=9) if kind == "sft" else pair_records(rows)
    settings: dict[str, Any] = {
        "data": write_jsonl(tmp_path / "rows.jsonl", records),
        "target": write_jsonl(tmp_path / "target.jsonl", token_records(rows, seed=5, longest=9)),
        "model": models["tuned"],
        "reference": models["base"],
        "dtype": "float64",
        **CASES[name],
    }
    score(ScoreConfig(**settings), tmp_path / "parts")
    monkeypatch.setattr(sums, "PART_ROWS", 10**6)
    score(ScoreConfig(**settings), tmp_path / "whole")
    found, wanted = (pl.read_parquet(tmp_path / run / "values/generation=0/*.parquet") for run in ("parts", "whole"))
    compared = 0
    for column in wanted.columns:
        if wanted[column].dtype == pl.List(pl.Float32):
            one, other = (frame[column].explode().to_numpy().astype(float) for frame in (found, wanted))
            if np.isfinite(other).any():
                largest = np.nanmax(np.abs(other))
                np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * largest, err_msg=column)
                compared += 1
    assert compared >= 6
