from __future__ import annotations

import base64
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest
from small_run import published, small_run, value_rows, write_pieces, write_rejects

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.page.rows import PackedRows, codes, drawn_rows, pack_rows, planes, varints
from alphatoken_curate.page.tokens import read_tokens
from alphatoken_curate.reading.row import read_row
from alphatoken_curate.reading.scan import scan_tokens
from alphatoken_curate.runs.schema import STATUSES
from alphatoken_curate.tokens.pieces import Piece
from alphatoken_curate.views import heat


def packed(run: Path) -> PackedRows:
    return pack_rows(run, read_tokens(run))


def stream(rows: PackedRows, name: str) -> bytes:
    return zlib.decompress(base64.b64decode(rows.parts[name], validate=True))


def about(rows: PackedRows) -> Any:
    return orjson.loads(stream(rows, "d-about"))


def plain_varints(content: bytes) -> list[int]:
    found, value, shift = [], 0, 0
    for byte in content:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
    return found


def numbers(rows: PackedRows, index: int, blocks: int) -> list[float]:
    """A column of every block, whole."""
    found: list[float] = []
    for block in range(blocks):
        flat = np.frombuffer(stream(rows, f"d-{block}-{index}"), np.uint8)
        found += flat.reshape(4, -1).T.copy().view("<f4").ravel().tolist()
    return found


def test_varints_come_back() -> None:
    values = np.array([0, 1, 127, 128, 16383, 16384, (1 << 21) - 1])
    assert plain_varints(varints(values)) == values.tolist()
    assert len(varints(values[:3])) == 3 and varints(values[:0]) == b""


def test_planes_come_back() -> None:
    values = np.array([1.5, -2e-30, np.nan, 0.0], np.float32)
    back = np.frombuffer(planes(values), np.uint8).reshape(4, -1).T.copy().view("<f4").ravel()
    assert back.tobytes() == values.tobytes()


