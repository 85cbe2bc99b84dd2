from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from daily import daily
from tiny import CORE, FAMILIES, ROUNDING, make_row, tiny_model, tiny_rows
from unrolled import mean_over, values_by_autograd, values_by_retraining

from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, Values, drift_loss, mean_loss
from alphatoken_curate.directions.shelves import InMemory
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.directions.windows import borders_of
from alphatoken_curate.errors import CurateError, InputError
from alphatoken_curate.signals.rehearsed import exact_paths
from alphatoken_curate.tokens.plan import collate
from alphatoken_curate.tokens.tokenise import TokenRow

pytestmark = pytest.mark.usefixtures("all_float64")

ROWS = tiny_rows()
TARGET = [make_row(90, [5, 9, 33, 8, 40, 21, 7], [(2, 7)]), make_row(91, [4, 4, 17, 50], [(3, 4)])]
RETENTION = [make_row(95, [9, 2, 31, 30, 6, 11], [(1, 6)])]

TWO = [(0, 1, 2), (3, 4, 5)]
SEVEN = [(0, 3), (4, 1), (5, 2), (1, 3), (5, 0), (2, 4), (0, 1)]
"""Rows visited more than once."""

ADAM = Optimiser(lr=0.01, steps=7, root=1e-4)
OPTIMISERS = {
    "adamw": ADAM,
    "adamw, nearly signs": dataclasses.replace(ADAM, root=1e-12, lr=1e-3),
    "adamw, clipped, decay, cosine": Optimiser(
        lr=0.01, steps=7, root=1e-4, schedule="cosine", warmup=1, clip=0.5, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-3
    ),
    "sgd": Optimiser(lr=0.05, steps=7, kind="sgd"),
    "sgd, momentum, clipped, linear, decay": Optimiser(
        lr=0.05, steps=7, kind="sgd", momentum=0.9, clip=0.5, schedule="linear", weight_decay=0.1
    ),
}


def rehearse(
    trainee: Trainee,
    steps: Sequence[Sequence[int]],
    optimiser: Optimiser,
    denominator: Literal["count", "sum"] = "count",
    *,
    batch_tokens: int = 45,
    rows: Sequence[TokenRow] = ROWS,
) -> Values:
    course = Course(rows=rows, steps=steps, optimiser=optimiser, denominator=denominator, batch_tokens=batch_tokens)
    starts = [w.detach().clone() for w in trainee.weights]
    found = Rehearsal(trainee, course, InMemory()).run([mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)])
    assert all(torch.equal(own, start) for own, start in zip(trainee.weights, starts, strict=True))
    return found


def assert_exact(found: Values, wanted: torch.Tensor, tolerance: float = 1e-8) -> None:
    error = np.abs(found.value - wanted.numpy()).max(axis=1) / wanted.abs().amax(dim=1).numpy()
    assert wanted.abs().amax() > 0 and (error < tolerance).all(), error


def check(
    family: str,
    layers: Any,
    parameters: Any,
    steps: Any,
    optimiser: Optimiser,
    denominator: Any,
    tolerance: float = 1e-8,
) -> None:
    model = tiny_model(family)
    trainee = Trainee(tiny_model(family), layers, parameters)
    optimiser = dataclasses.replace(optimiser, steps=len(steps))
    outcomes = [mean_over(TARGET), mean_over(RETENTION)]
    wanted = values_by_autograd(model, trainee.names, ROWS, steps, optimiser, outcomes, summed=denominator == "sum")
    assert_exact(rehearse(trainee, steps, optimiser, denominator), wanted, tolerance)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("denominator", ["count", "sum"])
