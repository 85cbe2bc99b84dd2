from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import (
    published,
    renamed,
    small_run,
    value_row,
    value_rows,
    write_generation,
    write_pieces,
    write_rejects,
)

from alphatoken_curate import mask
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.reading.row import BranchView, RowView, read_row
from alphatoken_curate.reading.scan import scan
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.shards import Branch, ValueRow
from alphatoken_curate.tokens.pieces import Piece


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_a_scored_row_is_read_with_its_values_mask_and_text(tmp_path: Path, kind: str) -> None:
    rows = value_rows(kind=kind)
    run = small_run(tmp_path / "run", rows, kind=kind)
    make_mask(run, published(keep=0.2, weights="rank"))
    prefixes = ("chosen_", "rejected_") if kind == "preference" else ("",)
    weights = {row["row_id"]: row for row in scan(run, "train", mask=1).collect().iter_rows(named=True)}
    for row in (rows[0], rows[6], rows[11]):
        view = read_row(run, row=row.row_id)
        told = (view.row_id, view.source, view.line, view.id, view.status)
        assert told == (row.row_id, "rows.jsonl", row.line, row.id, "scored")
        assert (view.mask, view.mask_generations, view.left_out) == (1, (0,), False)
        assert (view.omega, view.margin) == (row.omega, row.margin)
        for branch, prefix, written in zip(view.branches, prefixes, row.branches, strict=True):
            assert branch.name == prefix.rstrip("_")
            check_branch(view, branch, written, np.array(weights[row.row_id][f"{prefix}loss_weight"], np.float32))


def check_branch(view: RowView, branch: BranchView, written: Branch, weight: np.ndarray) -> None:
    assert np.array_equal(branch.token_ids, written.input_ids)
    assert branch.texts == tuple(f"<{number}>" for number in written.input_ids)
    assert np.array_equal(branch.response, written.response)
    for name, signal in written.signals.items():
        assert np.array_equal(view.column(branch, name), signal, equal_nan=True)
    assert np.array_equal(branch.kept, weight > 0)
    column = view.column(branch, "loss_weight")
    assert np.array_equal(column[written.response], weight[written.response])
    assert np.isnan(column[~written.response]).all()


@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize(("number", "status"), [(3, "rejected"), (5, "failed"), (7, "target")])
def test_rows_that_were_not_scored(tmp_path: Path, number: int, status: str, kind: str) -> None:
    run = small_run(tmp_path / "run", kind=kind)
    write_rejects(run, [{"row_id": 1, "message": "no"}, {"row_id": 3, "message": "no answer"}])
    view = read_row(run, row=number)
    assert view.status == status
    assert (view.mask, view.mask_generations, view.left_out) == (None, (), False)
    assert view.omega is view.margin is None
    assert view.reason == ("no answer" if status == "rejected" else None)
    for branch, written in zip(view.branches, value_rows(kind=kind)[number].branches, strict=True):
        assert (branch.signals, branch.weight) == ({}, None)
        assert len(branch.texts) == len(written.input_ids)
        assert (len(branch.texts) == 0) == (status == "rejected")


def test_one_branch_can_be_chosen(tmp_path: Path) -> None:
    pair, single = (read_row(small_run(tmp_path / kind, kind=kind), row=1) for kind in ("preference", "sft"))
    assert [branch.name for branch in pair.chosen_branches(None)] == ["chosen", "rejected"]
    assert [branch.name for branch in pair.chosen_branches("rejected")] == ["rejected"]
    assert single.chosen_branches(None) == single.branches
    with pytest.raises(UsageError, match="branch: found 'chosen'; the run holds SFT rows"):
        single.chosen_branches("chosen")


