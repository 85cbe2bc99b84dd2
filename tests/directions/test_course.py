"""The steps of a rehearsed training: their order, their batches, and what they cost where it begins."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from tiny import tiny_pairs, tiny_rows

from alphatoken_curate.directions.course import Course, plan_steps
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.step_losses import PairLoss
from alphatoken_curate.tokens.plan import token_starts

ROWS, ADAM = tiny_rows(), Optimiser(lr=0.01, steps=2)


def test_the_way_back_takes_smaller_batches() -> None:
    course = Course(rows=ROWS, steps=[(0, 1, 2, 3)], optimiser=ADAM, batch_tokens=60)
    assert [sorted(batch.rows) for batch in course.batches(0)] == [[0, 2, 3], [1]]
    assert sorted(len(batch.rows) for batch in course.batches(0, twice=True)) == [1, 1, 2]


def test_every_epoch_takes_all_rows_once_in_an_order_of_its_own() -> None:
    steps = plan_steps(ROWS, epochs=3, rows_per_step=4, seed=0)
    assert [len(step) for step in steps] == [4, 2] * 3
    orders = [sum(steps[i : i + 2], ()) for i in (0, 2, 4)]
    assert all(sorted(order) == list(range(6)) for order in orders) and len(set(orders)) == 3
    assert plan_steps(ROWS, epochs=2, rows_per_step=4, seed=0) == steps[:4]
    assert plan_steps(ROWS, epochs=3, rows_per_step=4, seed=1) != steps


def test_the_order_is_of_rows_and_not_of_where_they_stand() -> None:
    turned = ROWS[::-1]
    one, other = (plan_steps(rows, epochs=1, rows_per_step=2, seed=3) for rows in (ROWS, turned))
    assert [[ROWS[i].row_id for i in step] for step in one] == [[turned[i].row_id for i in step] for step in other]


def test_turns_of_a_row_have_places_of_their_own() -> None:
    turns = [dataclasses.replace(ROWS[0], turn=n) for n in range(12)]
    (order,) = plan_steps(turns, epochs=1, rows_per_step=12, seed=0)
    assert sorted(order) == list(range(12)) and list(order) != list(range(12))


def test_what_a_step_costs_where_the_training_begins() -> None:
    course = Course(rows=ROWS, steps=[(0, 3), (4, 1)], optimiser=ADAM, batch_tokens=30)
    assert course.loss_before(1) == 0.0, "not known"
    starts = token_starts(ROWS)
    nll = np.random.default_rng(0).uniform(1, 30, starts[-1])
    known = dataclasses.replace(course, begins=nll)
    for k, step in enumerate(course.steps):
        wanted = np.concatenate([nll[starts[i] : starts[i + 1]] for i in step]).mean()
        assert known.loss_before(k) == pytest.approx(wanted, rel=1e-12)


def test_what_a_step_of_pairs_costs_where_the_training_begins() -> None:
    pairs = tiny_pairs()
    starts = token_starts(pairs)
    nll = np.random.default_rng(1).uniform(1, 30, starts[-1])
    loss = PairLoss(beta=5.0, reference=None, starts=starts, gamma=0.5, divided="count")
    course = Course(rows=pairs, steps=[(0,), (2, 1)], optimiser=ADAM, batch_tokens=30, loss=loss, begins=nll)
    means = np.array([nll[a:b].mean() for a, b in itertools.pairwise(starts)])
    each = np.logaddexp(0, 5 * (means[0::2] - means[1::2]) + 0.5)
    for k, step in enumerate(course.steps):
        assert course.loss_before(k) == pytest.approx(each[list(step)].mean(), rel=1e-12)