@pytest.mark.parametrize("steps", [TWO, pytest.param(SEVEN, marks=pytest.mark.long)], ids=["2 steps", "7 steps"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_values_are_those_of_autograd_through_the_unrolled_training(name: str, steps: Any, denominator: Any) -> None:
    check("gpt2", "all", "all", steps, OPTIMISERS[name], denominator)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("layers", "parameters"), [(1, "linear"), (3, "linear"), ("all", "linear"), (2, "all")])
def test_what_trains_is_narrowed(layers: Any, parameters: Any) -> None:
    check("gpt2", layers, parameters, SEVEN, ADAM, "count")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "family",
    daily([family for family in CORE if family not in ("gpt2", "gpt_oss")], ["gemma3_text", "phi3", "gpt_neox"]),
)
def test_other_families(family: str) -> None:
    check(family, "all", "all", SEVEN, ADAM, "count")


@pytest.mark.long
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CORE])
def test_every_family(family: str) -> None:
    tolerance = 10 * max(ROUNDING.get(family, {}).values(), default=1e-9)  # of a second derivative
    check(family, "all", "all", TWO, ADAM, "sum", tolerance)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts(family: str) -> None:
    check(family, 3, "linear", TWO, OPTIMISERS["sgd, momentum, clipped, linear, decay"], "sum")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("start", ["model", "other"])
def test_stability_is_the_drift_at_the_end_weighed_by_the_fisher(start: str) -> None:
    """Not zero where the model is the reference: it drifts on the way. Beside adaptation, in one way back."""
    trainee = Trainee(tiny_model("gpt2"), 2, "all")
    generator = torch.Generator().manual_seed(7)
    fisher = [torch.rand(w.shape, generator=generator, dtype=w.dtype) for w in trainee.weights]
    reference = [w.detach().clone() for w in trainee.weights]
    if start == "other":
        reference = [r + 0.01 * f for r, f in zip(reference, fisher, strict=True)]

    def drift(_: Any, held: dict[str, torch.Tensor]) -> torch.Tensor:
        each = zip(fisher, (held[name] for name in trainee.names), reference, strict=True)
        return sum((0.5 * f * (w - r) ** 2).sum() for f, w, r in each)  # type: ignore[return-value]

    outcomes = [mean_over(TARGET), drift, mean_over(RETENTION)]
    model = tiny_model("gpt2")
    wanted = values_by_autograd(model, trainee.names, ROWS, SEVEN, ADAM, outcomes, summed=False)
    course = Course(rows=ROWS, steps=SEVEN, optimiser=ADAM, batch_tokens=45)
    each = [mean_loss(TARGET, 1000), drift_loss(fisher, reference), mean_loss(RETENTION, 1000)]
    assert_exact(Rehearsal(trainee, course, InMemory()).run(each), wanted)


DROPS = [0, 7, 17, 26]
"""Tokens whose weight is moved in trainings of their own."""


@pytest.mark.parametrize("denominator", daily(["count", "sum"], ["sum"]))
@pytest.mark.parametrize(
    "name",
    [
        "adamw, clipped, decay, cosine",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("adamw", "sgd, momentum, clipped, linear, decay")),
    ],
)
def test_values_are_what_trainings_with_one_weight_moved_end_with(name: str, denominator: Any) -> None:
    optimiser, trainee = OPTIMISERS[name], Trainee(tiny_model("gpt2"), "all", "all")
    found = rehearse(trainee, SEVEN, optimiser, denominator).value[0]
    wanted = values_by_retraining(
        tiny_model("gpt2"),
        trainee.names,
        ROWS,
        SEVEN,
        optimiser,
        mean_over(TARGET),
        DROPS,
        summed=denominator == "sum",
        by=1e-3,
    ).numpy()
    assert np.abs(found[DROPS] - wanted).max() < 1e-7 * np.abs(found).max()