def test_any_generation_can_be_shown(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", generations=(0, 2))
    for number, checkpoint, seed in ((0, "base", 0), (2, "checkpoint-2", 2), (None, "checkpoint-2", 2)):
        view = read_row(run, id="n6", generation=number)
        assert (view.generation, view.checkpoint) == (seed, checkpoint)
        expected = value_rows(seed=seed)[6].branches[0].signals["value"]
        assert np.array_equal(view.branches[0].signals["value"], expected, equal_nan=True)
        assert (view.mask, view.mask_generations) == (0, (2,))
    with pytest.raises(UsageError, match="has no generation 1; it has 0, 2"):
        read_row(run, row=0, generation=1)
    assert read_row(small_run(tmp_path / "one"), row=0).checkpoint is None


def test_a_row_that_a_mask_of_several_generations_leaves_out(tmp_path: Path) -> None:
    rows = value_rows()
    run = small_run(tmp_path / "run", rows)
    write_generation(run, [failed(row) if row.row_id == 4 else row for row in rows], number=1)
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, published(generation="all"))
    view = read_row(run, row=4, generation=0)
    assert (view.status, view.mask, view.mask_generations, view.left_out) == ("scored", 1, (0, 1), True)
    assert view.branches[0].weight is None
    with pytest.raises(UsageError, match="mask 1 leaves row 4 out"):
        view.column(view.branches[0], "loss_weight")
    assert read_row(run, row=4).status == "failed"
    assert not read_row(run, row=6).left_out
    # A mask of this generation alone must hold the row.
    shutil.rmtree(run / "train")
    manifest.write(run, replace(manifest.rebuild(run), masks=()))
    make_mask(run, published(generation="1"))
    stored = manifest.read(run)
    manifest.write(run, replace(stored, masks=(replace(stored.masks[0], generations=(0,)),)))
    with pytest.raises(StoredDataError, match="does not hold row 4 as values/ does"):
        read_row(run, row=4, generation=0)


def failed(row: ValueRow) -> ValueRow:
    """The row as a scoring leaves it that could not compute its values."""
    return replace(row, status="failed", branches=tuple(replace(one, signals={}) for one in row.branches))


