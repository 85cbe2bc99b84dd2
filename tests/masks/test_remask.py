from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from small_run import published, small_run, value_row, value_rows, write_generation

from alphatoken_curate.cli.mask import command
from alphatoken_curate.config import MaskConfig, ScoreConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.remask import make_mask, spreads
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.atomic import KILL_AT
from alphatoken_curate.runs.fingerprint import fingerprint
from alphatoken_curate.runs.schema import COMPONENTS, LAYOUTS, PREFERENCE, components
from alphatoken_curate.runs.shards import Branch, ValueRow
from alphatoken_curate.signals import composite

RANK = published(keep=0.3, weights="rank", scope="batch:2", generation="all")
KINDS = pytest.mark.parametrize("kind", sorted(LAYOUTS))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "a")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained(run: Path, mask: int = 0) -> pl.DataFrame:
    paths = shards.listed(shards.train_folder(run, mask)).values()
    schema = manifest.layout(manifest.read(run)).train
    return pl.concat([pl.DataFrame(shards.read(path, schema)) for path in paths])


def stored_weights(run: Path, mask: int = 0, branch: str = "") -> list[list[float]]:
    return trained(run, mask)[f"{branch}loss_weight"].to_list()


def is_scored(row: ValueRow) -> bool:
    return row.status == "scored"


# The oracle: one token after the other, from the rows as they were given, sharing nothing with the module.


def value_of(parts: Iterable[float], weight: float = 1.5, scales: tuple[float, float] = (1.0, 1.0)) -> float:
    a, b, c, d = map(float, parts)
    return float(np.float32((a + b) / scales[0] + weight * ((c + d) / scales[1])))


def plain_values(rows: list[ValueRow], branch: int, **settings: Any) -> dict[tuple[int, int], float]:
    """(row_id, position) -> the number to select on, of the scored rows."""
    return {
        (row.row_id, int(at)): value_of((row.branches[branch].signals[name][at] for name in COMPONENTS), **settings)
        for row in filter(is_scored, rows)
        for at in np.flatnonzero(row.branches[branch].response)
    }


def plain_kept(
    values: Mapping[tuple[int, int], float], share: float, batch: int = 10**6
) -> tuple[set[tuple[int, int]], int]:
    """Tokens kept, batches of scored rows each by itself, and how many rows got their best one back."""
    row_ids = sorted({row_id for row_id, _ in values})
    kept: set[tuple[int, int]] = set()
    for start in range(0, len(row_ids), batch):
        ranked = sorted((-v, key) for key, v in values.items() if key[0] in row_ids[start : start + batch])
        kept |= {key for _, key in ranked[: math.ceil(share * len(ranked))]}
    lost = sorted(set(row_ids) - {row_id for row_id, _ in kept})
    return kept | {min((-v, key) for key, v in values.items() if key[0] == row_id)[1] for row_id in lost}, len(lost)


def stored_kept(run: Path, mask: int, branch: str) -> set[tuple[int, int]]:
    rows = trained(run, mask).select("row_id", f"{branch}loss_mask").rows()
    return {(row_id, position) for row_id, row in rows for position, one in enumerate(row) if one}


@KINDS
@pytest.mark.parametrize(("share", "batch"), [(0.5, 0), (0.2, 0), (0.3, 2)])
def test_each_branch_is_masked_by_its_own_top_share(tmp_path: Path, kind: str, share: float, batch: int) -> None:
    rows = [rounded(row) for row in value_rows(kind=kind)]  # so that there are ties
    run = small_run(tmp_path, rows, config=published(keep=share, scope=f"batch:{batch}" if batch else "global"))
    mask, given_back = manifest.read(run).masks[0], 0
    for number, prefix in enumerate(LAYOUTS[kind].branches):
        values = plain_values(rows, number)
        assert len(set(values.values())) < len(values)
        want, back = plain_kept(values, share, batch or 10**6)
        given_back += back
        assert stored_kept(run, 0, prefix) == want
    assert mask.rows_given_back == given_back
    assert mask.kept_tokens == sum(len(stored_kept(run, 0, prefix)) for prefix in LAYOUTS[kind].branches)