def test_codes_are_within_half_a_step() -> None:
    values = np.r_[0.0, np.nan, np.geomspace(1e-3, 1, 400), -np.geomspace(1e-3, 1, 400)].astype(np.float32)
    top, ratio = 1.0, 1e3 ** (1 / 126)
    found = codes(values, top, ratio)
    assert found[0] == 0 and found[1] == 128
    for code, value in zip(found[2:].tolist(), values[2:].tolist(), strict=True):
        back = top / ratio ** (127 - (code & 127)) * (-1 if code > 128 else 1)
        assert code & 127 and abs(np.log(back / value)) < np.log(ratio) * 0.501
    assert codes(np.array([1e-6, 4e-4, 9e-4], np.float32), top, ratio).tolist() == [0, 0, 1]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_every_row_comes_back_with_its_texts_and_numbers(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alphatoken_curate.page.rows.BLOCK_TOKENS", 25)
    run = small_run(tmp_path / "run", kind=kind)
    rows = packed(run)
    told = about(rows)
    blocks = told["blocks"]
    assert len(blocks) > 2 and rows.shown == rows.total == 12 and rows.exact and told["exact"]
    assert told["rows"]["id"] == list(range(12))
    texts = [told["texts"][i] for n in range(len(blocks)) for i in plain_varints(stream(rows, f"d-{n}-t"))]
    used = Counter(texts)
    assert [used[text] for text in told["texts"]] == sorted(used.values(), reverse=True)
    views = [read_row(run, row=i) for i in range(12)]
    assert texts == [text for view in views for branch in view.branches for text in branch.texts]
    runs = [[branch.response for branch in view.branches] for view in views]
    assert [[[x for i, n in enumerate(one) for x in [i % 2] * n] for one in row] for row in told["rows"]["runs"]] == [
        [one.astype(int).tolist() for one in row] for row in runs
    ]
    assert [STATUSES[i] for i in told["rows"]["status"]] == [view.status for view in views]
    expected = scan_tokens(run).collect()  # row by row, chosen before rejected
    for index, column in enumerate(told["columns"]):
        if not column.get("constant"):
            assert numbers(rows, index, len(blocks)) == expected[column["name"]].to_list()
            assert column["scale"] == heat.scale_of(expected[column["name"]].to_numpy())
    kept = [
        np.unpackbits(np.frombuffer(stream(rows, f"d-{n}-k"), np.uint8), bitorder="little") for n in range(len(blocks))
    ]
    ends = np.searchsorted(expected["row_id"].to_numpy(), [*blocks, 12])
    flat = np.concatenate([bits[: b - a] for bits, a, b in zip(kept, ends[:-1], ends[1:], strict=True)])
    assert flat.astype(bool).tolist() == expected["kept"].to_list()
    assert told["weight"] == 1.0 and rows.columns[-1] == "loss_weight"


def test_soft_weights_are_a_column(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config=published(weights="rank"))
    rows = packed(run)
    told = about(rows)
    index = [one["name"] for one in told["columns"]].index("loss_weight")
    assert told["weight"] is None
    assert numbers(rows, index, 1) == scan_tokens(run).collect()["loss_weight"].to_list()


def test_of_many_numbers_all_are_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphatoken_curate.page.rows.MOST_EXACT", 50)
    run = small_run(tmp_path / "run")
    rows = packed(run)
    told = about(rows)
    assert not rows.exact
    value = scan_tokens(run).collect()["value"].to_numpy()
    column = told["columns"][0]
    top, ratio = column["code"]
    found = np.frombuffer(stream(rows, "d-0-0"), np.uint8).astype(int)
    back = np.where(found > 128, -1, 1) * np.where(found, top / ratio ** (127.0 - (found & 127)), 0)
    smallest = top / ratio**126
    assert column["name"] == "value" and (np.abs(value) < smallest).mean() < 0.03
    assert np.all(np.abs(back - value) <= np.maximum(np.abs(value) * 0.05, smallest))


def test_rows_beyond_the_limits_are_drawn_by_their_numbers() -> None:
    lengths = np.full(1000, 10)
    assert drawn_rows(lengths, 1000, 10_000).tolist() == list(range(1000))
    some = drawn_rows(lengths, 300, 10_000)
    assert len(some) == 300 and (np.diff(some) > 0).all() and 400 < some.mean() < 600
    fewer = drawn_rows(lengths, 300, 500)
    assert len(fewer) == 50 and set(fewer) < set(some)
    assert len(drawn_rows(np.array([99, 99]), 10, 5)) == 1 and len(drawn_rows(np.empty(0, np.int64), 10, 5)) == 0


def test_a_sample_keeps_rows_and_numbers_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphatoken_curate.page.rows.MOST_ROWS", 4)
    run = small_run(tmp_path / "run")
    rows = packed(run)
    told = about(rows)
    assert (rows.shown, rows.total) == (4, 12) and told["rows"]["id"] == drawn_rows(
        np.ones(12, np.int64), 4, 99
    ).tolist()
    expected = scan_tokens(run).filter(pl.col("row_id").is_in(told["rows"]["id"])).collect()
    assert numbers(rows, 0, 1) == expected["value"].to_list()
    assert told["rows"]["line"] == [number + 1 for number in told["rows"]["id"]]


def test_split_characters_are_whole_and_special_tokens_stay_apart(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    ids = value_rows()[1].branches[0].input_ids.tolist()
    contents = {ids[0]: (b"\xe2", False), ids[1]: (b"\x82", False), ids[2]: (b"\xac \x1b", False), ids[3]: (b"x", True)}
    write_pieces(run, [Piece(*contents.get(number, (b"x", False))) for number in range(50)])
    told = about(packed(run))
    assert "€ \x1b" in told["texts"]
    assert told["shown"][str(told["texts"].index("€ \x1b"))] == "€ ␛"
    assert told["shown"][str(told["texts"].index(""))] == "▯"  # a piece that ends no character adds nothing to search
    assert sorted(told["classes"][told["kinds"][i]] for i, text in enumerate(told["texts"]) if text == "x") == [
        "special",
        "words",
    ]


def test_reasons_of_refused_rows_and_rows_left_out_of_the_mask(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    lines = [{"row_id": 3, "message": "no\x1b <b>"}, {"row_id": 99, "message": "other"}]
    write_rejects(run, lines)
    assert about(packed(run))["reasons"] == {"3": "no␛ <b>"}
    tokens = read_tokens(run)
    assert tokens.weight is not None
    without = np.where(tokens.row == 4, np.float32(np.nan), tokens.weight)
    assert about(pack_rows(run, replace(tokens, weight=without)))["rows"]["out"] == [4]
    (run / "rejects.jsonl").write_text("{")
    with pytest.raises(StoredDataError, match=r"rejects\.jsonl: damaged"):
        packed(run)
