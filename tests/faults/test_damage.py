"""Runs with damage of every kind: `verify` names the file, no reader gives wrong data for it, commands end with 4."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from small_run import renamed, sealed_manifest, small_run, value_row
from tiny_files import command, contents

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.page.report import render
from alphatoken_curate.reading.compare import compare
from alphatoken_curate.reading.row import read_row, rejects
from alphatoken_curate.reading.scan import scan, scan_tokens
from alphatoken_curate.reading.search import search_rows
from alphatoken_curate.reading.stats import stats
from alphatoken_curate.reading.trainset import open_train
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.reading.words import read_vocabulary
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.artifacts import REFERENCE, Store
from alphatoken_curate.runs.documents import sealed
from alphatoken_curate.runs.records import read_records
from alphatoken_curate.runs.schema import SFT
from alphatoken_curate.scoring.beside import TARGET_ROWS, _side_rows, read_side_rows
from alphatoken_curate.tokens.tokenise import TokenRow

VALUES, TRAIN = "values/generation=1", "train/mask=0000"
STORED = {"schema_version": 2, "dtype": "float32", "reference": "x", "layers": 2, "parameters": "linear"}


def stored_tensors(run: Path) -> Store:
    return Store(folder=run / "artifacts", fields=STORED)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run of every kind of file."""
    run = small_run(folder / "whole", generations=(0, 1))
    stored_tensors(run).save(REFERENCE, {"map": torch.arange(40.0)})
    (run / "artifacts" / "run.json").write_bytes(sealed({"fields": STORED}))
    one = value_row(1, 7).branches[0]
    tokens = {"input_ids": one.input_ids, "response": one.response, "end_of_turn": one.end_of_turn}
    row = TokenRow(row_id=0, source="x", line=1, id=None, **tokens, truncated=0)
    (run / TARGET_ROWS).write_bytes(_side_rows([row]))
    (run / "rejects.jsonl").write_bytes(b'{"row_id":3,"reason":"empty","message":"no answer"}\n')
    renamed(run)
    assert verify(run) == []
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


READERS: dict[str, Callable[[Path], Any]] = {
    "scan": lambda run: scan(run).collect().to_dicts(),
    "scan train": lambda run: scan(run, "train").collect().to_dicts(),
    "scan_tokens": lambda run: scan_tokens(run, generation=0).collect().to_dicts(),
    "show": lambda run: [read_row(run, row=row) for row in (1, 3, 6)],
    "search": lambda run: list(search_rows(run, "<7>")),
    "stats": stats,
    "compare": lambda run: [compare(run, changed=0).correlations, compare(run).masks],
    "train": lambda run: list(open_train(run).rows()),
    "vocabulary": read_vocabulary,
    "rejects": lambda run: rejects(run, manifest.read(run)),
    "records": lambda run: [read_records(run, one, SFT) for one in manifest.read(run).generations[0].shards],
    "side rows": lambda run: read_side_rows(run, manifest.read(run), TARGET_ROWS),
    "tensors": lambda run: stored_tensors(run).find(REFERENCE),
    "manifest": manifest.read,
    "report": render,
}


def told(run: Path, name: str) -> str:
    """What a reader gives, or that it refuses; tensors of other settings are as good as none."""
    try:
        found = READERS[name](run)
    except StoredDataError as error:
        assert str(error)
        return "refused"
    return "refused" if found is None else repr(found)


@pytest.fixture(scope="module")
def truth(whole: Path) -> dict[str, str]:
    found = {name: told(whole, name) for name in READERS}
    assert "refused" not in found.values()
    return found


def files(run: Path) -> list[str]:
    """All that is checked by digest: everything but the card, which users may write on."""
    found = list(contents(run))
    return sorted(name for name in found if name != "README.md")


def flips(run: Path, seed: int, count: int) -> list[tuple[str, int]]:
    """Single bits, as many in each kind of file as in every other: shards, artefacts, manifest and what lies beside."""
    draw, groups = random.Random(seed), {}
    for name in files(run):
        groups.setdefault(name.split("/")[0], []).append(name)
    found = []
    for number in range(count):
        name = draw.choice(list(groups.values())[number % len(groups)])
        found.append((name, draw.randrange((run / name).stat().st_size * 8)))
    return found


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def found_by_verify(run: Path, seed: int, count: int) -> int:
    found = 0
    for name, bit in flips(run, seed, count):
        flip(run / name, bit)
        assert name in {problem.file for problem in verify(run)}, (name, bit)
        flip(run / name, bit)
        found += 1
    assert verify(run) == []
    return found


@pytest.mark.long
def test_verify_finds_every_flipped_bit(run: Path) -> None:
    assert {name.split("/")[0] for name, _ in flips(run, 0, 9)} == {
        "artifacts", "config.yaml", "manifest.json", "rejects.jsonl", "train", "values"
    }  # fmt: skip
    assert found_by_verify(run, 0, 60) == 60


@pytest.mark.stress
def test_verify_finds_1000_of_1000_flipped_bits(run: Path) -> None:
    assert found_by_verify(run, 1, 1000) == 1000


def read_in_silence(run: Path, truth: dict[str, str], seed: int, count: int) -> dict[str, int]:
    """How many of so many flipped bits each reader refuses; what it gives otherwise is what it gave before."""
    refused = dict.fromkeys(READERS, 0)
    for name, bit in flips(run, seed, count):
        flip(run / name, bit)
        for reader in READERS:
            found = told(run, reader)
            assert found in (truth[reader], "refused"), (reader, name, bit)
            refused[reader] += found == "refused"
        flip(run / name, bit)
    return refused