def rounded(row: ValueRow) -> ValueRow:
    """Components in steps of a half, value to match."""

    def coarse(one: Branch) -> Branch:
        signals = {name: (np.round(x * 2) / 2).astype(np.float32) for name, x in one.signals.items()}
        if signals:
            signals["value"] = composite.value(signals, components("published"), stability_weight=1.5)
        return replace(one, signals=signals)

    return replace(row, branches=tuple(map(coarse, row.branches)))


@KINDS
def test_what_is_stored_beside_the_mask(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path, kind=kind)
    scored, stored = list(filter(is_scored, value_rows(kind=kind))), trained(run)
    assert stored["row_id"].to_list() == [row.row_id for row in scored]
    for number, prefix in enumerate(LAYOUTS[kind].branches):
        branches = [row.branches[number] for row in scored]
        kept = [np.array(row) > 0 for row in stored_weights(run, 0, prefix)]
        assert stored[f"{prefix}value"].to_list() == [
            [None if np.isnan(x) else float(x) for x in one.signals["value"]] for one in branches
        ]
        assert stored[f"{prefix}input_ids"].to_list() == [one.input_ids.tolist() for one in branches]
        assert stored[f"{prefix}labels"].to_list() == [
            np.where(mask, one.input_ids, -100).tolist() for one, mask in zip(branches, kept, strict=True)
        ]


@pytest.mark.parametrize("weights", ["rank", "sigmoid", "relu"])
def test_soft_weights_have_mean_1_in_each_branch(tmp_path: Path, weights: str) -> None:
    run = small_run(tmp_path, kind="preference", config=published(weights=weights))
    for number, prefix in enumerate(PREFERENCE.branches):
        values = plain_values(value_rows(kind="preference"), number)
        ranked = sorted(values, key=lambda key: (-values[key], key))
        rms = math.sqrt(sum(v * v for v in values.values()) / len(values))
        formula = {
            "rank": {key: 1 - place / len(ranked) for place, key in enumerate(ranked)},
            "sigmoid": {key: 1 / (1 + math.exp(-v / rms)) for key, v in values.items()},
            "relu": {key: max(v, 0.0) for key, v in values.items()},
        }[weights]
        found = {
            (row_id, at): weight
            for row_id, row in trained(run).select("row_id", f"{prefix}loss_weight").rows()
            for at, weight in enumerate(row)
            if weight > 0
        }
        raw = {key: formula[key] or min(formula[k] for k in found if formula[k]) for key in found}
        mean = sum(raw.values()) / len(raw)
        assert found == pytest.approx({key: weight / mean for key, weight in raw.items()}, rel=1e-5)


def test_one_pair_of_scales_serves_both_branches(tmp_path: Path) -> None:
    rows = value_rows(kind="preference")
    rows = [replace(row, branches=(row.branches[0], louder(row.branches[1]))) for row in rows]
    run = small_run(tmp_path, rows, config=published(stability_scale="rms"))
    parts = [
        [float(one.signals[name][at]) for name in COMPONENTS]
        for row in filter(is_scored, rows)
        for one in row.branches
        for at in np.flatnonzero(one.response)
    ]
    adaptation = math.sqrt(sum((a + b) ** 2 for a, b, _, _ in parts) / len(parts))
    stability = math.sqrt(sum((c + d) ** 2 for _, _, c, d in parts) / len(parts))
    for number, prefix in enumerate(PREFERENCE.branches):
        want = plain_values(rows, number, scales=(adaptation, stability))
        stored = trained(run).select("row_id", f"{prefix}value").rows()
        found = {(row_id, at): v for row_id, row in stored for at, v in enumerate(row) if v is not None}
        assert found == pytest.approx(want, rel=1e-5)


def louder(one: Branch) -> Branch:
    """The same with ten times the adaptation, value to match."""
    signals = {name: x * np.float32(10) if name.startswith("adapt") else x for name, x in one.signals.items()}
    if signals:
        signals["value"] = composite.value(signals, components("published"), stability_weight=1.5)
    return replace(one, signals=signals)


@KINDS
def test_by_an_expression(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path, kind=kind)
    made = make_mask(run, published(keep=0.25, by="nll - reference_nll"))
    for number, prefix in enumerate(LAYOUTS[kind].branches):
        excess = {
            (row.row_id, int(at)): float(signals["nll"][at] - signals["reference_nll"][at])
            for row in filter(is_scored, value_rows(kind=kind))
            for signals in [row.branches[number].signals]
            for at in np.flatnonzero(row.branches[number].response)
        }
        assert stored_kept(run, made.mask, prefix) == plain_kept(excess, 0.25)[0]


