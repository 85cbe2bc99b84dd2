"""Published runs read where they lie: the same frames, and what is checked of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from buckets import s3
from polars.testing import assert_frame_equal
from small_run import published, small_run, value_rows, write_generation

from alphatoken_curate import StoredDataError, UsageError, publish, scan
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.reading import published as module
from alphatoken_curate.runs import card, manifest, shards
from alphatoken_curate.runs.schema import LAYOUTS
from alphatoken_curate.runs.shards import Footer

SHARD = "values/generation=0/part-00001.parquet"


@pytest.fixture
def url(bucket: str) -> str:
    return f"s3://{bucket}/runs/é 1"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_frames_are_those_of_the_run(tmp_path: Path, url: str, kind: str) -> None:
    run = small_run(tmp_path / "run", kind=kind)
    write_generation(run, value_rows(seed=1, kind=kind), number=1)
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, published(keep=0.25))
    card.write(run, manifest.read(run))
    publish(run, url)
    asked: list[tuple[Any, dict[str, Any]]] = [("values", {}), ("values", {"generation": 0}), ("train", {"mask": 0})]
    for what, number in [*asked, ("train", {})]:
        here, there = scan(run, what, **number), scan(url + "/", what, **number)
        assert_frame_equal(there.collect(), here.collect())
        assert_frame_equal(
            there.filter(pl.col("row_id") > 7).select("row_id").collect(engine="streaming"),
            here.filter(pl.col("row_id") > 7).select("row_id").collect(),
        )
    with pytest.raises(UsageError, match="has no mask 7; it has 0, 1"):
        scan(url, "train", mask=7)


def test_footers_that_are_long_are_read_whole(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(small_run(tmp_path / "run"), url)
    monkeypatch.setattr(module, "_TAIL_BYTES", 100)
    assert scan(url).collect().height


def change(url: str, name: str, data: bytes) -> None:
    s3().pipe_file(f"{url}/{name}", data)


def test_what_is_not_as_it_was_published_is_refused(tmp_path: Path, url: str) -> None:
    run = small_run(tmp_path / "run")
    publish(run, url)
    data = (run / SHARD).read_bytes()
    other = (run / SHARD.replace("00001", "00000")).read_bytes()
    body = data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]
    cases = (data[:-1], "the manifest has"), (other, "the manifest has|swapped"), (body, "its footer is not")
    for changed, says in cases:
        change(url, SHARD, changed)
        with pytest.raises(StoredDataError, match=says) as refused:
            scan(url)
        assert f"{url}/{SHARD}: " in str(refused.value) and "\n" not in str(refused.value)
    s3().rm(f"{url}/{SHARD}")
    with pytest.raises(StoredDataError, match="missing; the manifest has"):
        scan(url)
    for damaged in (b"", b"{}", (run / manifest.NAME).read_bytes().replace(b'"read"', b'"raed"')):
        change(url, manifest.NAME, damaged)
        with pytest.raises(StoredDataError, match=r"manifest.json: damaged"):
            scan(url)


def test_a_shard_of_other_settings_and_the_same_size_is_refused(tmp_path: Path, url: str) -> None:
    run, other = (small_run(tmp_path / name) for name in ("run", "other"))
    footer = shards.read_footer(other / SHARD)
    fields = {**footer.fields, "seed": 4}  # one digit, as before
    rows = value_rows()[5:10]
    shards.write_values(other / SHARD, rows, Footer(fields=fields, facts=footer.facts), LAYOUTS["sft"])
    assert (other / SHARD).stat().st_size == (run / SHARD).stat().st_size
    publish(run, url)
    change(url, SHARD, (other / SHARD).read_bytes())
    with pytest.raises(StoredDataError, match="it was swapped"):
        scan(url)


@pytest.mark.parametrize("where", ["s3://{bucket}/none", "s3://{bucket}-none/run"])
def test_where_no_run_is_published(bucket: str, where: str) -> None:
    with pytest.raises(StoredDataError, match=r"manifest.json: the store has no such bucket, prefix or object"):
        scan(where.format(bucket=bucket))


@pytest.mark.parametrize("url", ["gs://b/run", "https://h/run", Path("s3://b/run"), "s3:/b/run", "memory://r"])
def test_urls_that_are_not_read(url: Any) -> None:
    with pytest.raises(UsageError, match="a published run is read from s3://bucket/prefix"):
        scan(url)


def test_what_is_asked_for_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give `values` or `train`"):
        scan(tmp_path, "masks")  # type: ignore[arg-type]