@pytest.mark.long
def test_the_padding_token_moves_as_it_does_in_a_training_and_counts_as_what_it_is() -> None:
    """SmolLM2 ends its turns with it: as an input torch gives it no gradient, as a head's row it moves all the same."""

    def model() -> Any:
        made = tiny_model("qwen2")
        made.get_input_embeddings().weight.detach()[0] = torch.linspace(-0.5, 0.6, 16)
        return made

    rows = [make_row(0, [5, 0, 9, 0, 12, 8, 0], [(3, 7)]), make_row(1, [7, 0, 0, 31, 6], [(2, 5)])]
    trainee, steps = Trainee(model(), "all", "all"), [(0,), (1, 0), (1,)]
    course = Course(rows=rows, steps=steps, optimiser=ADAM, batch_tokens=100)
    target = [make_row(90, [5, 0, 33, 8, 0, 21, 7], [(2, 7)])]
    found = Rehearsal(trainee, course, InMemory()).run([mean_loss(target, 100)]).value[0]
    tokens = range(len(found))
    wanted = values_by_retraining(
        model(), trainee.names, rows, steps, ADAM, mean_over(target), tokens, summed=False, by=1e-3
    ).numpy()
    assert np.abs(found - wanted).max() < 1e-7 * np.abs(found).max()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_with_a_sum_of_weights_the_values_of_a_step_add_up_to_nothing(name: str) -> None:
    """A factor on all weights of a step changes nothing, whatever the optimiser and clipping."""
    trainee = Trainee(tiny_model("gpt2"), 2, "all")
    found = rehearse(trainee, TWO, OPTIMISERS[name], "sum").value
    for step in TWO:
        mine = found[:, np.concatenate([_places(i) for i in step])]
        assert (np.abs(mine.sum(1)) < 1e-12 * np.abs(mine).sum(1)).all()


