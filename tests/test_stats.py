from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import small_run, value_row, value_rows, write_generation

from alphatoken_curate import composite, manifest
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import CurateError, StoredDataError
from alphatoken_curate.remask import make_mask
from alphatoken_curate.scan import scan
from alphatoken_curate.schema import COMPONENTS
from alphatoken_curate.shards import ValueRow
from alphatoken_curate.stats import BINS_EACH_SIDE, MEANS, _Part, _Sums, edges_for, histogram, stats


def flat(rows: list[ValueRow], name: str) -> np.ndarray:
    """A signal of all scored response tokens, float64."""
    scored = [row for row in rows if row.status == "scored"]
    return np.concatenate([row.signals[name][row.response] for row in scored]).astype(np.float64)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def with_stability(row: ValueRow, factor: float) -> ValueRow:
    """The same row with its stability multiplied, its value to match."""
    signals = {name: x * np.float32(factor) if name.startswith("stab") else x for name, x in row.signals.items()}
    if signals:
        signals["value"] = composite.value(*(signals[name] for name in COMPONENTS), stability_weight=1.5)
    return replace(row, signals=signals)


def kept_of(run: Path, rows: list[ValueRow]) -> np.ndarray:
    """Which scored response tokens the newest mask keeps, read without `scan_tokens`."""
    weights = {row["row_id"]: row["loss_weight"] for row in scan(run, "train").collect().iter_rows(named=True)}
    return np.concatenate([np.array(weights[r.row_id])[r.response] > 0 for r in rows if r.status == "scored"])


def by_numpy(values: np.ndarray, edges: tuple[float, ...]) -> list[int]:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).tolist()


def test_all_numbers_against_numpy(tmp_path: Path) -> None:
    rows = value_rows(40)
    run = small_run(tmp_path / "run", rows, config=MaskConfig(keep=0.3))
    found = stats(run)
    value = flat(rows, "value")
    kept = kept_of(run, rows)
    assert found.rows == {"read": 40, "scored": 37, "target": 1, "failed": 1, "rejected": 1}
    assert found.tokens == sum(len(row.input_ids) for row in rows)
    assert found.response_tokens == sum(int(row.response.sum()) for row in rows)
    assert found.scored_tokens == len(value)
    assert found.kept_tokens == kept.sum()
    assert found.kept_share == kept.sum() / len(value)
    for name in (*COMPONENTS, "value"):
        assert found.rms[name] == pytest.approx(rms(flat(rows, name)), rel=1e-12)
    for name, short in (("adaptation", "adapt"), ("stability", "stab")):
        both = flat(rows, f"{short}_direct") + flat(rows, f"{short}_causal")
        assert found.rms[name] == pytest.approx(rms(both), rel=1e-12)
    for name in ("nll", "entropy", "reference_nll"):
        assert found.mean[name] == pytest.approx(flat(rows, name).mean(), rel=1e-12)
    assert list(found.values.count) == by_numpy(value, found.values.edges)
    assert found.values.kept is not None
    assert list(found.values.kept) == by_numpy(value[kept], found.values.edges)
    assert not found.stability_is_zero
    assert found.truncated_rows == 8
    assert found.truncated_tokens == 56


def top(score: np.ndarray, share: float) -> np.ndarray:
    chosen = np.zeros(len(score), np.bool_)
    chosen[np.argsort(-score, kind="stable")[: int(np.ceil(share * len(score)))]] = True
    return chosen


def test_decisions_that_stability_changed(tmp_path: Path) -> None:
    rows = [with_stability(row, 0.1) for row in value_rows(30)]
    run = small_run(tmp_path / "run", rows, config=MaskConfig(keep=0.5, allow_empty_rows=True))
    adaptation = flat(rows, "adapt_direct") + flat(rows, "adapt_causal")
    stability = flat(rows, "stab_direct") + flat(rows, "stab_causal")
    alone = top(adaptation, 0.5)
    none = top(adaptation + 1.5 * stability, 0.5)
    scaled = top(adaptation / rms(adaptation) + 1.5 * stability / rms(stability), 0.5)
    expected = {"none": int((alone != none).sum()), "rms": int((alone != scaled).sum())}
    assert stats(run).decisions_changed == expected
    assert 0 < expected["none"] < expected["rms"]


def test_a_mask_that_keeps_all_leaves_stability_nothing_to_decide(tmp_path: Path) -> None:
    found = stats(small_run(tmp_path / "run", config=MaskConfig(keep=1.0)))
    assert found.decisions_changed == {"none": 0, "rms": 0}
    assert found.kept_share == 1
    assert found.values.kept == found.values.count


def test_no_stability_is_told(tmp_path: Path) -> None:
    rows = [with_stability(row, 0.0) for row in value_rows(reference=False)]
    found = stats(small_run(tmp_path / "run", rows))
    assert found.stability_is_zero
    assert found.rms["stability"] == 0
    assert found.decisions_changed == {"none": 0, "rms": 0}
    assert found.mean["reference_nll"] is None


