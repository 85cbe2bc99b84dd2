from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from daily import daily
from killed import ended_by
from tiny import make_row, tiny_model, tiny_rows

from alphatoken_curate import StoredDataError
from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, Values, mean_loss
from alphatoken_curate.directions.shelves import Artefacts, InMemory, Scratch, Shelf
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.runs.atomic import sweep

FIELDS: dict[str, Any] = {"model": "m", "schema_version": 3, "rehearse_lr": 0.01}
TARGET = [make_row(90, [5, 9, 33, 8, 40, 21, 7], [(2, 7)])]


def shelf(kind: str, folder: Path) -> Shelf:
    if kind == "memory":
        return InMemory()
    return (
        Scratch(folder, "cpu")
        if kind == "scratch"
        else Artefacts(Store(folder=folder, fields=FIELDS), "cpu", prefix="0")
    )


@pytest.mark.parametrize("kind", ["memory", "scratch", "artefacts"])
def test_what_is_put_is_got_until_it_is_dropped(kind: str, tmp_path: Path) -> None:
    held, tensor = shelf(kind, tmp_path), torch.arange(6.0).view(2, 3)
    assert held.get("state-1") is None and not held.has("state-1")
    held.put("state-1", {"a b": tensor, "c": tensor.t()})
    held.put("state-2", {"a b": tensor + 1})
    tensor.zero_()
    found = held.get("state-1")
    assert found is not None and found["a b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(found["c"], found["a b"].t())
    held.put("state-1", {"a b": tensor})
    assert not held.get("state-1")["a b"].any() and "c" not in held.get("state-1")  # type: ignore[index, operator]
    held.drop("state-1")
    held.drop("state-1")
    assert held.get("state-1") is None and held.get("state-2") is not None
    assert held.has("state-2") and not held.has("state-1")
    held.drop("state-2")
    assert not any(tmp_path.iterdir())


def test_scratch_of_a_writer_that_was_killed_is_swept(tmp_path: Path) -> None:
    held = Scratch(tmp_path, "cpu")
    held.put("3", {"a": torch.ones(2)})
    held.put("4", {"a": torch.ones(2)})
    assert sweep(tmp_path) == 2 and not any(tmp_path.iterdir())


def test_states_of_other_settings_or_orders_are_others(tmp_path: Path) -> None:
    Artefacts(Store(folder=tmp_path, fields=FIELDS), "cpu", prefix="0").put("state-1", {"a": torch.ones(2)})
    assert Artefacts(Store(folder=tmp_path, fields=FIELDS), "cpu", prefix="0").get("state-1") is not None
    others = [FIELDS | {"rehearse_lr": 0.02}, FIELDS | {"anything": 1}]
    for shelf_ in (Artefacts(Store(folder=tmp_path, fields=f), "cpu", prefix="0") for f in others):
        assert shelf_.get("state-1") is None and not shelf_.has("state-1")
    assert Artefacts(Store(folder=tmp_path, fields=FIELDS), "cpu", prefix="1").get("state-1") is None
    assert Artefacts(Store(folder=tmp_path, fields=FIELDS, generation=1), "cpu", prefix="0").get("state-1") is None
    assert [path.name for path in tmp_path.iterdir()] == ["rehearsal-00000-0-state-1.safetensors"]


# ------------------------------------------------------------------------------------------------ a rehearsal on disk


def rehearse(folder: Path, outcomes: int = 1, at_once: int = 1, window: int | None = None) -> Values:
    """Of its steps it tells those of which it says before that they are left."""
    steps = [(0, 3), (4, 1), (5, 2), (1, 3), (5, 0)]
    course = Course(rows=tiny_rows(), steps=steps, optimiser=Optimiser(lr=0.01, steps=5, clip=0.5), batch_tokens=60)
    course = replace(course, window=window)
    trainee = Trainee(tiny_model("gpt2", dtype=torch.float32), 1, "all")
    store = Store(folder=folder, fields=FIELDS)
    states, steps_ = Artefacts(store, "cpu", prefix="0"), Scratch(folder, "cpu")
    rehearsal, told = Rehearsal(trainee, course, states, steps=steps_), list[int]()
    left = list(rehearsal.left(outcomes, at_once=at_once))
    found = rehearsal.run([mean_loss(TARGET, 100)] * outcomes, told.append, at_once=at_once)
    assert sorted(told) == sorted(left)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "border",
    daily(
        ["state-2", "digest-2", "state-5", "adjoint-0-5-0", "adjoint-0-2", "adjoint-0-0", "values-0"],
        ["digest-2", "adjoint-0-2", "values-0"],
    ),
)
@pytest.mark.parametrize("point", ["mid-write", "after-rename"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(border: str, point: str, tmp_path: Path) -> None:
    """In the forward, the replay and the way back."""
    wanted = rehearse(tmp_path / "whole")
    folder = tmp_path / "killed"
    at = f"{point}@rehearsal-00000-0-{border}.safetensors"
    killed = _in_a_process(folder, at)
    assert killed == 9
    found = rehearse(folder)
    np.testing.assert_array_equal(found.value, wanted.value)
    sweep(folder)
    assert contents(folder) == contents(tmp_path / "whole") and len(contents(folder)) == 1


def _in_a_process(folder: Path, kill_at: str) -> int:
    """The signal that ended a rehearsal in a process of its own."""
    return ended_by(kill_at, lambda: rehearse(folder))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "border",
    daily(["state-2", "adjoint-1-2", "values-1", "adjoint-1w1-3", "values-0w0"], ["adjoint-1-2", "values-0w0"]),
)
def test_what_is_left_is_told_of_parts_and_windows(border: str, tmp_path: Path) -> None:
    window = 2 if "w" in border else None
    at, how = f"after-rename@rehearsal-00000-0-{border}.safetensors", {"outcomes": 3, "at_once": 2, "window": window}
    assert ended_by(at, lambda: rehearse(tmp_path, **how)) == 9  # type: ignore[arg-type]
    rehearse(tmp_path, **how)  # type: ignore[arg-type]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", ["state-0", "digest-2", "adjoint-0-2", "adjoint-0-2-0", "values-0"])
def test_damage_is_seen(name: str, tmp_path: Path) -> None:
    _in_a_process(tmp_path, "after-rename@rehearsal-00000-0-adjoint-0-2.safetensors")
    if name == "values-0":
        rehearse(tmp_path)
    path = tmp_path / f"rehearsal-00000-0-{name}.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
    with pytest.raises(StoredDataError, match=rf"rehearsal-00000-0-{name}\.safetensors: damaged .* Delete it and run"):
        rehearse(tmp_path)
