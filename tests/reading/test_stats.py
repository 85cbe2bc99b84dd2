from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import changed, published, scored, small_run, value_row, value_rows, with_stability, write_generation

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.reading.counting import GroupStats
from alphatoken_curate.reading.scan import scan
from alphatoken_curate.reading.stats import stats
from alphatoken_curate.reading.sums import Sums
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import COMPONENTS, SIGNALS, components
from alphatoken_curate.runs.shards import ValueRow
from alphatoken_curate.signals import composite


def flat(rows: list[ValueRow], name: str, branch: int | None = None) -> np.ndarray:
    """A signal of the scored response tokens of one branch or of all, branch by branch, float64."""
    numbers = range(len(rows[0].branches)) if branch is None else [branch]
    found = [row.branches[i] for i in numbers for row in rows if row.status == "scored"]
    return np.concatenate([one.signals[name][one.response] for one in found]).astype(np.float64)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def failed(row: ValueRow) -> ValueRow:
    """The row as a scoring leaves it that could not compute its values."""
    branches = tuple(replace(one, signals={}) for one in row.branches)
    return replace(row, status="failed", branches=branches, omega=None, margin=None)


def kept_of(run: Path, rows: list[ValueRow], branch: int = 0) -> np.ndarray:
    """Which scored response tokens of a branch the newest mask keeps, read without `scan_tokens`."""
    name = (("chosen_", "rejected_")[branch] if len(rows[0].branches) == 2 else "") + "loss_weight"
    weights = {row["row_id"]: row[name] for row in scan(run, "train").collect().iter_rows(named=True)}
    kept = []
    for row in rows:
        if row.status == "scored":
            response = row.branches[branch].response
            weight = np.array(weights.get(row.row_id, [0.0] * len(response)))
            kept.append(weight[response] > 0)
    return np.concatenate(kept)


def by_numpy(values: np.ndarray, edges: tuple[float, ...]) -> list[int]:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).tolist()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_all_numbers_against_numpy(tmp_path: Path, kind: str) -> None:
    rows = value_rows(40, kind=kind)
    run = small_run(tmp_path / "run", rows, config=published(keep=0.3), kind=kind)
    found = stats(run)
    value = flat(rows, "value")
    kept = np.concatenate([kept_of(run, rows, branch) for branch in range(len(rows[0].branches))])
    assert (found.kind, found.generation) == (kind, 0)
    assert found.rows == {"read": 40, "scored": 37, "target": 1, "failed": 1, "rejected": 1}
    assert found.tokens == sum(len(one.input_ids) for row in rows for one in row.branches)
    assert found.response_tokens == sum(int(one.response.sum()) for row in rows for one in row.branches)
    assert found.scored_tokens == found.decided_tokens == len(value)
    assert found.kept_tokens == kept.sum()
    assert found.kept_share == kept.sum() / len(value)
    assert found.rows_left_out == 0
    check_spreads(found.rms, rows)
    for name in ("nll", "entropy", "reference_nll"):
        assert found.mean[name] == pytest.approx(flat(rows, name).mean(), rel=1e-12)
    assert list(found.histograms["value"].count) == by_numpy(value, found.histograms["value"].edges)
    assert found.histograms["value"].kept is not None
    assert list(found.histograms["value"].kept) == by_numpy(value[kept], found.histograms["value"].edges)
    assert not found.stability_is_zero
    assert found.truncated_rows == 8
    assert found.truncated_tokens == 56


def check_group(found: GroupStats, value: np.ndarray, kept: np.ndarray, edges: tuple[float, ...]) -> None:
    """The numbers of a group against those of its tokens."""
    assert (found.scored_tokens, found.kept_tokens) == (len(value), kept.sum())
    assert found.kept_share == kept.sum() / len(value)
    assert found.mean == pytest.approx(value.mean(), rel=1e-12)
    assert found.rms == pytest.approx(rms(value), rel=1e-12)
    assert found.values.edges == edges
    assert list(found.values.count) == by_numpy(value, edges)
    assert found.values.kept is not None
    assert list(found.values.kept) == by_numpy(value[kept], edges)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_every_signal_and_source_against_numpy(tmp_path: Path, kind: str) -> None:
    rows = [replace(row, source=f"{'ba'[row.row_id % 2]}.jsonl") for row in value_rows(40, kind=kind)]
    run = small_run(tmp_path / "run", rows, config=published(keep=0.3), kind=kind)
    found = stats(run)
    kept = np.concatenate([kept_of(run, rows, branch) for branch in range(len(rows[0].branches))])
    assert list(found.histograms) == ["nll", "entropy", "reference_nll", *COMPONENTS, "value"]
    for name, one in found.histograms.items():
        x = flat(rows, name)
        assert list(one.count) == by_numpy(x, one.edges)
        assert one.kept is not None
        assert list(one.kept) == by_numpy(x[kept], one.edges)
        assert (one.edges[0] == 0) == (name in ("nll", "entropy", "reference_nll"))
    whose = [row.source for i in range(len(rows[0].branches)) for row in rows if row.status == "scored"
             for _ in range(int(row.branches[i].response.sum()))]  # fmt: skip
    assert list(found.sources) == ["b.jsonl", "a.jsonl"]
    for name, group in found.sources.items():
        mine = np.array(whose) == name
        check_group(group, flat(rows, "value")[mine], kept[mine], found.histograms["value"].edges)


