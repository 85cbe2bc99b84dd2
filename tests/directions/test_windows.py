"""Rehearsals in windows: each against autograd through its own steps, from the state that it starts at."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from killed import kill
from tiny import make_row, tiny_model, tiny_rows
from unrolled import mean_over, token_losses, values_by_windows

from alphatoken_curate import CurateError, InputError, StoredDataError
from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, Values, drift_loss, mean_loss
from alphatoken_curate.directions.shelves import Artefacts, InMemory, Scratch
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.directions.windows import borders_of, windows
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.runs.atomic import sweep
from alphatoken_curate.signals.rehearsed import exact_paths

pytestmark = pytest.mark.usefixtures("all_float64")

ROWS = tiny_rows()
TARGET = [make_row(90, [5, 9, 33, 8, 40, 21, 7], [(2, 7)]), make_row(91, [4, 4, 17, 50], [(3, 4)])]
RETENTION = [make_row(95, [9, 2, 31, 30, 6, 11], [(1, 6)])]
OUTCOMES = [mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)]

STEPS = [(0, 3), (4, 1), (5, 2), (1, 3), (5, 0), (2, 4), (0, 1)]
"""Rows visited more than once, in one window and in several."""

ENDS = {1: [1, 2, 3, 4, 5, 6, 7], 2: [1, 3, 5, 7], 3: [1, 4, 7], 4: [3, 7], 6: [1, 7]}
"""Of windows of so many steps: steps done where each ends. What is left comes first."""

ADAM = Optimiser(lr=0.01, steps=7, root=1e-4)
OPTIMISERS = {
    "adamw": ADAM,
    "adamw, clipped, decay, cosine": Optimiser(
        lr=0.01, steps=7, root=1e-4, schedule="cosine", warmup=1, clip=0.5, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-3
    ),
    "sgd": Optimiser(lr=0.05, steps=7, kind="sgd"),
    "sgd, momentum, clipped, linear, decay": Optimiser(
        lr=0.05, steps=7, kind="sgd", momentum=0.9, clip=0.5, schedule="linear", weight_decay=0.1
    ),
}
FULL = OPTIMISERS["adamw, clipped, decay, cosine"]


def course(window: int | None, optimiser: Optimiser = FULL, denominator: Any = "count") -> Course:
    return Course(rows=ROWS, steps=STEPS, optimiser=optimiser, denominator=denominator, batch_tokens=45, window=window)


def made(states: Any, window: int | None, *, exact: bool = False, **how: Any) -> Rehearsal:
    trainee = Trainee(tiny_model("gpt2"), 1, "linear" if exact else "all")
    return Rehearsal(trainee, course(window, **how), states, paths=exact_paths(trainee) if exact else None)


def same(found: Values, wanted: Values) -> None:
    for part in ("own", "denominator", "direct", "causal"):
        np.testing.assert_array_equal(getattr(found, part), getattr(wanted, part), strict=True)
    assert found.root_share == wanted.root_share


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "window", "denominator"),
    [
        ("adamw", 2, "count"),
        ("adamw, clipped, decay, cosine", 3, "sum"),
        ("sgd, momentum, clipped, linear, decay", 4, "sum"),
        *(
            pytest.param(name, window, denominator, marks=pytest.mark.long)
            for name in OPTIMISERS
            for window in ENDS
            for denominator in ("count", "sum")
        ),
    ],
)
def test_values_are_those_of_autograd_through_each_window(
    name: str, window: int, denominator: Literal["count", "sum"]
) -> None:
    optimiser, trainee = OPTIMISERS[name], Trainee(tiny_model("gpt2"), 2, "all")
    outcomes = [mean_over(TARGET), mean_over(RETENTION)]
    wanted = values_by_windows(
        tiny_model("gpt2"),
        trainee.names,
        ROWS,
        STEPS,
        optimiser,
        outcomes,
        ENDS[window],
        summed=denominator == "sum",
    )
    starts = [w.detach().clone() for w in trainee.weights]
    rehearsal = Rehearsal(trainee, course(window, optimiser, denominator), InMemory())
    assert_close(rehearsal.run(OUTCOMES), wanted)
    assert all(torch.equal(own, start) for own, start in zip(trainee.weights, starts, strict=True))


def assert_close(found: Values, wanted: torch.Tensor) -> None:
    error = np.abs(found.value - wanted.numpy()).max(axis=1) / wanted.abs().amax(dim=1).numpy()
    assert wanted.abs().amax() > 0 and (error < 1e-8).all(), error


def test_drift_is_counted_from_the_reference_in_every_window() -> None:
    trainee, generator = Trainee(tiny_model("gpt2"), 1, "linear"), torch.Generator().manual_seed(7)
    fisher = [torch.rand(w.shape, generator=generator, dtype=w.dtype) for w in trainee.weights]
    reference = [w.detach() + 0.01 * f for w, f in zip(trainee.weights, fisher, strict=True)]

    def drift(_: Any, held: dict[str, torch.Tensor]) -> torch.Tensor:
        each = zip(fisher, (held[name] for name in trainee.names), reference, strict=True)
        return torch.stack([(0.5 * f * (w - r) ** 2).sum() for f, w, r in each]).sum()

    outcomes = [mean_over(TARGET), drift]
    wanted = values_by_windows(tiny_model("gpt2"), trainee.names, ROWS, STEPS, ADAM, outcomes, ENDS[3], summed=False)
    rehearsal = Rehearsal(trainee, course(3, ADAM), InMemory())
    assert_close(rehearsal.run([OUTCOMES[0], drift_loss(fisher, reference)]), wanted)


def test_a_window_of_one_step_is_what_each_step_does_to_the_loss_after_it() -> None:
    """By plain SGD lr <gradient of J after the step, gradient of l_t before it> / D."""
    trainee, model = Trainee(tiny_model("gpt2"), 1, "all"), tiny_model("gpt2")
    optimiser, held = OPTIMISERS["sgd"], {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = np.zeros(sum(int(row.response.sum()) for row in ROWS))
    starts = np.cumsum([0, *(int(row.response.sum()) for row in ROWS)])

    def gradient(loss: Any) -> list[torch.Tensor]:
        asked = {n: held[n].clone().requires_grad_() for n in trainee.names}
        return list(torch.autograd.grad(loss({**held, **asked}), list(asked.values())))

    for step in STEPS:
        tokens = [(i, n) for i in step for n in range(int(ROWS[i].response.sum()))]
        each = [gradient(lambda w, i=i, n=n: token_losses(model, w, ROWS[i])[n]) for i, n in tokens]
        for name, *grads in zip(trainee.names, *each, strict=True):
            held[name] = held[name] - optimiser.lr * torch.stack(grads).mean(dim=0)
        after = gradient(lambda w: mean_over(TARGET)(model, w))
        for (i, n), grads in zip(tokens, each, strict=True):
            moved = sum(float((a * g).sum()) for a, g in zip(after, grads, strict=True))
            wanted[starts[i] + n] += optimiser.lr * moved / len(tokens)
    found = Rehearsal(trainee, course(1, optimiser), InMemory()).run(OUTCOMES[:1]).value[0]
    assert np.abs(found - wanted).max() < 1e-10 * np.abs(wanted).max()


@cache
def whole_run(window: int | None) -> Values:
    """Of a rehearsal that nothing interrupts."""
    return made(InMemory(), window).run(OUTCOMES)


@pytest.mark.long
def test_a_window_of_all_steps_or_more_is_none() -> None:
    for window in (7, 1000):
        same(made(InMemory(), window).run(OUTCOMES), whole_run(None))
    same(made(InMemory(), 7, exact=True).run(OUTCOMES), made(InMemory(), None, exact=True).run(OUTCOMES))


def test_the_last_window_is_whole_and_has_the_values_of_the_whole_training() -> None:
    """Of tokens that its steps take, and no others do: the same bits."""
    steps = [(0, 3), (4, 1), (0, 4), (5,), (2,)]

    def found(window: int | None) -> Values:
        one = Course(rows=ROWS, steps=steps, optimiser=ADAM, batch_tokens=45, window=window)
        return Rehearsal(Trainee(tiny_model("gpt2"), 1, "all"), one, InMemory()).run(OUTCOMES)

    starts = np.cumsum([0, *(int(row.response.sum()) for row in ROWS)])
    mine = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in (2, 5)])
    whole, parted = found(None), found(2)
    np.testing.assert_array_equal(parted.value[:, mine], whole.value[:, mine])
    others = np.setdiff1d(np.arange(starts[-1]), mine)
    assert (np.abs(parted.value - whole.value)[:, others] > 0).all()
    assert parted.root_share == whole.root_share > 0, "it is of all steps"


# ----------------------------------------------------------------------------------------------- what is done and kept


def test_each_step_is_told_once_there_and_once_back_for_each_part() -> None:
    calls: list[int] = []
    made(InMemory(), 3).run(OUTCOMES, calls.append)
    assert calls == [0, 0, 1, 2, 3, 3, 2, 1, 4, 5, 6, 6, 5, 4]
    calls.clear()
    made(InMemory(), 3).run(OUTCOMES, calls.append, at_once=1)
    assert calls == [0, 0, 0, 1, 2, 3, 3, 2, 1, 3, 2, 1, 4, 5, 6, 6, 5, 4, 6, 5, 4]


@pytest.mark.parametrize("at_once", [1, pytest.param(2, marks=pytest.mark.long)])
def test_what_is_kept_and_done_is_of_a_window_however_many_there_are(at_once: int) -> None:
    """Values apart. And gradients are taken as often for each window."""
    steps, most, taken = STEPS * 4, {}, {}
    for windows_ in (2, 6):
        states, kept = InMemory(), list[int]()
        one = Course(rows=ROWS, steps=steps[: 4 * windows_], optimiser=ADAM, window=4)
        trainee = Trainee(tiny_model("gpt2"), 1, "linear")
        counted = Counted(trainee)
        rehearsal = Rehearsal(counted, one, states)  # type: ignore[arg-type]
        rehearsal.run(
            OUTCOMES, lambda _, s=states, k=kept: k.append(sum("values" not in n for n in s._held)), at_once=at_once
        )
        most[windows_], taken[windows_] = max(kept), counted.gradients / windows_
        assert set(states._held) == {f"values-{p}w{w}" for p in range(2 // at_once) for w in range(windows_)}
    assert most[2] == most[6] and taken[2] == taken[6]


class Counted:
    """A trainee whose gradients are counted."""

    def __init__(self, trainee: Trainee) -> None:
        self.own, self.gradients = trainee, 0

    def __getattr__(self, name: str) -> Any:
        self.gradients += name == "gradient"
        return getattr(self.own, name)


class Stopped(Exception):
    """As if the process were killed there."""


def stopped(states: InMemory, after: int, window: int = 3, at_once: int | None = None) -> list[int]:
    """The steps that were told before it stopped."""
    calls: list[int] = []

    def told(k: int) -> None:
        if len(calls) == after:
            raise Stopped
        calls.append(k)

    with pytest.raises(Stopped):
        made(states, window).run(OUTCOMES, told, at_once=at_once)
    return calls


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("at_once", "stop"),
    [
        *((2, stop) for stop in (4, 7)),
        (1, 14),
        *(pytest.param(2, stop, marks=pytest.mark.long) for stop in (0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13)),
        *(pytest.param(1, stop, marks=pytest.mark.long) for stop in (2, 7, 9, 12, 16, 20)),
    ],
)
def test_stopped_anywhere_it_goes_on_to_the_same_bits_and_does_no_window_twice(at_once: int, stop: int) -> None:
    states, again = InMemory(), list[int]()
    stopped(states, stop, at_once=at_once)
    done = {int(name[-1]) for name in states._held if name.startswith(f"values-{2 // at_once - 1}w")}
    same(made(states, 3).run(OUTCOMES, again.append, at_once=at_once), whole_run(3))
    steps = {0: {0}, 1: {1, 2, 3}, 2: {4, 5, 6}}
    assert not set(again) & set().union(*(steps[w] for w in done), set())
    assert len(again) <= (14 if at_once == 2 else 21) - stop + 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "lost",
    [
        *("state-4", "values-0w1"),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("state-0", "digest-0", "digest-4", "state-5")),
        pytest.param("values-0w0", marks=pytest.mark.long),
    ],
)
def test_what_was_deleted_is_made_again(lost: str) -> None:
    """By training from where all began, where nothing nearer is kept."""
    states = InMemory()
    stopped(states, 12)  # on the way back through the last window
    assert {"state-0", "state-4", "values-0w0", "values-0w1"} <= set(states._held)
    states.drop(lost)
    same(made(states, 3).run(OUTCOMES), whole_run(3))


def test_what_it_began_with_is_gone_back_to_or_that_is_an_error() -> None:
    states = InMemory()
    with pytest.raises(CurateError, match=r"begins with is gone\. Run the same command again"):
        made(states, 3).run(OUTCOMES, lambda k: states.drop("state-0") if k == 4 else None)
    same(made(states, 3).run(OUTCOMES), whole_run(3))


def test_a_training_that_diverges_late_is_refused_as_without_windows() -> None:
    one = dataclasses.replace(course(2), optimiser=dataclasses.replace(ADAM, lr=30.0))
    told = []
    for window in (2, None):
        with pytest.raises(InputError, match=r"diverges: in step \d of 7") as refused:
            trainee = Trainee(tiny_model("gpt2"), "all", "all")
            Rehearsal(trainee, dataclasses.replace(one, window=window), InMemory()).run(OUTCOMES)
        told.append(str(refused.value))
    assert told[0] == told[1]


def test_an_outcome_that_is_not_finite_is_refused_where_it_is() -> None:
    one = Course(rows=ROWS, steps=[(0,), (1,)], optimiser=Optimiser(lr=1e300, steps=2, kind="sgd"), window=1)
    with pytest.raises(InputError, match=r"no finite gradient after step 1 of it\. Give a smaller --rehearse-lr"):
        Rehearsal(Trainee(tiny_model("gpt2"), "all", "all"), one, InMemory()).run(OUTCOMES)


# ------------------------------------------------------------------------------------------------------------- on disk

FIELDS: dict[str, Any] = {"model": "m", "rehearse_window": 3}


def rehearse(folder: Path) -> Values:
    trainee = Trainee(tiny_model("gpt2", dtype=torch.float32), 1, "all")
    states = Artefacts(Store(folder=folder, fields=FIELDS), "cpu", prefix="0")
    return Rehearsal(trainee, course(3), states, steps=Scratch(folder, "cpu")).run(OUTCOMES, at_once=1)


def killed(folder: Path, at: str) -> None:
    kill(at, lambda: rehearse(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Values, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("whole")
    return rehearse(folder), contents(folder)


_NOW = ("adjoint-1w1-2", "values-1w1")
_LATER = (
    "state-1",
    "state-4",
    "digest-2",
    "digest-4",
    "adjoint-0w1-4-0",
    "adjoint-0w1-1",
    "values-0w1",
    "adjoint-0w2-5",
    "values-1w2",
)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("border", [*_NOW, *(pytest.param(name, marks=pytest.mark.long) for name in _LATER)])
@pytest.mark.parametrize("point", ["mid-write", pytest.param("after-rename", marks=pytest.mark.long)])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    border: str, point: str, tmp_path: Path, whole: tuple[Values, dict[str, bytes]]
) -> None:
    """In the forward, the replay, the way back and between windows."""
    killed(tmp_path, f"{point}@rehearsal-00000-0-{border}.safetensors")
    same(rehearse(tmp_path), whole[0])
    sweep(tmp_path)
    assert contents(tmp_path) == whole[1] and len(whole[1]) == 6


@pytest.mark.parametrize(
    "name",
    ["state-1", *(pytest.param(n, marks=pytest.mark.long) for n in ("values-1w0", "digest-4", "adjoint-0w1-2"))],
)
def test_damage_is_seen(name: str, tmp_path: Path) -> None:
    killed(tmp_path, "after-rename@rehearsal-00000-0-adjoint-0w1-2.safetensors")
    path = tmp_path / f"rehearsal-00000-0-{name}.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
    with pytest.raises(StoredDataError, match=rf"rehearsal-00000-0-{name}\.safetensors: damaged .* Delete it and run"):
        rehearse(tmp_path)


# ------------------------------------------------------------------------------------------------------- where they lie


@pytest.mark.parametrize(
    ("steps", "size", "borders"),
    [
        (1, None, [[0, 1]]),
        (7, None, [[0, 1, 4, 7]]),
        (9, 100, [[0, 3, 6, 9]]),
        (7, 3, [[0, 1], [1, 2, 4], [4, 5, 7]]),
        (8, 4, [[0, 2, 4], [4, 6, 8]]),
        (3, 1, [[0, 1], [1, 2], [2, 3]]),
    ],
)
def test_what_is_left_comes_first_of_windows_and_of_their_segments(
    steps: int, size: int | None, borders: list[list[int]]
) -> None:
    assert borders_of(steps, size) == borders
    course = Course(rows=ROWS, steps=[(0,)] * steps, optimiser=ADAM, window=size)
    assert [one.borders for one in windows(course.taken, course.lengths, course.window)] == borders


def test_a_window_knows_the_tokens_of_its_own_rows() -> None:
    lengths = np.array([int(row.response.sum()) for row in ROWS])
    starts = np.cumsum([0, *lengths])
    found = list(windows(STEPS, lengths, 3))
    assert [one.rows.tolist() for one in found] == [[0, 3], [1, 2, 3, 4, 5], [0, 1, 2, 4, 5]]
    assert [one.is_last for one in found] == [False, False, True] and len({one.name for one in found}) == 3
    one, all_places = found[0], found[0].places_in_all(starts)
    assert one.starts.tolist() == [0, lengths[0], lengths[0] + lengths[3]]
    assert all_places.tolist() == [*range(lengths[0]), *range(starts[3], starts[4])]
    whole = course(None).batches(0)
    for batch in whole:
        assert all_places[one.places(batch)].tolist() == [
            t for i in batch.rows for t in range(starts[i], starts[i + 1])
        ]


# -------------------------------------------------------------------------------------------------- below what trains


def test_what_lies_below_runs_once_for_each_batch_that_trains() -> None:
    """Not for replays, the way back and further outcomes; and without room to keep it, values are the same bits."""

    def found(room: int, shelf: Any = None) -> tuple[Values, int]:
        model, ran = tiny_model("gpt2", dtype=torch.float32), list[int]()
        trainee = Trainee(model, 1, "linear")
        trainee._below.room = room
        if shelf is not None:
            trainee.shelve_below(shelf)
        model.transformer.h[0].ln_1.register_forward_hook(lambda *_: ran.append(1))
        return Rehearsal(trainee, course(3), InMemory()).run(OUTCOMES, at_once=1), len(ran)

    shelf = InMemory()
    (kept, once), (computed, often), (shelved, as_once) = found(1 << 30), found(1), found(1, shelf)
    batches = {batch.input_ids.tobytes() for k in range(len(STEPS)) for batch in course(3).batches(k)}
    assert once == as_once == len(batches) + len(OUTCOMES) and often > 2 * once
    same(computed, kept)
    same(shelved, kept)
    assert len(shelf._held) <= len(OUTCOMES), "what windows put there is gone"


@pytest.mark.parametrize(("steps", "borders"), [(1, [0, 1]), (2, [0, 2]), (7, [0, 1, 4, 7]), (9, [0, 3, 6, 9])])
def test_segments_are_about_as_long_as_they_are_many(steps: int, borders: list[int]) -> None:
    assert borders_of(steps, None) == [borders]