def test_by_margin_the_pairs_apart_the_most_are_kept_whole(tmp_path: Path) -> None:
    run = small_run(tmp_path, kind="preference")
    made = make_mask(run, published(keep=0.4, by="margin", allow_empty_rows=True))
    scored = list(filter(is_scored, value_rows(kind="preference")))
    for number, prefix in enumerate(PREFERENCE.branches):
        tokens = [
            (-float(row.margin or 0), row.row_id, int(at))
            for row in scored
            for at in np.flatnonzero(row.branches[number].response)
        ]
        want = {key for _, *key in map(tuple, sorted(tokens)[: math.ceil(0.4 * len(tokens))]) for key in [tuple(key)]}
        assert stored_kept(run, made.mask, prefix) == want
    with pytest.raises(UsageError, match=r"'margin'\. The columns are row_id"):
        make_mask(small_run(tmp_path / "sft"), published(by="margin"))


def test_the_summary_counts_each_branch(tmp_path: Path) -> None:
    run = small_run(tmp_path, kind="preference")
    made = make_mask(run, RANK)
    again = make_mask(run, RANK)
    assert made.created and again == replace(made, created=False)
    scored = list(filter(is_scored, value_rows(kind="preference")))
    for number, name in enumerate(("chosen", "rejected")):
        assert made.branches[name].response_tokens == sum(int(row.branches[number].response.sum()) for row in scored)
        assert made.branches[name].kept_tokens == len(stored_kept(run, made.mask, f"{name}_"))
    assert made.response_tokens == sum(one.response_tokens for one in made.branches.values())
    assert made.kept_tokens == sum(one.kept_tokens for one in made.branches.values())
    assert make_mask(small_run(tmp_path / "sft"), RANK).branches == {}


def test_random_masks_of_the_branches_are_drawn_apart(tmp_path: Path) -> None:
    rows = [row for row in value_rows(40, kind="preference") if is_scored(row)]
    rows = [replace(row, row_id=i, line=i + 1, branches=row.branches[:1] * 2) for i, row in enumerate(rows)]
    run = small_run(tmp_path, rows, config=published(by="random", allow_empty_rows=True))
    assert stored_kept(run, 0, "chosen_") != stored_kept(run, 0, "rejected_")


# ------------------------------------------------------------------------------------------------- several generations


def several(run: Path, kind: str) -> list[list[ValueRow]]:
    """A run of generations 0, 1 and 3, without masks; row 4 failed in the second. Returns their rows."""
    made = [value_rows(seed=number, kind=kind) for number in (0, 1, 3)]
    lost = made[1][4]
    branches = tuple(replace(one, signals={}) for one in lost.branches)
    made[1][4] = replace(lost, status="failed", branches=branches, omega=None, margin=None)
    for number, rows in zip((0, 1, 3), made, strict=True):
        write_generation(run, rows, number=number)
    manifest.write(run, manifest.rebuild(run))
    return made


@pytest.mark.one_in(2)
@KINDS
@pytest.mark.parametrize(("generation", "numbers"), [("all", (0, 1, 3)), ("0,3", (0, 3))])
def test_the_mask_of_several_is_made_from_averaged_components(
    tmp_path: Path, kind: str, generation: str, numbers: tuple[int, ...]
) -> None:
    of = dict(zip((0, 1, 3), several(tmp_path, kind), strict=True))
    chosen = [of[number] for number in numbers]
    summary = make_mask(tmp_path, published(generation=generation))
    left_out = sum({row.status for row in same} == {"scored", "failed"} for same in zip(*chosen, strict=True))
    assert (summary.generations, summary.rows_left_out) == (numbers, left_out)
    assert manifest.read(tmp_path).masks[0].generations == numbers
    for number, prefix in enumerate(LAYOUTS[kind].branches):
        values = {}
        for same in zip(*chosen, strict=True):
            for at in np.flatnonzero(same[0].branches[number].response) if all(map(is_scored, same)) else ():
                signals = [row.branches[number].signals for row in same]
                means = [np.mean([np.float64(one[name][at]) for one in signals]) for name in COMPONENTS]
                values[same[0].row_id, int(at)] = value_of(map(np.float32, means))
        stored = trained(tmp_path).select("row_id", f"{prefix}value").rows()
        found = {(row_id, at): v for row_id, row in stored for at, v in enumerate(row) if v is not None}
        assert found == values
        assert stored_kept(tmp_path, 0, prefix) == plain_kept(values, 0.5)[0]
    assert trained(tmp_path)["row_id"].to_list() == [
        same[0].row_id for same in zip(*chosen, strict=True) if all(map(is_scored, same))
    ]
    assert replace(make_mask(tmp_path, published(generation=generation)), created=True) == summary