def check_spreads(found: Mapping[str, float], rows: list[ValueRow]) -> None:
    expected = {name: rms(flat(rows, name)) for name in (*COMPONENTS, "value")}
    for name, short in (("adaptation", "adapt"), ("stability", "stab")):
        expected[name] = rms(flat(rows, f"{short}_direct") + flat(rows, f"{short}_causal"))
    assert found == pytest.approx(expected, rel=1e-12)


def test_branches_and_pairs_against_numpy(tmp_path: Path) -> None:
    rows = value_rows(30, kind="preference")
    run = small_run(tmp_path / "run", rows, config=published(keep=0.3), kind="preference")
    found = stats(run)
    assert list(found.branches) == ["chosen", "rejected"]
    for number, branch in enumerate(found.branches.values()):
        kept = kept_of(run, rows, number)
        check_group(branch, flat(rows, "value", number), kept, found.histograms["value"].edges)
    pairs = [row for row in rows if row.status == "scored"]
    margin, omega = (np.array([getattr(row, name) for row in pairs], np.float32) for name in ("margin", "omega"))
    assert found.pairs is not None
    assert found.pairs.rows == len(pairs) == 27
    assert found.pairs.margin == pytest.approx(margin.astype(np.float64).mean(), rel=1e-12)
    assert found.pairs.omega == pytest.approx(omega.astype(np.float64).mean(), rel=1e-12)
    assert found.pairs.margin_above_zero == (margin > 0).mean()
    assert 0 < found.pairs.margin_above_zero < 1
    assert found.generations[0].pairs == found.pairs


def test_rows_of_one_sequence_have_neither_branches_nor_pairs(tmp_path: Path) -> None:
    found = stats(small_run(tmp_path / "run"))
    assert found.branches == {}
    assert found.pairs is None


def test_a_margin_of_zero_is_not_above_zero(tmp_path: Path) -> None:
    rows = value_rows(6, reference=False, kind="preference")
    found = stats(small_run(tmp_path / "run", rows, kind="preference")).pairs
    assert found is not None
    assert (found.margin, found.margin_above_zero) == (0, 0)


def test_the_drift_has_its_spread_where_it_was_computed(tmp_path: Path) -> None:
    def drift(row: ValueRow) -> ValueRow:
        one = row.branches[0]
        more = {f"drift_{path}": one.signals[f"stab_{path}"] * np.float32(3) for path in ("direct", "causal")}
        return replace(row, branches=(replace(one, signals={**one.signals, **more}),))

    rows = [drift(row) if row.status == "scored" and row.row_id != 2 else row for row in value_rows(20)]
    found = stats(small_run(tmp_path / "run", rows)).rms
    scored = [row for row in rows if "drift_direct" in row.branches[0].signals]
    for name in ("direct", "causal"):
        assert found[f"drift_{name}"] == pytest.approx(rms(flat(scored, f"drift_{name}")), rel=1e-12)
    both = flat(scored, "drift_direct") + flat(scored, "drift_causal")
    assert found["drift"] == pytest.approx(rms(both), rel=1e-12)
    assert not [name for name in stats(small_run(tmp_path / "other")).rms if "drift" in name]


def top(score: np.ndarray, share: float) -> np.ndarray:
    chosen = np.zeros(len(score), np.bool_)
    chosen[np.argsort(-score, kind="stable")[: int(np.ceil(share * len(score)))]] = True
    return chosen


