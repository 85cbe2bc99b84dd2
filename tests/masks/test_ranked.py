"""What a mask selects on, shard by shard; and how much of a run is held in memory by what reads it."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from small_run import published, small_run, value_row, value_rows
from tiny_files import save_models

from alphatoken_curate import MaskConfig, ScoreConfig
from alphatoken_curate.masks import criteria, formulas
from alphatoken_curate.masks.ranked import ranked, sizes
from alphatoken_curate.masks.remask import make_mask, spreads
from alphatoken_curate.masks.responses import aligned, chosen_generations, load
from alphatoken_curate.reading.stats import stats
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import COMPONENTS, LAYOUTS
from alphatoken_curate.scoring.check import check
from alphatoken_curate.signals import composite

KINDS = pytest.mark.parametrize("kind", sorted(LAYOUTS))


@pytest.mark.one_in(9)
@KINDS
@pytest.mark.parametrize("generation", ["0", "all"])
@pytest.mark.parametrize("by", ["value", "nll", "random", "row_id", "value - avg(nll)", "-surprise"])
def test_scores_are_those_of_all_tokens_read_at_once(tmp_path: Path, kind: str, generation: str, by: str) -> None:
    run = small_run(tmp_path, kind=kind, generations=(0, 3), per_shard=3)
    stored = manifest.read(run)
    layout, components = manifest.layout(stored), manifest.components(stored)
    config = MaskConfig(keep=0.5, by=by, generation=generation, seed=4)
    files = aligned(run, chosen_generations(run, stored, config))
    scales = composite.Scales(adaptation=2.0, stability=3.0)
    found = ranked(run, files, layout, components, config, stability_weights=(1.5, 0.25), scales=scales)
    whole = load(run, files, criteria.columns_needed(by, components, layout), layout)
    assert [one.tolist() for one in found.keys] == [one.tolist() for one in whole.keys]
    scored = [row for row in value_rows(kind=kind) if row.status == "scored"]
    for number, (branch, read) in enumerate(zip(found.branches, whole.branches, strict=True)):
        assert branch.lengths.tolist() == [int(row.branches[number].response.sum()) for row in scored]
        assert branch.per_shard == read.per_shard and len(branch.per_shard) == 4
        for score, weight in zip(branch.scores, (1.5, 0.25), strict=True):
            wanted = criteria.selection(
                by,
                read.columns,
                components=components,
                stability_weight=weight,
                scales=scales,
                seed=4,
                layout=layout,
                branch=number,
            )
            assert score.dtype == np.float32 and np.array_equal(score, wanted)


@KINDS
def test_sizes_are_those_of_all_tokens(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path, kind=kind, per_shard=2)
    stored = manifest.read(run)
    found = sizes(run, [[one] for one in stored.generations[0].shards], LAYOUTS[kind], manifest.components(stored))
    rows = [one for row in value_rows(kind=kind) if row.status == "scored" for one in row.branches]
    each = {name: np.concatenate([one.signals[name][one.response] for one in rows]) for name in COMPONENTS}
    wanted = {name: np.sqrt(np.mean(np.square(column, dtype=np.float64))) for name, column in each.items()}
    assert found.spreads == pytest.approx(wanted, rel=1e-12)
    adaptation = np.add(each["adapt_direct"], each["adapt_causal"], dtype=np.float64)
    assert found.scales.adaptation == pytest.approx(np.sqrt(np.mean(adaptation**2)), rel=1e-12)


# --- memory


ROWS = (80, 640)
"""Rows of the smaller and the larger run."""
LENGTH, SHARD = 250, 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [
        small_run(tmp_path_factory.mktemp(f"{rows}rows"), [value_row(i, LENGTH) for i in range(rows)], per_shard=SHARD)
        for rows in ROWS
    ]


def most(work: Callable[[], object]) -> int:
    """The most bytes that work holds at a time: of Python and NumPy, where all that is kept lies."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def grows(work: Callable[[Path], object], runs: list[Path]) -> float:
    """Bytes held for each response token more. Blocks are small, as those of a large run are beside it."""
    counts = [manifest.read(run).counts.response_tokens for run in runs]
    with patch.object(formulas, "BLOCK", 2000):
        for run in runs:
            work(run)  # what is there afterwards is not counted
        low, high = (most(lambda run=run: work(run)) for run in runs)  # type: ignore[misc]
    return (high - low) / (counts[1] - counts[0])


def masked(**settings: object) -> Callable[[Path], object]:
    """A mask with another number at each call."""
    counter = iter(range(10**6))
    return lambda run: make_mask(run, published(**settings, stability_weight=2 + next(counter)))  # type: ignore[arg-type]


PER_ROW = 24 / (LENGTH / 2)
"""Bytes of a row, spread over its response tokens."""
MORE = 10_000 / (SHARD * LENGTH / 2)
"""Bytes of a shard, for its footer and its line of the manifest, spread over its response tokens."""


@pytest.mark.long
def test_verify_and_the_manifest_hold_one_shard(runs: list[Path]) -> None:
    """First of these tests: shards of masks, which the others make, have footers and lines too."""
    assert grows(verify, runs) <= 8 + MORE
    assert grows(manifest.rebuild, runs) <= 4 + MORE


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, 10),
        pytest.param({"keep": "positive", "weights": "relu"}, 10, marks=pytest.mark.long),
        pytest.param({"scope": "batch:16", "allow_empty_rows": True}, 10, marks=pytest.mark.long),
        pytest.param({"weights": "sigmoid", "stability_scale": "rms"}, 10, marks=pytest.mark.long),
        ({"weights": "tilt:0.25"}, 10),
        pytest.param({"weights": "rank", "scope": "row"}, 25, marks=pytest.mark.long),
        ({"weights": "rank"}, 25),
    ],
)
def test_a_mask_holds_no_more_of_a_token_than_is_said(
    settings: dict[str, object], bound: float, runs: list[Path]
) -> None:
    assert grows(masked(**settings), runs) <= bound + PER_ROW + MORE


@pytest.mark.long
def test_stats_hold_no_more_of_a_token_than_is_said(runs: list[Path]) -> None:
    assert grows(lambda run: spreads(run, published(stability_scale="rms")), runs) <= 14 + PER_ROW + MORE
    assert grows(stats, runs) <= 14 + PER_ROW + MORE


@pytest.mark.long
def test_rows_are_not_kept_beside_their_tokens(tmp_path: Path) -> None:
    """`check`, as `score`: 6 bytes of a token and less than 2,000 of a row with its plan, whatever text it was."""
    model, length = save_models(tmp_path)["base"], 200
    data = []
    for rows in (2000, 3000):  # more than are read at once
        line = json.dumps({"id": "some row", "input_ids": [40] * length, "labels": [-100, *[40] * (length - 1)]})
        data.append(tmp_path / f"{rows}.jsonl")
        data[-1].write_text((line + "\n") * rows)
    settings = ScoreConfig(data=(str(data[0]),), model=model, batch_tokens=4096)
    check(settings)  # what is there afterwards is not counted
    with patch("alphatoken_curate.tokens.tokenise._BATCH_ROWS", 50):
        low, high = (most(lambda one=one: check(replace(settings, data=(str(one),)))) for one in data)  # type: ignore[misc]
    assert (high - low) / 1000 <= 6 * length + 2000
