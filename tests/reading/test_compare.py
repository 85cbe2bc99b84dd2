"""Two scorings side by side, against loops over the rows that were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import published, scored, small_run, value_rows, with_by, write_generation

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.reading.compare import Comparison, compare, spearman
from alphatoken_curate.reading.scan import scan_tokens
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.shards import ValueRow

Key = tuple[int, int, int]
"""Row, branch, position."""


def tokens_of(rows: Sequence[ValueRow], name: str = "value") -> dict[Key, float]:
    return {
        (row.row_id, number, int(at)): float(one.signals[name][at])
        for row in rows
        if row.status == "scored"
        for number, one in enumerate(row.branches)
        for at in np.flatnonzero(one.response)
    }


def plain_ranks(numbers: Sequence[float]) -> list[float]:
    return [sum(x < y for x in numbers) + (sum(x == y for x in numbers) + 1) / 2 for y in numbers]


def plain_spearman(one: Sequence[float], other: Sequence[float]) -> float:
    return float(np.corrcoef(plain_ranks(one), plain_ranks(other))[0, 1])


def kept_of(run: Path, mask: int) -> set[Key]:
    """What a stored mask keeps."""
    names = {"chosen": 0, "rejected": 1}
    found = scan_tokens(run, mask=mask).filter("kept").collect().to_dicts()
    return {(row["row_id"], names.get(row.get("branch", ""), 0), row["position"]) for row in found}


def check(found: Comparison, one: dict[Key, float], other: dict[Key, float]) -> None:
    """Everything that values alone decide."""
    both = [key for key in one if key in other]
    assert found.tokens == len(both)
    assert found.rows == len({key[0] for key in both})
    values = [[side[key] for key in both] for side in (one, other)]
    assert found.correlations["value"] == pytest.approx(plain_spearman(*values), abs=1e-12)
    for side in (0, 1):
        assert found.rms["value"][side] == pytest.approx(np.sqrt(np.mean(np.square(values[side]))), rel=1e-6)
    ranks = [dict(zip(both, ((x - 0.5) / len(both) for x in plain_ranks(side)), strict=True)) for side in values]
    moves = sorted((abs(ranks[1][key] - ranks[0][key]) for key in both), reverse=True)
    told = [abs(two - one) for one, two in (changed.ranks for changed in found.changed)]
    assert told == pytest.approx(moves[: len(told)], abs=1e-12)
    for changed in found.changed:
        key = (changed.row_id, int(changed.branch == "rejected"), changed.position)
        assert changed.values == (one[key], other[key])
        assert changed.ranks == pytest.approx((ranks[0][key], ranks[1][key]), abs=1e-12)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_two_generations_of_a_run_against_loops(tmp_path: Path, kind: str) -> None:
    rows = value_rows(30, kind=kind)
    run = small_run(tmp_path / "run", rows, kind=kind, config=published(keep=0.4), generations=(0, 2, 5))
    again = {number: [scored(row, seed=number) if row.status == "scored" else row for row in rows] for number in (2, 5)}
    found = compare(run)
    assert (found.first.generation, found.second.generation) == (0, 5)
    assert (found.second.checkpoint, found.second.run, found.kind) == ("checkpoint-5", str(run), kind)
    check(found, tokens_of(rows), tokens_of(again[5]))
    for name in ("nll", "stab_causal"):
        values = [list(tokens_of(side, name).values()) for side in (rows, again[5])]
        assert found.correlations[name] == pytest.approx(plain_spearman(*values), abs=1e-12)
    assert found.rows_apart == 0
    assert len(found.changed) == 10
    assert [(one.first, one.second) for one in found.steps] == [(0, 2), (2, 5)]
    for step, (one, other) in zip(found.steps, pairwise((rows, again[2], again[5])), strict=True):
        values = [list(tokens_of(side).values()) for side in (one, other)]
        assert step.correlation == pytest.approx(plain_spearman(*values), abs=1e-12)
    assert compare(run, generations=(2, None)).steps == found.steps[1:]
    check(compare(run, generations=(2, 0)), tokens_of(again[2]), tokens_of(rows))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_masks_are_those_that_the_newest_settings_make_of_each(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path / "run", value_rows(30, kind=kind), kind=kind, generations=(0, 2))
    settings = {"keep": 0.3, "scope": "batch:4", "weights": "rank"}
    for number, generation in ((1, "0"), (2, "2")):
        assert make_mask(run, published(**settings, generation=generation)).mask == number
    found = compare(run).masks
    one, other = kept_of(run, 1), kept_of(run, 2)
    assert (found.both, found.only_first, found.only_second) == (len(one & other), len(one - other), len(other - one))
    assert found.tokens == found.both + found.only_first + found.only_second + found.neither
    assert found.jaccard == len(one & other) / len(one | other)
    assert compare(run).steps[0].masks == found
    keys = {(c.row_id, int(c.branch == "rejected"), c.position): c.kept for c in compare(run, changed=999).changed}
    assert all(kept == (key in one, key in other) for key, kept in keys.items())
    assert compare(run).first.mask_settings["keep"] == 0.3


def test_independent_halves_overlap_by_a_third(tmp_path: Path) -> None:
    rows = value_rows(40)
    run = small_run(tmp_path / "run", rows, config=published(keep=0.5, allow_empty_rows=True), generations=(0, 3))
    found = compare(run).masks
    assert found.by_chance == pytest.approx(1 / 3, abs=0.01)
    assert found.jaccard is not None
    assert abs(found.jaccard - found.by_chance) < 0.15


def test_two_runs_with_settings_and_estimators_of_their_own(tmp_path: Path) -> None:
    rows = value_rows(20)
    one = small_run(tmp_path / "one", rows, config=published(keep=0.2))
    influence = [scored(row, seed=1, estimator="influence") if row.status == "scored" else row for row in rows]
    other = small_run(tmp_path / "other", influence, config=published(keep=1.0), per_shard=3)
    found = compare(one, other)
    check(found, tokens_of(rows), tokens_of(influence))
    assert set(found.correlations) == {"nll", "entropy", "reference_nll", "value"}
    assert (found.first.estimator, found.second.estimator) == ("published", "influence")
    assert found.steps == ()
    assert found.masks.both + found.masks.only_second == found.tokens
    assert (found.masks.only_first, found.masks.neither) == (0, 0)
    assert found.masks.jaccard == found.masks.both / found.tokens


def test_the_newest_generation_of_each_run_is_taken_or_the_ones_named(tmp_path: Path) -> None:
    one, other = (small_run(tmp_path / name, generations=(0, 2)) for name in ("one", "other"))
    assert compare(one, other).correlations["value"] == pytest.approx(1)
    assert compare(one, other).changed == ()
    found = compare(one, other, generations=(0, None))
    assert (found.first.generation, found.second.generation) == (0, 2)
    assert found.correlations == compare(one).correlations


def test_rows_that_are_not_alike_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = value_rows(12)
    one = small_run(tmp_path / "one", rows)
    changed = list(rows)
    ids = rows[0].branches[0].input_ids.copy()
    ids[np.flatnonzero(rows[0].branches[0].response)[-1]] += 1
    changed[0] = replace(rows[0], branches=(replace(rows[0].branches[0], input_ids=ids),))
    changed[1] = failed(rows[1])
    changed[2] = replace(value_rows(13)[12], row_id=2, line=3)
    other = small_run(tmp_path / "other", changed)
    found = compare(one, other)
    same = [row for row in rows if row.row_id > 2]
    check(found, tokens_of(same), tokens_of(same))
    assert found.rows_apart == 3
    assert compare(other, one).rows_apart == 3


def failed(row: ValueRow) -> ValueRow:
    return replace(row, status="failed", branches=tuple(replace(one, signals={}) for one in row.branches))


@pytest.mark.long
def test_tokens_that_changed_are_told_with_their_text(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(30), generations=(0, 2))
    for one in compare(run).changed:
        ids = value_rows(30)[one.row_id].branches[0].input_ids
        texts = [f"<{number}>" for number in ids]
        assert one.text == texts[one.position]
        assert one.before == "".join(texts[max(0, one.position - 4) : one.position])
        assert one.after == "".join(texts[one.position + 1 :][:4])
    assert [one.position for one in compare(run, changed=3).changed] == [one.position for one in compare(run).changed][
        :3
    ]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one, pairs = small_run(tmp_path / "one"), small_run(tmp_path / "pairs", kind="preference")
    with pytest.raises(UsageError, match="has one generation; name another run"):
        compare(one)
    with pytest.raises(UsageError, match="one holds preference pairs"):
        compare(one, pairs)
    with pytest.raises(UsageError, match="has no generation 3; it has 0"):
        compare(one, one, generations=(0, 3))
    other = small_run(tmp_path / "other", [replace(row, row_id=0, line=1) for row in value_rows(12)[11:]])
    with pytest.raises(UsageError, match="no row is scored in both with the same tokens"):
        compare(one, other)
    with pytest.raises(UsageError, match="none: no such run folder"):
        compare(one, tmp_path / "none")


def test_a_run_without_a_mask_is_compared_by_the_default_settings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (0, 1):
        write_generation(run, value_rows(20, seed=number), number=number)
    manifest.write(run, manifest.rebuild(run))
    found = compare(run)
    assert found.first.mask_settings["keep"] == MaskConfig().keep
    made = make_mask(run, MaskConfig(generation="0"))
    assert found.masks.both + found.masks.only_first == made.kept_tokens


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_that_of_plain_ranks(pairs: list[tuple[int, int]]) -> None:
    one, other = (np.array(side, np.float32) for side in zip(*pairs, strict=True))
    found = spearman(one, other)
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(plain_spearman(list(one), list(other)), abs=1e-12)


def test_the_extremes_of_rank_correlation() -> None:
    one = np.array([1.0, 5.0, 2.0, 9.0])
    assert spearman(one, one**3) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, np.zeros(4)) is None


def test_json_has_every_number(tmp_path: Path) -> None:
    import orjson

    found: Any = orjson.loads(orjson.dumps(compare(small_run(tmp_path / "run", generations=(0, 2)))))
    assert set(found) == set(Comparison.__dataclass_fields__)
    assert set(found["masks"]) >= {"both", "jaccard", "by_chance"}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("by", ["read_csv('pipe')", "nll +", "length('x')"])
def test_sql_of_other_releases_is_not_evaluated(tmp_path: Path, by: str) -> None:
    run = with_by(small_run(tmp_path / "run", generations=(0, 2)), by)
    with pytest.raises(UsageError) as caught:
        compare(run)
    assert str(caught.value).startswith(f"{run}: its newest mask selects by {by!r}, SQL that --by does not take")
