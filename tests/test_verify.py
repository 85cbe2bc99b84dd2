from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from small_run import small_run, value_rows, write_generation

from alphatoken_curate import card, manifest, shards
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.remask import make_mask
from alphatoken_curate.schema import SIGNALS, TRAIN, VALUES
from alphatoken_curate.shards import Footer
from alphatoken_curate.verify import verify

VALUES_1 = "values/generation=0/part-00001.parquet"
TRAIN_1 = "train/mask=0000/part-00001.parquet"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "a")


def files(run: Path) -> set[str]:
    return {problem.file for problem in verify(run)}


def test_a_whole_run_has_no_problem(run: Path) -> None:
    assert verify(run) == []
    make_mask(run, MaskConfig(keep=0.3, weights="sigmoid", scope="row", by="nll - reference_nll"))
    write_generation(run, value_rows(seed=1), number=1)
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, MaskConfig(keep="positive", allow_empty_rows=True, weights="relu"))
    card.write(run, manifest.read(run))
    assert verify(str(run)) == []


def test_a_run_without_reference_or_mask_is_whole(tmp_path: Path) -> None:
    write_generation(tmp_path, value_rows(reference=False))
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    card.write(tmp_path, manifest.read(tmp_path))
    assert verify(tmp_path) == []


@pytest.mark.parametrize("name", [VALUES_1, TRAIN_1])
def test_every_flipped_bit_is_found(run: Path, name: str) -> None:
    path = run / name
    data = path.read_bytes()
    for bit in random.Random(1).sample(range(len(data) * 8), 100):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert name in files(run), f"bit {bit}"


@pytest.mark.parametrize("name", ["config.yaml", "rejects.jsonl", "artifacts/vocab.parquet"])
def test_other_files_are_checked_too(run: Path, name: str) -> None:
    path = run / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert files(run) == {name}
    path.unlink()
    assert files(run) == {name}


def test_missing_truncated_swapped_and_empty_shards(run: Path) -> None:
    path, other = run / VALUES_1, run / "values/generation=0/part-00000.parquet"
    good = path.read_bytes()
    for content in (b"", good[:-1], good[: len(good) // 2], other.read_bytes()):
        path.write_bytes(content)
        assert VALUES_1 in files(run)
    path.unlink()
    assert VALUES_1 in files(run)
    path.mkdir()
    assert VALUES_1 in files(run)


def test_foreign_and_left_over_files(run: Path) -> None:
    folder = run / "train/mask=0000"
    shutil.copy(folder / "part-00000.parquet", folder / "part-00003.parquet")
    shutil.copy(folder / "part-00000.parquet", folder / "part-00000 (copy).parquet")
    (run / "artifacts" / "notes.txt").write_text("x")
    (run / ".manifest.json.0123456789abcdef.tmp").write_text("x")
    (run / "LICENSE").write_text("the user's own")
    found = {problem.file: problem.found for problem in verify(run)}
    assert {name for name, what in found.items() if what == "not named by the manifest"} == {
        "train/mask=0000/part-00003.parquet",
        "train/mask=0000/part-00000 (copy).parquet",
        "artifacts/notes.txt",
    }
    assert "stopped" in found[".manifest.json.0123456789abcdef.tmp"]
    assert "LICENSE" not in found


def rewritten(run: Path, name: str, change: Callable[[dict[str, list[Any]]], None]) -> None:
    """Change a shard's content and make everything that only hashes or counts bytes agree with it."""
    path, schema = run / name, VALUES if name.startswith("values") else TRAIN
    footer, content = shards.read_footer(path), shards.read(path, schema).to_pydict()
    change(content)
    shards._commit(path, pa.table(content, schema=schema), footer, footer.counts)
    if schema is VALUES:
        stored = manifest.read(run)
        manifest.write(run, replace(manifest.rebuild(run), masks=stored.masks))
    else:
        manifest.write(run, manifest.rebuild(run))


def scored(content: dict[str, list[Any]]) -> int:
    return next(i for i, row in enumerate(content["status"]) if row == "scored")


def set_in(column: str, index: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def change(content: dict[str, list[Any]]) -> None:
        content[column][scored(content) if "status" in content else 0][index] = value

    return change


def drop_last(column: str) -> Callable[[dict[str, list[Any]]], None]:
    def change(content: dict[str, list[Any]]) -> None:
        content[column][scored(content) if "status" in content else 0].pop()

    return change


def set_row(column: str, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def change(content: dict[str, list[Any]]) -> None:
        content[column][1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_row("row_id", 7), "row ids do not go on"),
        (set_row("status", "done"), "'done' is none of"),
        (drop_last("input_ids"), "`response` is not as long"),
        (drop_last("response"), "`response` is not as long"),
        (set_in("response", 0, True), "true at index 0"),
        *((drop_last(name), f"`{name}` is not as long") for name in SIGNALS),
        *((set_in(name, -1, None), f"`{name}` is not null exactly") for name in SIGNALS),
        *((set_in(name, 0, 0.0), f"`{name}` is not null exactly") for name in SIGNALS),
        *((set_in(name, -1, float("nan")), f"`{name}` is not finite") for name in SIGNALS),
        (set_in("value", -1, float("inf")), "`value` is not finite"),
    ],
)
def test_values_that_contradict_themselves(
    run: Path, change: Callable[[dict[str, list[Any]]], None], message: str
) -> None:
    rewritten(run, VALUES_1, change)
    assert any(problem.file == VALUES_1 and message in problem.found for problem in verify(run))


def last_trained(content: dict[str, list[Any]]) -> tuple[int, int]:
    return next((r, i) for r, row in enumerate(content["loss_weight"]) for i, w in enumerate(row) if w > 0)


def set_trained(column: str, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def change(content: dict[str, list[Any]]) -> None:
        row, i = last_trained(content)
        content[column][row][i] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_row("row_id", 7), "not the scored rows"),
        (set_in("input_ids", 0, 49), "not the scored rows"),
        (set_in("attention_mask", 0, 0), "`attention_mask` is not 1"),
        (set_trained("labels", -100), "`labels` are not"),
        (set_in("labels", 0, 7), "`labels` are not"),
        (set_trained("labels", 999), "`labels` are not"),
        (set_trained("loss_mask", 0), "`loss_mask` is not"),
        (set_trained("loss_weight", 0.0), "`labels` are not"),
        (set_trained("loss_weight", -1.0), "finite and >= 0"),
        (set_trained("loss_weight", float("nan")), "finite and >= 0"),
        (set_in("loss_weight", 0, 1.0), "above 0 off the response"),
        (set_in("value", 0, 1.0), "`value` is not null"),
        *((drop_last(name), f"`{name}` is not as long") for name in TRAIN.names[2:]),
    ],
)
def test_train_rows_that_contradict_themselves(
    run: Path, change: Callable[[dict[str, list[Any]]], None], message: str
) -> None:
    rewritten(run, TRAIN_1, change)
    assert any(problem.file == TRAIN_1 and message in problem.found for problem in verify(run))