def test_names_of_the_same_generation_are_the_same_mask(tmp_path: Path) -> None:
    several(tmp_path, "sft")
    first = make_mask(tmp_path, published())
    assert first.generations == (3,)
    for generation, aggregate in (("3", "mean"), ("latest", "last"), ("all", "last"), ("0,3", "last")):
        again = make_mask(tmp_path, published(generation=generation, aggregate=aggregate))
        assert again == replace(first, created=False)
    others = [
        make_mask(tmp_path, published(generation=name, aggregate=aggregate))
        for name, aggregate in (("0", "mean"), ("all", "mean"), ("0,1", "mean"), ("0,1", "last"))
    ]
    assert [one.mask for one in others] == [1, 2, 3, 4]
    assert [one.generations for one in others] == [(0,), (0, 1, 3), (0, 1), (1,)]


def test_a_mask_says_what_it_depends_on_and_no_more(tmp_path: Path) -> None:
    several(tmp_path, "sft")
    for generation in ("latest", "all"):
        make_mask(tmp_path, published(generation=generation))
    one, mean = (
        shards.read_footer(shards.train_folder(tmp_path, number) / "part-00000.parquet").fields for number in (0, 1)
    )
    stored = {made.generation: made for made in manifest.read(tmp_path).generations}
    assert one["values"] == fingerprint({"shards": [shard.sha256 for shard in stored[3].shards]})
    assert set(mean) - set(one) == {"aggregate"} and mean["aggregate"] == "mean"
    assert (one["generations"], mean["generations"]) == ([3], [0, 1, 3])


def test_a_generation_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    several(tmp_path, "sft")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="no generation 2; it has 0, 1, 3"):
        make_mask(tmp_path, published(generation="0,2"))
    assert contents(tmp_path) == before


def test_a_new_generation_leaves_masks_of_older_ones_as_they_are(run: Path) -> None:
    before = contents(run / "train")
    write_generation(run, value_rows(seed=1), number=1)
    manifest.write(run, manifest.rebuild(run))
    made = make_mask(run, published())
    assert made.mask == 1 and manifest.read(run).masks[1].generations == (1,)
    assert make_mask(run, published(generation="0")).mask == 0
    mean = make_mask(run, published(generation="all"))
    assert (mean.mask, mean.generations, mean.rows_left_out) == (2, (0, 1), 0)
    assert before.items() <= contents(run / "train").items()


def test_a_shard_without_scored_rows_is_written_all_the_same(tmp_path: Path) -> None:
    rows = [value_row(0, 4), value_row(1, 0, "rejected"), value_row(2, 6)]
    run = small_run(tmp_path, rows, per_shard=1)
    assert [shard.rows for shard in manifest.read(run).masks[0].shards] == [1, 0, 1]
    assert verify(run) == []


def test_the_same_settings_are_a_no_op(run: Path) -> None:
    first = make_mask(run, RANK)
    before = contents(run)
    again = make_mask(run, replace(RANK, seed=99))  # the seed matters to `random` alone
    assert (first.created, again.created) == (True, False)
    assert replace(again, created=True) == first
    assert contents(run) == before
    old = make_mask(run, published())
    assert (old.mask, old.created, old.newest) == (0, False, False)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "config",
    [
        published(keep=0.4),
        published(keep="positive"),
        published(scope="row"),
        published(weights="relu"),
        published(by="nll"),
        published(stability_weight=0),
        published(stability_scale="rms"),
        published(allow_empty_rows=True),
        published(by="random", seed=1),
    ],
)
def test_other_settings_are_another_mask(run: Path, config: MaskConfig) -> None:
    before = contents(run / "train")
    made = make_mask(run, config)
    assert (made.mask, made.created, made.path.name) == (1, True, "mask=0001")
    assert {name: data for name, data in contents(run / "train").items() if "mask=0000" in name} == before
    assert make_mask(run, config).created is False
    kept = sum(weight > 0 for row in stored_weights(run, 1) for weight in row)
    assert kept == made.kept_tokens


