"""A rehearsed LoRA against peft's own layers: autograd through their unrolled training, and their real training."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import oracles
import pytest
import torch
from daily import daily
from peft_lora import as_ours, names_of, with_lora
from tiny import make_row, tiny_model, tiny_pairs, tiny_rows
from torch import Tensor
from unrolled import cotangents_by_autograd, mean_over, token_losses, values_by_autograd, values_by_retraining
from unrolled_pairs import Dpo, own_losses

from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.lora import LoraTrainee
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Outcome, Rehearsal, Values, mean_loss
from alphatoken_curate.directions.shelves import InMemory
from alphatoken_curate.directions.step_losses import PairLoss
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.directions.windows import borders_of
from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.unmerged import Lora
from alphatoken_curate.signals.rehearsed import exact_paths
from alphatoken_curate.tokens.plan import collate, token_starts

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("all_float64")

ROWS = tiny_rows()
TARGET = [make_row(90, [5, 9, 33, 8, 40, 21, 7], [(2, 7)]), make_row(91, [4, 4, 17, 50], [(3, 4)])]
RETENTION = [make_row(95, [9, 2, 31, 30, 6, 11], [(1, 6)])]
STEPS = [(0, 3), (4, 1), (5, 2), (1, 3), (5, 0)]

ADAM = Optimiser(lr=0.01, steps=5, root=1e-4)
WARM = dataclasses.replace(ADAM, warmup=2, schedule="cosine", clip=0.5, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-3)
SGD = Optimiser(lr=0.2, steps=5, kind="sgd", momentum=0.9, clip=0.5, schedule="linear", weight_decay=0.1)
OPTIMISERS = {
    "adamw": ADAM,
    "adamw, nearly signs": dataclasses.replace(ADAM, root=1e-12, lr=1e-3),
    "adamw, warmed up, clipped, decay, cosine": WARM,
    "sgd": Optimiser(lr=0.5, steps=5, kind="sgd"),
    "sgd, momentum, clipped, linear, decay": SGD,
}
LORA = Lora(rank=2, scale=2.0)


def lora_of(family: str, layers: Any = "all", lora: Lora = LORA, seed: int = 3, **how: Any) -> LoraTrainee:
    return LoraTrainee(tiny_model(family), layers, lora, seed=seed, **how)


def begun(trainee: LoraTrainee, seed: int = 5) -> Lora:
    """A LoRA of the same shapes that has trained before: B is not 0."""
    draw = torch.Generator().manual_seed(seed)
    pairs = zip(trainee.names[::2], trainee.weights[::2], trainee.weights[1::2], strict=True)
    start = {
        name.removesuffix(".lora_A"): tuple(0.2 * torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in (a, b))
        for name, a, b in pairs
    }
    return dataclasses.replace(trainee.lora, start=start)  # type: ignore[arg-type]


def rehearse(
    trainee: LoraTrainee,
    optimiser: Optimiser,
    denominator: Literal["count", "sum"] = "count",
    outcomes: Sequence[Outcome] | None = None,
    steps: Any = STEPS,
) -> Values:
    course = Course(rows=ROWS, steps=steps, optimiser=optimiser, denominator=denominator, batch_tokens=45)
    starts = [w.detach().clone() for w in trainee.weights]
    each = outcomes or [mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)]
    found = Rehearsal(trainee, course, InMemory(), room=1 << 30).run(each)
    assert all(torch.equal(own, start) for own, start in zip(trainee.weights, starts, strict=True))
    return found


def assert_exact(found: Values, wanted: Tensor, tolerance: float = 1e-8) -> None:
    error = np.abs(found.value - wanted.numpy()).max(axis=1) / wanted.abs().amax(dim=1).numpy()
    assert np.isfinite(found.value).all() and wanted.abs().amax() > 0 and (error < tolerance).all(), error


def check(family: str, layers: Any, optimiser: Optimiser, denominator: Any, *, began: bool = False) -> None:
    trainee = lora_of(family, layers)
    if began:
        trainee = lora_of(family, layers, begun(trainee))
    model = with_lora(oracles.eager(tiny_model(family)), trainee)
    outcomes = [mean_over(TARGET), mean_over(RETENTION)]
    how: Any = {"summed": denominator == "sum"}
    wanted = values_by_autograd(model, names_of(model), ROWS, STEPS, optimiser, outcomes, **how)
    assert_exact(rehearse(trainee, optimiser, denominator), wanted)


_OFTEN = ("adamw, nearly signs", "adamw, warmed up, clipped, decay, cosine")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("denominator", ["count", "sum"])
@pytest.mark.parametrize("name", daily(OPTIMISERS, _OFTEN))
def test_values_are_those_of_autograd_through_the_unrolled_training_of_pefts_layers(
    name: str, denominator: Any
) -> None:
    """The first gradient of A is exactly 0, since B is; with a warm-up, whose first rate is 0, the second is too."""
    check("gpt2", "all", OPTIMISERS[name], denominator)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("family", "layers"),
    [("gpt2", 2), ("llama", "all"), ("phi3", 1), pytest.param("gpt_neox", 1, marks=pytest.mark.long)],
)
def test_other_blocks_and_families(family: str, layers: Any) -> None:
    check(family, layers, WARM, "sum")


@pytest.mark.parametrize("family", ["gpt2", pytest.param("qwen2", marks=pytest.mark.long)])
def test_one_that_began_before_goes_on_from_where_it_is(family: str) -> None:
    check(family, "all", ADAM, "count", began=True)


def test_beside_some_maps_alone() -> None:
    """An adapter of query and value projections: nothing else trains."""
    whole = begun(lora_of("llama"))
    assert whole.start is not None
    some = {name: x for name, x in whole.start.items() if name.endswith(("q_proj", "v_proj"))}
    trainee = lora_of("llama", lora=dataclasses.replace(whole, start=some))
    assert {name.split(".")[-2] for name in trainee.names} == {"q_proj", "v_proj"}
    model = with_lora(oracles.eager(tiny_model("llama")), trainee)
    wanted = values_by_autograd(model, names_of(model), ROWS, STEPS, ADAM, [mean_over(TARGET)], summed=False)
    assert_exact(rehearse(trainee, ADAM, outcomes=[mean_loss(TARGET, 1000)]), wanted)


DROPS = [0, 7, 17, 26]
"""Tokens whose weight is moved in trainings of their own."""


@pytest.mark.long
@pytest.mark.parametrize("denominator", ["count", "sum"])
@pytest.mark.parametrize(
    "name",
    [
        "adamw, warmed up, clipped, decay, cosine",
        "sgd, momentum, clipped, linear, decay",
    ],
)
def test_values_are_what_trainings_with_one_weight_moved_end_with(name: str, denominator: Any) -> None:
    trainee = lora_of("gpt2", 2)
    model = with_lora(oracles.eager(tiny_model("gpt2")), trainee)
    found = rehearse(trainee, OPTIMISERS[name], denominator).value[0]
    how: Any = {"summed": denominator == "sum", "by": 1e-3}
    wanted = values_by_retraining(
        model, names_of(model), ROWS, STEPS, OPTIMISERS[name], mean_over(TARGET), DROPS, **how
    ).numpy()
    assert np.abs(found[DROPS] - wanted).max() < 1e-7 * np.abs(found).max()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_and_b_end_where_pefts_training_by_torch_ends(family: str, kind: Any) -> None:
    """Real layers, real optimisers, no root term."""
    trainee = lora_of(family, seed=11)
    model = with_lora(tiny_model(family), trainee)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    plain = Optimiser(lr=0.01, steps=len(STEPS), kind=kind, root=0.0, weight_decay=0.1)
    how = {"lr": 0.01, "weight_decay": 0.1}
    torchs = torch.optim.AdamW(parameters, **how) if kind == "adamw" else torch.optim.SGD(parameters, **how)
    for step in STEPS:
        loss = torch.cat([token_losses(model, {}, ROWS[i]) for i in step]).mean()
        torchs.zero_grad()
        loss.backward()
        torchs.step()
    state = plain.start([w.detach() for w in trainee.weights])
    course = Course(rows=ROWS, steps=STEPS, optimiser=plain, batch_tokens=45)
    for k in range(len(STEPS)):
        plain.step(state, trainee.gradient(course.batches(k))[0], k)
    own = dict(zip(trainee.names, trainee.weights, strict=True))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(own[as_ours(name)], parameter.detach(), rtol=1e-9, atol=1e-12)


def test_a_begins_as_pefts_does_by_the_seed_and_the_name_of_its_map() -> None:
    one, other, last = lora_of("gpt2"), lora_of("gpt2", seed=4), lora_of("gpt2", 1)
    first = dict(zip(one.names, one.weights, strict=True))
    for name, own in first.items():
        if name.endswith("lora_B"):
            assert not own.any()
            continue
        bound = 1 / math.sqrt(own.shape[1])  # of nn.init.kaiming_uniform_ with a = sqrt(5)
        assert own.abs().max() <= bound and own.abs().max() > 0.7 * bound
    drawn = torch.cat([(w * math.sqrt(w.shape[1])).flatten() for name, w in first.items() if name.endswith("A")])
    assert abs(float(drawn.mean())) < 0.1 and abs(float(drawn.var()) - 1 / 3) < 0.05
    assert all(not torch.equal(a, b) for a, b in zip(one.weights[::2], other.weights[::2], strict=True))
    assert all(torch.equal(first[name], own) for name, own in zip(last.names, last.weights, strict=True))
    other.restart(3)
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))


def test_with_a_sum_of_weights_the_values_of_a_step_add_up_to_nothing() -> None:
    steps = [(0, 1, 2), (3, 4, 5)]
    found = rehearse(lora_of("gpt2", 2), WARM, "sum", steps=steps).value
    starts = np.cumsum([0, *(int(r.response.sum()) for r in ROWS)])
    for step in steps:
        mine = found[:, np.concatenate([np.arange(starts[i], starts[i + 1]) for i in step])]
        assert (np.abs(mine.sum(1)) < 1e-12 * np.abs(mine).sum(1)).all()
    assert found[:, : starts[3]].any()


# ---------------------------------------------------------------------------------------------------- paths and drift


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("family", "layers", "began"), [("gpt2", 2, False), ("llama", 2, True)])
def test_paths_are_along_what_a_step_induces_at_the_merged_weights(family: str, layers: int, began: bool) -> None:
    """C[s, t] of the model that peft merges, along the derivative of its weights by A and B (forward mode)."""
    trainee = lora_of(family, layers)
    if began:
        trainee = lora_of(family, layers, begun(trainee))
    model = with_lora(oracles.eager(tiny_model(family)), trainee)
    steps = cotangents_by_autograd(model, names_of(model), ROWS, STEPS, WARM, mean_over(TARGET))
    course = Course(rows=ROWS, steps=STEPS, optimiser=WARM, batch_tokens=45)
    found = Rehearsal(trainee, course, InMemory(), paths=exact_paths(trainee)).run([mean_loss(TARGET, 1000)])
    assert found.direct is not None and found.causal is not None
    places = np.cumsum([0, *(int(r.response.sum()) for r in ROWS)])
    wanted, own = torch.zeros(2, places[-1], dtype=torch.float64), torch.zeros(places[-1], dtype=torch.float64)
    for rows, step in zip(STEPS, steps, strict=True):
        tokens = sum(int(ROWS[i].response.sum()) for i in rows)
        held = {as_ours(name): x for name, x in step.held.items()}
        moves = {as_ours(name): -a / tokens for name, a in step.cotangents.items()}
        merged, direction = tiny_model(family), {}
        for m in Trainee(merged, layers, "linear").maps:
            weight = m.weight.detach().clone()
            pair = [(x[f"{m.owner}.lora_A"], x[f"{m.owner}.lora_B"]) for x in (held, moves)]

            def of(a: Tensor, b: Tensor, weight: Tensor = weight) -> Tensor:
                return weight + LORA.scale * b @ a

            there, direction[m.name] = torch.func.jvp(of, *pair)
            m.weight.detach().copy_(there)
        for i in rows:
            ids, answers = torch.from_numpy(ROWS[i].input_ids).long(), np.flatnonzero(ROWS[i].response).tolist()
            c = oracles.contraction_by_backwards(merged, layers, direction, ids, answers)
            mine = slice(places[i], places[i + 1])
            wanted[:, mine] += oracles.along_paths(c, answers)
            own[mine] += c.sum(0)
    scale = float(own.abs().max())
    for name, values, of_c in (("direct", found.direct, wanted[0]), ("causal", found.causal, wanted[1])):
        assert np.abs(values[0] - of_c.numpy()).max() < 1e-8 * scale, name
    # All paths together are the influence: what is not direct is upstream.
    assert np.abs(found.own[0] - own.numpy()).max() < 1e-8 * scale


def test_paths_change_no_values_and_no_weights() -> None:
    trainee, course = lora_of("gpt2", 2), Course(rows=ROWS, steps=STEPS, optimiser=ADAM, batch_tokens=45)
    before = [m.bare.detach().clone() for m in trainee.maps]
    without = Rehearsal(trainee, course, InMemory()).run([mean_loss(TARGET, 100)])
    with_them = Rehearsal(trainee, course, InMemory(), paths=exact_paths(trainee)).run([mean_loss(TARGET, 100)])
    np.testing.assert_array_equal(with_them.own, without.own)
    assert all(torch.equal(m.bare, weight) for m, weight in zip(trainee.maps, before, strict=True))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("reference", ["start", "other"])
@pytest.mark.parametrize("began", [False, True])
def test_stability_is_the_drift_of_what_the_lora_makes_of_the_weights(reference: str, began: bool) -> None:
    trainee = lora_of("gpt2", 2)
    if began:
        trainee = lora_of("gpt2", 2, begun(trainee))
    model, draw = with_lora(oracles.eager(tiny_model("gpt2")), trainee), torch.Generator().manual_seed(7)
    fisher = [torch.rand(m.weight.shape, generator=draw, dtype=torch.float64) for m in trainee.maps]
    offset = [0.01 * torch.randn(f.shape, generator=draw, dtype=f.dtype) for f in fisher]
    first = {as_ours(n): p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    def drift(_: Any, held: dict[str, Tensor]) -> Tensor:
        now, parts = {as_ours(name): x for name, x in held.items()}, []
        for m, f, o in zip(trainee.maps, fisher, offset, strict=True):
            a, b = f"{m.owner}.lora_A", f"{m.owner}.lora_B"
            moved = LORA.scale * now[b] @ now[a]
            moved = moved + o if reference == "other" else moved - LORA.scale * first[b] @ first[a]
            parts.append(0.5 * (f * moved**2).sum())
        return torch.stack(parts).sum()

    outcomes = [mean_over(TARGET), drift]
    wanted = values_by_autograd(model, names_of(model), ROWS, STEPS, ADAM, outcomes, summed=False)
    own = trainee.drift_loss(fisher, offset if reference == "other" else None)
    assert_exact(rehearse(trainee, ADAM, outcomes=[mean_loss(TARGET, 1000), own]), wanted)


# ------------------------------------------------------------------------------------------------------- narrow weights


def test_narrow_weights_are_what_wide_ones_of_the_same_numbers_are() -> None:
    """Stored in bfloat16, multiplied in what they multiply: not a bit is another."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    wide, kept = tiny_model("llama", dtype=torch.bfloat16).float(), LoraTrainee(model, "all", LORA, seed=3)
    assert {m.bare.dtype for m in kept.maps} == {torch.bfloat16}
    assert {w.dtype for w in kept.weights} == {torch.float32} == {model.get_input_embeddings().weight.dtype}
    plain = LoraTrainee(wide, "all", LORA, seed=3)
    assert {m.bare.dtype for m in plain.maps} == {torch.bfloat16}, "nothing is lost"
    for m in plain.maps:
        m.bare.data = m.bare.data.float()
    np.testing.assert_array_equal(*(rehearse(one, SGD, steps=STEPS[:2]).value for one in (kept, plain)))


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.long)])
def test_products_that_are_rounded_are_near(family: str) -> None:
    exact = rehearse(LoraTrainee(tiny_model(family, dtype=torch.float32), 2, LORA, seed=3), SGD).value
    given = LoraTrainee(tiny_model(family, dtype=torch.float32), 2, LORA, seed=3, dtype=torch.bfloat16)
    off = np.linalg.norm(rehearse(given, SGD).value - exact) / np.linalg.norm(exact)
    assert 1e-4 < off < 0.1, off


