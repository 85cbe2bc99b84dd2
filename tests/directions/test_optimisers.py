from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import get_scheduler
from unrolled import plain_step

from alphatoken_curate.directions.optimisers import Optimiser, State, decays

SHAPES = [(3, 4), (5,), (2, 3, 2)]
STEPS = 5

OPTIMISERS = {
    "adamw": Optimiser(lr=0.02, steps=STEPS, root=1e-3),
    "adamw, linear, warm-up": Optimiser(lr=0.02, steps=STEPS, root=1e-3, schedule="linear", warmup=2),
    "adamw, cosine, clipped, decay": Optimiser(
        lr=0.02, steps=STEPS, root=1e-3, schedule="cosine", clip=0.7, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-3
    ),
    "adamw, without a root": Optimiser(lr=0.02, steps=STEPS, root=0.0),
    "sgd": Optimiser(lr=0.1, steps=STEPS, kind="sgd"),
    "sgd, momentum, decay, clipped": Optimiser(
        lr=0.1, steps=STEPS, kind="sgd", momentum=0.9, weight_decay=0.3, clip=0.7, schedule="linear"
    ),
    "sgd, decay": Optimiser(lr=0.1, steps=STEPS, kind="sgd", weight_decay=0.3, warmup=1),
    "sgd, never clipped": Optimiser(lr=0.1, steps=STEPS, kind="sgd", clip=1e3),
}


def random(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def by_torch(optimiser: Optimiser, weights: list[Tensor], grads: list[list[Tensor]]) -> list[Tensor]:
    """The same steps by torch's optimisers, transformers' schedule and torch's clipping."""
    held = [torch.nn.Parameter(w.clone()) for w in weights]
    groups = [
        {"params": [p for p in held if p.ndim > 1], "weight_decay": optimiser.weight_decay},
        {"params": [p for p in held if p.ndim == 1], "weight_decay": 0.0},
    ]
    if optimiser.kind == "adamw":
        torchs: Any = torch.optim.AdamW(groups, lr=optimiser.lr, betas=optimiser.betas, eps=optimiser.eps)
    else:
        torchs = torch.optim.SGD(groups, lr=optimiser.lr, momentum=optimiser.momentum)
    name = "constant_with_warmup" if optimiser.schedule == "constant" else optimiser.schedule
    schedule = get_scheduler(name, torchs, num_warmup_steps=optimiser.warmup, num_training_steps=optimiser.steps)
    for each in grads:
        for p, g in zip(held, each, strict=True):
            p.grad = g.clone()
        if optimiser.clip is not None:
            torch.nn.utils.clip_grad_norm_(held, optimiser.clip)
        torchs.step()
        schedule.step()
    return [p.detach() for p in held]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_without_a_root_steps_are_those_of_torch_and_its_schedules(name: str) -> None:
    optimiser = dataclasses.replace(OPTIMISERS[name], root=0.0)
    grads = [random(10 + k) for k in range(STEPS)]
    state = optimiser.start([w.clone() for w in random(0)])
    for k, each in enumerate(grads):
        optimiser.step(state, each, k)
    for own, wanted in zip(state.weights, by_torch(optimiser, random(0), grads), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_cotangents_are_those_of_autograd_through_the_same_step(name: str, k: int) -> None:
    optimiser = OPTIMISERS[name]
    state = optimiser.start(random(0))
    for n, slot in enumerate(state.slots):
        for tensor, values in zip(slot, random(1 + n), strict=True):
            tensor.copy_(values.square() if n else values)
    grads = random(5)
    inputs = [x.clone().requires_grad_() for x in (*state.tensors, *grads)]
    size = len(SHAPES)
    each = [inputs[i : i + size] for i in range(0, len(inputs), size)]
    outputs = plain_step(optimiser, each[0], each[1:-1], each[-1], k)
    cotangents = [x for n in range(len(outputs) // size) for x in random(20 + n)]
    wanted = torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)

    adjoint = State(random(20), tuple(random(21 + n) for n in range(len(state.slots))))
    found = optimiser.pull_back(state, grads, k, adjoint)
    for own, other in zip([*adjoint.tensors, *found], wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-13)

    optimiser.step(state, grads, k)
    for own, other in zip(state.tensors, outputs, strict=True):
        torch.testing.assert_close(own, other.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "apertus", "qwen2", "bloom", "phimoe"])
def test_what_decays_is_what_the_trainer_of_transformers_lets_decay(family: str) -> None:
    """By names, and not by dimensions: biases of experts have two, and what is no norm may have one."""
    from transformers import Trainer

    model = tiny_model(family)
    names = [name for name, _ in model.named_parameters()]
    wanted = Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), model)
    assert [name for name, told in zip(names, decays(model, names), strict=True) if told] == [
        name for name in names if name in wanted
    ]
    chosen = Optimiser(lr=1.0, steps=1, kind="sgd", weight_decay=0.5, decaying=(False, True, True))
    weights = random(1)
    state = chosen.start([w.clone() for w in weights])
    chosen.step(state, [torch.zeros_like(w) for w in weights], 0)
    for own, before, part in zip(state.weights, weights, (1, 0.5, 0.5), strict=True):
        torch.testing.assert_close(own, part * before)


