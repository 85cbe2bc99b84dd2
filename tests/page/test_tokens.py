from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from small_run import published, small_run, value_rows, write_generation

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.page.tokens import NO_CLASS, masked, read_tokens, values_at
from alphatoken_curate.reading.scan import scan, scan_tokens
from alphatoken_curate.reading.words import CLASSES
from alphatoken_curate.runs import manifest


def frame(run: Path, **which: int) -> pl.DataFrame:
    """The same tokens by `scan_tokens`, branch by branch."""
    found = scan_tokens(run, **which).collect()
    return found.sort("branch", "row_id", "position") if "branch" in found.columns else found


@pytest.mark.parametrize(("kind", "estimator"), [("sft", "published"), ("preference", "exact+influence")])
def test_tokens_are_those_of_scan_tokens(tmp_path: Path, kind: str, estimator: str) -> None:
    run = small_run(tmp_path / "run", kind=kind, estimator=estimator)
    tokens, expected = read_tokens(run), frame(run)
    assert len(tokens) == len(expected) == tokens.starts[-1]
    assert tokens.row.tolist() == expected["row_id"].to_list()
    for name in ("position", "token_id"):
        assert getattr(tokens, name).tolist() == expected[name].to_list()
    for name, values in tokens.signals.items():
        assert values.tolist() == expected[name].to_list(), name
    assert set(tokens.components.of_value) < set(tokens.signals) and "drift_direct" not in tokens.signals
    assert tokens.weight is not None and tokens.weight.tolist() == expected["loss_weight"].to_list()
    assert tokens.kept is not None and tokens.kept.tolist() == expected["kept"].to_list()
    assert [CLASSES[i] for i in tokens.kind] == expected["class"].to_list()


def test_places_count_anew_in_each_row_and_branch(tmp_path: Path) -> None:
    tokens = read_tokens(small_run(tmp_path / "run", kind="preference"))
    seen: dict[tuple[int, int], int] = {}
    for i, place in enumerate(tokens.place.tolist()):
        key = (int(i >= tokens.starts[1]), int(tokens.row[i]))
        seen[key] = seen.get(key, 0) + 1
        assert place == seen[key]


def test_spans_find_the_tokens_of_a_row(tmp_path: Path) -> None:
    tokens = read_tokens(small_run(tmp_path / "run", kind="preference"))
    for row, spans in zip((0, 5, 6), tokens.spans(np.array([0, 5, 6])), strict=True):
        for branch, (first, last) in enumerate(spans):
            expected = [i for i in range(*tokens.starts[branch : branch + 2]) if tokens.row[i] == row]
            assert list(range(first, last)) == expected


def test_rows_of_every_status(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", kind="preference")
    rows, expected = read_tokens(run).rows, scan(run).collect()
    assert len(rows) == len(expected)
    assert [rows.sources[i] for i in rows.source] == expected["source"].to_list()
    assert rows.line.tolist() == expected["line"].to_list() and rows.own == expected["id"].to_list()
    assert np.nan_to_num(rows.margin).tolist() == expected["margin"].fill_null(0).to_list()


def test_without_a_mask_and_without_a_vocabulary(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    manifest.write(run, replace(manifest.read(run), masks=()))
    (run / "artifacts/vocab.parquet").unlink()
    tokens = read_tokens(run)
    assert tokens.mask is tokens.weight is tokens.kept is None
    assert set(tokens.kind.tolist()) == {NO_CLASS}


def test_other_generations_and_masks_speak_of_the_same_tokens(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", kind="preference", generations=(0, 1))
    make_mask(run, published(keep=0.2))
    tokens = read_tokens(run)
    assert tokens.mask is not None and tokens.mask.mask == 1 and tokens.generation.generation == 1
    for one in tokens.stored.generations:
        values = values_at(run, tokens, one)
        assert values.tolist() == frame(run, generation=one.generation)["value"].to_list()
    for mask in tokens.stored.masks:
        assert masked(run, tokens, mask).tolist() == frame(run, mask=mask.mask)["loss_weight"].to_list()


def test_rows_that_a_generation_failed_on_have_no_values_and_no_weights(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    rows = [
        replace(row, status="failed", branches=tuple(replace(b, signals={}) for b in row.branches))
        if row.row_id == 4
        else row
        for row in value_rows(seed=1)
    ]
    write_generation(run, rows, number=1)
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, published(generation="all"))
    first = read_tokens(run).stored.generations[0]
    tokens = read_tokens(run)
    assert 4 not in tokens.row and len(values_at(run, tokens, first)) == len(tokens)
    stored = manifest.read(run)
    manifest.write(run, replace(stored, generations=stored.generations[:1], masks=()))
    older = read_tokens(run)
    later = values_at(run, older, stored.generations[1])
    assert np.isnan(later[older.row == 4]).all() and not np.isnan(later[older.row != 4]).any()
    weights = masked(run, older, stored.masks[-1])
    assert np.isnan(weights[older.row == 4]).all() and not np.isnan(weights[older.row != 4]).any()


def test_damage_and_a_missing_run_are_told(tmp_path: Path) -> None:
    with pytest.raises(StoredDataError, match="no finished run"):
        read_tokens(tmp_path)
    run = small_run(tmp_path / "run")
    path = run / "train/mask=0000/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoredDataError, match="part-00001"):
        read_tokens(run)