def test_paths_of_narrow_weights_are_of_the_sum_in_float32() -> None:
    trainee = LoraTrainee(tiny_model("llama", dtype=torch.bfloat16), 2, LORA, seed=3)
    course = Course(rows=ROWS, steps=STEPS[:2], optimiser=SGD, batch_tokens=45)
    before = [m.bare.detach().clone() for m in trainee.maps]
    found = Rehearsal(trainee, course, InMemory(), paths=exact_paths(trainee)).run([mean_loss(TARGET, 100)])
    wide = LoraTrainee(tiny_model("llama", dtype=torch.bfloat16).float(), 2, LORA, seed=3)
    wanted = Rehearsal(wide, course, InMemory(), paths=exact_paths(wide)).run([mean_loss(TARGET, 100)])
    assert found.direct is not None and wanted.direct is not None
    np.testing.assert_allclose(found.direct, wanted.direct, rtol=1e-4, atol=1e-6 * np.abs(wanted.direct).max())
    assert all(torch.equal(m.bare, w) and m.bare.dtype == w.dtype for m, w in zip(trainee.maps, before, strict=True))


def test_losses_are_those_of_the_model_with_its_lora() -> None:
    trainee = lora_of("llama")
    trainee = lora_of("llama", lora=begun(trainee))
    model, batch = with_lora(tiny_model("llama"), trainee), collate(ROWS, [0, 3])
    found = trainee.losses(batch)
    wanted = torch.cat([token_losses(model, {}, ROWS[i]) for i in (0, 3)])
    torch.testing.assert_close(found.nll, wanted.detach(), rtol=1e-9, atol=1e-12)
    assert (found.entropy > 0).all() and found.grad is None