def decisions(rows: list[ValueRow], share: float) -> dict[str, int]:
    """What stability changes, branch by branch, with one pair of scales."""
    numbers = range(len(rows[0].branches))
    adapt = [flat(rows, "adapt_direct", i) + flat(rows, "adapt_causal", i) for i in numbers]
    stab = [flat(rows, "stab_direct", i) + flat(rows, "stab_causal", i) for i in numbers]
    ratio = rms(np.concatenate(adapt)) / (rms(np.concatenate(stab)) or 1)
    expected = {"none": 0, "rms": 0}
    for a, s in zip(adapt, stab, strict=True):
        alone = top(a, share)
        expected["none"] += int((alone != top(a + 1.5 * s, share)).sum())
        expected["rms"] += int((alone != top(a + 1.5 * ratio * s, share)).sum())
    return expected


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_decisions_that_stability_changed(tmp_path: Path, kind: str) -> None:
    rows = [with_stability(row, 0.1) for row in value_rows(30, kind=kind)]
    run = small_run(tmp_path / "run", rows, config=published(keep=0.5, allow_empty_rows=True), kind=kind)
    expected = decisions(rows, 0.5)
    assert stats(run).decisions_changed == expected
    assert 0 < expected["none"] < expected["rms"]


def test_where_a_mask_keeps_all_decisions_are_those_of_the_published_one(tmp_path: Path) -> None:
    found = stats(small_run(tmp_path / "run", config=published(keep=1.0)))
    half = stats(small_run(tmp_path / "half"))
    assert not found.decided_by_value and half.decided_by_value
    assert found.decisions_changed == half.decisions_changed and half.decisions_changed["none"] > 0
    assert found.kept_share == 1
    assert found.histograms["value"].kept == found.histograms["value"].count


def test_no_stability_is_told(tmp_path: Path) -> None:
    rows = [with_stability(row, 0.0) for row in value_rows(reference=False)]
    found = stats(small_run(tmp_path / "run", rows))
    assert found.stability_is_zero
    assert found.rms["stability"] == 0
    assert found.decisions_changed == {"none": 0, "rms": 0}
    assert found.mean["reference_nll"] is None
    assert "reference_nll" not in found.histograms


def test_one_row_of_one_token(tmp_path: Path) -> None:
    row = value_row(0, 2)
    found = stats(small_run(tmp_path / "run", [row]))
    assert found.scored_tokens == found.kept_tokens == 1
    assert found.rms["value"] == pytest.approx(abs(float(row.branches[0].signals["value"][1])))
    assert sum(found.histograms["value"].count) == 1
    assert found.histograms["value"].count[0] == found.histograms["value"].count[-1] == 0


def test_no_scored_row(tmp_path: Path) -> None:
    found = stats(small_run(tmp_path / "run", [value_row(0, 5, "target"), value_row(1, 5, "failed")]))
    assert found.scored_tokens == found.kept_tokens == 0
    assert found.kept_share is None
    assert set(found.rms.values()) == {0.0}
    assert set(found.mean.values()) == {None}
    assert {sum(one.count) for one in found.histograms.values()} == {0}
    assert found.sources == {}
    assert found.generations[0].values.mean is found.generations[0].values.rms is None


