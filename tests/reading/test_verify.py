from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from small_run import published, sealed_manifest, small_run, value_rows, write_generation

from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.runs import card, manifest, shards
from alphatoken_curate.runs.schema import LAYOUTS, SFT
from alphatoken_curate.runs.shards import Footer

VALUES_1 = "values/generation=0/part-00001.parquet"
TRAIN_1 = "train/mask=0000/part-00001.parquet"


both_kinds = pytest.mark.parametrize("kind", list(LAYOUTS))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "a")


def files(run: Path) -> set[str]:
    return {problem.file for problem in verify(run)}


@pytest.mark.one_in(2)
@both_kinds
def test_a_whole_run_has_no_problem(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path, kind=kind)
    assert verify(run) == []
    make_mask(run, published(keep=0.3, weights="sigmoid", scope="row", by="nll - reference_nll"))
    write_generation(run, value_rows(seed=1, kind=kind), number=4)
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, published(keep="positive", allow_empty_rows=True, weights="relu"))
    make_mask(run, published(generation="all", weights="rank"))
    card.write(run, manifest.read(run))
    assert verify(str(run)) == []


@both_kinds
def test_a_run_without_reference_or_mask_is_whole(tmp_path: Path, kind: str) -> None:
    write_generation(tmp_path, value_rows(reference=False, kind=kind))
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    card.write(tmp_path, manifest.read(tmp_path))
    assert verify(tmp_path) == []


@pytest.mark.one_in(4)
@both_kinds
@pytest.mark.parametrize("name", [VALUES_1, TRAIN_1])
def test_every_flipped_bit_is_found(tmp_path: Path, kind: str, name: str) -> None:
    path = small_run(tmp_path, kind=kind) / name
    data = path.read_bytes()
    for bit in random.Random(1).sample(range(len(data) * 8), 50):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert name in files(tmp_path), f"bit {bit}"


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
    told = {(problem.found, problem.do) for problem in verify(run) if problem.file == VALUES_1}
    assert ("missing", "restore it, or run the command that wrote it again") in told
    assert not any(VALUES_1 in found for found, _ in told)
    path.mkdir()
    assert VALUES_1 in files(run)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("kind", ["sft", "preference", "each"])
