from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import published, sealed_manifest, small_run, value_rows, write_generation

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.atomic import KILL_AT, digest
from alphatoken_curate.runs.fingerprint import differing, fingerprint
from alphatoken_curate.runs.schema import LAYOUTS, PREFERENCE, SCHEMA_VERSION, SFT, components


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "a")


def document(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_bytes())
    return found


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_it_says_what_the_run_holds(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path / "a", kind=kind)
    stored = manifest.read(run)
    rows = value_rows(kind=kind)
    branches = [branch for row in rows for branch in row.branches]
    scored = [branch for row in rows for branch in row.branches if row.status == "scored"]
    counts = dataclasses.asdict(stored.counts)
    assert counts == {
        "read": 12,
        "scored": 9,
        "target": 1,
        "failed": 1,
        "rejected": 1,
        "tokens": sum(len(branch.input_ids) for branch in branches),
        "response_tokens": sum(int(branch.response.sum()) for branch in branches),
        "truncated_rows": 3,
        "truncated_tokens": 21,
        "sequences": 9,
    }
    assert [file.path for file in stored.files] == ["artifacts/vocab.parquet", "config.yaml", "rejects.jsonl"]
    for file in (*stored.files, *stored.generations[0].shards, *stored.masks[0].shards):
        assert (file.bytes, file.sha256) == digest(run / file.path)
    mask = stored.masks[0]
    assert mask.response_tokens == sum(int(branch.response.sum()) for branch in scored)
    assert mask.kept_tokens >= -(-mask.response_tokens // 2)
    assert mask.settings["keep"] == 0.5 and mask.generations == (0,)


def test_it_is_sorted_indented_and_free_of_this_machine(run: Path, tmp_path: Path) -> None:
    text = (run / "manifest.json").read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    assert str(tmp_path) not in text and str(os.getpid()) not in text.replace('"sha256"', "").split()
    again = small_run(tmp_path / "b")
    assert (again / "manifest.json").read_text() == text


def test_what_is_written_is_read(run: Path) -> None:
    stored = manifest.read(run)
    manifest.write(run, stored)
    assert manifest.read(run) == stored


def test_it_knows_the_kind_of_its_rows(run: Path) -> None:
    assert manifest.layout(manifest.read(run)) is SFT
    assert manifest.layout(manifest.read(small_run(run.parent / "b", kind="preference"))) is PREFERENCE
    for settings_ in ({}, {"kind": "dpo"}, {"kind": ["sft"]}, {"kind": None}):
        with pytest.raises(StoredDataError, match=r"manifest\.json: damaged .* not sft or preference"):
            manifest.layout(dataclasses.replace(manifest.read(run), settings=settings_))


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_it_is_rebuilt_from_the_shards(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path, kind=kind)
    make_mask(run, published(keep=0.3, weights="rank"))
    before = (run / "manifest.json").read_bytes()
    (run / "manifest.json").unlink()
    manifest.write(run, manifest.rebuild(run))
    assert (run / "manifest.json").read_bytes() == before


def test_generations_with_gaps_and_masks_of_several_are_rebuilt(tmp_path: Path) -> None:
    run = small_run(tmp_path, generations=(0, 3, 12), config=published(generation="all"))
    make_mask(run, published(generation="0,12"))
    make_mask(run, published(generation="3"))
    stored = manifest.read(run)
    assert [one.generation for one in stored.generations] == [0, 3, 12]
    assert [one.checkpoint for one in stored.generations] == ["base", "checkpoint-3", "checkpoint-12"]
    assert [one.generations for one in stored.masks] == [(0, 3, 12), (0, 12), (3,)]
    assert manifest.rebuild(run) == stored


def test_a_mask_goes_with_any_of_its_generations(tmp_path: Path) -> None:
    run = small_run(tmp_path, generations=(0, 3), config=published(generation="all"))
    make_mask(run, published(generation="3"))
    (run / "values/generation=0/part-00002.parquet").unlink()
    found = manifest.rebuild(run)
    assert [one.generation for one in found.generations] == [3]
    assert [(one.mask, one.generations) for one in found.masks] == [(1, (3,))]


def test_the_newest_generation_speaks_for_the_counts(tmp_path: Path) -> None:
    rows = value_rows()
    write_generation(tmp_path, rows)
    write_generation(tmp_path, [*rows[:8], dataclasses.replace(rows[5], row_id=8, line=9), *rows[9:]], number=2)
    assert [getattr(manifest.rebuild(tmp_path).counts, name) for name in ("scored", "failed")] == [8, 2]


def test_what_is_unfinished_is_left_out_of_it(run: Path) -> None:
    make_mask(run, published(keep=0.3))
    (run / "train/mask=0001/part-00001.parquet").unlink()
    write_generation(run, value_rows()[:5], number=1, read=12)
    assert (len(manifest.rebuild(run).masks), len(manifest.rebuild(run).generations)) == (1, 1)
    (run / "values/generation=0/part-00002.parquet").unlink()
    with pytest.raises(StoredDataError, match="no finished values"):
        manifest.rebuild(run)


def test_shards_of_other_makings_are_not_mixed(run: Path) -> None:
    path = run / "values/generation=0/part-00001.parquet"
    footer = shards.read_footer(path)
    other = dataclasses.replace(footer, fields={**footer.fields, "seed": 9})
    shards.write_values(path, value_rows()[5:10], other, SFT)
    with pytest.raises(StoredDataError, match="made with other seed"):
        manifest.rebuild(run)


def refused(run: Path, content: bytes) -> str:
    (run / "manifest.json").write_bytes(content)
    with pytest.raises(StoredDataError) as caught:
        manifest.read(run)
    assert str(run / "manifest.json") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"[" * 10_000_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b'{"schema_version": 1}',
        b"NaN",
    ],
    ids=range(10),
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, content)


