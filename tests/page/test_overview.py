from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pages import Parsed, cells, read, without_stability
from small_run import published, small_run, value_row, value_rows, write_rejects

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.page.overview import NAMES, bar, how_distributed, how_many_kept, what_was_run
from alphatoken_curate.reading.scan import scan_tokens
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import SIGNALS


def test_what_was_run_is_told(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config=published(keep=0.3, by="nll + entropy"))
    text = Parsed(what_was_run(run, *read(run))).text
    assert "12 rows read: 9 scored, 1 held out as target, 1 failed and 1 rejected" in text
    assert "rows.jsonl (12 rows)" in text and "published" in text and "weight 1.5" in text
    assert (
        "number 0, by nll + entropy; --keep 0.3, --scope global, --weights binary, --always-keep none, of generation 0"
        in text
    )
    assert "21 tokens of 3 rows, by --max-length" in text  # 7 of 1 in each shard
    assert manifest.read(run).generations[0].fingerprint[7:23] in text


def test_names_of_others_are_text(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    stored = manifest.read(run)
    odd = "<b>\x1b\u202e"
    generation = replace(stored.generations[0], checkpoint=odd)
    inputs = (replace(stored.inputs[0], source=odd),)
    manifest.write(run, replace(stored, generations=(generation,), inputs=inputs))
    found = Parsed(what_was_run(run, *read(run)))
    assert found.text.count("<b>␛⟨U+202E⟩") == 2
    assert not [name for name, _ in found.tags if name == "b"]


def test_reasons_of_refusals_are_counted(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    lines = [{"reason": "empty"}, {"reason": "<i>"}, {"reason": "empty"}]
    write_rejects(run, lines)
    assert cells(what_was_run(run, *read(run)))[1:] == [["empty", "2"], ["<i>", "1"]]
    (run / "rejects.jsonl").write_text("{")
    with pytest.raises(StoredDataError, match="damaged"):
        what_was_run(run, *read(run))


def test_kept_tokens_by_branch(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", kind="preference", config=published(keep=0.4))
    tokens, found = read(run)
    rows = {row[0]: row[1:4] for row in cells(how_many_kept(tokens, found))}
    expected = scan_tokens(run).collect()
    for name in ("chosen", "rejected"):
        of_branch = expected.filter(branch=name)
        assert rows[name][:2] == [str(len(of_branch)), str(of_branch["kept"].sum())]
    assert rows["all"][:2] == [str(len(expected)), str(expected["kept"].sum())]
    text = Parsed(how_many_kept(tokens, found)).text
    loss = expected.filter("kept")["nll"].sum() / expected["nll"].sum()
    assert f"they hold {100 * loss:.0f}% of the loss" in text
    assert "Each of them weighs 1 in the loss" in text


def test_kept_tokens_by_source(tmp_path: Path) -> None:
    rows = [replace(row, source=f"<{row.row_id % 2}>.jsonl") for row in value_rows()]
    run = small_run(tmp_path / "run", rows)
    told = {row[0]: row[1] for row in cells(how_many_kept(*read(run)))}
    tokens = scan_tokens(run).collect()["row_id"]
    assert told["<0>.jsonl"] == str((tokens % 2 == 0).sum()) and told["<1>.jsonl"] == str((tokens % 2 == 1).sum())


def test_soft_weights_are_drawn(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config=published(weights="rank"))
    tokens, found = read(run)
    text = Parsed(how_many_kept(tokens, found)).text
    assert tokens.weight is not None
    kept = np.sort(tokens.weight[tokens.weight > 0])[::-1]
    heavy = 1 + int(np.argmax(np.cumsum(kept) >= kept.sum() / 2))
    assert f"the heaviest {100 * heavy / len(kept):.0f}% of them hold half" in text
    assert f"{kept[0]:.3g} times the mean" in text


def test_every_component_has_a_histogram(tmp_path: Path) -> None:
    for estimator in ("published", "influence", "exact+influence"):
        run = small_run(tmp_path / estimator, estimator=estimator)
        tokens, found = read(run)
        markup = how_distributed(tokens, found)
        names = {"value", *tokens.components.of_value, *tokens.components.upstream}
        drawn = [name for name in ("value", *SIGNALS) if f'id="q-hist-{name.replace("_", "-")}"' in markup]
        assert set(drawn) == names
        for table in re.findall(r"<tbody>(.*?)</tbody>", markup):
            assert sum(int(row[1].replace(",", "")) for row in cells(table)) == len(tokens)
            assert sum(int(row[2].replace(",", "")) for row in cells(table)) == tokens.kept.sum()  # type: ignore[union-attr]


def test_the_answer_to_a_histogram_is_right(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    tokens, found = read(run)
    value = scan_tokens(run).collect()["value"]
    answer = re.findall(r'id="a-hist-value">(.*?)</p>', how_distributed(tokens, found))[0].replace("−", "-")
    low, middle, high = (value.quantile(share, "linear") for share in (0.05, 0.5, 0.95))
    assert f"Median {middle:+.3g}; nine in ten lie between {low:+.3g} and {high:+.3g}" in answer


def test_a_run_without_stability_mask_or_tokens_says_so(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", without_stability(value_rows()))
    assert how_distributed(*read(run)).count("It is 0 for every token.") == 2
    manifest.write(run, replace(manifest.read(run), masks=()))
    assert "no mask yet" in how_many_kept(*read(run))
    assert "kept" not in Parsed(how_distributed(*read(run))).text
    empty = small_run(tmp_path / "empty", [value_row(0, 5, "failed")])
    assert "No token was scored." in how_many_kept(*read(empty)) and "No token" in how_distributed(*read(empty))


def test_every_column_has_a_name_of_its_own() -> None:
    assert set(NAMES) == {*SIGNALS, "loss_weight"} and len(set(NAMES.values())) == len(NAMES)


def test_a_bar_is_as_wide_as_its_share() -> None:
    widths = [attributes["width"] for name, attributes in Parsed(bar(0.25)).tags if name == "rect"]
    assert widths == ["100", "25"]