def test_a_seed_makes_another_random_mask(run: Path) -> None:
    one, two = (make_mask(run, published(by="random", seed=seed)) for seed in (1, 2))
    assert (one.mask, two.mask) == (1, 2)
    assert stored_weights(run, 1) != stored_weights(run, 2)


def test_score_settings_serve_as_mask_settings(run: Path) -> None:
    assert make_mask(run, ScoreConfig(data=("rows.jsonl",), keep=0.5, by="value", always_keep="none")).created is False


@pytest.mark.one_in(8)
@pytest.mark.parametrize(
    "point", ["after-temp-open", "mid-write:9", "after-close:2", "after-rename", "after-rename:2", "before-manifest",
              "after-fsync:4", "after-rename:4"],
)  # fmt: skip
def test_a_killed_mask_is_finished_with_the_same_bytes(run: Path, tmp_path: Path, point: str) -> None:
    killed_and_finished(run, tmp_path / "whole", point)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("point", ["mid-write:20", "after-rename:2", "before-manifest"])
def test_a_killed_mean_of_pairs_is_finished_with_the_same_bytes(tmp_path: Path, point: str) -> None:
    run = small_run(tmp_path / "a", kind="preference", generations=(0, 1))
    killed_and_finished(run, tmp_path / "whole", point)


def killed_and_finished(run: Path, whole: Path, point: str) -> None:
    shutil.copytree(run, whole)
    make_mask(whole, RANK)
    code = (
        "import sys, pathlib; from test_remask import RANK; from alphatoken_curate.masks.remask import make_mask\n"
        "make_mask(pathlib.Path(sys.argv[1]), RANK)"
    )
    searched = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, KILL_AT: point, "PYTHONPATH": searched}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(run)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    made = make_mask(run, RANK)
    assert made.mask == 1
    assert contents(run) == contents(whole)


def test_a_begun_mask_of_other_settings_is_not_touched(run: Path) -> None:
    make_mask(run, RANK)
    (run / "train/mask=0001/part-00002.parquet").unlink()
    manifest.write(run, manifest.rebuild(run))
    before = contents(run / "train")
    made = make_mask(run, published(keep=0.1))
    assert made.mask == 2
    assert before.items() <= contents(run / "train").items()


def test_a_lost_shard_of_a_mask_is_made_again(run: Path) -> None:
    before = contents(run)
    (run / "train/mask=0000/part-00001.parquet").unlink()
    made = make_mask(run, published())
    assert made.created and made.mask == 0
    assert contents(run) == before


def test_settings_that_cannot_be_used_change_nothing(run: Path) -> None:
    before = contents(run)
    for config in (published(by="nope"), published(by="nll/0"), published(by="nll +")):
        with pytest.raises(UsageError):
            make_mask(run, config)
    assert contents(run) == before


def test_a_run_without_reference_says_so(tmp_path: Path) -> None:
    run = small_run(tmp_path, value_rows(reference=False))
    with pytest.raises(UsageError, match="--reference"):
        make_mask(run, published(by="nll - reference_nll"))


def test_values_that_are_not_the_manifests_are_refused(run: Path) -> None:
    path = run / "values/generation=0/part-00001.parquet"
    good = path.read_bytes()
    for content in (
        (run / "values/generation=0/part-00000.parquet").read_bytes(),
        good[:-1],
        bytes([good[0] ^ 1]) + good[1:],
    ):
        path.write_bytes(content)
        with pytest.raises(StoredDataError, match=r"part-00001\.parquet"):
            make_mask(run, RANK)
    path.unlink()
    with pytest.raises(StoredDataError, match="missing"):
        make_mask(run, RANK)


