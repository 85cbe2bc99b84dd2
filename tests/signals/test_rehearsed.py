from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from tiny import make_row, tiny_model, tiny_pairs, tiny_rows
from tiny_files import perturbed
from torch import Tensor
from unrolled import cotangents_by_autograd, mean_over
from unrolled_pairs import Dpo, flat, own_losses

from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.groups import mean_and_error
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, Values, mean_loss
from alphatoken_curate.directions.shelves import InMemory
from alphatoken_curate.directions.step_losses import PairLoss
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.runs.schema import BY_ESTIMATOR
from alphatoken_curate.signals.rehearsed import columns, exact_paths
from alphatoken_curate.tokens.plan import token_starts

pytestmark = pytest.mark.usefixtures("all_float64")

ROWS = tiny_rows()
OTHER = [make_row(95, [9, 2, 31, 30, 6, 11], [(1, 6)])]
TARGET = [make_row(90, [5, 9, 33, 8, 40, 21, 7], [(2, 7)])]
STEPS = [(0, 3), (4, 1, 0), (5, 2, 3)]
ADAM = Optimiser(lr=0.01, steps=3, root=1e-4, clip=0.5, weight_decay=0.1)


def rehearsed(family: str, layers: Any, denominator: Any = "count") -> tuple[Trainee, Values]:
    trainee = Trainee(tiny_model(family), layers, "linear")
    course = Course(rows=ROWS, steps=STEPS, optimiser=ADAM, denominator=denominator, batch_tokens=45)
    outcomes = [mean_loss(TARGET, 100), mean_loss(OTHER, 100)]
    return trainee, Rehearsal(trainee, course, InMemory(), paths=exact_paths(trainee)).run(outcomes)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("family", "layers"), [("gpt2", 4), ("llama", 2), ("mixtral", 2)])
def test_paths_are_those_of_every_step_along_its_own_direction(family: str, layers: int) -> None:
    """From C[s, t] at the weights before each step of the unrolled training, one backward per token."""
    trainee, found = rehearsed(family, layers)
    assert found.direct is not None and found.causal is not None
    places = np.cumsum([0, *(int(r.response.sum()) for r in ROWS)])
    for n, target in enumerate((TARGET, OTHER)):
        wanted, own = torch.zeros(2, places[-1], dtype=torch.float64), torch.zeros(places[-1], dtype=torch.float64)
        steps = cotangents_by_autograd(tiny_model(family), trainee.names, ROWS, STEPS, ADAM, mean_over(target))
        for rows, step in zip(STEPS, steps, strict=True):
            model = tiny_model(family)
            model.load_state_dict(step.held, strict=False)
            tokens = sum(int(ROWS[i].response.sum()) for i in rows)
            direction = _direction(trainee, {name: -a / tokens for name, a in step.cotangents.items()})
            for i in rows:
                ids, answers = torch.from_numpy(ROWS[i].input_ids).long(), np.flatnonzero(ROWS[i].response).tolist()
                c = oracles.contraction_by_backwards(model, layers, direction, ids, answers)
                mine = slice(places[i], places[i + 1])
                wanted[:, mine] += oracles.along_paths(c, answers)
                own[mine] += c.sum(0)
        scale = float(own.abs().max())
        assert np.abs(found.direct[n] - wanted[0].numpy()).max() < 1e-8 * scale
        assert np.abs(found.causal[n] - wanted[1].numpy()).max() < 1e-8 * scale
        assert np.abs(found.own[n] - own.numpy()).max() < 1e-8 * scale


def test_paths_of_pairs_count_by_omega_of_their_step_with_the_sign_of_their_branch() -> None:
    """What is left of the value, omega's part, is in none of them."""

    def model() -> Any:
        return perturbed(tiny_model("gpt2"), scale=0.1)

    pairs, steps, beta = tiny_pairs(), [(0, 3), (1, 2, 0)], 0.3
    reference, rows = own_losses(tiny_model("gpt2"), pairs), flat(pairs)
    loss = PairLoss(beta=beta, reference=torch.cat(reference).numpy(), starts=token_starts(pairs))
    trainee = Trainee(model(), 2, "linear")
    course = Course(rows=pairs, steps=steps, optimiser=ADAM, batch_tokens=70, loss=loss)
    found = Rehearsal(trainee, course, InMemory(), paths=exact_paths(trainee, loss)).run([mean_loss(TARGET, 100)])
    assert found.direct is not None and found.causal is not None and found.omega is not None
    dpo = Dpo(
        model=model, names=trainee.names, pairs=pairs, steps=steps, optimiser=ADAM, reference=reference, beta=beta
    )
    places, wanted = token_starts(pairs), torch.zeros(3, found.own.shape[1], dtype=torch.float64)
    for step, at in zip(steps, dpo.cotangents(mean_over(TARGET)), strict=True):
        moved = model()
        moved.load_state_dict(at.held, strict=False)
        direction = _direction(trainee, {name: -a / len(step) for name, a in at.cotangents.items()})
        losses = own_losses(moved, pairs)
        for n in step:
            gains = [float((reference[i] - losses[i]).sum()) for i in (2 * n, 2 * n + 1)]
            omega = beta / (1 + np.exp(beta * (gains[0] - gains[1])))
            for i, sign in ((2 * n, omega), (2 * n + 1, -omega)):
                ids, answers = torch.from_numpy(rows[i].input_ids).long(), np.flatnonzero(rows[i].response).tolist()
                c = oracles.contraction_by_backwards(moved, 2, direction, ids, answers)
                mine = slice(places[i], places[i + 1])
                wanted[:2, mine] += sign * oracles.along_paths(c, answers)
                wanted[2, mine] += sign * c.sum(0)
    scale = float(wanted[2].abs().max())
    for mine, other in zip((found.direct, found.causal, found.own), wanted.numpy(), strict=True):
        assert np.abs(mine[0] - other).max() < 1e-8 * scale
    assert np.abs(found.omega).max() > 1e-3 * scale


