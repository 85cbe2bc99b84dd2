from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import small_run, value_row, value_rows, write_generation

from alphatoken_curate import manifest
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.remask import make_mask
from alphatoken_curate.row_view import read_row
from alphatoken_curate.scan import scan


def test_a_scored_row_is_read_with_its_values_mask_and_text(tmp_path: Path) -> None:
    rows = value_rows()
    run = small_run(tmp_path / "run", rows)
    make_mask(run, MaskConfig(keep=0.2, weights="rank"))
    weights = {row["row_id"]: row["loss_weight"] for row in scan(run, "train", mask=1).collect().iter_rows(named=True)}
    for row in (rows[0], rows[6], rows[11]):
        view = read_row(run, row=row.row_id)
        assert (view.row_id, view.source, view.line, view.id, view.status) == (
            *(row.row_id, "rows.jsonl", row.line),
            *(row.id, "scored"),
        )
        assert np.array_equal(view.token_ids, row.input_ids)
        assert view.texts == tuple(f"<{number}>" for number in row.input_ids)
        assert np.array_equal(view.response, row.response)
        for name, signal in row.signals.items():
            assert np.array_equal(view.column(name), signal, equal_nan=True)
        assert view.mask == 1
        expected = np.array(weights[row.row_id], np.float32)
        assert np.array_equal(view.kept, expected > 0)
        column = view.column("loss_weight")
        assert np.array_equal(column[row.response], expected[row.response])
        assert np.isnan(column[~row.response]).all()


@pytest.mark.parametrize(("number", "status"), [(3, "rejected"), (5, "failed"), (7, "target")])
def test_rows_that_were_not_scored(tmp_path: Path, number: int, status: str) -> None:
    run = small_run(tmp_path / "run")
    (run / "rejects.jsonl").write_text('{"row_id": 1, "message": "no"}\n{"row_id": 3, "message": "no answer"}\n')
    view = read_row(run, row=number)
    assert view.status == status
    assert (view.signals, view.weight, view.mask) == ({}, None, None)
    assert view.reason == ("no answer" if status == "rejected" else None)
    assert len(view.texts) == (0 if status == "rejected" else len(value_rows()[number].input_ids))


def test_a_rejected_row_without_its_reason(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    assert read_row(run, row=3).reason is None
    (run / "rejects.jsonl").unlink()
    assert read_row(run, row=3).reason is None
    (run / "rejects.jsonl").write_text("{")
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
        with pytest.raises(UsageError, match="--row N or --id ID"):
            read_row(run, **given)


def test_without_a_mask_all_response_tokens_count_as_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_generation(run, value_rows())
    manifest.write(run, manifest.rebuild(run))
    view = read_row(run, row=1)
    assert view.weight is view.mask is None
    assert np.array_equal(view.kept, view.response)
    with pytest.raises(UsageError, match="no mask"):
        view.column("loss_weight")


def test_columns_that_cannot_be_shown(tmp_path: Path) -> None:
    view = read_row(small_run(tmp_path / "run", value_rows(reference=False)), row=0)
    with pytest.raises(UsageError, match=r"found 'colour'.*loss_weight"):
        view.column("colour")
    with pytest.raises(UsageError, match="reference_nll was not computed"):
        view.column("reference_nll")
    assert not view.computed("reference_nll")
    assert view.computed("value")


def test_tokens_without_text_are_shown_by_number(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    path = run / "artifacts/vocab.parquet"
    ids = value_rows()[1].input_ids
    numbers = tuple(f"<{number}>" for number in ids)
    pq.write_table(pa.table({"token_id": pa.array([int(ids[0])], pa.int32()), "text": pa.array(["a"])}), path)
    assert read_row(run, row=1).texts == tuple("a" if i == ids[0] else f"<{i}>" for i in ids)
    pq.write_table(pa.table({"token_id": pa.array(ids, pa.int32()), "text": pa.array([""] * len(ids))}), path)
    assert read_row(run, row=1).texts == numbers
    path.unlink()
    assert read_row(run, row=1).texts == numbers
    path.write_bytes(b"PAR1")
    with pytest.raises(StoredDataError, match=r"vocab\.parquet: damaged"):
        read_row(run, row=1)


def test_damage_is_found_in_what_is_read(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    path = run / "train/mask=0000/part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert read_row(run, row=0).mask == 0
    with pytest.raises(StoredDataError, match="part-00001"):
        read_row(run, row=6)