def _places(row: int) -> Any:
    starts = np.cumsum([0, *(int(r.response.sum()) for r in ROWS)])
    return np.arange(starts[row], starts[row + 1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_with_a_count_they_add_up_to_what_a_factor_on_the_gradient_does(name: str) -> None:
    """-<a_k, g_k>: minus the derivative of J by a factor on g_k, here of the last step, from that step alone."""
    optimiser, trainee = OPTIMISERS[name], Trainee(tiny_model("gpt2"), 2, "all")
    course = Course(rows=ROWS, steps=TWO, optimiser=optimiser)
    rehearsal, state = Rehearsal(trainee, course, InMemory()), optimiser.start([w.detach() for w in trainee.weights])
    starts = [w.clone() for w in state.weights]
    found = rehearsal.run([mean_loss(TARGET, 1000)]).value[0]
    for own, start in zip(state.weights, starts, strict=True):
        own.copy_(start)
    optimiser.step(state, trainee.gradient(course.batches(0))[0], 0)
    grads, kept = trainee.gradient(course.batches(1))[0], state.clone()

    def after(factor: float) -> float:
        state.copy_(kept)
        optimiser.step(state, [g * factor for g in grads], 1)
        return float(trainee.gradient([collate(TARGET, [0, 1])])[1])

    h = 1e-3
    slopes = [(after(1 + x) - after(1 - x)) / (2 * x) for x in (h, h / 2)]
    wanted = -(4 * slopes[1] - slopes[0]) / 3
    mine = found[np.concatenate([_places(i) for i in TWO[1]])]
    assert abs(mine.sum() - wanted) < 1e-7 * np.abs(mine).sum()


def test_the_term_of_the_denominator_is_apart_and_the_same_for_all_tokens_of_a_step() -> None:
    trainee = Trainee(tiny_model("gpt2"), 2, "all")
    count, summed = rehearse(trainee, TWO, ADAM, "count"), rehearse(trainee, TWO, ADAM, "sum")
    assert not count.denominator.any()
    np.testing.assert_array_equal(summed.own, count.own)
    for step in TWO:
        mine = np.concatenate([_places(i) for i in step])
        wanted = -count.own[:, mine].mean(1)
        assert (wanted != 0).all()
        np.testing.assert_allclose(summed.denominator[:, mine], np.repeat(wanted[:, None], len(mine), 1), rtol=1e-12)


def test_groups_of_target_rows_add_up_weighed_by_their_tokens() -> None:
    trainee = Trainee(tiny_model("gpt2"), 2, "all")
    course = Course(rows=ROWS, steps=SEVEN, optimiser=ADAM)
    outcomes = [mean_loss(rows, 1000) for rows in (TARGET, TARGET[:1], TARGET[1:])]
    both, one, other = Rehearsal(trainee, course, InMemory()).run(outcomes).value
    np.testing.assert_allclose(both, (5 * one + 1 * other) / 6, atol=1e-13 * np.abs(both).max())
    assert np.abs(one - other).max() > 0.1 * np.abs(both).max()


@pytest.mark.long
def test_batches_change_nothing_but_rounding() -> None:
    trainee = Trainee(tiny_model("gpt2"), "all", "all")
    alone, together = (rehearse(trainee, SEVEN, ADAM, batch_tokens=n).value for n in (1, 10_000))
    assert 0 < np.abs(alone - together).max() < 1e-10 * np.abs(alone).max()


def test_a_token_that_no_step_takes_has_no_value() -> None:
    found = rehearse(Trainee(tiny_model("gpt2"), 1, "all"), [(0, 1)], ADAM).value
    assert found[:, : _places(2)[0]].all() and not found[:, _places(2)[0] :].any()


# ----------------------------------------------------------------------------------------------- stopped, and repeated


class Stopped(Exception):
    """As if the process were killed there."""


@pytest.mark.long
@pytest.mark.parametrize("denominator", ["count", "sum"])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(denominator: Any) -> None:
    course = Course(
        rows=ROWS, steps=SEVEN, optimiser=OPTIMISERS["adamw, clipped, decay, cosine"], denominator=denominator
    )
    outcomes = [mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)]
    calls: list[int] = []
    wanted = Rehearsal(Trainee(tiny_model("gpt2"), 1, "all"), course, InMemory()).run(outcomes, calls.append)
    assert calls == [*range(7), *reversed(range(7))]
    for stop in (0, 2, 4, 7, 8, 10, 13):
        states, left = InMemory(), iter(range(stop))

        def told(_: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise Stopped

        with pytest.raises(Stopped):
            Rehearsal(Trainee(tiny_model("gpt2"), 1, "all"), course, states).run(outcomes, told)
        again: list[int] = []
        found = Rehearsal(Trainee(tiny_model("gpt2"), 1, "all"), course, states).run(outcomes, again.append)
        np.testing.assert_array_equal(found.own, wanted.own)
        np.testing.assert_array_equal(found.denominator, wanted.denominator)
        assert found.root_share == wanted.root_share > 0
        assert len(again) <= len(calls) - stop + max(np.diff(borders_of(len(course.steps), None)[0]))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "lost",
    [
        *("state-3", "digest-7"),
        *(pytest.param(one, marks=pytest.mark.long) for one in ("state-0", "digest-0", "state-6")),
    ],
)
def test_states_that_were_deleted_are_made_again(lost: str) -> None:
    """By training up to there, whichever way the rehearsal had come."""
    course, outcomes = Course(rows=ROWS, steps=SEVEN, optimiser=ADAM), [mean_loss(TARGET, 1000)]
    wanted = Rehearsal(Trainee(tiny_model("gpt2"), 1, "all"), course, InMemory()).run(outcomes)
    states, left = InMemory(), iter(range(8))

    def told(_: int) -> None:
        if next(left, None) is None:
            raise Stopped

    with pytest.raises(Stopped):
        Rehearsal(Trainee(tiny_model("gpt2"), 1, "all"), course, states).run(outcomes, told)
    states.drop(lost)
    found = Rehearsal(Trainee(tiny_model("gpt2"), 1, "all"), course, states).run(outcomes)
    np.testing.assert_array_equal(found.value, wanted.value)


def test_what_is_done_is_not_done_again_and_little_is_kept() -> None:
    course, states = Course(rows=ROWS, steps=SEVEN, optimiser=ADAM), InMemory()
    wanted = Rehearsal(Trainee(tiny_model("gpt2"), 1, "all"), course, states).run([mean_loss(TARGET, 1000)])
    calls: list[int] = []
    found = Rehearsal(Trainee(tiny_model("gpt2"), 1, "all"), course, states).run([untouched], calls.append)
    np.testing.assert_array_equal(found.value, wanted.value)
    assert not calls and set(states._held) == {"values-0"}


def untouched(_: Trainee) -> list[torch.Tensor]:
    raise AssertionError("it was taken again")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("exact", [False, True])
def test_outcomes_that_go_back_one_after_the_other_owe_the_same(at_once: int, exact: bool) -> None:
    """Whatever memory there is for, and wherever it was interrupted between."""
    outcomes = [mean_loss(rows, 1000) for rows in (TARGET, TARGET[:1], TARGET[1:])]
    course = Course(rows=ROWS, steps=SEVEN, optimiser=ADAM)

    def made(states: InMemory) -> Rehearsal:
        trainee = Trainee(tiny_model("gpt2"), 1, "linear" if exact else "all")
        return Rehearsal(trainee, course, states, paths=exact_paths(trainee) if exact else None)

    wanted, states, left = made(InMemory()).run(outcomes), InMemory(), iter(range(18))

    def told(_: int) -> None:
        if next(left, None) is None:
            raise Stopped

    with pytest.raises(Stopped):
        made(states).run(outcomes, told, at_once=at_once)
    assert "values-0" in states._held
    found = made(states).run(outcomes, at_once=at_once)
    np.testing.assert_array_equal(found.value, wanted.value)
    if exact:  # products of several directions may round otherwise than of one
        assert found.causal is not None and wanted.causal is not None
        np.testing.assert_allclose(found.causal, wanted.causal, rtol=1e-9, atol=1e-15)
    assert set(states._held) == {f"values-{n}" for n in range(-(-3 // at_once))}


def test_steps_that_come_out_otherwise_are_an_error() -> None:
    """One gradient off by its last bits, in one of the steps that are taken again."""

    class Uneven(Trainee):
        calls = 0

        def gradient(self, batches: Any, **how: Any) -> Any:
            found = super().gradient(batches, **how)
            self.calls += 1
            if self.calls == 9:  # seven steps and J came before
                first = found[0][0]  # of which some rows, in some releases, are 0
                first.view(torch.int64).view(-1)[first.abs().argmax()] += 64
            return found

    course = Course(rows=ROWS, steps=SEVEN, optimiser=ADAM)
    trainee = Uneven(tiny_model("gpt2"), 1, "all")
    trainee.calls = 0  # how many checks take, releases differ in
    with pytest.raises(CurateError, match=r"Steps 2 to 4 of the rehearsal came out otherwise .* Use --device cpu"):
        Rehearsal(trainee, course, InMemory()).run([mean_loss(TARGET, 1000)])


def test_a_training_that_diverges_is_refused_with_what_to_change() -> None:
    course = Course(rows=ROWS, steps=SEVEN, optimiser=dataclasses.replace(ADAM, lr=30.0))
    with pytest.raises(InputError, match=r"diverges: in step \d of 7 the mean loss is .*smaller --rehearse-lr"):
        Rehearsal(Trainee(tiny_model("gpt2"), "all", "all"), course, InMemory()).run([mean_loss(TARGET, 1000)])


def test_an_outcome_that_is_not_finite_is_refused() -> None:
    """One step, and that too far: no later one notices."""
    course = Course(rows=ROWS, steps=[(0,)], optimiser=Optimiser(lr=1e300, steps=1, kind="sgd"))
    with pytest.raises(InputError, match=r"no finite gradient where the rehearsal ends\. Give a smaller --rehearse-lr"):
        Rehearsal(Trainee(tiny_model("gpt2"), "all", "all"), course, InMemory()).run([mean_loss(TARGET, 1000)])


def test_without_a_root_term_a_derivative_that_is_not_finite_is_refused() -> None:
    """Embeddings of tokens that do not occur have a second moment of 0."""
    course = Course(rows=ROWS, steps=TWO, optimiser=dataclasses.replace(ADAM, root=0.0, eps=1e-8))
    with pytest.raises(InputError, match=r"through step 2 of the rehearsal is not finite.* larger --rehearse-root"):
        Rehearsal(Trainee(tiny_model("gpt2"), "all", "all"), course, InMemory()).run([mean_loss(TARGET, 1000)])