@pytest.mark.parametrize("generation", [0, 2])
def test_shards_behind_a_damaged_or_missing_one_are_sound(tmp_path: Path, kind: str, generation: int) -> None:
    rows = value_rows(kind="sft" if kind == "each" else kind)
    if kind == "each":  # two answers of each row
        rows = [replace(rows[i - i % 2], row_id=i // 2, turn=i % 2, line=i // 2 + 1) for i in range(12)]
    run = small_run(tmp_path, rows, per_shard=2, generations=(0, 2))
    assert verify(run) == []
    name = f"values/generation={generation}/part-00001.parquet"
    whole = bytearray((run / name).read_bytes())
    whole[100] ^= 1
    (run / name).write_bytes(whole)
    assert [problem.file for problem in verify(run)] == [name]
    (run / name).unlink()
    assert [problem.file for problem in verify(run)] == [name]


def test_rows_that_do_not_go_on_are_found_behind_a_missing_shard(tmp_path: Path) -> None:
    rows = value_rows()
    run = small_run(tmp_path, [*rows[:8], *(replace(row, row_id=row.row_id + 1) for row in rows[8:])], per_shard=2)
    (run / "values/generation=0/part-00001.parquet").unlink()
    assert found(run, "values/generation=0/part-00004.parquet") == "row ids do not go on one by one from 8"


def test_what_a_killed_command_left_is_not_held_against_the_manifest(tmp_path: Path) -> None:
    """It is told of for itself, with advice that ends it."""
    run = small_run(tmp_path)
    named = manifest.read(run)
    make_mask(run, published(keep=0.3))
    write_generation(run, value_rows(seed=1), number=1)
    manifest.write(run, named)  # as if both had been killed before they were named
    left = {problem.file: problem.do for problem in verify(run)}
    assert {name.rpartition("/")[0] for name in left} == {"train/mask=0001", "values/generation=1"}
    assert {do.partition(" ")[0] for do in left.values()} == {"finish"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alphatoken_curate.masks.remask._free_number", lambda *_: 2)
        make_mask(run, published(keep=0.4))
    card.write(run, manifest.read(run))
    again = {problem.file: problem.do for problem in verify(run)}
    assert again.keys() == left.keys()
    assert {do for name, do in again.items() if name.startswith("train")} == {"move it out of the run"}


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
    path, layout = run / name, manifest.layout(manifest.read(run))
    schema = layout.values if name.startswith("values") else layout.train
    footer, content = shards.read_footer(path), shards.read(path, schema).to_pydict()
    change(content)
    shards.commit(path, pa.table(content, schema=schema), footer, footer.counts)
    manifest.write(run, manifest.rebuild(run))


def found(run: Path, name: str) -> str:
    """All that is wrong with a file."""
    return "; ".join(problem.found for problem in verify(run) if problem.file == name)


def set_in(column: str, row: int, index: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def change(content: dict[str, list[Any]]) -> None:
        content[column][row][index] = value

    return change


def swapped(content: dict[str, list[Any]]) -> None:
    for name in [name for name in content if name.startswith("chosen_")]:
        other = name.replace("chosen_", "rejected_")
        content[name], content[other] = content[other], content[name]


@both_kinds
def test_values_that_contradict_themselves(tmp_path: Path, kind: str) -> None:
    run, prefix = small_run(tmp_path, kind=kind), LAYOUTS[kind].branches[-1]
    rewritten(run, VALUES_1, set_in(prefix + "entropy", 1, -1, None))
    assert found(run, VALUES_1) == f"`{prefix}entropy` is not null exactly off the response"


@both_kinds
def test_train_rows_that_contradict_themselves(tmp_path: Path, kind: str) -> None:
    run, prefix = small_run(tmp_path, kind=kind), LAYOUTS[kind].branches[-1]
    rewritten(run, TRAIN_1, set_in(prefix + "labels", 0, 0, 7))
    assert f"`{prefix}labels` are not the tokens" in found(run, TRAIN_1)


@both_kinds
def test_weights_whose_mean_is_not_1(tmp_path: Path, kind: str) -> None:
    run, prefix = small_run(tmp_path, kind=kind), LAYOUTS[kind].branches[-1]

    def heavier(content: dict[str, list[Any]]) -> None:
        content[prefix + "loss_weight"] = [[3 * x for x in row] for row in content[prefix + "loss_weight"]]

    rewritten(run, TRAIN_1, heavier)
    assert f"mean of `{prefix}loss_weight`" in found(run, "train/mask=0000")


def test_swapped_branches(tmp_path: Path) -> None:
    run = small_run(tmp_path / "values", kind="preference")
    rewritten(run, VALUES_1, swapped)
    assert "`margin` is not what the losses" in found(run, VALUES_1)
    assert "not those that are scored in values/" in found(run, TRAIN_1)
    run = small_run(tmp_path / "train", kind="preference")
    rewritten(run, TRAIN_1, swapped)
    assert files(run) >= {TRAIN_1} and VALUES_1 not in files(run)


def test_a_wrong_omega(tmp_path: Path) -> None:
    run = small_run(tmp_path, kind="preference")
    rewritten(run, VALUES_1, lambda content: content["omega"].__setitem__(1, 0.3))
    assert found(run, VALUES_1) == "`omega` is not beta sigmoid(-margin), which is above 0 and at most beta"


def test_generations_of_other_tokens(tmp_path: Path) -> None:
    run, name = small_run(tmp_path, generations=(0, 2)), "values/generation=2/part-00001.parquet"
    rewritten(run, name, set_in("input_ids", 1, 0, 49))
    assert "its `input_ids` is not that of the same shard of the first generation" in found(run, name)


def test_generations_of_another_number_of_shards(tmp_path: Path) -> None:
    write_generation(tmp_path, value_rows(), per_shard=6)
    write_generation(tmp_path, value_rows(), per_shard=5, number=1)
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    assert "has 2 shards, and none for these rows" in found(tmp_path, "values/generation=1/part-00002.parquet")


def test_generations_of_another_kind(tmp_path: Path) -> None:
    write_generation(tmp_path, value_rows(kind="preference"))
    write_generation(tmp_path, value_rows(), number=1)
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    assert "its columns are not those that the run's kind" in found(tmp_path, "values/generation=0/part-00000.parquet")


@pytest.mark.one_in(2)
@both_kinds
def test_train_rows_are_those_scored_in_every_generation_of_the_mask(tmp_path: Path, kind: str) -> None:
    rows = value_rows(kind=kind)
    failed = replace(rows[0], status="failed", row_id=8, line=9, omega=None, margin=None)
    plain = tuple(replace(branch, signals={}) for branch in rows[8].branches)
    write_generation(tmp_path, rows)
    write_generation(tmp_path, [*rows[:8], replace(failed, branches=plain, id=rows[8].id), *rows[9:]], number=1)
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    made = [make_mask(tmp_path, published(generation=which)) for which in ("0", "1", "all")]
    card.write(tmp_path, manifest.read(tmp_path))
    assert [one.rows for one in made] == [9, 8, 8]
    assert verify(tmp_path) == []
    whole, few = (tmp_path / f"train/mask={n:04d}/part-00001.parquet" for n in (0, 2))
    footer = shards.read_footer(few)
    schema = LAYOUTS[kind].train
    shards.commit(few, shards.read(whole, schema), footer, shards.read_footer(whole).counts)
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    assert "not those that are scored in values/" in found(tmp_path, "train/mask=0002/part-00001.parquet")


def test_a_mask_that_names_a_missing_generation(tmp_path: Path) -> None:
    run = small_run(tmp_path, generations=(0, 2), config=published(generation="all"))
    whole: Any = orjson.loads((run / "manifest.json").read_bytes())
    whole["masks"][0]["generations"] = [0, 1]
    (run / "manifest.json").write_bytes(sealed_manifest(whole))
    assert "mask 0 has 3 shards of generations 0, 1" in found(run, "manifest.json")
    whole["masks"][0]["generations"] = [2]
    (run / "manifest.json").write_bytes(sealed_manifest(whole))
    assert "its `masks` are not what the shards say" in found(run, "manifest.json")
    shutil.rmtree(run / "values/generation=0")
    (run / "manifest.json").unlink()
    assert found(run, TRAIN_1) == "not named by the manifest"


@pytest.mark.parametrize("damaged", [None, b"{}"])
def test_what_to_do_about_a_manifest_is_told_once(tmp_path: Path, damaged: bytes | None) -> None:
    run = small_run(tmp_path / "run")
    (run / "manifest.json").unlink()
    if damaged is not None:
        (run / "manifest.json").write_bytes(damaged)
    (problem,) = verify(run)
    assert str(run) not in problem.found and "run" not in problem.found.replace("finished run", "")
    assert problem.do.startswith("run the `score`")


def test_a_shard_of_another_run_is_found(run: Path) -> None:
    path = run / VALUES_1
    footer = shards.read_footer(path)
    shards.write_values(path, value_rows()[5:10], Footer(fields={"seed": 9}, facts=footer.facts), SFT)
    stored = manifest.read(run)
    generation = stored.generations[0]
    changed = (generation.shards[0], shards.facts_of(path)[1], generation.shards[2])
    manifest.write(run, replace(stored, generations=(replace(generation, shards=changed),)))
    assert "fingerprint" in found(run, VALUES_1)


@pytest.mark.one_in(3)
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
        (("settings", "kind"), "preference"),
        (("settings", "kind"), "dpo"),
    ],
)
def test_a_changed_manifest_is_found(run: Path, place: tuple[Any, ...], value: Any) -> None:
    whole: Any = orjson.loads((run / "manifest.json").read_bytes())
    part = whole
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    for content in (sealed_manifest(whole), orjson.dumps(whole)):
        (run / "manifest.json").write_bytes(content)
        assert "manifest.json" in files(run)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 1_000_000, b"null"], ids=range(4))
