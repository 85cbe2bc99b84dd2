"""`--reuse`: what another run computed is taken over where it was made of the same rows, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_files import pair_records, token_records, write_jsonl

from alphatoken_curate import ScoreConfig, score
from alphatoken_curate.progress import Silent

RECORDS = token_records(12, seed=3)
TARGET = token_records(4, seed=9)


class Stages(Silent):
    """Keeps the names of what was done."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def stage(self, name: str, tokens: int) -> None:
        self.names.append(name)


def values(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run / "values").rglob("*.parquet"))]


class Rows:
    """Runs of rows under a name."""

    def __init__(self, place: Path, models: dict[str, str]) -> None:
        self.place = place
        beside = {"target": write_jsonl(place / "target.jsonl", TARGET)}
        self.settings: dict[str, Any] = {"model": models["tuned"], "reference": models["base"], "layers": 2, **beside}

    def score(self, name: str, records: list[Any], run: str, **more: Any) -> list[str]:
        data, heard = write_jsonl(self.place / name, records), Stages()
        score(ScoreConfig(data=(str(data),), **self.settings | more), self.place / run, heard)
        return heard.names


@pytest.fixture
def rows(tmp_path: Path, models: dict[str, str]) -> Rows:
    return Rows(tmp_path, models)


def test_the_same_rows_under_another_name_are_not_computed_again(rows: Rows) -> None:
    settings = {"precondition": "ekfac", "drift": "lookahead", "lookahead_lr": 1e-2}
    first = rows.score("one.jsonl", RECORDS, "one", **settings)
    again = rows.score("two.jsonl", RECORDS, "two", reuse=str(rows.place / "one"), **settings)
    assert [name for name in first if name not in again] and "Fisher of the reference" in first
    assert not [name for name in again if "Fisher" in name or "gradient" in name or "curvature" in name]
    rows.score("two.jsonl", RECORDS, "alone", **settings)
    assert values(rows.place / "two") == values(rows.place / "alone")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("reference", [True, False])
def test_rows_that_are_held_out_of_the_end_are_others(rows: Rows, reference: bool) -> None:
    """Their tokens lie behind all others in either run."""
    settings: dict[str, Any] = {"precondition": "ekfac", "drift": "lookahead", "lookahead_lr": 1e-2}
    settings |= {} if reference else {"reference": None}
    rows.score("data.jsonl", RECORDS, "whole", **settings)
    rows.score("data.jsonl", RECORDS, "alone", target=None, **settings)
    rows.score("data.jsonl", RECORDS, "reusing", target=None, reuse=str(rows.place / "whole"), **settings)
    assert values(rows.place / "reusing") == values(rows.place / "alone")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("per_shard", [4, 1024])
def test_rows_that_a_bad_one_gave_other_numbers_are_others(rows: Rows, per_shard: int) -> None:
    """Draws and shards go by them."""
    settings = {"bad_rows": "quarantine", "fisher_rows": 5, "rows_per_shard": per_shard}
    bad = {"input_ids": [3, 4], "labels": [-100, -100]}
    rows.score("bad.jsonl", [bad, *RECORDS], "bad", **settings)
    rows.score("data.jsonl", RECORDS, "alone", **settings)
    rows.score("data.jsonl", RECORDS, "reusing", reuse=str(rows.place / "bad"), **settings)
    assert values(rows.place / "reusing") == values(rows.place / "alone")


def test_branches_of_pairs_are_no_rows_of_their_own(rows: Rows) -> None:
    pairs = pair_records(6)
    names = ("input_ids", "labels")
    flat = [{name: pair[f"{branch}_{name}"] for name in names} for pair in pairs for branch in ("chosen", "rejected")]
    rows.score("flat.jsonl", flat, "flat")
    rows.score("pairs.jsonl", pairs, "alone")
    rows.score("pairs.jsonl", pairs, "reusing", reuse=str(rows.place / "flat"))
    assert values(rows.place / "reusing") == values(rows.place / "alone")
