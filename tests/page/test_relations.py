from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pages import Parsed, cells, read
from small_run import published, small_run, value_row, value_rows, with_by, write_pieces

from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.page.relations import over_time, overlap, piece, what_agrees, what_goes_with_it, which_tokens
from alphatoken_curate.page.tokens import read_tokens
from alphatoken_curate.reading.scan import scan_tokens
from alphatoken_curate.runs import manifest
from alphatoken_curate.tokens.pieces import Piece


def answer(markup: str, slug: str) -> str:
    return Parsed(re.findall(rf'id="a-{slug}">(.*?)</p>', markup)[0]).text.replace("−", "-")


def spearman(frame: pl.DataFrame, one: str, other: str) -> str:
    return f"{frame.select(pl.corr(one, other, method='spearman')).item():+.2f}"


def test_objectives_and_paths_are_compared(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", kind="preference")
    markup = what_agrees(*read(run))
    frame = scan_tokens(run).collect()
    sums = frame.select(
        a=pl.col("adapt_direct") + pl.col("adapt_causal"), s=pl.col("stab_direct") + pl.col("stab_causal")
    )
    told = answer(markup, "objectives")
    same = sums.select((pl.col("a").sign() == pl.col("s").sign()).mean()).item()
    assert f"Rank correlation {spearman(sums, 'a', 's')} (Spearman" in told and f"at {100 * same:.0f}%" in told
    for name, prefix in (("adaptation", "adapt"), ("stability", "stab")):
        found = spearman(frame, f"{prefix}_direct", f"{prefix}_causal")
        assert f"Rank correlation {found} (" in answer(markup, f"paths-{name}")


def test_decisions_are_those_of_stats(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    tokens, found = read(run)
    rows = {row[0]: row[1] for row in cells(what_agrees(tokens, found))}
    assert rows["none"] == str(found.decisions_changed["none"]) and rows["rms"] == str(found.decisions_changed["rms"])
    assert found.decisions_changed["none"] > 0
    make_mask(run, published(by="nll"))
    assert "does not select by value" in what_agrees(*read(run))
    assert "selects by SQL that --by does not take" in what_agrees(*read(with_by(run, "read_csv('pipe')")))


def test_the_influence_estimator_has_no_paths_to_compare(tmp_path: Path) -> None:
    markup = what_agrees(*read(small_run(tmp_path / "run", estimator="influence")))
    assert "a-objectives" in markup and "a-paths" not in markup


@pytest.mark.parametrize("masked", [True, False])
def test_value_by_loss_place_and_class(tmp_path: Path, masked: bool) -> None:
    run = small_run(tmp_path / "run", value_rows(30))
    words = [b" the", b"7", b".", b"\n", b"+=", b"<|end|>"]
    write_pieces(run, [Piece(words[i % 6], special=i % 6 == 5) for i in range(50)])
    if not masked:
        manifest.write(run, replace(manifest.read(run), masks=()))
    tokens = read_tokens(run)
    markup = what_goes_with_it(tokens)
    frame = scan_tokens(run).collect()
    assert f"value and loss {spearman(frame, 'nll', 'value')}" in answer(markup, "loss")
    table = {row[0]: row[1:] for row in cells(markup)}
    for (name,), group in frame.group_by("class"):
        assert table[str(name)][0] == str(len(group))
        assert float(table[str(name)][1].replace("−", "-")) == pytest.approx(group["value"].mean(), abs=0.006)
        if masked:
            assert table[str(name)][2] == f"{100 * group['kept'].mean():.0f}%"
    best = frame.group_by("class").agg(pl.col("kept" if masked else "value").mean()).sort(pl.last())["class"][-1]
    assert answer(markup, "class").startswith(f"{'Kept most' if masked else 'Highest mean value'}: {best}, ")
    assert ("are kept" in markup) == masked


def test_types_kept_and_dropped_most(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(40))
    frame = scan_tokens(run).collect()
    kept, all_ = Counter(frame.filter("kept")["token_id"].to_list()), Counter(frame["token_id"].to_list())
    overall = frame["kept"].mean()
    assert isinstance(overall, float)
    excess = sorted(((kept[i] - overall * n, i) for i, n in all_.items()), key=lambda x: (-x[0], x[1]))
    markup = which_tokens(read_tokens(run))
    more, less = re.findall(r"<tbody>(.*?)</tbody>", markup)
    assert [row[0] for row in cells(more)] == [f"<{i}>" for x, i in excess if x > 0][:15]
    assert {row[0] for row in cells(less)} == {f"<{i}>" for x, i in excess[::-1][:15]}
    for name, count, _, share, _ in cells(more):
        number = int(name.strip("<>"))
        assert count == str(all_[number]) and share == f"{100 * kept[number] / all_[number]:.0f}%"


def test_pieces_are_seen_whole(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    write_pieces(run, [Piece(b"  a ", False), Piece(b"\xe2\x82", False), Piece(b"<b>\x1b", False), Piece(b"", False)])
    tokens = read_tokens(run)
    texts = [Parsed(piece(tokens, i)).text for i in range(4)]
    assert texts == ["··a·", "E2 82 (bytes)", "<b>␛", "<3>"]


def test_drift_between_generations_and_masks(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", generations=(0, 1, 2))
    make_mask(run, published(generation="0"))
    make_mask(run, published(keep=0.2))
    tokens, found = read(run)
    markup = over_time(run, tokens, found)
    values = pl.DataFrame({str(g): scan_tokens(run, generation=g).collect()["value"] for g in range(3)})
    told = answer(markup, "drift-values")
    assert f"generation 2 rank {spearman(values, '0', '2')} with those of generation 0" in told
    assert f"and {spearman(values, '1', '2')} with the one before" in told
    kept = [
        set(scan_tokens(run, mask=m).filter("kept").select("row_id", "position").collect().rows()) for m in range(3)
    ]
    shares = [f"{100 * len(a & b) / len(a | b):.0f}%" for a, b in ((kept[1], kept[2]), (kept[0], kept[2]))]
    assert re.findall(r"\d+%", answer(markup, "drift-masks")) == shares
    rms = [f"{x.pow(2).mean() ** 0.5:.3g}" for x in (values["0"], values["2"])]  # type: ignore[operator]
    assert f"value from {rms[0]} to {rms[1]}" in answer(markup, "drift-rms")


def test_one_generation_and_one_mask(tmp_path: Path) -> None:
    run = small_run(tmp_path / "one")
    assert "There is one scoring" in over_time(run, *read(run))
    run = small_run(tmp_path / "two", generations=(0, 1))
    assert "There is one mask." in over_time(run, *read(run))


def test_overlap_is_of_joint_tokens() -> None:
    nan = np.nan
    a, b = np.array([1, 1, 0, 0, nan, 1], np.float32), np.array([2, 0, 3, 0, 1, nan], np.float32)
    assert overlap(a, b) == pytest.approx(1 / 3)
    assert overlap(a * 0, b * 0) is None


def test_nothing_scored_and_no_mask(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", [value_row(0, 5, "failed")])
    tokens, found = read(run)
    for part in (what_agrees(tokens, found), what_goes_with_it(tokens), which_tokens(tokens)):
        assert "No token was scored." in part
    run = small_run(tmp_path / "other")
    manifest.write(run, replace(manifest.read(run), masks=()))
    (run / "artifacts/vocab.parquet").unlink()
    tokens, _ = read(run)
    assert "no mask yet" in which_tokens(tokens)
    assert "has no vocabulary" in what_goes_with_it(tokens)


def test_one_token_is_no_correlation(tmp_path: Path) -> None:
    markup = what_agrees(*read(small_run(tmp_path / "run", [value_row(0, 2)])))
    assert "Rank correlation" not in markup and "of tokens" in answer(markup, "objectives")
