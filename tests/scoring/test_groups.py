"""Errors of a gradient's values: each group of target rows as the whole target of a run of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from daily import daily
from tiny_files import command, pair_records, rows_of, token_records, write_jsonl

from alphatoken_curate import ScoreConfig, score, verify
from alphatoken_curate.directions.groups import deal

TARGET, KEPT = token_records(9, seed=9), token_records(7, seed=5)


def groups_of(records: list[dict[str, Any]], groups: int) -> list[list[dict[str, Any]]]:
    """Records by the group of their row."""
    return [[records[row.row_id] for row in group] for group in deal(rows_of(records), groups, seed=0)]


def columns(run: Path, prefix: str, *names: str) -> dict[str, np.ndarray]:
    frame = pl.read_parquet(run / "values/generation=0/*.parquet").filter(status="scored").sort("row_id")
    return {name: frame[prefix + name].explode().drop_nulls().to_numpy().astype(float) for name in names}


def error_by_hand(values: list[np.ndarray], records: list[list[dict[str, Any]]]) -> np.ndarray:
    """Of means of groups: the error of their mean weighed by tokens."""
    counts = [sum(x != -100 for one in group for x in one["labels"]) for group in records]
    shares = np.array(counts)[:, None] / sum(counts)
    mean = (shares * values).sum(axis=0)
    squares = (shares * (np.array(values) - mean)) ** 2
    return np.sqrt(squares.sum(axis=0) * len(values) / (len(values) - 1))


SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "exact": {"estimator": "exact"},
    "influence": {"estimator": "influence", "parameters": "all", "layers": "all"},
    "scaled": {"estimator": "exact+influence", "precondition": "ekfac", "precondition_stability": True},
}


_EACH = [(kind, name) for kind in ("sft", "preference") for name in SETTINGS]
_OFTEN = (("sft", "scaled"), ("sft", "published"), ("preference", "exact"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("kind", "name"), daily(_EACH, _OFTEN))
def test_errors_are_those_of_the_groups_values(name: str, kind: str, models: dict[str, str], tmp_path: Path) -> None:
    records = token_records(6, seed=2) if kind == "sft" else pair_records(4)
    data = write_jsonl(tmp_path / "rows.jsonl", records)

    def run(at: str, target: list[dict[str, Any]], kept: list[dict[str, Any]], **more: Any) -> Path:
        files = {"target": write_jsonl(tmp_path / f"{at}.t.jsonl", target)}
        files["retention"] = write_jsonl(tmp_path / f"{at}.k.jsonl", kept)
        settings = {"layers": 2, "dtype": "float64", **SETTINGS[name], **more}
        score(ScoreConfig(data=(data,), model=models["base"], **files, **settings), tmp_path / at)
        return tmp_path / at

    whole, plain = run("whole", TARGET, KEPT, target_groups=3), run("plain", TARGET, KEPT)
    assert not verify(whole)
    targets, keeps = groups_of(TARGET, 3), groups_of(KEPT, 3)
    parts = [run(f"part{n}", target, kept) for n, (target, kept) in enumerate(zip(targets, keeps, strict=True))]
    for prefix in ("",) if kind == "sft" else ("chosen_", "rejected_"):
        found = columns(whole, prefix, "value", "adapt_error", "stab_error", "value_error")
        wanted = {}
        for objective, group in (("adapt", targets), ("stab", keeps)):
            names = [f"{objective}_{path}" for path in _paths(name)]
            values = [sum(columns(part, prefix, *names).values()) for part in parts]
            wanted[f"{objective}_error"] = error_by_hand(values, group)  # type: ignore[arg-type]
        wanted["value_error"] = np.hypot(wanted["adapt_error"], 1.5 * wanted["stab_error"])
        for column, numbers in wanted.items():
            np.testing.assert_allclose(found[column], numbers, rtol=1e-5, atol=1e-6 * numbers.max(), err_msg=column)
        value = columns(plain, prefix, "value")["value"]
        np.testing.assert_allclose(found["value"], value, rtol=1e-6, atol=1e-7 * np.abs(value).max())


def _paths(name: str) -> tuple[str, ...]:
    return ("influence",) if name == "influence" else ("direct", "causal")


def test_without_groups_there_are_no_errors_and_one_row_has_none(models: dict[str, str], tmp_path: Path) -> None:
    data, one = (write_jsonl(tmp_path / f"{n}.jsonl", token_records(n, seed=n)) for n in (5, 1))
    for at, more in (("plain", {}), ("one", {"target_groups": 8})):
        score(ScoreConfig(data=(data,), target=one, model=models["base"], **more), tmp_path / at)
        frame = pl.read_parquet(tmp_path / at / "values/generation=0/*.parquet")
        for name in ("adapt_error", "stab_error", "value_error"):
            assert frame[name].explode().null_count() == len(frame[name].explode())
        assert not verify(tmp_path / at)


def test_other_groups_are_another_run(models: dict[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", token_records(12))
    flags = ["score", data, "--model", models["base"], "-o", tmp_path / "run", "--target-rows", "6"]
    assert command(*flags, "--target-groups", "1").code == 0
    ended = command(*flags, "--target-groups", "2")
    assert ended.code == 4 and "target_groups (1 in the run, 2 now)" in ended.err