@pytest.mark.one_in(2)
@KINDS
@pytest.mark.parametrize("generation", ["latest", "all"])
def test_what_stability_changed(tmp_path: Path, kind: str, generation: str) -> None:
    run = small_run(tmp_path, kind=kind, generations=(0, 1), config=published(generation=generation))
    found = spreads(run, published(generation=generation))
    made = [value_rows(seed=seed, kind=kind) for seed in ((1,) if generation == "latest" else (0, 1))]
    direct = [
        np.float32(np.mean([np.float64(row.branches[number].signals["stab_direct"][at]) for row in same]))
        for same in zip(*made, strict=True)
        if all(map(is_scored, same))
        for number, one in enumerate(same[0].branches)
        for at in np.flatnonzero(one.response)
    ]
    assert found.components["stab_direct"] == pytest.approx(math.sqrt(sum(float(x) ** 2 for x in direct) / len(direct)))
    assert found.response_tokens == len(direct)
    make_mask(run, published(stability_weight=0, generation=generation))
    both = LAYOUTS[kind].branches
    changed = [len(stored_kept(run, 0, prefix) ^ stored_kept(run, 1, prefix)) for prefix in both]
    assert found.decisions_changed == sum(changed) and all(changed)
    assert spreads(run, published(by="nll", generation=generation)).decisions_changed == 0


def told(run: Path, *flags: str) -> list[str]:
    done = CliRunner().invoke(command, [str(run), *flags])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_the_command_tells_of_branches_and_generations(tmp_path: Path) -> None:
    several(tmp_path / "a", "preference")
    lines = told(tmp_path / "a", "--generation", "0,1")
    made = manifest.read(tmp_path / "a").masks[0]
    kept, response = ([len(stored_kept(tmp_path / "a", 0, prefix)) for prefix in PREFERENCE.branches],
                      [len(plain_values(value_rows(kind="preference"), number)) for number in (0, 1)])  # fmt: skip
    lost = [int(one.response.sum()) for one in value_rows(kind="preference")[4].branches]
    assert f"  tokens  {sum(kept)} of {made.response_tokens} response tokens kept" in lines[2]
    assert lines[3].strip() == ", ".join(
        f"{name} {part} of {whole - gone}"
        for name, part, whole, gone in zip(("chosen", "rejected"), kept, response, lost, strict=True)
    ) + " kept"  # fmt: skip
    assert "  values  the mean of generations 0, 1" in lines
    assert "          1 row is left out: scored in only some of them" in lines
    assert "  values  generation 3" in told(tmp_path / "a")


def test_the_command_says_no_more_than_there_is(run: Path) -> None:
    assert not [line for line in told(run) if "chosen" in line or "values" in line or "left out" in line]


@KINDS
@pytest.mark.parametrize("scale", ["none", "rms"])
def test_the_mask_of_an_influence_run_recombines_its_components(tmp_path: Path, kind: str, scale: str) -> None:
    rows = value_rows(kind=kind, estimator="influence")
    run = small_run(tmp_path, kind=kind, estimator="influence")
    made = make_mask(run, published(keep=0.3, stability_weight=4, stability_scale=scale))
    parts = [
        [one.signals[name][at] for name in ("adapt_influence", "stab_influence")]
        for row in filter(is_scored, rows)
        for one in row.branches
        for at in np.flatnonzero(one.response)
    ]
    sizes = np.sqrt(np.mean(np.square(np.array(parts, np.float64)), axis=0)) if scale == "rms" else np.ones(2)
    for number, prefix in enumerate(LAYOUTS[kind].branches):
        values = {
            (row.row_id, int(at)): signals["adapt_influence"][at] / sizes[0]
            + 4 * signals["stab_influence"][at] / sizes[1]
            for row in filter(is_scored, rows)
            for signals in [row.branches[number].signals]
            for at in np.flatnonzero(row.branches[number].response)
        }
        assert stored_kept(run, made.mask, prefix) == plain_kept(values, 0.3)[0]
    found = spreads(run, published(stability_weight=4, stability_scale=scale))
    assert list(found.components) == ["adapt_influence", "stab_influence"]
    assert list(found.components.values()) == pytest.approx(np.sqrt(np.mean(np.square(parts), axis=0)), rel=1e-5)
    assert found.decisions_changed > 0


