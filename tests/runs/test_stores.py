"""Rows in object stores: S3 as moto has it, in this process, and fsspec's own memory."""

from __future__ import annotations

import gzip
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import fsspec
import orjson
import polars as pl
import pytest
import zstandard
from buckets import s3
from tiny_files import command, token_records, write_jsonl

from alphatoken_curate import InputError, UsageError
from alphatoken_curate.rows.read import RowStream, read_rows
from alphatoken_curate.runs import stores

ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}.", "id": str(n)} for n in range(200)]
LINES = b"".join(orjson.dumps(row) + b"\n" for row in ROWS)


def parquet(tmp_path: Path) -> bytes:
    pl.DataFrame(ROWS).write_parquet(tmp_path / "rows.parquet", row_group_size=50)
    return (tmp_path / "rows.parquet").read_bytes()


def kinds(tmp_path: Path) -> dict[str, bytes]:
    packed = {"rows.jsonl.gz": gzip.compress(LINES), "rows.jsonl.zst": zstandard.compress(LINES)}
    return {"rows.jsonl": LINES, **packed, "rows.json": orjson.dumps(ROWS), "rows.parquet": parquet(tmp_path)}


def put(url: str, data: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(data)
    return url


@pytest.fixture(params=["s3", "memory"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """A URL below which is nothing."""
    if request.param == "s3":
        yield f"s3://{request.getfixturevalue('bucket')}/a b/é"
        return
    yield "memory://bucket/a b/é"
    fsspec.filesystem("memory").store.clear()


@pytest.mark.one_in(2)
def test_rows_and_digests_are_those_of_the_same_file_on_disk(place: str, tmp_path: Path) -> None:
    for name, data in kinds(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        here, there = read_rows([str(tmp_path / name)]), read_rows([put(f"{place}/{name}", data)])
        assert [(row.id, row.line, row.record) for row in there.rows] == [(r.id, r.line, r.record) for r in here.rows]
        assert (there.files[0].digest, there.files[0].bytes) == (here.files[0].digest, here.files[0].bytes)
        assert there.files[0].source == there.rows[0].source == f"{place}/{name}"


def test_a_prefix_and_a_glob_give_their_files_in_order(place: str) -> None:
    for name in ("b.jsonl", "a/z.jsonl", ".hidden.jsonl", "notes.txt", "a/y.jsonl.gz"):
        put(f"{place}/{name}", gzip.compress(LINES) if name.endswith("gz") else LINES)
    prefix = [file.source for file in read_rows([place + "/"]).files]
    assert prefix == [f"{place}/{name}" for name in ("a/y.jsonl.gz", "a/z.jsonl", "b.jsonl")]
    assert [file.source for file in read_rows([place]).files] == prefix
    assert [file.source for file in read_rows([f"{place}/*/z*.jsonl"]).files] == [f"{place}/a/z.jsonl"]
    assert [file.source for file in read_rows([f"{place}/**/*.jsonl"]).files] == prefix[1:]


def test_a_limit_reads_the_first_rows_and_knows_the_whole_file(place: str) -> None:
    stream = RowStream([put(f"{place}/rows.jsonl", LINES)], limit=3)
    assert len(list(stream)) == 3 and stream.files[0].bytes == len(LINES)


def test_bad_rows_are_named_by_the_url(place: str) -> None:
    found = read_rows([put(f"{place}/rows.jsonl", LINES + b"{\n")])
    assert [(bad.source, bad.line, bad.reason) for bad in found.bad] == [(f"{place}/rows.jsonl", 201, "invalid_json")]


def test_a_file_named_twice_is_refused(place: str) -> None:
    url = put(f"{place}/rows.jsonl", LINES)
    with pytest.raises(InputError, match="named twice"):
        read_rows([url, url.replace("s3://", "S3://").replace("memory://", "Memory://")])


@pytest.mark.parametrize("name", ["values/generation=0/part-00000.parquet", "export.json"])
def test_a_published_run_or_an_export_is_not_rows(place: str, name: str) -> None:
    put(f"{place}/run/{name}", b"x")
    with pytest.raises(InputError, match="not rows"):
        read_rows([f"{place}/run/"])


def refusal(url: str) -> str:
    with pytest.raises((InputError, UsageError)) as refused:
        read_rows([url])
    told = str(refused.value)
    assert "\n" not in told and "secret" not in told and "a-key" not in told
    return told


def test_what_is_not_there_is_told_in_a_line(bucket: str) -> None:
    for url in (
        f"s3://{bucket}-no/x.jsonl",
        f"s3://{bucket}/x.jsonl",
        f"s3://{bucket}/none/",
        f"s3://{bucket}/*.jsonl",
    ):
        assert refusal(url).startswith(f"{url}: the store has no such bucket, prefix or object.")
    put(f"s3://{bucket}/notes.txt", b"x")
    assert "no object that it names ends in .parquet" in refusal(f"s3://{bucket}")
    assert "Rename it" in refusal(f"s3://{bucket}/notes.txt")


@pytest.mark.parametrize("url", ["http://host/x.jsonl", "file:///tmp/x.jsonl", "ftp://h/x.jsonl", "a::s3://b/x.jsonl"])
def test_other_schemes_are_refused(url: str) -> None:
    assert "rows are read from s3://, gs:// and hf://, not from" in refusal(url)


def test_urls_with_secrets_are_refused_without_them() -> None:
    assert refusal("s3://a-key:secret@b/x.jsonl").startswith("s3://b/x.jsonl: the URL has more in it")


@pytest.mark.parametrize(("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_extra_is_named(scheme: str, module: str, extra: str) -> None:
    registry = importlib.import_module("fsspec.registry")
    with mock.patch.dict(sys.modules, {module: None}), mock.patch.dict(registry._registry):
        registry._registry.pop(scheme, None)
        assert refusal(f"{scheme}://b/x.jsonl").endswith(f"pip install 'alphatoken-curate[{extra}]'")


def test_no_credentials_and_no_store_are_told_in_a_line(bucket: str) -> None:
    import s3fs

    url = put(f"s3://{bucket}/rows.jsonl", LINES)
    without = {name: text for name, text in os.environ.items() if not name.startswith(("AWS_ACCESS", "AWS_SECRET"))}
    nobody = {"AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_CONFIG_FILE": "/nowhere"}
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    told = ({**without, **nobody}, "Unable to locate credentials"), ({**os.environ, **nowhere}, "Could not connect")
    for environment, says in told:
        s3fs.S3FileSystem.clear_instance_cache()
        with mock.patch.dict(os.environ, environment, clear=True), mock.patch.object(s3fs.S3FileSystem, "retries", 1):
            assert says in refusal(url)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("url", ["hf://datasets/owner/name/x.jsonl", "hf://x", "hf://datasets/", "hf://a/b@c/x.jsonl"])
def test_hub_urls_without_a_network_are_told_in_a_line(url: str) -> None:
    assert refusal(url).startswith(f"{url}: the store ")


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet"])
def test_an_object_that_changes_while_it_is_read_is_refused(bucket: str, tmp_path: Path, kind: str) -> None:
    data = kinds(tmp_path)[kind]
    url = put(f"s3://{bucket}/{kind}", data)
    stream = iter(RowStream([url]))
    next(stream)
    put(url, data.replace(b"What", b"whaT") if kind == "rows.jsonl" else data + b" ")
    with pytest.raises(InputError, match="it changed while it was read"):
        list(stream)


def test_a_read_that_breaks_off_is_refused(bucket: str) -> None:
    url = put(f"s3://{bucket}/rows.jsonl", LINES)
    stored = stores.open_stored(url)
    with mock.patch.object(stored._file, "read", side_effect=[b"{", b""]):  # type: ignore[attr-defined]
        assert stored.read(1) == b"{"
        with pytest.raises(InputError, match="broke off after 0 of"):
            stored.read(9)
    stored.close()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_object_is_not_held_in_memory(bucket: str, tmp_path: Path, kind: str) -> None:
    """Of 96 MiB, some blocks are."""
    texts = [os.urandom(8 * 2**10).hex() for _ in range(6 * 2**10)]
    rows = [{"prompt": "p", "response": "r", "other": text} for text in texts]
    if kind == "jsonl":
        data = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    else:
        pl.DataFrame(rows).write_parquet(tmp_path / "x.parquet", compression="uncompressed", row_group_size=512)
        data = (tmp_path / "x.parquet").read_bytes()
    assert len(data) > 90 * 2**20
    s3().pipe_file(f"{bucket}/x.{kind}", data)
    del rows, texts
    code = f"""
import resource
from alphatoken_curate.rows.read import RowStream
from alphatoken_curate.runs.stores import found
found("s3://{bucket}/x.{kind}")
import pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(1 for _ in RowStream(["s3://{bucket}/x.{kind}"]))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    read_, grown = map(int, done.stdout.split())
    assert read_ == 6 * 2**10 and grown < 60, grown


def test_scoring_rows_of_a_store_goes_on_and_is_known_again(
    bucket: str, models: dict[str, str], tmp_path: Path
) -> None:
    here = write_jsonl(tmp_path / "rows.jsonl", token_records(8))
    url = put(f"s3://{bucket}/rows.jsonl", Path(here).read_bytes())
    asked = ("--target", url, "--model", models["base"], "-o", tmp_path / "run")
    first = command("score", url, *asked)
    assert first.code == 0 and f"- {url}\n" in (tmp_path / "run/config.yaml").read_text(), first.err
    again = command("score", url, *asked)
    assert again.code == 0 and "is finished" in again.out, again.err
    assert command("score", "--config", tmp_path / "run/config.yaml", "-o", tmp_path / "other").code == 0
    put(url, Path(write_jsonl(tmp_path / "rows.jsonl", token_records(9))).read_bytes())
    changed = command("score", url, *asked)
    assert changed.code == 4 and "rows.jsonl" in changed.err, changed.err