def test_one_row_of_one_token(tmp_path: Path) -> None:
    row = value_row(0, 2)
    found = stats(small_run(tmp_path / "run", [row]))
    assert found.scored_tokens == found.kept_tokens == 1
    assert found.rms["value"] == pytest.approx(abs(float(row.signals["value"][1])))
    assert sum(found.values.count) == 1
    assert found.values.count[0] == found.values.count[-1] == 0


def test_no_scored_row(tmp_path: Path) -> None:
    found = stats(small_run(tmp_path / "run", [value_row(0, 5, "target"), value_row(1, 5, "failed")]))
    assert found.scored_tokens == found.kept_tokens == 0
    assert found.kept_share is None
    assert set(found.rms.values()) == {0.0}
    assert set(found.mean.values()) == {None}
    assert set(found.values.count) == {0}


def test_without_a_mask(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = value_rows()
    write_generation(run, rows)
    manifest.write(run, manifest.rebuild(run))
    found = stats(run)
    assert found.kept_tokens is found.kept_share is found.values.kept is None
    assert found.masks == ()
    assert found.rms["value"] == pytest.approx(rms(flat(rows, "value")))
    assert found.decided_by_value


def test_generations_and_masks_are_listed(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    make_mask(run, MaskConfig(by="nll", keep=0.2))
    found = stats(run)
    stored = manifest.read(run)
    assert [(one.generation, one.shards, one.rows) for one in found.generations] == [(0, 3, 12)]
    assert found.generations[0].bytes == sum(shard.bytes for shard in stored.generations[0].shards)
    assert [(one.mask, one.settings["by"]) for one in found.masks] == [(0, "value"), (1, "nll")]
    assert found.masks[1].kept_tokens == found.kept_tokens
    assert not found.decided_by_value
    assert found.decisions_changed == {"none": 0, "rms": 0}


def test_counts_do_not_depend_on_shards(tmp_path: Path) -> None:
    rows = value_rows(20)
    whole, cut = (stats(small_run(tmp_path / str(n), rows, per_shard=n)) for n in (20, 3))
    assert whole.values == cut.values
    assert whole.rms == pytest.approx(cut.rms, rel=1e-14)
    assert (whole.kept_tokens, whole.decisions_changed) == (cut.kept_tokens, cut.decisions_changed)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(30), per_shard=4)
    assert orjson.dumps(stats(run)) == orjson.dumps(stats(run))


def test_histograms_of_other_kinds_are_not_added() -> None:
    values = np.zeros(1, np.float32)
    one = histogram(values, None, (0.0, 1.0))
    assert (one + one).count == (0, 2, 0)
    for other in (histogram(values, None, (0.0, 2.0)), histogram(values, np.ones(1, np.bool_), (0.0, 1.0))):
        with pytest.raises(CurateError):
            one + other


def test_json_has_every_field(tmp_path: Path) -> None:
    found = stats(small_run(tmp_path / "run"))
    text = orjson.dumps(found)
    assert set(orjson.loads(text)) == set(type(found).__dataclass_fields__)


@given(st.floats(1e-30, 1e30))
def test_edges_reach_as_far_as_asked_with_round_steps(reach: float) -> None:
    edges = edges_for(reach)
    assert len(edges) == 2 * BINS_EACH_SIDE + 1
    assert edges[BINS_EACH_SIDE] == 0
    assert np.all(np.diff(edges) > 0)
    assert edges == tuple(-edge for edge in reversed(edges))
    assert reach * (1 - 1e-9) <= edges[-1] <= 2.5 * reach * (1 + 1e-9)
    assert f"{edges[BINS_EACH_SIDE + 1]:.0e}"[0] in "125"


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=80))
def test_the_closed_bins_cover_98_of_100_values(numbers: list[float]) -> None:
    sums = _Sums()
    value = np.array(numbers, np.float32)
    nothing = dict.fromkeys((*COMPONENTS, *MEANS), np.zeros(len(value), np.float32))
    sums.add(_Part(columns={**nothing, "value": value}, kept=None))
    core = sums.core()
    sizes = np.sort(np.abs(value))
    needed = float(sizes[int(np.ceil(0.98 * len(sizes))) - 1]) or float(sizes[-1])
    assert needed < core or not value.any()
    if needed > 1e-30:
        assert core <= needed * (1 + 1 / 16)
    if not value.any():
        assert core == 1


@pytest.mark.parametrize("x", [-1.0, -0.5, 0.0, 0.25, 0.5, 9.0])
def test_a_value_at_an_edge_belongs_to_the_bin_above(x: float) -> None:
    found = histogram(np.array([x], np.float32), None, (-0.5, 0.0, 0.5))
    assert found.count.index(1) == sum(edge <= x for edge in found.edges)


def test_a_damaged_shard_is_an_error_of_stored_data(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    path = run / "values/generation=0/part-00000.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(StoredDataError, match=r"verify|damaged"):
        stats(run)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoredDataError, match=r"manifest\.json: missing"):
        stats(tmp_path)


def test_the_vocabulary_is_not_needed(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    whole = stats(run)
    (run / "artifacts/vocab.parquet").unlink()
    assert stats(run) == whole