@pytest.mark.long
def test_no_reader_is_wrong_in_silence(run: Path, truth: dict[str, str]) -> None:
    refused = read_in_silence(run, truth, 2, 18)
    assert min(count for reader, count in refused.items() if reader != "tensors") >= 2, refused


@pytest.mark.stress
def test_no_reader_is_wrong_in_silence_300_times(run: Path, truth: dict[str, str]) -> None:
    refused = read_in_silence(run, truth, 3, 300)
    assert min(refused.values()) >= 5, refused


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [f"{VALUES}/part-00001.parquet", f"{TRAIN}/part-00001.parquet"])
def test_a_file_cut_at_50_lengths(run: Path, truth: dict[str, str], name: str) -> None:
    content = (run / name).read_bytes()
    readers = ["scan", "scan_tokens", "stats"] if name.startswith("values") else ["scan train", "train", "show"]
    for part in range(50):
        (run / name).write_bytes(content[: part * len(content) // 50])
        if part % 5 == 0:
            assert name in {problem.file for problem in verify(run)}
        assert told(run, readers[part % 3]) in ("refused", truth[readers[part % 3]])
        with pytest.raises(StoredDataError, match="part-00001"):
            shards.facts_of(run / name)


def swapped(run: Path, folder: str) -> None:
    one, other = (run / folder / f"part-0000{i}.parquet" for i in (0, 1))
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def duplicated(run: Path, folder: str) -> None:
    shutil.copy(run / folder / "part-00000.parquet", run / folder / "part-00001.parquet")


def missing(run: Path, folder: str) -> None:
    (run / folder / "part-00001.parquet").unlink()


def empty(run: Path, folder: str) -> None:
    (run / folder / "part-00001.parquet").write_bytes(b"")


def of_another_run(run: Path, folder: str) -> None:
    other = small_run(run.parent / "other", [value_row(i, 4 + i % 5) for i in range(12)], generations=(0, 1))
    shutil.copy(other / folder / "part-00001.parquet", run / folder / "part-00001.parquet")


def of_another_folder(run: Path, folder: str) -> None:
    """Of the same run and rows: another generation, another mask."""
    if folder == VALUES:
        shutil.copy(run / "values/generation=0/part-00001.parquet", run / folder / "part-00001.parquet")
        return
    shutil.copy(run / TRAIN / "part-00001.parquet", run / "train/mask=0001/part-00001.parquet")


DAMAGES = (swapped, duplicated, missing, empty, of_another_run, of_another_folder)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("where", [VALUES, TRAIN])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_shards_that_are_not_the_ones_written(
    damage: Callable[[Path, str], None], where: str, run: Path, truth: dict[str, str]
) -> None:
    place = where
    if damage is of_another_folder and where == TRAIN:
        assert command("mask", run, "--keep", 0.2).code == 0
        place, truth = "train/mask=0001", {reader: told(run, reader) for reader in READERS}
    damage(run, where)
    ended = command("verify", run)
    assert ended.code == 4 and f"{place}/part-00001.parquet" in ended.err
    must = {VALUES: ["scan", "stats", "search", "show", "report"], TRAIN: ["scan train", "train", "show", "stats"]}
    for reader in READERS:
        found = told(run, reader)
        assert found in (truth[reader], "refused"), reader
        assert found == "refused" or reader not in must[where], reader
    for name in ("stats", "report"):
        ended = command(name, run)
        assert ended.code == 4 and "part-0000" in ended.err and "Traceback" not in ended.err, ended.err


def test_a_foreign_shard_is_named_and_not_read(run: Path, truth: dict[str, str]) -> None:
    for folder in (VALUES, TRAIN):
        shutil.copy(run / folder / "part-00000.parquet", run / folder / "part-00003.parquet")
    ended = command("verify", run)
    assert ended.code == 4
    assert all(f"{folder}/part-00003.parquet: not named by the manifest" in ended.err for folder in (VALUES, TRAIN))
    assert {reader: told(run, reader) for reader in READERS} == truth


def without_a_shard(whole: Any) -> None:
    whole["generations"][1]["shards"].pop()
    whole["generations"][1]["plan"].pop()


def with_one_more(whole: Any) -> None:
    more = whole["generations"][1]["shards"][-1] | {"path": f"{VALUES}/part-00003.parquet"}
    whole["generations"][1]["shards"].append(more)
    whole["generations"][1]["plan"].append(whole["generations"][1]["plan"][0])


def with_one_twice(whole: Any) -> None:
    first = whole["generations"][1]["shards"][0]
    whole["generations"][1]["shards"][1] = first | {"path": f"{VALUES}/part-00001.parquet"}


@pytest.mark.parametrize("change", [without_a_shard, with_one_more, with_one_twice])
@pytest.mark.parametrize("seal", [True, False])
def test_a_manifest_of_other_shards(change: Callable[[Any], None], seal: bool, run: Path) -> None:
    document = orjson.loads((run / "manifest.json").read_bytes())
    change(document)
    (run / "manifest.json").write_bytes(sealed_manifest(document) if seal else orjson.dumps(document))
    ended = command("verify", run)
    assert ended.code == 4 and ("manifest.json" in ended.err or "part-00001.parquet" in ended.err)
    if not seal:  # a seal is no lock: who makes one anew can say what he likes, and `verify` still tells
        assert {told(run, reader) for reader in READERS if reader != "tensors"} == {"refused"}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[" * 10_000_000, b"\xff" * 99], ids=range(5))
def test_what_is_no_manifest_ends_every_reader(content: bytes, run: Path) -> None:
    (run / "manifest.json").write_bytes(content)
    assert {told(run, reader) for reader in READERS if reader != "tensors"} == {"refused"}
    for name in ("verify", "stats", "report"):
        ended = command(name, run)
        assert ended.code == 4 and "manifest.json" in ended.err and len(ended.err) < 2000
