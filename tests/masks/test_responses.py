from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import published, small_run, value_rows, write_generation

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.responses import Scored, aligned, chosen_generations, load
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import COMPONENTS, LAYOUTS, MOST_TURNS, SIGNALS, rows_and_turns
from alphatoken_curate.runs.shards import Branch, ValueRow

KINDS = pytest.mark.parametrize("kind", sorted(LAYOUTS))
NAMES = ("nll", "value", *COMPONENTS, "token_id")
PAIR = {"sft": (), "preference": ("omega", "margin")}


def key(row_id: int) -> int:
    """Of a row of one sequence."""
    return row_id * MOST_TURNS


def failed(row: ValueRow) -> ValueRow:
    """The same row where scoring it failed."""
    branches = tuple(replace(branch, signals={}) for branch in row.branches)
    return replace(row, status="failed", branches=branches, omega=None, margin=None)


def three(run: Path, kind: str) -> list[list[ValueRow]]:
    """Generations 0, 2 and 5 of a run, written: row 1 failed in the second, row 5 in all but the last."""
    made = [value_rows(seed=number, kind=kind) for number in (0, 2, 5)]
    made[1][1] = failed(made[1][1])
    made[2][5] = replace(value_rows(seed=5, kind=kind)[4], row_id=5, line=6)
    for one in made[:2]:
        one[5] = failed(replace(one[4], row_id=5, line=6))
    for number, rows in zip((0, 2, 5), made, strict=True):
        write_generation(run, rows, number=number)
    manifest.write(run, manifest.rebuild(run))
    return made


def read(run: Path, generation: str, names: tuple[str, ...], kind: str, **more: str) -> Scored:
    config = published(generation=generation, **more)  # type: ignore[arg-type]
    return load(run, aligned(run, chosen_generations(run, manifest.read(run), config)), names, LAYOUTS[kind])


def plain(made: list[list[ValueRow]], branch: int, name: str) -> list[float]:
    """Of the rows scored in all: a signal's mean at each response token, by one token after the other."""
    values = []
    for same in zip(*made, strict=True):
        if {row.status for row in same} != {"scored"}:
            continue
        for position in np.flatnonzero(same[0].branches[branch].response):
            of_token = [np.float64(row.branches[branch].signals[name][position]) for row in same]
            values.append(float(np.float32(sum(of_token) / len(of_token))))
    return values


@KINDS
def test_one_generation_is_read_as_it_is_stored(tmp_path: Path, kind: str) -> None:
    run = small_run(tmp_path, kind=kind)
    scored = [row for row in value_rows(kind=kind) if row.status == "scored"]
    found = read(run, "latest", (*NAMES, *PAIR[kind]), kind)
    assert np.concatenate(found.keys).tolist() == [key(row.row_id) for row in scored] and found.left_out == 0
    for number, tokens in enumerate(found.branches):
        places = [
            (i, key(row.row_id), int(at)) for i, row in enumerate(scored) for at in np.flatnonzero(branch(row, number))
        ]
        columns = tokens.columns
        assert list(zip(tokens.row, columns["sequence"], columns["position"], strict=True)) == places
        assert columns["token_id"].tolist() == [scored[i].branches[number].input_ids[at] for i, _, at in places]
        for name in (*COMPONENTS, "nll", "value"):
            assert columns[name].dtype == np.float32
            assert columns[name].tolist() == [scored[i].branches[number].signals[name][at] for i, _, at in places]
        for name in PAIR[kind]:
            assert columns[name].tolist() == [np.float32(getattr(scored[i], name)) for i, _, _ in places]
        assert sum(tokens.per_shard) == len(places) and len(tokens.per_shard) == 3


def branch(row: ValueRow, number: int) -> np.ndarray:
    return row.branches[number].response


@pytest.mark.one_in(2)
@KINDS
@pytest.mark.parametrize("wanted", ["all", "0,5", "2,5"])
def test_several_generations_are_averaged_once(tmp_path: Path, kind: str, wanted: str) -> None:
    made = three(tmp_path, kind)
    chosen = made if wanted == "all" else [made[{0: 0, 2: 1, 5: 2}[int(number)]] for number in wanted.split(",")]
    found = read(tmp_path, wanted, NAMES, kind)
    for number, tokens in enumerate(found.branches):
        for name in ("nll", "value", *COMPONENTS):
            assert tokens.columns[name].dtype == np.float32
            assert tokens.columns[name].tolist() == plain(chosen, number, name)
    statuses = [{row.status for row in same} for same in zip(*chosen, strict=True)]
    assert np.concatenate(found.keys).tolist() == [key(i) for i, kinds in enumerate(statuses) if kinds == {"scored"}]
    assert found.left_out == sum("scored" in kinds and len(kinds) > 1 for kinds in statuses) > 0


def test_the_mean_is_that_of_float64_rounded_once(tmp_path: Path) -> None:
    made = three(tmp_path, "sft")
    found = read(tmp_path, "all", ("nll",), "sft").branches[0].columns["nll"]
    kept = [i for i in range(12) if {rows[i].status for rows in made} == {"scored"}]
    stacked = np.stack(
        [np.concatenate([rows[i].branches[0].signals["nll"][branch(rows[i], 0)] for i in kept]) for rows in made]
    )
    np.testing.assert_array_equal(found, stacked.astype(np.float64).mean(axis=0).astype(np.float32))
    assert np.any(found != stacked.mean(axis=0, dtype=np.float32)), "so few tokens that rounding does not show"


