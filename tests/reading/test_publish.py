"""Runs published to S3 as moto has it: whole, once, by one publisher, and what is new of them after that."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from buckets import s3
from small_run import published, small_run, value_rows, write_generation
from tiny_files import command, contents

from alphatoken_curate import StoredDataError, UsageError, publish
from alphatoken_curate.errors import BusyError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.runs import card, manifest
from alphatoken_curate.runs.uploads import Uploads


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "a run é")


@pytest.fixture
def url(bucket: str) -> str:
    return f"s3://{bucket}/runs/a é"


def stored(url: str) -> dict[str, bytes]:
    """All objects below a URL."""
    store, base = s3(), url.removeprefix("s3://")
    return {name.removeprefix(f"{base}/"): store.cat(name) for name in store.find(base)}


def more(run: Path, **settings: Any) -> None:
    """Another mask, and the card that names it."""
    make_mask(run, published(keep=0.25, **settings))
    card.write(run, manifest.read(run))


def test_every_file_is_there_and_the_manifest_comes_last(run: Path, url: str) -> None:
    heard: list[str] = []
    done = publish(run, url + "/", told=heard.append)
    assert stored(url) == contents(run) and done.manifest == "new"
    assert heard[-1] == manifest.NAME and sorted(heard) == sorted(contents(run))
    assert (done.put, done.bytes, done.kept) == (len(heard), sum(map(len, contents(run).values())), 0)
    again = publish(run, url, told=heard.append)
    assert (again.put, again.kept, again.manifest) == (0, len(contents(run)), "kept") and len(heard) == done.put


def test_the_run_comes_down_as_it_went_up(run: Path, url: str, tmp_path: Path) -> None:
    publish(run, url)
    s3().get(url + "/", str(tmp_path / "down"), recursive=True)
    assert contents(tmp_path / "down") == contents(run) and not verify(tmp_path / "down")


def test_what_is_new_is_added_and_the_manifest_replaced(run: Path, url: str) -> None:
    publish(run, url)
    before = stored(url)
    write_generation(run, value_rows(seed=1), number=1)
    manifest.write(run, manifest.rebuild(run))
    more(run)
    (run / "report.html").write_text("a page")
    heard: list[str] = []
    done = publish(run, url, told=heard.append)
    assert stored(url) == contents(run) and done.manifest == "replaced"
    assert set(heard) == contents(run).keys() - before.keys() | {manifest.NAME, card.NAME}
    assert heard[-2:] == [manifest.NAME, card.NAME], "a card names what the manifest names"


def test_an_older_state_does_not_replace_a_newer(run: Path, url: str, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run, tmp_path / "old"))
    more(run)
    publish(run, url)
    with pytest.raises(StoredDataError, match="names mask 1, which this run has not"):
        publish(old, url)
    assert stored(url) == contents(run)


def test_another_run_is_refused_and_changes_nothing(run: Path, url: str, tmp_path: Path) -> None:
    publish(run, url)
    other = small_run(tmp_path / "other", value_rows(seed=5))
    with pytest.raises(StoredDataError, match="names generation 0, which this run has not, or has otherwise"):
        publish(other, url)
    assert stored(url) == contents(run)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("data", [b"not a manifest", b"{}"])
def test_a_manifest_that_was_changed_there_is_refused(run: Path, url: str, data: bytes) -> None:
    publish(run, url)
    s3().pipe_file(f"{url}/{manifest.NAME}", data)
    with pytest.raises(StoredDataError, match=r"manifest.json: it cannot be read"):
        publish(run, url)
    assert stored(url)[manifest.NAME] == data


@pytest.mark.one_in(2)
@pytest.mark.parametrize("longer", [b"", b" "])
def test_an_object_of_other_bytes_is_refused_by_name(run: Path, url: str, longer: bytes) -> None:
    name = "values/generation=0/part-00001.parquet"
    data = (run / name).read_bytes()
    s3().pipe_file(f"{url}/{name}", data[:-1] + bytes([data[-1] ^ 1]) + longer)
    with pytest.raises(StoredDataError, match=f"{name}: an object of other bytes"):
        publish(run, url)
    assert manifest.NAME not in stored(url)


def test_a_prefix_with_other_things_is_refused(run: Path, url: str) -> None:
    s3().pipe_file(f"{url}/notes.txt", b"mine")
    with pytest.raises(StoredDataError, match=r"not empty, and no published run \(it has 'notes.txt'\)"):
        publish(run, url)
    assert stored(url) == {"notes.txt": b"mine"}


def killed(run: Path, url: str, point: str) -> None:
    code = f"from alphatoken_curate import publish; publish({str(run)!r}, {url!r})"
    environment = {**os.environ, "ALPHATOKEN_CURATE_KILL_AT": point}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.long
def test_an_upload_that_was_killed_goes_on(run: Path, url: str) -> None:
    """Between any two objects, and before the manifest: no manifest is there, and the same call ends it."""
    for point in ("after-object", "after-object:3", "before-published"):
        killed(run, url, point)
        assert manifest.NAME not in stored(url)
    done = publish(run, url)
    assert done.kept and done.put and stored(url) == contents(run)
    more(run)
    for point in ("after-object", "before-published", "after-object@manifest.json"):
        killed(run, url, point)
        assert card.NAME in stored(url) and stored(url)[card.NAME] != (run / card.NAME).read_bytes()
    assert publish(run, url).manifest == "kept" and stored(url) == contents(run)


def race(*calls: Any) -> list[Any]:
    """What each gives or raises, all begun at once."""
    barrier, found = threading.Barrier(len(calls)), [None] * len(calls)

    def one(number: int) -> None:
        barrier.wait()
        try:
            found[number] = calls[number]()
        except (StoredDataError, UsageError) as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.long
def test_of_two_publishers_of_the_same_run_both_end_well(run: Path, bucket: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    for number in range(3):
        url = f"s3://{bucket}/same-{number}"
        found = race(lambda url=url: publish(run, url), lambda url=url: publish(other, url))
        assert not [one for one in found if isinstance(one, Exception)], found
        assert stored(url) == contents(run)


@pytest.mark.long
def test_of_two_publishers_of_two_runs_one_wins_whole(run: Path, bucket: str, tmp_path: Path) -> None:
    other = small_run(tmp_path / "other", value_rows(seed=5))
    for number in range(4):
        url = f"s3://{bucket}/two-{number}"
        found = race(lambda url=url: publish(run, url), lambda url=url: publish(other, url))
        lost = [isinstance(one, Exception) for one in found]
        assert sorted(lost) == [False, True], found
        assert stored(url) == contents([run, other][lost.index(False)])


def test_of_two_later_states_one_wins_whole(run: Path, url: str, tmp_path: Path) -> None:
    publish(run, url)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    more(run)
    more(other, scope="row")
    found = race(lambda: publish(run, url), lambda: publish(other, url))
    lost = [isinstance(one, Exception) for one in found]
    assert sorted(lost) == [False, True], found
    assert stored(url) == contents([run, other][lost.index(False)])


def test_a_manifest_that_another_replaced_meanwhile_stays(run: Path, url: str, tmp_path: Path) -> None:
    """The other adds a generation while this one has put its mask: neither has an object of the other's names."""
    publish(run, url)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    write_generation(other, value_rows(seed=1), number=1)
    manifest.write(other, manifest.rebuild(other))
    card.write(other, manifest.read(other))
    more(run)
    heard: list[str] = []

    def put(name: str) -> None:
        heard.append(name)
        if len(heard) == 1:
            publish(other, url)

    with pytest.raises(BusyError, match=r"manifest.json: another publisher was first"):
        publish(run, url, told=put)
    assert manifest.decoded(stored(url)[manifest.NAME], "") == manifest.read(other)