def test_a_rejected_row_without_its_reason(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    assert read_row(run, row=3).reason is None
    (run / "rejects.jsonl").unlink()
    assert read_row(run, row=3).reason is None
    for renames in (False, True):
        (run / "rejects.jsonl").write_text("{")
        if renames:
            renamed(run)
        with pytest.raises(StoredDataError, match=r"rejects\.jsonl: damaged"):
            read_row(run, row=3)


@pytest.mark.parametrize("number", [-1, 12, 10**20])
def test_a_row_that_is_not_there(tmp_path: Path, number: int) -> None:
    with pytest.raises(UsageError, match=r"has no row -?\d+; its rows are 0 to 11"):
        read_row(small_run(tmp_path / "run"), row=number)


def test_a_row_by_its_id(tmp_path: Path) -> None:
    rows = [*value_rows(8), replace(value_row(8, 5), id="n2")]
    run = small_run(tmp_path / "run", rows)
    assert read_row(run, id="n6").row_id == 6
    with pytest.raises(UsageError, match=r"rows 2, 8 have the id 'n2'"):
        read_row(run, id="n2")
    with pytest.raises(UsageError, match=r"no row has the id 'x'"):
        read_row(run, id="x")


def test_exactly_one_of_row_and_id(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    for given in ({}, {"row": 1, "id": "n2"}):
        with pytest.raises(UsageError, match="one of --row N, --id ID and --search TEXT"):
            read_row(run, **given)


def test_without_a_mask_all_response_tokens_count_as_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_generation(run, value_rows())
    manifest.write(run, manifest.rebuild(run))
    view = read_row(run, row=1)
    (branch,) = view.branches
    assert branch.weight is view.mask is None
    assert np.array_equal(branch.kept, branch.response)
    with pytest.raises(UsageError, match="no mask"):
        view.column(branch, "loss_weight")


def test_columns_that_cannot_be_shown(tmp_path: Path) -> None:
    view = read_row(small_run(tmp_path / "run", value_rows(reference=False)), row=0)
    (branch,) = view.branches
    with pytest.raises(UsageError, match=r"'colour': names no column 'colour'. The columns are .*surprise"):
        view.column(branch, "colour")
    asked = {"reference_nll": "--reference", "drift_direct": "--retention", "drift_causal": "--drift"}
    asked |= {"adapt_upstream": r"exact\+influence", "stab_influence": "--estimator influence"}
    for name, told in asked.items():
        with pytest.raises(UsageError, match=rf"{name} was not computed.*{told}"):
            view.column(branch, name)
        assert not view.computed(name)
    assert view.computed("value")


def test_tokens_without_text_are_shown_by_number(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    path = run / "artifacts/vocab.parquet"
    ids = value_rows()[1].branches[0].input_ids
    numbers = tuple(f"<{number}>" for number in ids)
    write_pieces(run, [Piece(content=b"a" if number == ids[0] else b"", special=False) for number in range(40)])
    assert read_row(run, row=1).branches[0].texts == tuple("a" if i == ids[0] else f"<{i}>" for i in ids)
    path.unlink()
    assert read_row(run, row=1).branches[0].texts == numbers
    path.write_bytes(b"PAR1")
    with pytest.raises(StoredDataError, match=r"vocab\.parquet: damaged"):
        read_row(run, row=1)


def test_a_character_that_tokens_split_is_read_whole(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    ids = value_rows()[1].branches[0].input_ids
    contents = {int(ids[1]): b"\xe2", int(ids[2]): b"\x82", int(ids[3]): b"\xac!"}
    write_pieces(run, [Piece(content=contents.get(number, b"a"), special=False) for number in range(50)])
    assert read_row(run, row=1).branches[0].texts == ("a", "\ufffd", "\ufffd", "€!", *["a"] * (len(ids) - 4))


def test_damage_is_found_in_what_is_read(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    path = run / "train/mask=0000/part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert read_row(run, row=0).mask == 0
    with pytest.raises(StoredDataError, match="part-00001"):
        read_row(run, row=6)


BY = ("7 - surprise", "surprise", "-nll", "value * 2", "random", "position + token_id")


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("kind", "by"), [*(("sft", by) for by in BY), *(("preference", by) for by in (*BY, "omega", "value * margin"))]
)
def test_numbers_to_show_by_are_those_that_a_mask_is_made_by(tmp_path: Path, kind: str, by: str) -> None:
    run = small_run(tmp_path / "run", value_rows(kind=kind), kind=kind)
    made = mask(run, published(by=by, scope="row", weights="rank"))
    view = read_row(run, row=0)
    assert made.created
    for branch in view.branches:
        numbers, kept = view.column(branch, by), branch.kept
        assert np.array_equal(np.isfinite(numbers), branch.response)
        dropped = branch.response & ~kept
        assert kept.any() and (not dropped.any() or numbers[kept].min() >= numbers[dropped].max())


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_a_draw_is_that_of_the_mask_it_is_shown_beside(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path / "run", kind=kind, config=published(by="random", seed=3, keep=0.5, scope="row"))
    view = read_row(run, row=4)
    for branch in view.branches:
        drawn, kept = view.column(branch, "random"), branch.kept
        dropped = branch.response & ~kept
        assert kept.any() and drawn[kept].min() > drawn[dropped].max(initial=0)


def test_what_looks_at_several_tokens_is_refused_and_not_shown_of_one_row(tmp_path: Path) -> None:
    view = read_row(small_run(tmp_path / "run"), row=0)
    with pytest.raises(UsageError, match="may look at several tokens at once, which for a mask are those of the whole"):
        view.column(view.branches[0], "nll - avg(nll)")
    with pytest.raises(UsageError, match=r"names no column 'nul'\. Did you mean nll"):
        view.column(view.branches[0], "nul")


@pytest.mark.parametrize("status", ["target", "failed", "rejected"])
@pytest.mark.parametrize("by", ["nll", "7 - surprise"])
def test_a_row_that_was_not_scored_has_no_numbers(tmp_path: Path, status: str, by: str) -> None:
    rows = value_rows()
    number = next(row.row_id for row in rows if row.status == status)
    view = read_row(small_run(tmp_path / "run", rows), row=number)
    with pytest.raises(UsageError, match=rf"by: row {number} has no numbers: it was not scored \({status}\)"):
        view.column(view.branches[0], by)


def test_numbers_of_a_pair_are_as_a_mask_has_them(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(kind="preference"), kind="preference")
    view = read_row(run, row=0)
    branch, omega = view.branches[0], np.float32(view.omega or 0)
    assert np.array_equal(
        view.column(branch, "omega * nll")[branch.response], omega * branch.signals["nll"][branch.response]
    )