def test_the_numbers_of_a_pair_are_averaged_too(tmp_path: Path) -> None:
    made = three(tmp_path, "preference")
    found = read(tmp_path, "0,2", ("omega", "margin"), "preference")
    for tokens in found.branches:
        for name in ("omega", "margin"):
            for row_id in rows_and_turns(np.concatenate(found.keys))[0]:
                want = np.float32(np.mean([np.float64(getattr(rows[row_id], name)) for rows in made[:2]]))
                assert set(tokens.columns[name][tokens.columns["sequence"] == key(row_id)]) == {want}


def test_the_losses_of_the_reference_are_taken_from_where_they_are(tmp_path: Path) -> None:
    """A run begun with model and reference the same has none in its first generation."""
    write_generation(tmp_path, value_rows(reference=False))
    write_generation(tmp_path, value_rows(seed=1), number=1)
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    columns = read(tmp_path, "all", ("reference_nll", "nll"), "sft").branches[0].columns
    later = read(tmp_path, "1", ("reference_nll",), "sft").branches[0].columns
    np.testing.assert_array_equal(columns["reference_nll"], later["reference_nll"])
    assert not np.isnan(columns["reference_nll"]).any() and not np.isnan(columns["nll"]).any()


@KINDS
def test_shards_one_by_one_hold_what_all_hold_together(tmp_path: Path, kind: str) -> None:
    three(tmp_path, kind)
    generations = manifest.read(tmp_path).generations
    names = (*(name for name in SIGNALS if name != "reference_nll"), *PAIR[kind])
    whole = load(tmp_path, aligned(tmp_path, generations), names, LAYOUTS[kind])
    parts = [load(tmp_path, [files], names, LAYOUTS[kind]) for files in aligned(tmp_path, generations)]
    assert sum(part.left_out for part in parts) == whole.left_out == 2
    for number, tokens in enumerate(whole.branches):
        assert tokens.per_shard == tuple(len(part.branches[number].row) for part in parts)
        rows = np.cumsum([0, *(len(part.keys[0]) for part in parts)])
        for name, column in tokens.columns.items():
            np.testing.assert_array_equal(
                column, np.concatenate([part.branches[number].columns[name] for part in parts])
            )
        shifted = [part.branches[number].row + start for part, start in zip(parts, rows, strict=False)]
        np.testing.assert_array_equal(tokens.row, np.concatenate(shifted))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("generation", "aggregate", "want"),
    [
        ("latest", "mean", [5]),
        ("latest", "last", [5]),
        ("all", "mean", [0, 2, 5]),
        ("all", "last", [5]),
        ("5,0", "mean", [0, 5]),
        ("0,2", "last", [2]),
        ("0", "mean", [0]),
    ],
)
def test_which_generations_are_named(tmp_path: Path, generation: str, aggregate: str, want: list[int]) -> None:
    three(tmp_path, "sft")
    found = chosen_generations(tmp_path, manifest.read(tmp_path), published(generation=generation, aggregate=aggregate))
    assert [one.generation for one in found] == want


@pytest.mark.parametrize("generation", ["1", "0,1", "0,1,2,7"])
def test_a_generation_that_is_not_there_is_refused(tmp_path: Path, generation: str) -> None:
    three(tmp_path, "sft")
    with pytest.raises(UsageError, match=r"no generation 1.*; it has 0, 2, 5"):
        chosen_generations(tmp_path, manifest.read(tmp_path), published(generation=generation, aggregate="last"))


def test_a_run_without_generations_says_how_to_make_one(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    empty = replace(manifest.read(run), generations=())
    with pytest.raises(StoredDataError, match="run the `score` command"):
        chosen_generations(run, empty, published())


def moved(one: Branch) -> Branch:
    """The response begins one token later."""
    first = int(one.response.argmax())
    response = one.response.copy()
    response[first] = False
    signals = {name: np.where(response, signal, np.float32(np.nan)) for name, signal in one.signals.items()}
    return replace(one, response=response, end_of_turn=one.end_of_turn & response, signals=signals)


def test_generations_of_other_tokens_are_refused(tmp_path: Path) -> None:
    rows = [replace(row, row_id=i, line=i + 1) for i, row in enumerate(value_rows(12)[8:])]
    write_generation(tmp_path, rows)
    write_generation(tmp_path, [replace(row, branches=(moved(row.branches[0]),)) for row in rows], number=1)
    manifest.write(tmp_path, manifest.rebuild(tmp_path))
    with pytest.raises(StoredDataError, match=r"generation=1.*its tokens are not those"):
        read(tmp_path, "all", ("nll",), "sft")


def test_generations_of_other_shards_are_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path, generations=(0, 1))
    one, other = manifest.read(run).generations
    for shards in (other.shards[:-1], other.shards[::-1]):
        with pytest.raises(StoredDataError, match="generations 0, 1 do not hold the same rows"):
            aligned(run, [one, replace(other, shards=shards)])


def test_a_file_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    three(tmp_path, "sft")
    path = tmp_path / "values/generation=2/part-00001.parquet"
    path.write_bytes((tmp_path / "values/generation=0/part-00001.parquet").read_bytes())
    with pytest.raises(StoredDataError, match=r"generation=2.part-00001\.parquet: not the file"):
        read(tmp_path, "all", ("nll",), "sft")
    read(tmp_path, "0,5", ("nll",), "sft")
