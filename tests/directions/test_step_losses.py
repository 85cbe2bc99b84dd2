"""The losses of steps, and rehearsals of preference pairs: against autograd through a DPO training written by hand."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from daily import daily
from tiny import make_row, tiny_model, tiny_pairs, tiny_rows
from tiny_files import perturbed
from unrolled import mean_over
from unrolled_pairs import Dpo, Simpo, flat, own_losses

from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, Values, mean_loss
from alphatoken_curate.directions.shelves import InMemory
from alphatoken_curate.directions.step_losses import TOKENS, PairLoss
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.signals.rehearsed import exact_paths
from alphatoken_curate.tokens.plan import Batch, collate, token_starts

pytestmark = pytest.mark.usefixtures("all_float64")

PAIRS = tiny_pairs()
TARGET = [make_row(90, [5, 9, 33, 8, 40, 21, 7], [(2, 7)]), make_row(91, [4, 4, 17, 50], [(3, 4)])]
RETENTION = [make_row(95, [9, 2, 31, 30, 6, 11], [(1, 6)])]
BETA = 0.3

STEPS = [(0, 3), (1, 2), (2, 0, 1), (3,), (0, 2)]
"""Pairs visited twice, and steps of one, two and three."""

ADAM = Optimiser(lr=0.01, steps=5, root=1e-4)
OPTIMISERS = {
    "adamw": ADAM,
    "adamw, nearly signs": dataclasses.replace(ADAM, root=1e-12, lr=1e-3),
    "adamw, clipped, decay, cosine": Optimiser(
        lr=0.01, steps=5, root=1e-4, schedule="cosine", warmup=1, clip=0.2, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-3
    ),
    "sgd": Optimiser(lr=0.2, steps=5, kind="sgd"),
    "sgd, momentum, clipped, linear, decay": Optimiser(
        lr=0.05, steps=5, kind="sgd", momentum=0.9, clip=0.2, schedule="linear", weight_decay=0.1
    ),
}


def pair_loss(reference: Sequence[torch.Tensor]) -> PairLoss:
    return PairLoss(beta=BETA, reference=torch.cat(list(reference)).numpy(), starts=token_starts(PAIRS))


def course(optimiser: Optimiser, reference: Sequence[torch.Tensor], batch_tokens: int, steps: Any = STEPS) -> Course:
    return Course(rows=PAIRS, steps=steps, optimiser=optimiser, batch_tokens=batch_tokens, loss=pair_loss(reference))


def compared(
    family: str, layers: Any, parameters: Any, optimiser: Optimiser, *, batch_tokens: int = 70, own: bool = False
) -> tuple[Values, np.ndarray]:
    """Values found, and those of autograd. `own`: the model itself, as it starts, is the reference."""

    def model() -> Any:
        return perturbed(tiny_model(family), scale=0.1)

    reference = own_losses(model() if own else tiny_model(family), PAIRS)
    trainee = Trainee(model(), layers, parameters)
    starts = [w.detach().clone() for w in trainee.weights]
    found = Rehearsal(trainee, course(optimiser, reference, batch_tokens), InMemory()).run(
        [mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)]
    )
    assert all(torch.equal(w, start) for w, start in zip(trainee.weights, starts, strict=True))
    dpo = Dpo(
        model=model, names=trainee.names, pairs=PAIRS, steps=STEPS, optimiser=optimiser, reference=reference, beta=BETA
    )
    return found, dpo.values([mean_over(TARGET), mean_over(RETENTION)]).numpy()


def assert_exact(found: Values, wanted: np.ndarray, tolerance: float = 1e-8) -> None:
    error = np.abs(found.value - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
    assert np.abs(wanted).max() > 0 and (error < tolerance).all(), error


def assert_weighs_by_derivative(
    loss: PairLoss, batch: Batch, nll: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor
) -> None:
    """`wanted`: the loss by hand. Of v its derivative too, along something, by nll and by both ways of the weights."""
    given = loss.weigh(batch, nll, [weights, weights])
    by_nll = torch.autograd.grad(wanted, nll, create_graph=True)[0]
    torch.testing.assert_close(given, by_nll)
    along = torch.rand(len(nll), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad((given * along).sum(), [nll, weights]),
        torch.autograd.grad((by_nll * along).sum(), [nll, weights]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


# -------------------------------------------------------------------------------------------------- the loss of a step


def test_plain_rows_count_tokens_and_weigh_by_their_weights() -> None:
    batch = collate(tiny_rows(), [0, 2])
    nll, weights = torch.rand(7), torch.rand(7)
    assert TOKENS.ways == 1 and TOKENS.units(batch) == 7
    assert TOKENS.total(batch, nll) == nll.sum() and TOKENS.weigh(batch, nll, [weights]) is weights


def test_the_loss_of_pairs_is_dpos_and_weighs_by_its_derivative() -> None:
    draw = torch.Generator().manual_seed(1)
    lengths = [int(row.response.sum()) for row in flat(PAIRS)]
    reference = [torch.rand(n, generator=draw, dtype=torch.float64) for n in lengths]
    loss, batch = pair_loss(reference), collate(PAIRS, [3, 0])
    parts = [
        torch.rand(n, generator=draw, dtype=torch.float64) for n in (lengths[6], lengths[7], lengths[0], lengths[1])
    ]
    nll = torch.cat(parts).requires_grad_()
    weights = torch.rand(len(nll), generator=draw, dtype=torch.float64).requires_grad_()
    held = nll.split([len(part) for part in parts])
    weighed = weights.split([len(part) for part in parts])
    ratios = [(w * (reference[i] - x)).sum() for w, i, x in zip(weighed, (6, 7, 0, 1), held, strict=True)]
    margins = torch.stack([BETA * (ratios[0] - ratios[1]), BETA * (ratios[2] - ratios[3])])
    wanted = -torch.log(torch.sigmoid(margins)).sum()
    torch.testing.assert_close(loss.margin(batch, nll, weights), margins)
    assert loss.units(batch) == 2 and loss.ways == 2
    assert_weighs_by_derivative(loss, batch, nll, weights, wanted)
    ones = torch.ones_like(nll)
    plain = torch.stack([(reference[i] - x).sum() for i, x in zip((6, 7, 0, 1), held, strict=True)])
    wanted = torch.nn.functional.softplus(-BETA * (plain[0::2] - plain[1::2])).sum()
    torch.testing.assert_close(loss.total(batch, nll), wanted)
    assert (loss.weigh(batch, nll, [ones, ones]).sign() == torch.from_numpy(1 - 2 * (batch.row % 2))).all()


def simpo_loss(divided: Any) -> PairLoss:
    return PairLoss(beta=2.0, reference=None, starts=token_starts(PAIRS), gamma=0.7, divided=divided)


@pytest.mark.parametrize("divided", ["count", "sum"])
def test_the_loss_of_pairs_is_simpos_and_weighs_by_its_derivative(divided: str) -> None:
    draw = torch.Generator().manual_seed(2)
    loss, batch = simpo_loss(divided), collate(PAIRS, [3, 0])
    lengths = batch.counts.tolist()
    nll, weights = (torch.rand(sum(lengths), generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    each = zip(nll.split(lengths), weights.split(lengths), strict=True)
    means = [-(x * w).sum() / (len(x) if divided == "count" else w.sum()) for x, w in each]
    margins = torch.stack([2 * (means[0] - means[1]), 2 * (means[2] - means[3])]) - 0.7
    torch.testing.assert_close(loss.margin(batch, nll, weights), margins)
    assert_weighs_by_derivative(loss, batch, nll, weights, -torch.log(torch.sigmoid(margins)).sum())


def test_simpos_loss_is_trls() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer

    trained = types.SimpleNamespace(
        **{"loss_type": "simpo", "simpo_gamma": 0.7, "beta": 2.0, "label_smoothing": 0.0, "alpha": 0.0},
        accelerator=types.SimpleNamespace(device="cpu"),
    )
    batch = collate(PAIRS, [3, 0, 1])
    nll = torch.rand(int(batch.counts.sum()), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    means = torch.stack([-part.mean() for part in nll.split(batch.counts.tolist())])
    losses, *_ = CPOTrainer.cpo_loss(trained, means[0::2], means[1::2])
    torch.testing.assert_close(simpo_loss("count").total(batch, nll), losses.sum())
    torch.testing.assert_close(simpo_loss("sum").total(batch, nll), losses.sum())


def test_margins_far_off_do_not_overflow() -> None:
    batch = collate(PAIRS, [0])
    for far in (1e6, -1e6):
        reference = [torch.full((int(row.response.sum()),), far * (n % 2)) for n, row in enumerate(flat(PAIRS))]
        loss, nll = pair_loss(reference), torch.zeros(10, dtype=torch.float32)
        weighed = loss.weigh(batch, nll, [torch.ones_like(nll)] * 2)
        assert weighed.isfinite().all()
        assert weighed[0] == pytest.approx(BETA if far > 0 else 0.0) and loss.total(batch, nll).isfinite()


# ----------------------------------------------------------------------------------------------------- whole rehearsals


_OFTEN = ("adamw, nearly signs", "adamw, clipped, decay, cosine", "sgd, momentum, clipped, linear, decay")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", daily(OPTIMISERS, _OFTEN))
def test_values_are_those_of_autograd_through_the_unrolled_training(name: str) -> None:
    found, wanted = compared("gpt2", "all", "all", OPTIMISERS[name])
    assert_exact(found, wanted)
    assert found.omega is not None and not found.denominator.any()
    assert np.abs(found.omega).max() > 1e-3 * np.abs(found.own).max()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("divided", ["count", "sum"])
@pytest.mark.parametrize("name", daily(OPTIMISERS, ["adamw, clipped, decay, cosine"]))
def test_simpos_values_are_those_of_autograd_through_the_unrolled_training(name: str, divided: str) -> None:
    def model() -> Any:
        return perturbed(tiny_model("gpt2"), scale=0.1)

    trainee, loss = Trainee(model(), "all", "all"), simpo_loss(divided)
    made = Course(rows=PAIRS, steps=STEPS, optimiser=OPTIMISERS[name], batch_tokens=70, loss=loss)
    found = Rehearsal(trainee, made, InMemory()).run([mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)])
    simpo = Simpo(
        **{"model": model, "names": trainee.names, "pairs": PAIRS, "steps": STEPS, "optimiser": OPTIMISERS[name]},
        **{"reference": [], "beta": loss.beta, "gamma": loss.gamma, "by_weights": divided == "sum"},
    )
    assert_exact(found, simpo.values([mean_over(TARGET), mean_over(RETENTION)]).numpy())
    assert found.omega is not None and np.abs(found.omega).max() > 1e-3 * np.abs(found.own).max()


@pytest.mark.parametrize(
    ("batch_tokens", "own"),
    [(1, True), *(pytest.param(10_000, own, marks=pytest.mark.long) for own in (False, True))],
)
def test_whatever_the_batches_and_the_reference(batch_tokens: int, own: bool) -> None:
    assert_exact(*compared("gpt2", "all", "all", ADAM, batch_tokens=batch_tokens, own=own))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("family", "layers", "parameters"),
    [
        ("gpt2", 1, "linear"),
        ("qwen2", "all", "all"),
        pytest.param("mixtral", 2, "linear", marks=pytest.mark.long),
        pytest.param("gemma3_text", 3, "all", marks=pytest.mark.long),
    ],
)
def test_other_families_and_what_trains_narrowed(family: str, layers: Any, parameters: Any) -> None:
    assert_exact(*compared(family, layers, parameters, OPTIMISERS["adamw, clipped, decay, cosine"]))


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["adamw, clipped, decay, cosine", "sgd, momentum, clipped, linear, decay"],
)
def test_values_are_what_trainings_with_one_weight_moved_end_with(name: str) -> None:
    def model() -> Any:
        return perturbed(tiny_model("gpt2"), scale=0.1)

    tokens, reference = [0, 8, 13, 27], own_losses(tiny_model("gpt2"), PAIRS)
    trainee = Trainee(model(), "all", "all")
    found = Rehearsal(trainee, course(OPTIMISERS[name], reference, 70), InMemory()).run([mean_loss(TARGET, 1000)]).value
    dpo = Dpo(
        model=model,
        names=trainee.names,
        pairs=PAIRS,
        steps=STEPS,
        optimiser=OPTIMISERS[name],
        reference=reference,
        beta=BETA,
    )
    wanted = dpo.by_retraining(mean_over(TARGET), tokens, by=1e-3).numpy()
    assert np.abs(found[0, tokens] - wanted).max() < 1e-7 * np.abs(found).max()


def test_an_outcome_of_pairs_is_their_mean_loss() -> None:
    reference, trainee = own_losses(tiny_model("gpt2"), PAIRS), Trainee(perturbed(tiny_model("gpt2"), scale=0.1), 2)
    gains = torch.stack([(a - b).sum() for a, b in zip(reference, own_losses(trainee.model, PAIRS), strict=True)])
    wanted = torch.log1p(torch.exp(BETA * (gains[1::2] - gains[0::2]))).mean()
    loss, batches = pair_loss(reference), [collate(PAIRS, [0, 2]), collate(PAIRS, [3, 1])]
    gradient, mean, count = trainee.gradient(batches, loss=loss)
    assert count == 4 and mean == pytest.approx(float(wanted), rel=1e-12)
    for own, other in zip(mean_loss(PAIRS, 70, loss)(trainee), gradient, strict=True):
        torch.testing.assert_close(own, other)


def test_batches_keep_pairs_whole() -> None:
    for batch_tokens in (1, 40, 10_000):
        made = course(ADAM, own_losses(tiny_model("gpt2"), PAIRS), batch_tokens, [(0, 1, 2, 3)])
        for twice in (False, True):
            batches = made.batches(0, twice=twice)
            rows = [batch.rows for batch in batches]
            assert sorted(sum(rows, ())) == list(range(8)) and all(batch.pairs for batch in batches)
            assert all(a + 1 == b and a % 2 == 0 for r in rows for a, b in zip(r[::2], r[1::2], strict=True))


class Stopped(Exception):
    """As if the process were killed there."""


@pytest.mark.long
@pytest.mark.parametrize("exact", [False, True])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(exact: bool) -> None:
    reference = own_losses(tiny_model("gpt2"), PAIRS)
    outcomes = [mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)]
    made = course(OPTIMISERS["adamw, clipped, decay, cosine"], reference, 70)

    def rehearsal(states: InMemory) -> Rehearsal:
        trainee = Trainee(perturbed(tiny_model("gpt2"), scale=0.1), 1, "linear")
        return Rehearsal(trainee, made, states, paths=exact_paths(trainee, made.loss) if exact else None)

    wanted = rehearsal(InMemory()).run(outcomes, at_once=1)
    assert wanted.omega is not None and (wanted.direct is not None) == exact
    for stop in (0, 3, 5, 7, 12):
        states, left = InMemory(), iter(range(stop))

        def told(_: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise Stopped

        with pytest.raises(Stopped):
            rehearsal(states).run(outcomes, told, at_once=1)
        found = rehearsal(states).run(outcomes, at_once=1)
        for name in ("own", "omega", "denominator", *(("direct", "causal") if exact else ())):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.long
def test_windows_of_pairs_are_trainings_of_their_own() -> None:
    """The first is a training up to its end; the last ends where the whole does, and gives what that gives."""
    steps = [(0, 1), (1,), (3, 2), (2,)]
    reference = own_losses(tiny_model("gpt2"), PAIRS)
    plain = course(ADAM, reference, 70, steps)

    def values(of: Course) -> np.ndarray:
        trainee = Trainee(perturbed(tiny_model("gpt2"), scale=0.1), 2, "all")
        return Rehearsal(trainee, of, InMemory()).run([mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)]).value

    whole, first = values(plain), values(dataclasses.replace(plain, steps=steps[:2]))
    middle = int(token_starts(PAIRS)[4])
    assert not first[:, middle:].any() and not np.allclose(whole[:, :middle], first[:, :middle], rtol=1e-3)
    found = values(dataclasses.replace(plain, window=2))
    np.testing.assert_array_equal(found, np.concatenate([first[:, :middle], whole[:, middle:]], axis=1))
    np.testing.assert_array_equal(values(dataclasses.replace(plain, window=4)), whole)