def test_cases_that_clip_do_and_others_do_not() -> None:
    norm = float(torch.cat([g.flatten() for g in random(5)]).norm())
    assert {o.clip is not None and o.clip < norm for o in OPTIMISERS.values()} == {True, False}
    assert OPTIMISERS["sgd, never clipped"].clip > norm  # type: ignore[operator]


def test_where_a_gradient_is_zero_adams_slope_is_the_rate_over_the_root() -> None:
    """As of LoRA's A in the first step, where B is 0."""
    optimiser = Optimiser(lr=0.1, steps=1, root=1e-4, eps=0.0)
    state, zero = optimiser.start([torch.zeros(3, dtype=torch.float64)]), [torch.zeros(3, dtype=torch.float64)]
    adjoint = State([torch.ones(3, dtype=torch.float64)], tuple([torch.zeros_like(zero[0])] for _ in range(2)))
    found = optimiser.pull_back(state, zero, 0, adjoint)
    torch.testing.assert_close(found[0], torch.full((3,), -0.1 / 1e-2, dtype=torch.float64))
    without = dataclasses.replace(optimiser, root=0.0)
    assert not without.pull_back(state, zero, 0, adjoint)[0].isfinite().any()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_the_root_takes_is_told_beside_the_length_of_the_step(name: str) -> None:
    optimiser = OPTIMISERS[name]
    plain = dataclasses.replace(optimiser, root=0.0)
    states = [o.start([torch.zeros_like(w) for w in random(0)]) for o in (optimiser, plain)]
    grads = [random(10 + k) for k in range(3)]
    for k in range(3):
        for o, state in zip((optimiser, plain), states, strict=True):
            for weight in state.weights:
                weight.zero_()  # nothing to decay
            o.step(state, grads[k], k)
        taken, whole = optimiser.root_shift(states[0], k)
        each = list(zip(states[0].weights, states[1].weights, strict=True))
        rooted = optimiser.kind == "adamw" and optimiser.root > 0
        assert taken == pytest.approx(sum(float((a - b).square().sum()) for a, b in each), rel=1e-9)
        assert whole == pytest.approx(sum(float(a.square().sum()) for a, _ in each) if rooted else 0.0, rel=1e-9)
        assert (taken > 0) == (rooted and optimiser.rate(k) > 0)


def test_where_nothing_moves_the_root_takes_nothing() -> None:
    optimiser = Optimiser(lr=0.1, steps=1, eps=0.0)
    assert optimiser.root_shift(optimiser.start([torch.zeros(3)]), 0) == (0.0, 0.0)


def test_a_copy_shares_no_memory_and_takes_over_numbers_in_place() -> None:
    state = OPTIMISERS["adamw"].start(random(0))
    copied = state.clone()
    state.weights[0].add_(1)
    state.slots[1][2].add_(2)
    assert not torch.equal(copied.weights[0], state.weights[0]) and not copied.slots[1][2].any()
    held = copied.weights[0]
    copied.copy_(state)
    assert copied.weights[0] is held
    assert all(torch.equal(a, b) for a, b in zip(copied.tensors, state.tensors, strict=True))
    assert torch.equal(copied.digest(), state.digest())
    copied.slots[1][2].view(-1)[-1] += 1
    assert not torch.equal(copied.digest(), state.digest())