def test_a_mask_weighs_stability_as_the_values_of_the_run_do(tmp_path: Path) -> None:
    """`mask` weighed it by 1.5 whatever the run was scored with, so `--by value` was not the run's column."""
    rows, settings = value_rows(), {"stability_weight": 0.25}
    run = small_run(tmp_path, rows, settings=settings, config=published(keep=0.2, by="nll"))
    made = make_mask(run, published(keep=0.3))
    values = {
        (row.row_id, int(at)): one["adapt_direct"][at]
        + one["adapt_causal"][at]
        + np.float32(0.25) * (one["stab_direct"][at] + one["stab_causal"][at])
        for row in filter(is_scored, rows)
        for one in [row.branches[0].signals]
        for at in np.flatnonzero(row.branches[0].response)
    }
    assert stored_kept(run, made.mask, "") == plain_kept(values, 0.3)[0]
    assert make_mask(run, published(keep=0.3, stability_weight=0.25)).mask == made.mask
    other = make_mask(run, published(keep=0.3, stability_weight=1.5))
    assert stored_kept(run, other.mask, "") != plain_kept(values, 0.3)[0]
    told = {one.mask: one.settings["stability_weight"] for one in manifest.read(run).masks}
    assert (told[made.mask], told[other.mask]) == (0.25, 1.5)
    one, same, third = (spreads(run, published(**how)) for how in ({}, settings, {"stability_weight": 1.5}))
    assert one == same != third


def test_selecting_by_upstream_needs_a_run_that_has_it(tmp_path: Path) -> None:
    run = small_run(tmp_path / "both", estimator="exact+influence")
    made = make_mask(run, published(keep=0.3, by="adapt_direct + adapt_upstream"))
    values = {
        (row.row_id, int(at)): float(np.float32(signals["adapt_direct"][at] + signals["adapt_upstream"][at]))
        for row in filter(is_scored, value_rows(estimator="exact+influence"))
        for signals in [row.branches[0].signals]
        for at in np.flatnonzero(row.branches[0].response)
    }
    assert stored_kept(run, made.mask, "") == plain_kept(values, 0.3)[0]
    plain = small_run(tmp_path / "plain")
    before = contents(plain)
    with pytest.raises(UsageError, match=r"adapt_upstream was not computed: .*--estimator exact\+influence"):
        make_mask(plain, published(by="adapt_upstream"))
    assert contents(plain) == before


@KINDS
def test_generations_of_an_influence_run_are_averaged(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path, kind=kind, estimator="influence", generations=(0, 1), config=published(generation="all"))
    made = [value_rows(kind=kind, estimator="influence", seed=seed) for seed in (0, 1)]
    for number, prefix in enumerate(LAYOUTS[kind].branches):
        values = {}
        for same in zip(*made, strict=True):
            for at in np.flatnonzero(same[0].branches[number].response) if all(map(is_scored, same)) else ():
                a, b = (
                    np.float32(np.mean([np.float64(row.branches[number].signals[name][at]) for row in same]))
                    for name in ("adapt_influence", "stab_influence")
                )
                values[same[0].row_id, int(at)] = float(np.float32(float(a) + 1.5 * float(b)))
        stored = trained(run).select("row_id", f"{prefix}value").rows()
        assert {(row_id, at): v for row_id, row in stored for at, v in enumerate(row) if v is not None} == values


@pytest.mark.one_in(5)
@KINDS
@pytest.mark.parametrize(
    ("config", "units"),
    [
        (published(), "nats per unit step"),
        (published(stability_scale="rms"), "multiples of the RMS of an objective"),
        (published(by="entropy"), "nats"),
        (published(by="stab_causal"), "nats per unit step"),
        (published(by="random"), "0 to 1"),
        (published(by="token_id"), "token"),
        (published(by="position"), "position"),
        (published(by="nll - reference_nll"), "those of the --by expression"),
        (published(by="value + 1"), "those of the --by expression"),
    ],
)
def test_the_footer_has_the_units_of_what_the_mask_was_made_from(
    tmp_path: Path, kind: str, config: MaskConfig, units: str
) -> None:
    run = small_run(tmp_path / "a", kind=kind, config=config)
    layout = LAYOUTS[kind]
    for path in shards.listed(shards.train_folder(run, 0)).values():
        with pq.ParquetFile(path) as file:
            told = orjson.loads(file.metadata.metadata[b"alphatoken_curate.units"])
            schema = file.schema_arrow
        for prefix in layout.branches:
            assert told[f"{prefix}value"] == schema.field(f"{prefix}value").metadata[b"units"].decode() == units
            assert told[f"{prefix}loss_weight"] == "ratio"
    assert verify(run) == []


def test_a_mask_by_a_number_of_the_pair_has_its_units(tmp_path: Path) -> None:
    run = small_run(tmp_path / "a", kind="preference", config=published(by="margin"))
    with pq.ParquetFile(shards.train_folder(run, 0) / "part-00000.parquet") as file:
        assert file.schema_arrow.field("chosen_value").metadata[b"units"] == b"beta x nats"