# ------------------------------------------------------------------------------------------------ stopped, and refused


class Stopped(Exception):
    """As if the process were killed there."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("room", [0, 1 << 30])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(room: int) -> None:
    """Whether steps were kept for the way back, or are taken again."""
    course = Course(rows=ROWS, steps=STEPS, optimiser=WARM, batch_tokens=45)
    outcomes = [mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)]

    def made(states: InMemory) -> Rehearsal:
        return Rehearsal(lora_of("gpt2", 1), course, states, room=room)

    taken: list[int] = []
    wanted, plain = made(InMemory()), Rehearsal._step

    def step(self: Rehearsal, k: int, *, keep: bool) -> None:
        taken.append(k)
        plain(self, k, keep=keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rehearsal, "_step", step)
        values = wanted.run(outcomes)
    assert len(taken) == len(STEPS) + (0 if room else borders_of(len(STEPS), None)[0][-2])
    for stop in (2, 7):
        states, left = InMemory(), iter(range(stop))

        def told(_: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise Stopped

        with pytest.raises(Stopped):
            made(states).run(outcomes, told)
        found = made(states).run(outcomes)
        np.testing.assert_array_equal(found.value, values.value)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_and_routers_are_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match=r"is no linear layer of its own \(an expert, or a router\).*Rehearse without"):
        lora_of(family)


def test_a_map_that_is_multiplied_otherwise_is_refused() -> None:
    model = tiny_model("llama")
    module = model.model.layers[3].mlp.up_proj
    module.forward = lambda x: x @ module.weight.T
    with pytest.raises(ModelError, match=r"layers\.3\.mlp\.up_proj is not multiplied as linear maps are"):
        LoraTrainee(model, 1, LORA, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_falcon_multiplies_in_a_way_of_its_own(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"query_key_value is not multiplied as linear maps are"):
        LoraTrainee(tiny_model("falcon", dtype=dtype), 1, LORA, seed=0)


def test_an_adapter_of_other_maps_is_refused() -> None:
    whole = begun(lora_of("llama"))
    with pytest.raises(ModelError, match=r"stands beside model\.layers\.0\..*Give --layers all"):
        lora_of("llama", 1, whole)
    assert whole.start is not None
    odd = {name: (a[:, :-1], b) for name, (a, b) in whole.start.items()}
    with pytest.raises(ModelError, match=r"is of another shape: it was trained from another model"):
        lora_of("llama", lora=dataclasses.replace(whole, start=odd))


def test_no_gradient_of_a_weight_is_made() -> None:
    """Nor does any ask for one: a hook on each would be called."""
    trainee, batch = lora_of("gpt2", 2), collate(ROWS, [0, 1])
    seen: list[bool] = []
    plain = trainee.nll

    def nll(batch: Any, **how: Any) -> Tensor:
        seen.extend(p.requires_grad for p in trainee.model.parameters())
        return plain(batch, **how)

    trainee.nll = nll  # type: ignore[method-assign]
    gradient = trainee.gradient([batch])[0]
    trainee.products(batch, [gradient], [[torch.zeros_like(g) for g in gradient]], 1.0)
    assert seen and not any(seen) and not any(w.requires_grad for w in trainee.weights)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.long)])
def test_pairs_train_a_lora_too(family: str) -> None:
    pairs, steps, optimiser = tiny_pairs(), [(0, 3), (1, 2), (2, 0, 1)], OPTIMISERS["adamw, nearly signs"]
    trainee = lora_of(family)
    reference = own_losses(tiny_model(family), pairs)
    model = with_lora(oracles.eager(tiny_model(family)), trainee)
    told: Any = {"pairs": pairs, "steps": steps, "optimiser": optimiser, "reference": reference, "beta": 0.3}
    wanted = Dpo(model=lambda: copy.deepcopy(model), names=names_of(model), **told)
    loss = PairLoss(beta=0.3, reference=torch.cat(reference).numpy(), starts=token_starts(pairs))
    course = Course(rows=pairs, steps=steps, optimiser=optimiser, batch_tokens=70, loss=loss)
    found = Rehearsal(trainee, course, InMemory(), room=1 << 30).run(
        [mean_loss(TARGET, 1000), mean_loss(RETENTION, 1000)]
    )
    assert_exact(found, wanted.values([mean_over(TARGET), mean_over(RETENTION)]))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("room", [0, 1 << 30])
def test_windows_of_a_lora_are_trainings_of_their_own(room: int) -> None:
    """Whether all their steps are kept or taken again."""
    steps, optimiser = [(0, 1), (2, 0), (4, 3), (3, 5)], OPTIMISERS["adamw, nearly signs"]

    def values(steps: Any, window: int | None = None) -> np.ndarray:
        course = Course(rows=ROWS, steps=steps, optimiser=optimiser, batch_tokens=45, window=window)
        return Rehearsal(lora_of("gpt2"), course, InMemory(), room=room).run([mean_loss(TARGET, 1000)]).value

    whole, first = values(steps), values(steps[:2])
    middle = sum(int(row.response.sum()) for row in ROWS[:3])
    assert not np.allclose(whole[:, :middle], first[:, :middle], rtol=1e-3)
    np.testing.assert_array_equal(values(steps, 2), np.concatenate([first[:, :middle], whole[:, middle:]], axis=1))
    np.testing.assert_array_equal(values(steps, 4), whole)