def test_weights_whose_mean_is_not_1(run: Path) -> None:
    rewritten(run, TRAIN_1, set_trained("loss_weight", 3.0))
    assert any("mean loss weight" in problem.found for problem in verify(run))


def test_a_shard_of_another_run_is_found(run: Path) -> None:
    path = run / VALUES_1
    footer = shards.read_footer(path)
    shards.write_values(path, value_rows()[5:10], Footer(fields={"seed": 9}, facts=footer.facts))
    stored = manifest.read(run)
    generation = stored.generations[0]
    changed = (generation.shards[0], shards.facts_of(path)[1], generation.shards[2])
    manifest.write(run, replace(stored, generations=(replace(generation, shards=changed),)))
    assert any(problem.file == VALUES_1 and "fingerprint" in problem.found for problem in verify(run))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("counts", "scored"), 8),
        (("counts", "tokens"), 1),
        (("masks", 0, "kept_tokens"), 1),
        (("generations", 0, "fingerprint"), "sha256:" + "0" * 64),
        (("generations", 0, "shards", 0, "rows"), 4),
        (("generations", 0, "checkpoint"), "other"),
        (("versions", "numpy"), "1.0"),
        (("settings", "estimator"), "exact"),
    ],
)
def test_a_changed_manifest_is_found(run: Path, place: tuple[Any, ...], value: Any) -> None:
    whole: Any = orjson.loads((run / "manifest.json").read_bytes())
    part = whole
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (run / "manifest.json").write_bytes(orjson.dumps(whole))
    assert "manifest.json" in files(run)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 1_000_000, b"null"], ids=range(4))
def test_with_a_damaged_manifest_the_shards_are_checked_by_themselves(run: Path, content: bytes) -> None:
    (run / "manifest.json").write_bytes(content)
    assert files(run) == {"manifest.json"}
    for name in (VALUES_1, TRAIN_1):
        data = bytearray((run / name).read_bytes())
        data[100] ^= 1
        (run / name).write_bytes(data)
        assert files(run) >= {"manifest.json", name}


def test_an_empty_folder_and_none_at_all(tmp_path: Path) -> None:
    assert files(tmp_path) == {"manifest.json", "."}
    assert files(tmp_path / "absent") == {"manifest.json", "."}


def test_a_card_that_names_an_old_mask(run: Path) -> None:
    make_mask(run, MaskConfig(keep=0.2))
    assert files(run) == {"README.md"}
    card.write(run, manifest.read(run))
    text = (run / "README.md").read_text()
    (run / "README.md").write_text(text + "\nMy own words.\n")
    assert verify(run) == []
    (run / "README.md").unlink()
    assert files(run) == {"README.md"}


def test_problems_say_what_to_do(run: Path) -> None:
    (run / VALUES_1).write_bytes(b"PAR1")
    for problem in verify(run):
        assert problem.found and problem.do
    assert np.all([problem.file for problem in verify(run)])