def test_the_denominator_has_no_part_in_the_paths() -> None:
    (_, count), (_, summed) = (rehearsed("gpt2", 2, denominator) for denominator in ("count", "sum"))
    assert summed.denominator.any() and not count.denominator.any()
    for name in ("own", "direct", "causal"):
        np.testing.assert_array_equal(getattr(summed, name), getattr(count, name))


def test_paths_change_no_values() -> None:
    trainee = Trainee(tiny_model("gpt2"), 2, "linear")
    course = Course(rows=ROWS, steps=STEPS, optimiser=ADAM, batch_tokens=45)
    without = Rehearsal(trainee, course, InMemory()).run([mean_loss(TARGET, 100), mean_loss(OTHER, 100)])
    np.testing.assert_array_equal(rehearsed("gpt2", 2)[1].own, without.own)
    assert without.direct is None and without.causal is None


def made_up(seed: int, *, parted: bool = True) -> Values:
    """Of five outcomes and four tokens."""
    draw = np.random.default_rng(seed)
    own, denominator, direct, causal = draw.normal(size=(4, 5, 4))
    return Values(own=own, denominator=denominator, **({"direct": direct, "causal": causal} if parted else {}))


GROUPS = {"adapt": [10, 20, 30], "stab": [7], "drift": [1]}


def test_columns_of_influence_are_means_over_groups_and_orders_with_their_error() -> None:
    orders = [made_up(0, parted=False), made_up(1, parted=False)]
    found = columns(orders, GROUPS, BY_ESTIMATOR["influence"])
    assert set(found) == {f"{o}_{p}" for o in GROUPS for p in ("influence", "denominator", "error")}
    each = (orders[0].own + orders[0].denominator + orders[1].own + orders[1].denominator) / 2
    np.testing.assert_allclose(found["adapt_influence"], (each[0] + 2 * each[1] + 3 * each[2]) / 6)
    np.testing.assert_allclose(found["stab_influence"], each[3])
    np.testing.assert_allclose(found["drift_influence"], each[4])
    np.testing.assert_allclose(found["drift_denominator"], (orders[0].denominator + orders[1].denominator)[4] / 2)
    np.testing.assert_allclose(found["adapt_error"], mean_and_error(each[:3], [10, 20, 30])[1])
    assert np.isnan(found["stab_error"]).all() and np.isnan(found["drift_error"]).all()


def test_what_a_weight_does_to_omega_is_in_the_influence_alone() -> None:
    one = replace(made_up(0), denominator=np.zeros((5, 4)), omega=np.random.default_rng(1).normal(size=(5, 4)))
    assert one.omega is not None and one.direct is not None
    found = columns([one], GROUPS, BY_ESTIMATOR["influence"])
    np.testing.assert_allclose(found["stab_influence"], (one.own + one.omega)[3])
    np.testing.assert_allclose(found["drift_omega"], one.omega[4])
    parted = columns([one], GROUPS, BY_ESTIMATOR["exact+influence"])
    np.testing.assert_allclose(parted["stab_upstream"], (one.own - one.direct)[3])


def test_columns_of_paths_leave_the_denominator_out() -> None:
    one = made_up(0)
    assert one.direct is not None and one.causal is not None
    found = columns([one], GROUPS, BY_ESTIMATOR["exact+influence"])
    paths = ("direct", "causal", "upstream", "denominator", "error")
    assert set(found) == {f"{o}_{p}" for o in ("adapt", "stab") for p in paths} | {
        "drift_direct",
        "drift_causal",
        "drift_denominator",
        "drift_error",
    }
    np.testing.assert_allclose(found["adapt_direct"], np.average(one.direct[:3], axis=0, weights=[1, 2, 3]))
    np.testing.assert_allclose(found["stab_upstream"], one.own[3] - one.direct[3])
    np.testing.assert_allclose(found["adapt_error"], mean_and_error((one.direct + one.causal)[:3], [10, 20, 30])[1])


def _direction(trainee: Trainee, by_name: dict[str, Tensor]) -> dict[str, Tensor]:
    matrices = trainee.as_direction([by_name[name] for name in trainee.names])
    return {m.name: x for m, x in zip(trainee.maps, matrices, strict=True)}
