"""Runs of every schema version there ever was, kept in `tests/data` by `support/store_runs.py`, read by all readers."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_files import command, contents

from alphatoken_curate.config import MaskConfig, ScoreConfig
from alphatoken_curate.errors import FingerprintError, UsageError
from alphatoken_curate.masks.mask import mask
from alphatoken_curate.page.report import render
from alphatoken_curate.reading.compare import compare
from alphatoken_curate.reading.row import read_row
from alphatoken_curate.reading.scan import scan, scan_tokens
from alphatoken_curate.reading.search import search_rows
from alphatoken_curate.reading.stats import stats
from alphatoken_curate.reading.trainset import open_train
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.reading.words import read_vocabulary
from alphatoken_curate.runs import manifest, schema
from alphatoken_curate.runs.schema import LAYOUTS, SIGNALS, VERSIONS, VOCABULARY_COLUMNS, components
from alphatoken_curate.runs.shards import read_footer
from alphatoken_curate.scoring.refresh import refresh
from alphatoken_curate.scoring.score import score

DATA = Path(__file__).parents[1] / "data"
every_run = pytest.mark.parametrize("version", VERSIONS)
both_kinds = pytest.mark.parametrize("kind", LAYOUTS)


@pytest.fixture
def run(version: int, kind: str, tmp_path: Path) -> Path:
    with tarfile.open(DATA / f"v{version}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / kind


def held(run: Path) -> Any:
    """What the run holds, as its writer said it: `values` by generation, and `train`."""
    return json.loads((run.parent / "held.json").read_bytes())[run.name]


def test_there_is_a_run_of_every_schema_version() -> None:
    assert {path.name for path in DATA.glob("*.tar.xz")} == {f"v{version}.tar.xz" for version in VERSIONS}
    assert sum(path.stat().st_size for path in DATA.glob("*.tar.xz")) < 150_000
    assert schema.absent(VERSIONS[-1]) == frozenset() and VERSIONS[-1] == schema.SCHEMA_VERSION


@every_run
@both_kinds
def test_values_are_what_was_written_and_null_where_there_was_no_column(run: Path, version: int, kind: str) -> None:
    layout = LAYOUTS[kind]
    for generation, rows in held(run)["values"].items():
        found = scan(run, generation=int(generation)).collect()
        assert found.schema == pl.DataFrame(pl.from_arrow(layout.values.empty_table())).schema
        for row, wanted in zip(found.to_dicts(), rows, strict=True):
            assert {name: row[name] for name in ("row_id", "source", "line", "id", "status")}.items() <= wanted.items()
            for prefix, branch in zip(layout.branches, wanted["branches"], strict=True):
                assert row[f"{prefix}input_ids"] == branch["input_ids"]
                assert row[f"{prefix}response"] == branch["response"]
                length = len(branch["input_ids"]) if row["status"] == "scored" else 0
                for name in SIGNALS:
                    assert row[prefix + name] == branch["signals"].get(name, [None] * length), name
            if kind == "preference":
                assert (row["omega"], row["margin"]) == (wanted["omega"], wanted["margin"])


@pytest.mark.one_in(5)
@every_run
@both_kinds
def test_tokens_rows_masks_and_numbers_are_read(run: Path, version: int, kind: str) -> None:
    newest = list(held(run)["values"].values())[-1]
    scored = [branch for row in newest if row["status"] == "scored" for branch in row["branches"]]
    values = [x for branch in scored for x in branch["signals"]["value"] if x is not None]
    tokens = scan_tokens(run).collect()
    assert tokens["value"].to_list() == values
    assert set(tokens.columns) >= set(components("published").signals)
    assert tokens["class"].null_count() == (len(values) if version == 1 else 0)
    view = read_row(run, row=1)
    assert [branch.token_ids.tolist() for branch in view.branches] == [
        one["input_ids"] for one in newest[1]["branches"]
    ]
    with pytest.raises(UsageError, match="adapt_upstream was not computed"):
        view.column(view.branches[0], "adapt_upstream")
    trained = [row for found in open_train(run).rows() for row in found.branches]
    wanted = [row[f"{prefix}loss_weight"] for row in held(run)["train"] for prefix in LAYOUTS[kind].branches]
    assert [row.loss_weight.tolist() for row in trained] == wanted
    found = stats(run)
    assert found.scored_tokens == len(values)
    assert found.rms["value"] == pytest.approx(np.sqrt(np.mean(np.square(values, dtype=np.float64))), rel=1e-6)
    page = render(run)
    assert ("Schema version 1, which had no columns adapt_upstream" in page) == (version == 1)
    other = run.parent / "other"
    other.symlink_to(run)
    assert compare(run, other).correlations["value"] == pytest.approx(1)


@pytest.mark.one_in(3)
@every_run
@both_kinds
def test_such_a_run_is_whole_and_can_be_masked_again(run: Path, version: int, kind: str) -> None:
    assert verify(run) == []
    before = contents(run)
    assert not mask(run, MaskConfig(keep=0.4, weights="rank")).created
    assert contents(run) == before
    made = mask(run, MaskConfig(keep=0.2, by="entropy"))
    assert (made.created, made.mask) == (True, 1)
    with pytest.raises(UsageError, match="adapt_influence was not computed"):
        mask(run, MaskConfig(by="adapt_influence"))
    assert verify(run) == []
    assert {name: content for name, content in contents(run).items() if name in before and "/" in name}.items() <= (
        before.items()
    )
    stored = manifest.read(run)
    assert stored.schema_version == version and manifest.rebuild(run) == stored
    kept = [row.labels >= 0 for one in open_train(run).rows() for row in one.branches]
    assert sum(int(one.sum()) for one in kept) == made.kept_tokens


@pytest.mark.one_in(3)
@both_kinds
@pytest.mark.parametrize("version", [1, 2])
def test_a_run_that_does_not_say_what_ends_an_answer_is_masked_as_before(run: Path, version: int, kind: str) -> None:
    asked = {"keep": 0.3, "by": "-nll", "scope": "row"}
    made = mask(run, MaskConfig(**asked))
    assert (made.end_of_turn_tokens, made.end_of_turn_kept, made.over_share) == (None, None, 0)
    assert not mask(run, MaskConfig(**asked, always_keep="none")).created, "the same mask"
    path = next(iter((run / "train" / f"mask={made.mask:04d}").glob("*.parquet")))
    footer = read_footer(path)
    assert "always_keep" not in footer.fields and "always_keep" not in footer.facts["settings"]
    assert "over_share" not in footer.facts and "end_of_turn_tokens" not in footer.counts
    ended = command("mask", run, "--keep", "0.25", "--always-keep", "end-of-turn")
    assert ended.code == 0 and "which tokens end an answer is not stored in this run: none is always kept" in ended.out
    assert "end of turn" not in command("stats", run).out
    if version == 1:
        with pytest.raises(UsageError, match="does not say which tokens are special"):
            mask(run, MaskConfig(**asked, always_keep="special"))
    stays = mask(run, MaskConfig(**asked, always_keep="nll > 0"))
    assert stays.created and stays.kept_tokens > made.kept_tokens
    ends = [column for column in scan(run).collect().columns if column.endswith("end_of_turn")]
    assert len(ends) == len(LAYOUTS[kind].branches)
    values = scan(run).collect()
    for column in ends:
        beside = values[column.replace("end_of_turn", "input_ids")]
        assert values[column].list.len().to_list() == beside.list.len().to_list()
        assert values[column].explode().drop_nulls().len() == 0
    assert verify(run) == []


@pytest.mark.one_in(4)
@both_kinds
@pytest.mark.parametrize("version", [version for version in VERSIONS if schema.absent(version)])
def test_what_an_older_run_lacks_is_said(run: Path, version: int, kind: str) -> None:
    every = (*SIGNALS, *VOCABULARY_COLUMNS.names, "end_of_turn")
    names = [name for name in every if name in schema.absent(version)]
    assert names
    for arguments in (
        ("verify", run),
        ("stats", run),
        ("show", run, "--row", 1),
        ("report", run),
        ("mask", run, "--keep", 0.3),
        ("compare", run, run),
    ):
        ended = command(*arguments)
        assert ended.code == 0, ended.err
        assert f"Schema version {version}, which had no columns {', '.join(names)}: they are null." in ended.err
    assert f"Schema version {version}, which had no columns" in (run / "README.md").read_text()


@pytest.mark.parametrize(("version", "kind"), [(1, "sft"), (1, "preference")])
def test_a_vocabulary_without_pieces_has_texts_alone(run: Path, version: int, kind: str) -> None:
    found = read_vocabulary(run)
    assert found.texts[7] == "<7>" and found.special is None and found.pieces == {}
    with pytest.raises(UsageError, match="kept no pieces of text"):
        list(search_rows(run, "<7>"))


@both_kinds
@pytest.mark.parametrize("version", VERSIONS[:-1])
def test_an_older_run_is_not_gone_on_with(run: Path, version: int, kind: str, models: dict[str, str]) -> None:
    before = contents(run)
    with pytest.raises(FingerprintError, match=f"schema version {version}, and this release writes") as caught:
        refresh(run, models["base"])
    assert caught.value.exit_code == 4 and "score --config" in str(caught.value)
    assert contents(run) == before


@pytest.mark.parametrize(("version", "kind"), [(1, "sft")])
def test_scoring_into_an_older_run_is_refused(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}\n' * 9)
    before = contents(run)
    config = ScoreConfig(data=(str(rows),), model=models["base"], layers=1, device="cpu")
    with pytest.raises(FingerprintError, match=r"schema_version|schema version") as caught:
        score(config, run)
    assert caught.value.exit_code == 4
    assert {name: content for name, content in contents(run).items() if name in before} == before