def test_a_huge_one_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(StoredDataError, match="at most"):
        manifest.read(tmp_path)


def test_a_missing_one_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(StoredDataError, match="run the `score` command"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(StoredDataError, match="cannot be read"):
        manifest.read(tmp_path)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema_version",), SCHEMA_VERSION + 1),
        (("schema_version",), True),
        (("counts", "read"), -1),
        (("counts", "read"), 1 << 63),
        (("counts", "read"), 1.0),
        (("counts", "read"), "12"),
        (("inputs", 0, "source"), None),
        (("digests", "model"), 3),
        (("versions", "numpy"), None),
        (("generations", 0, "shards", 0, "path"), "../../etc/passwd"),
        (("generations", 0, "shards", 0, "path"), "values/generation=0/part-00001.parquet"),
        (("generations", 0, "shards", 0, "sha256"), "0" * 63),
        (("generations", 0, "generation"), 1),
        (("generations", 0, "plan"), []),
        (("generations",), {}),
        (("files", 0, "path"), "artifacts/../x"),
        (("files", 0, "path"), "/etc/passwd"),
        (("files", 0, "path"), "rejects.jsonl"),
        (("masks", 0, "generations"), ["0"]),
        (("masks", 0, "generations"), []),
        (("masks", 0, "generations"), [7]),
        (("masks", 0, "generations"), [0, 7]),
        (("masks", 0, "generations"), [0, 0]),
        (("masks", 0, "shards"), []),
        (("masks", 0, "settings"), []),
        (("surprise",), 1),
        (("counts", "surprise"), 1),
    ],
)
def test_one_wrong_entry_is_refused(run: Path, place: tuple[str | int, ...], value: Any) -> None:
    whole: Any = document(run)
    part = whole
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    assert "not as it was written" not in refused(run, sealed_manifest(whole))


def test_generations_of_a_mask_ascend(tmp_path: Path) -> None:
    whole = document(small_run(tmp_path, generations=(0, 3), config=published(generation="all")))
    assert whole["masks"][0]["generations"] == [0, 3]
    whole["masks"][0]["generations"] = [3, 0]
    assert "mask 0 has 3 shards of generations 3, 0" in refused(tmp_path, sealed_manifest(whole))


def test_generations_ascend(tmp_path: Path) -> None:
    whole = document(small_run(tmp_path, generations=(0, 3)))
    whole["generations"].reverse()
    assert "generation numbers [3, 0] do not ascend" in refused(tmp_path, sealed_manifest(whole))


def test_a_mask_of_a_release_that_did_not_count_ends_of_answers_is_read(run: Path) -> None:
    whole = json.loads((run / "manifest.json").read_bytes())
    assert whole["masks"][0]["end_of_turn_tokens"] > 0
    for name in ("end_of_turn_tokens", "end_of_turn_kept", "over_share"):
        whole["masks"][0].pop(name, None)
    (run / "manifest.json").write_bytes(sealed_manifest(whole))
    (mask,) = manifest.read(run).masks
    assert (mask.end_of_turn_tokens, mask.end_of_turn_kept, mask.over_share) == (None, None, None)
    assert b"end_of_turn" not in manifest.encode(manifest.read(run)), "what it cannot tell is not written"


def test_a_key_that_is_missing_is_refused(run: Path) -> None:
    later = ("told",)
    for name in [field.name for field in dataclasses.fields(manifest.Manifest) if field.name not in later]:
        whole = document(small_run(run.parent / name))
        del whole[name]
        assert f"lacks the key '{name}'" in refused(run, sealed_manifest(whole))


NAMES = [field.name for kind in (manifest.Manifest, manifest.Mask) for field in dataclasses.fields(kind)]
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=5)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=9)),
    max_leaves=10,
)


@given(JSON)
@settings(max_examples=150, deadline=None)
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        content = orjson.dumps(value)
    except orjson.JSONEncodeError:  # lone surrogates
        return
    refused(folder, content)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_flipped_bit_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        small_run(folder)
        (folder / "manifest.json").rename(folder / "good.json")
    content = bytearray((folder / "good.json").read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(StoredDataError, match=r"manifest\.json"):
        manifest.read(folder)


def test_fingerprints_see_meaning_and_nothing_else() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert differing({"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3}) == ("b", "c")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("point", ["before-manifest", "mid-write", "after-rename", "after-manifest"])
def test_a_killed_writer_leaves_the_old_or_the_new(run: Path, point: str) -> None:
    code = (
        "import sys, pathlib, dataclasses; from alphatoken_curate.runs import manifest\n"
        "run = pathlib.Path(sys.argv[1]); manifest.write(run, dataclasses.replace(manifest.read(run), masks=()))"
    )
    before = (run / "manifest.json").read_bytes()
    environment = {**os.environ, KILL_AT: point, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(run)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (manifest.read(run).masks == ()) == point.startswith("after")
    assert ((run / "manifest.json").read_bytes() == before) != point.startswith("after")


@pytest.mark.parametrize("estimator", ["published", "influence", "exact+influence"])
def test_the_signals_are_those_of_the_estimator(tmp_path: Path, estimator: str) -> None:
    stored = manifest.read(small_run(tmp_path, estimator=estimator))
    assert manifest.components(stored) == components(estimator)
    for odd in ("shapley", None, 3):
        with pytest.raises(StoredDataError, match=r"settings have estimator .*, not published or exact or influence"):
            manifest.components(replace(stored, settings={**stored.settings, "estimator": odd}))
    with pytest.raises(UsageError, match="estimator: found 'shapley'; give one of published, exact, influence"):
        components("shapley")
