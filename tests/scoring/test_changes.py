"""A run whose DATA is no longer what it was: the refusal says what changed in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_files import command, contents, token_records, write_jsonl

from alphatoken_curate import FingerprintError, ScoreConfig, score

ROWS = [json.dumps(record) for record in token_records(11)]
NEW = [json.dumps(record) for record in token_records(3, seed=50)]


@pytest.fixture
def settings(folder: Path, models: dict[str, str]) -> dict[str, Any]:
    data = write_jsonl(folder / "rows.jsonl", ROWS)
    target = write_jsonl(folder / "target.jsonl", token_records(2, seed=9))
    return {"data": data, "model": models["base"], "target": target, "rows_per_shard": 3, "layers": 1}


@pytest.fixture
def run(folder: Path, settings: dict[str, Any], tmp_path: Path) -> Path:
    """A finished run of `settings`, copied from one that was made once."""
    made = folder / "finished"
    if not made.exists():
        score(ScoreConfig(**settings), made)
    return Path(shutil.copytree(made, tmp_path / "run"))


def refused(run: Path, settings: dict[str, Any], lines: list[str], folder: Path, **more: Any) -> str:
    """What is said of the run where its data are these lines."""
    with pytest.raises(FingerprintError) as caught:
        score(ScoreConfig(**settings | {"data": write_jsonl(folder / "rows.jsonl", lines)} | more), run)
    assert "data" in caught.value.fields
    return str(caught.value)


EDITS: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "one edited": (lambda r: [*r[:2], NEW[0], *r[3:]], "1 row edited, the first at line 3."),
    "two edited": (lambda r: [*r[:2], NEW[0], *r[3:9], NEW[1], r[10]], "2 rows edited, the first at line 3."),
    "appended": (lambda r: [*r, *NEW], "3 rows added at the end, from line 12 on."),
    "one appended": (lambda r: [*r, NEW[0]], "1 row added at the end, from line 12 on."),
    "put in front": (lambda r: [*NEW[:2], *r], "2 rows added, from line 1 on."),
    "put between": (lambda r: [*r[:5], NEW[0], *r[5:]], "1 row added, from line 6 on."),
    "cut off": (lambda r: r[:9], "2 rows removed at the end, from line 10 on."),
    "taken out": (lambda r: [*r[:4], *r[6:]], "2 rows removed, from line 5 on."),
    "two exchanged": (lambda r: [*r[:5], r[6], r[5], *r[7:]], "the same rows in another order, from line 6 on."),
    "turned round": (lambda r: r[::-1], "the same rows in another order, from line 1 on."),
    "mixed": (
        lambda r: [*r[:3], *NEW, *r[5:]],
        "its rows differ from line 4 on; it had 11 rows, and has 12 rows.",
    ),
    "spaced otherwise": (lambda r: [r[0].replace(", ", ","), *r[1:]], "every row gives the same tokens"),
    "another key": (lambda r: [r[0].replace("{", '{"note": 1, ', 1), *r[1:]], "every row gives the same tokens"),
    "another id": (lambda r: [*r[:3], r[3].replace('"r3"', '"x"'), *r[4:]], "1 row edited, the first at line 4."),
    "blank lines": (lambda r: ["", *r[:3], "", *r[3:]], "every row gives the same tokens"),
    "blank lines and an edit": (lambda r: ["", *r[:3], "", NEW[0], *r[4:]], "1 row edited, the first at line 6."),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("edit", EDITS)
def test_what_changed_in_a_file_is_told(edit: str, run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    change, says = EDITS[edit]
    before = contents(run)
    told = refused(run, settings, change(list(ROWS)), tmp_path)
    assert f"rows.jsonl: {says}" in told and "settings or inputs: data (rows.jsonl " in told
    assert contents(run) == before


@pytest.mark.one_in(2)
@pytest.mark.parametrize("edit", EDITS)
def test_the_shards_alone_tell_it_too(edit: str, run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    (run / "artifacts" / "run.json").unlink()
    change, says = EDITS[edit]
    assert f"rows.jsonl: {says}" in refused(run, settings, change(list(ROWS)), tmp_path)


def test_an_unfinished_run_tells_what_it_has_rows_of(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    (run / "manifest.json").unlink()
    for part in (2, 3):
        (run / f"values/generation=0/part-{part:05d}.parquet").unlink()
    told = refused(run, settings, [*ROWS[:4], NEW[0], *ROWS[5:]], tmp_path)
    assert "rows.jsonl: 1 row edited, the first at line 5." in told
    told = refused(run, settings, [*ROWS, NEW[0]], tmp_path)
    assert "rows.jsonl: the 6 rows scored so far are the same; it had 11 rows, and has 12 rows." in told
    shutil.rmtree(run / "values")
    assert "rows.jsonl: its bytes are others." in refused(run, settings, [*ROWS, NEW[0]], tmp_path)


def test_tokens_made_otherwise_say_nothing_of_rows(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    told = refused(run, settings, [*ROWS, NEW[0]], tmp_path, max_length=2000)
    assert (
        "max_length (2048 in the run, 2000 now)" in told
        and " data (" in told
        and "rows.jsonl: its bytes are others." in told
    )


def test_bad_rows_and_held_out_rows_are_rows_too(settings: dict[str, Any], tmp_path: Path) -> None:
    told = settings | {"bad_rows": "quarantine", "target": None}
    data = write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:3], "{", *ROWS[3:]])
    run = score(ScoreConfig(**told | {"data": data}), tmp_path / "run").run
    assert "1 row edited, the first at line 4." in refused(run, told, [*ROWS[:3], NEW[0], *ROWS[3:]], tmp_path)
    assert "1 row edited, the first at line 8." in refused(
        run, told, [*ROWS[:3], "{", *ROWS[3:6], "[]", *ROWS[7:]], tmp_path
    )
    assert "1 row removed, from line 4 on." in refused(run, told, ROWS, tmp_path)


def test_pairs(models: dict[str, str], tmp_path: Path) -> None:
    rows = [
        {
            "chosen_input_ids": [5, 6, 7 + i],
            "chosen_labels": [-100, 6, 7 + i],
            "rejected_input_ids": [5, 6, 40],
            "rejected_labels": [-100, 6, 40],
        }
        for i in range(4)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"data": data, "model": models["base"], "layers": 1}
    run = score(ScoreConfig(**settings), tmp_path / "run").run
    rows[2] |= {"rejected_input_ids": [5, 6, 41], "rejected_labels": [-100, 6, 41]}
    told = refused(run, settings, [json.dumps(row) for row in rows], tmp_path)
    assert "rows.jsonl: 1 row edited, the first at line 3." in told
    # Rows of the other kind are others from the first on, or nothing is said of them.
    assert "rows.jsonl: its" in refused(run, settings, ROWS, tmp_path)


def test_files_that_came_went_or_are_called_otherwise(settings: dict[str, Any], tmp_path: Path) -> None:
    a, b, c = (write_jsonl(tmp_path / f"{name}.jsonl", token_records(4, seed=n)) for n, name in enumerate("abc"))
    run = score(ScoreConfig(**settings | {"data": (a, b)}), tmp_path / "run").run

    def told(*data: str) -> str:
        with pytest.raises(FingerprintError) as caught:
            score(ScoreConfig(**settings | {"data": data}), run)
        return str(caught.value)

    assert "c.jsonl was not read." in told(a, b, c)
    assert "b.jsonl was read too." in told(a)
    assert "The same files were read in another order: a.jsonl, b.jsonl." in told(b, a)
    assert "b.jsonl was read too. c.jsonl was not read." in told(a, c)
    other = str(Path(b).rename(tmp_path / "d.jsonl"))
    assert "b.jsonl is called d.jsonl now." in told(a, other)
    write_jsonl(tmp_path / "a.jsonl", [*token_records(4, seed=0), token_records(1, seed=8)[0]])
    says = told(a, other)
    assert "b.jsonl is called d.jsonl now." in says and "a.jsonl: 1 row added at the end, from line 5 on." in says


def test_the_command_says_it(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:2], NEW[0], *ROWS[3:]])
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "data"]
    ended = command("score", data, *flags, "-o", run)
    assert ended.code == 4 and "rows.jsonl: 1 row edited, the first at line 3." in " ".join(ended.err.split())