def test_without_a_mask(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = value_rows()
    write_generation(run, rows)
    manifest.write(run, manifest.rebuild(run))
    found = stats(run)
    assert found.kept_tokens is found.kept_share is found.histograms["value"].kept is None
    assert found.masks == ()
    assert found.rms["value"] == pytest.approx(rms(flat(rows, "value")))
    assert not found.decided_by_value


def test_generations_and_masks_are_listed(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    make_mask(run, published(by="nll", keep=0.2))
    found = stats(run)
    stored = manifest.read(run)
    assert [(one.generation, one.shards, one.rows) for one in found.generations] == [(0, 3, 12)]
    assert found.generations[0].bytes == sum(shard.bytes for shard in stored.generations[0].shards)
    assert [(one.mask, one.settings["by"]) for one in found.masks] == [(0, "value"), (1, "nll")]
    assert found.masks[1].kept_tokens == found.kept_tokens
    assert not found.decided_by_value
    half = stats(small_run(tmp_path / "by value"))
    assert half.decided_by_value and half.decided_tokens == found.decided_tokens > 0
    assert half.decisions_changed == found.decisions_changed
    assert found.generations[0].rms == found.rms


def chain(run: Path, kind: str, config: MaskConfig | None = None) -> dict[int, list[ValueRow]]:
    """A run of three generations, in which stability grows from zero and row 4 fails at last; the rows of each."""
    base = value_rows(20, kind=kind)
    made = {0: [with_stability(row, 0.0) for row in base]}
    for number in (1, 4):
        again = [scored(row, seed=number) if row.status == "scored" else row for row in base]
        made[number] = [with_stability(row, 0.1 * number) for row in again]
    made[4][4] = failed(made[4][4])
    small_run(run, made[0], kind=kind)
    for number in (1, 4):
        write_generation(run, made[number], number=number)
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, config or published(allow_empty_rows=True))
    return made


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_spreads_of_each_generation_against_numpy(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    made = chain(run, kind)
    found = stats(run)
    assert [(one.generation, one.checkpoint) for one in found.generations] == [
        (0, "base"), (1, "checkpoint-1"), (4, "checkpoint-4"),
    ]  # fmt: skip
    for one in found.generations:
        check_spreads(one.rms, made[one.generation])
        rows = made[one.generation]
        kept = np.concatenate([kept_of(run, rows, branch) for branch in range(len(rows[0].branches))])
        check_group(one.values, flat(rows, "value"), kept, found.histograms["value"].edges)
        assert (one.pairs is None) == (kind == "sft")
    assert found.generations[0].rms["stability"] == 0 < found.generations[1].rms["stability"]
    assert found.rms == found.generations[-1].rms
    assert not found.stability_is_zero
    assert found.generation == 4
    assert found.rows == {"read": 20, "scored": 16, "target": 1, "failed": 2, "rejected": 1}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_one_generation_of_several(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    made = chain(run, kind)
    for number, rows in made.items():
        found = stats(run, generation=number)
        assert (found.generation, found.decided_generations) == (number, (number,))
        check_spreads(found.rms, rows)
        value = flat(rows, "value")
        assert list(found.histograms["value"].count) == by_numpy(value, found.histograms["value"].edges)
        kept = np.concatenate([kept_of(run, rows, branch) for branch in range(len(rows[0].branches))])
        assert found.histograms["value"].kept is not None
        assert list(found.histograms["value"].kept) == by_numpy(value[kept], found.histograms["value"].edges)
        assert found.kept_tokens == kept.sum()
        assert found.rows_left_out == (0 if number == 4 else 1)
        assert found.decisions_changed == decisions(rows, 0.5)
        assert found.decided_tokens == len(value)
        assert found.stability_is_zero == (number == 0)
        assert found.mean["nll"] == pytest.approx(flat(rows, "nll").mean(), rel=1e-12)
    assert stats(run) == stats(run, generation=4)
    with pytest.raises(UsageError, match="has no generation 2; it has 0, 1, 4"):
        stats(run, generation=2)


def test_decisions_are_those_of_the_generations_of_the_mask(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = chain(run, "sft", published(generation="0,1", allow_empty_rows=True))
    found = stats(run)
    pairs = zip(made[0], made[1], strict=True)
    means = [
        changed(one, lambda name, x, two=two: ((x + two.branches[0].signals[name].astype(np.float64)) / 2).astype("f4"))
        for one, two in pairs
    ]
    assert found.generation == 4
    assert found.decided_generations == found.masks[-1].generations == (0, 1)
    assert found.decisions_changed == decisions(means, 0.5)
    assert found.decided_tokens == len(flat(means, "value")) > found.scored_tokens
    assert found.rows_left_out == 0
    # A mask told `latest` stays what it is when a newer generation comes.
    make_mask(run, published(keep=0.4, allow_empty_rows=True))
    before = stats(run)
    write_generation(run, value_rows(20, seed=9), number=7)
    rebuilt = manifest.rebuild(run)
    manifest.write(run, rebuilt)
    after = stats(run)
    assert after.generation == 7
    assert (after.decisions_changed, after.decided_generations) == (before.decisions_changed, (4,))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_counts_do_not_depend_on_shards(tmp_path: Path, kind: str) -> None:
    rows = value_rows(20, kind=kind)
    whole, cut = (stats(small_run(tmp_path / str(n), rows, per_shard=n, kind=kind)) for n in (20, 3))
    for mine, other in ((whole.branches, cut.branches), (whole.sources, cut.sources)):
        assert {name: one.values for name, one in mine.items()} == {name: one.values for name, one in other.items()}
        for name, one in mine.items():
            assert (one.mean, one.rms) == pytest.approx((other[name].mean, other[name].rms), rel=1e-13)
    assert whole.histograms == cut.histograms
    assert whole.rms == pytest.approx(cut.rms, rel=1e-14)
    assert (whole.kept_tokens, whole.decisions_changed) == (cut.kept_tokens, cut.decisions_changed)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(30), per_shard=4)
    assert orjson.dumps(stats(run)) == orjson.dumps(stats(run))


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_json_has_every_field(tmp_path: Path, kind: str) -> None:
    found = stats(small_run(tmp_path / "run", kind=kind))
    text = orjson.dumps(found)
    assert set(orjson.loads(text)) == set(type(found).__dataclass_fields__)


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=80))
def test_the_closed_bins_cover_98_of_100_values(numbers: list[float]) -> None:
    sums = Sums(components("published"))
    value = np.array(numbers, np.float32)
    nothing = dict.fromkeys(SIGNALS, np.zeros(len(value), np.float32))
    sums.add({**nothing, "value": value})
    core = sums.core("value")
    sizes = np.sort(np.abs(value))
    needed = float(sizes[int(np.ceil(0.98 * len(sizes))) - 1]) or float(sizes[-1])
    assert needed < core or not value.any()
    if needed > 1e-30:
        assert core <= needed * (1 + 1 / 16)
    if not value.any():
        assert core == 1


def test_a_damaged_shard_is_an_error_of_stored_data(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    path = run / "values/generation=0/part-00000.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(StoredDataError, match=r"verify|damaged"):
        stats(run)


@pytest.mark.parametrize("name", ["value", "loss_mask"])
def test_damage_of_one_branch_is_found(tmp_path: Path, name: str) -> None:
    run = small_run(tmp_path / "run", kind="preference")
    path = run / ("values/generation=0" if name == "value" else "train/mask=0000") / "part-00001.parquet"
    column = next(
        one for i in range(100) if (one := pq.read_metadata(path).row_group(0).column(i)).path_in_schema.split(".")[0]
        == f"rejected_{name}"
    )  # fmt: skip
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoredDataError, match=r"part-00001\.parquet"):
        stats(run)


def test_rows_that_the_mask_must_hold_are_missed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    chain(run, "sft")
    stored = manifest.read(run)
    # The newest mask is of generation 4, in which row 4 failed; generation 0 has it.
    wrong = replace(stored.masks[-1], generations=(0,))
    manifest.write(run, replace(stored, masks=(*stored.masks[:-1], wrong)))
    with pytest.raises(StoredDataError, match="does not hold the rows that values/ does"):
        stats(run, generation=0)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoredDataError, match=r"manifest\.json: missing"):
        stats(tmp_path)