@both_kinds
def test_with_a_damaged_manifest_the_shards_are_checked_by_themselves(
    tmp_path: Path, kind: str, content: bytes
) -> None:
    run = small_run(tmp_path, kind=kind)
    (run / "manifest.json").write_bytes(content)
    assert files(run) == {"manifest.json"}
    for name in (VALUES_1, TRAIN_1):
        data = bytearray((run / name).read_bytes())
        data[100] ^= 1
        (run / name).write_bytes(data)
        assert files(run) - {"."} == {"manifest.json", VALUES_1, name}


def test_an_empty_folder_and_none_at_all(tmp_path: Path) -> None:
    assert files(tmp_path) == {"manifest.json", "."}
    with pytest.raises(UsageError, match="no such run folder"):
        files(tmp_path / "absent")


def test_a_card_that_names_an_old_mask(run: Path) -> None:
    make_mask(run, published(keep=0.2))
    assert files(run) == {"README.md"}
    card.write(run, manifest.read(run))
    text = (run / "README.md").read_text()
    (run / "README.md").write_text(text + "\nMy own words.\n")
    assert verify(run) == []
    (run / "README.md").unlink()
    assert files(run) == {"README.md"}


def test_problems_say_what_to_do(run: Path) -> None:
    (run / VALUES_1).write_bytes(b"PAR1")
    problems = verify(run)
    assert problems and all(problem.file and problem.found and problem.do for problem in problems)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("estimator", ["influence", "exact+influence"])
@both_kinds
def test_the_estimator_says_which_columns_are_damage(tmp_path: Path, kind: str, estimator: str) -> None:
    run, prefix = small_run(tmp_path, kind=kind, estimator=estimator), LAYOUTS[kind].branches[-1]
    assert verify(run) == []
    there, absent = ("influence", "direct") if estimator == "influence" else ("upstream", "influence")

    def emptied(content: dict[str, list[Any]]) -> None:
        name = f"{prefix}adapt_{there}"
        content[name] = [[None] * len(row) for row in content[name]]

    before = (run / VALUES_1).read_bytes()
    rewritten(run, VALUES_1, emptied)
    assert f"`{prefix}adapt_{there}` is not null exactly off the response" in found(run, VALUES_1)
    (run / VALUES_1).write_bytes(before)
    rewritten(run, VALUES_1, set_in(f"{prefix}stab_{absent}", 1, -1, 0.5))
    assert f"`{prefix}stab_{absent}` is not null everywhere" in found(run, VALUES_1)
