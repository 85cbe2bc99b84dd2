from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from small_run import published, scored, small_run, value_rows, write_generation, write_pieces

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.reading.scan import scan, scan_tokens
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.schema import PAIR_COLUMNS, Components, components
from alphatoken_curate.runs.shards import Branch, ValueRow
from alphatoken_curate.tokens.pieces import Piece


@pytest.fixture(params=["sft", "preference"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return small_run(tmp_path / "a [1]*", kind=request.param)  # a name that would be a pattern


def weights(run: Path, mask: int) -> dict[tuple[int, str], list[float]]:
    """Loss weights by row and prefix of the branch."""
    layout = manifest.layout(manifest.read(run))
    found: dict[tuple[int, str], list[float]] = {}
    for path in shards.listed(shards.train_folder(run, mask)).values():
        for row in shards.read(path, layout.train).to_pylist():
            found |= {(row["row_id"], prefix): row[f"{prefix}loss_weight"] for prefix in layout.branches}
    return found


def plain_tokens(run: Path, mask: int, rows: list[ValueRow], generation: int = 0) -> list[dict[str, Any]]:
    """The same table by loops over the rows that were written."""
    known = manifest.components(manifest.read(run))
    stored = weights(run, mask)
    return [
        token
        for row in rows
        if row.status == "scored"
        for prefix, branch in zip(manifest.layout(manifest.read(run)).branches, row.branches, strict=True)
        for token in plain_branch(row, prefix, branch, known, stored.get((row.row_id, prefix)), generation)
    ]


def plain_branch(
    row: ValueRow, prefix: str, branch: Branch, known: Components, weight: list[float] | None, generation: int
) -> Iterator[dict[str, Any]]:
    of_row = {"omega": row.omega, "margin": row.margin} if prefix else {}
    for i in np.flatnonzero(branch.response):
        token: dict[str, Any] = {
            "row_id": row.row_id,
            "turn": 0,
            **({"branch": prefix[:-1]} if prefix else {}),
            "generation": generation,
            "position": int(i),
        }
        token |= {"token_id": int(branch.input_ids[i]), "text": f"<{branch.input_ids[i]}>", "class": "code"}
        token |= {name: float(branch.signals[name][i]) if name in branch.signals else None for name in known.signals}
        token |= of_row
        yield token | {"kept": weight and weight[i] > 0, "loss_weight": weight and weight[i]}


def test_scan_gives_the_shards_in_order(run: Path) -> None:
    layout = manifest.layout(manifest.read(run))
    values = scan(run).collect()
    assert values["row_id"].to_list() == list(range(12))
    assert values.columns == layout.values.names
    train = scan(str(run), "train").collect()
    assert train.columns == layout.train.names
    found = {(row["row_id"], p): row[f"{p}loss_weight"] for row in train.to_dicts() for p in layout.branches}
    assert found == weights(run, 0)


def test_scan_tokens_is_what_loops_give(run: Path) -> None:
    make_mask(run, published(keep=0.3, weights="rank"))
    layout = manifest.layout(manifest.read(run))
    for mask, newest in ((0, False), (1, True)):
        frame = scan_tokens(run, mask=None if newest else mask)
        want = plain_tokens(run, mask, value_rows(kind=layout.kind))
        for engine in ("streaming", "in-memory"):
            assert frame.collect(engine=engine).to_dicts() == want  # type: ignore[call-overload]
    pair = layout.kind == "preference"
    assert list(frame.collect_schema().items()) == [
        ("row_id", pl.Int64), ("turn", pl.Int32), *([("branch", pl.String)] if pair else []), ("generation", pl.Int32),
        ("position", pl.Int32), ("token_id", pl.Int32), ("text", pl.String), ("class", pl.String),
        *((name, pl.Float32) for name in components("published").signals),
        *(((name, pl.Float32) for name in PAIR_COLUMNS) if pair else ()),
        ("kept", pl.Boolean), ("loss_weight", pl.Float32),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_without_mask_vocabulary_or_reference_the_columns_stay(tmp_path: Path, kind: str) -> None:
    run, rows = tmp_path / "a", value_rows(reference=False, kind=kind)
    write_generation(run, rows)
    manifest.write(run, manifest.rebuild(run))
    frame = scan_tokens(run).collect()
    assert frame.schema == scan_tokens(small_run(tmp_path / "b", kind=kind)).collect_schema()
    assert frame.height == sum(
        int(one.response.sum()) for row in rows if row.status == "scored" for one in row.branches
    )
    for name in ("text", "class", "kept", "loss_weight", "reference_nll"):
        assert frame[name].null_count() == frame.height


def test_only_what_the_manifest_names_is_read(run: Path) -> None:
    before = scan(run, "train").collect()
    folder = run / "train/mask=0000"
    shutil.copy(folder / "part-00000.parquet", folder / "part-00003.parquet")
    shutil.copytree(folder, run / "train/mask=0007")
    assert_frame_equal(scan(run, "train").collect(), before)


def test_a_run_that_is_not_whole_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        scan(tmp_path)
    (run / "manifest.json").rename(tmp_path / "kept")
    with pytest.raises(StoredDataError, match=r"manifest\.json: missing"):
        scan(run)
    (tmp_path / "kept").rename(run / "manifest.json")
    path = run / "values/generation=0/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoredDataError, match=r"part-00001\.parquet: not the file that the manifest names"):
        scan_tokens(run)


def test_numbers_that_are_not_there_are_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="has no generation 4; it has 0"):
        scan(run, generation=4)
    with pytest.raises(UsageError, match="has no mask 1; it has 0"):
        scan_tokens(run, mask=1)
    with pytest.raises(UsageError, match="give `values` or `train`"):
        scan(run, "tokens")  # type: ignore[arg-type]


def test_a_run_before_its_first_mask_has_no_train(tmp_path: Path) -> None:
    write_generation(tmp_path, value_rows())
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    with pytest.raises(UsageError, match="has no mask; run the `mask` command"):
        scan(tmp_path, "train")


def test_rows_that_a_mask_of_several_generations_leaves_out_have_no_weight(tmp_path: Path) -> None:
    for kind in ("sft", "preference"):
        run, first = tmp_path / kind, value_rows(kind=kind)
        again = [scored(row, seed=4) if row.status == "scored" else row for row in first]
        again[4] = failed(again[4])
        small_run(run, first)
        write_generation(run, again, number=3)
        manifest.write(run, manifest.rebuild(run))
        make_mask(run, published(generation="all"))
        left_out = scan_tokens(run, generation=0).filter(pl.col("row_id") == 4).collect()
        assert left_out.height > 1
        assert left_out["kept"].null_count() == left_out["loss_weight"].null_count() == left_out.height
        for number, rows in ((0, first), (3, again)):
            want = plain_tokens(run, 1, rows, number)
            assert scan_tokens(run, generation=number).collect(engine="streaming").to_dicts() == want
        assert scan(run, "train").collect()["row_id"].to_list() == [0, 1, 2, 6, 8, 9, 10, 11]


def failed(row: ValueRow) -> ValueRow:
    """The row as a scoring leaves it that could not compute its values."""
    return replace(
        row, status="failed", branches=tuple(replace(one, signals={}) for one in row.branches), omega=None, margin=None
    )


@pytest.mark.parametrize("read", [scan, scan_tokens])
def test_a_file_of_the_right_size_without_its_footer_is_named(run: Path, read: Callable[[Path], pl.LazyFrame]) -> None:
    """As after a crash of a machine whose disk had not written all: its end is zeros."""
    path = run / "values/generation=0/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9000] + bytes(9000))
    with pytest.raises(StoredDataError, match=r"values/generation=0/part-00001\.parquet: not the file that the manif"):
        read(run)


def test_rows_are_not_read_before_they_are_asked_for(run: Path) -> None:
    frame = scan_tokens(run)
    (run / "values/generation=0/part-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        frame.collect()


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("read", "rots"), [(scan, "values"), (scan_tokens, "values"), (scan_tokens, "train")])
def test_no_flipped_bit_is_read_in_silence(run: Path, read: Callable[[Path], pl.LazyFrame], rots: str) -> None:
    path = next(path for path in sorted(run.rglob("*.parquet")) if path.relative_to(run).parts[0] == rots)
    whole = path.read_bytes()
    for bit in random.Random(2).sample(range(len(whole) * 8), 100):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(StoredDataError, match=path.name):
            read(run)


def test_generations_are_told_apart(run: Path) -> None:
    kind = manifest.layout(manifest.read(run)).kind
    write_generation(run, value_rows(seed=1, kind=kind), number=1)
    manifest.write(run, manifest.rebuild(run))
    for number, seed in ((None, 1), (1, 1), (0, 0)):
        found = scan_tokens(run, generation=number).collect().to_dicts()
        assert found == plain_tokens(run, 0, value_rows(seed=seed, kind=kind), seed)


@pytest.mark.parametrize("estimator", ["influence", "exact+influence"])
def test_tokens_have_the_signals_of_the_estimator_and_rows_every_column(tmp_path: Path, estimator: str) -> None:
    run, rows = small_run(tmp_path, estimator=estimator), value_rows(estimator=estimator)
    found = scan_tokens(run).collect()
    assert found.to_dicts() == plain_tokens(run, 0, rows)
    names = set(components(estimator).signals)
    assert {name for name in found.columns if name.startswith(("adapt", "stab", "drift"))} < names
    assert found.select(components(estimator).always).null_count().sum_horizontal().item() == 0
    whole = scan(run).collect()
    assert whole.columns == manifest.layout(manifest.read(run)).values.names
    absent = components("published" if estimator == "influence" else "influence").adaptation[0]
    assert whole[absent].explode().drop_nulls().is_empty()


def test_every_token_has_its_text_and_class(run: Path) -> None:
    names = {0: (b"<|end|>", True, "special"), 1: (b" the", False, "words"), 2: (b"\xe2\x82", False, "words")}
    names |= {3: (b"\n", False, "whitespace"), 4: (b" 7", False, "digits"), 5: (b").", False, "punctuation")}
    write_pieces(run, [Piece(content=content, special=special) for content, special, _ in names.values()])
    found = scan_tokens(run).select("token_id", "text", "class").unique().collect()
    assert {0, 1, 2, 3, 4, 5, 6} & set(found["token_id"].to_list())
    for number, text, kind in found.iter_rows():
        content, _, wanted = names.get(number, (None, False, None))
        assert (text, kind) == (None if content is None else content.decode("utf-8", "replace"), wanted)