def test_the_vocabulary_is_not_needed(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    whole = stats(run)
    (run / "artifacts/vocab.parquet").unlink()
    assert stats(run) == whole


def with_drift(row: ValueRow, names: tuple[str, ...]) -> ValueRow:
    """The row with a drift beside its stability."""
    if row.status != "scored":
        return row
    branches = []
    for one in row.branches:
        more = {name: one.signals[name.replace("drift", "stab")] * np.float32(3) for name in names}
        branches.append(replace(one, signals={**one.signals, **more}))
    return replace(row, branches=tuple(branches))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize("estimator", ["influence", "exact+influence"])
def test_spreads_are_of_the_signals_of_the_estimator(tmp_path: Path, estimator: str, kind: str, drift: bool) -> None:
    known = components(estimator)
    rows = value_rows(20, kind=kind, estimator=estimator)
    rows = [with_drift(row, known.drift) for row in rows] if drift else rows
    found = stats(small_run(tmp_path / "run", rows, generations=(0, 2)), generation=0)
    assert set(found.histograms) == {*known.always, "reference_nll", *(known.drift if drift else ())}
    assert found.estimator == estimator
    objectives = {
        "adaptation": known.adaptation,
        "stability": known.stability,
        **({"drift": known.drift} if drift else {}),
    }
    expected = {name: rms(flat(rows, name)) for name in (*known.of_value, *known.upstream, "value")}
    expected |= {name: rms(flat(rows, name)) for name in known.drift if drift}
    expected |= {name: rms(sum(flat(rows, part) for part in parts)) for name, parts in objectives.items()}
    assert found.rms == pytest.approx(expected, rel=1e-12)
    assert found.generations[0].rms == found.rms != found.generations[1].rms
    assert not found.stability_is_zero and all(found.decisions_changed.values())


def test_an_influence_without_stability_is_seen(tmp_path: Path) -> None:
    known = components("influence")
    rows = []
    for row in value_rows(estimator="influence"):
        branches = []
        for one in row.branches:
            signals = {name: x * np.float32(0) if name.startswith("stab") else x for name, x in one.signals.items()}
            if signals:
                signals["value"] = composite.value(signals, known, stability_weight=1.5)
            branches.append(replace(one, signals=signals))
        rows.append(replace(row, branches=tuple(branches)))
    found = stats(small_run(tmp_path / "run", rows))
    assert found.stability_is_zero and found.rms["stability"] == 0 < found.rms["adaptation"]
    assert found.decisions_changed == {"none": 0, "rms": 0}