def test_a_damaged_run_is_not_published(run: Path, url: str) -> None:
    shard = run / "values/generation=0/part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoredDataError, match="not published, as it has"):
        publish(run, url)
    assert not stored(url)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ignored", ["IfNoneMatch", "IfMatch"])
def test_a_store_that_takes_no_heed_of_conditions_is_refused(run: Path, url: str, ignored: str) -> None:
    """Tried by objects that are small, and that stay as they are, the first time and later."""
    import s3fs

    real, sent = s3fs.S3FileSystem._call_s3, list[str]()

    async def call(self: Any, method: str, *given: Any, **asked: Any) -> Any:
        if ignored in asked:
            sent.append(asked["Key"].rpartition("/")[2])
        return await real(self, method, *given, **{name: one for name, one in asked.items() if name != ignored})

    reads = mock.patch.object(s3fs.S3FileSystem, "_call_s3", call)
    with reads, pytest.raises(UsageError, match="takes no heed of If-None-Match or If-Match"):
        publish(run, url)
    assert manifest.NAME not in stored(url) and set(sent) == {"config.yaml"}
    publish(run, url)
    before = stored(url)
    write_generation(run, value_rows(seed=1), number=1)
    manifest.write(run, manifest.rebuild(run))
    more(run)
    sent.clear()
    with reads, pytest.raises(UsageError, match="takes no heed of If-None-Match or If-Match"):
        publish(run, url)
    assert sent[-1] == manifest.NAME and before.items() <= stored(url).items()


@pytest.mark.long
def test_large_files_go_in_parts_on_the_same_conditions(bucket: str, tmp_path: Path) -> None:
    uploads, path = Uploads(f"s3://{bucket}/large"), tmp_path / "x"
    path.write_bytes(os.urandom(101 * 2**20))
    assert uploads.create("x", path) and not uploads.create("x", path) and uploads.is_same("x", path)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert not uploads.create("x", path) and not uploads.is_same("x", path)


WRONG = {
    "gs://b/x": "gcsfs has no replacement on a condition",
    "file:///tmp/x": "a folder of this machine",
    "memory://x": "nothing is known",
    "/tmp/x": "^/tmp/x: a run is published to s3:// alone; that is a folder of this machine: copy the run there",
    "pub": "^pub: a run is published to s3:// alone; that is a folder of this machine",
    "s3:/b/x": "give it as s3://bucket/prefix",
    "s3://": "no bucket",
    "s3://k:secret@b/x": "the URL has more in it",
    "s3://b/../x": "no paths",
}


@pytest.mark.parametrize("url", WRONG)
def test_where_no_run_is_published_to(run: Path, url: str) -> None:
    with pytest.raises(UsageError, match=WRONG[url]) as refused:
        publish(run, url)
    assert "secret" not in str(refused.value)


def test_what_the_command_says(run: Path, url: str, bucket: str) -> None:
    first, again = command("publish", run, url), command("publish", run, url)
    assert first.code == 0 and f"Published {run} to {url}: " in first.out and "put manifest.json\n" in first.err
    assert again.code == 0 and "is published already" in again.out and again.err == ""
    missing = command("publish", run, f"s3://{bucket}-none/x")
    assert missing.code == 2 and "no such bucket" in missing.err and missing.err.count("\n") == 1
    nothing = command("publish", run.parent / "none", url)
    assert nothing.code == 2 and "no such run folder" in nothing.err
