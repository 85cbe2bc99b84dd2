"""TRL's DPOTrainer with masks and weights on both branches, against the computation by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hand import dpo_loss, gradients, stored
from small_run import published
from tiny import make_row
from tiny_files import perturbed
from torch.utils.data import SequentialSampler
from trainer_runs import NO_CHECKPOINTING, ROWS, assert_close, settings, step, tiny, tokenizer, train_run
from trl import DPOConfig, DPOTrainer

from alphatoken_curate import mask
from alphatoken_curate.directions.course import Course
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.step_losses import PairLoss
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.errors import UsageError
from alphatoken_curate.tokens.plan import collate, token_starts
from alphatoken_curate.tokens.tokenise import PairRow
from alphatoken_curate.trainers import WeightedDPOTrainer, as_dataset

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"
)  # TRL's own call

BETA = 0.5
_BRANCHES = ("chosen", "rejected")


@pytest.fixture(scope="module", params=["binary", "rank"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("runs") / "run", kind="preference", weights=request.param)


def policy() -> Any:
    """Another model than the reference, so that margins are not 0."""
    return perturbed(tiny(), scale=0.2)


def trainer(out: Path, rows: Any, *, accumulation: int = 1, model: Any = None, **more: Any) -> WeightedDPOTrainer:
    more = {"max_length": None, **NO_CHECKPOINTING, "beta": BETA, **more}
    peft = {"peft_config": more.pop("peft_config")} if "peft_config" in more else {"ref_model": tiny()}
    return WeightedDPOTrainer(
        model=model or policy(),
        args=DPOConfig(**settings(out, accumulation, **more)),
        train_dataset=rows,
        processing_class=tokenizer(),
        **peft,
    )


@pytest.mark.one_in(4)
@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_is_that_computed_by_hand(run: Path, tmp_path: Path, accumulation: int, precomputed: bool) -> None:
    made = trainer(tmp_path, as_dataset(run), accumulation=accumulation, precompute_ref_log_probs=precomputed)
    assert ("ref_chosen_logps" in made.train_dataset.column_names) == precomputed
    model = policy()
    loss = dpo_loss(model, tiny(), stored(run, 0), BETA)
    assert abs(loss.item() - dpo_loss(tiny(), tiny(), stored(run, 0), BETA).item()) > 0.003  # the margins are not 0
    assert_close(step(made), loss, gradients(model, loss))


@pytest.mark.one_in(2)
def test_the_reference_is_masked_as_the_policy_is(run: Path, tmp_path: Path) -> None:
    """Without masks the reference's sums are others, so that the test above can fail."""
    rows = stored(run, 0)
    whole = [
        {**row, **{f"{b}_loss_weight": [0.0] + [1.0] * (len(row[f"{b}_input_ids"]) - 1) for b in _BRANCHES}}
        for row in rows
    ]
    masked, unmasked = dpo_loss(policy(), tiny(), rows, BETA), dpo_loss(policy(), tiny(), whole, BETA)
    assert abs(masked - unmasked) > 0.01
    same = trainer(tmp_path, as_dataset(run), model=tiny())
    assert step(same).loss == pytest.approx(0.6931471805599453, abs=1e-7)


def test_an_adapters_reference_is_the_model_without_it(run: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    made = trainer(tmp_path, as_dataset(run), model=tiny(), peft_config=lora)
    assert made.ref_model is None
    with torch.no_grad():
        wanted = dpo_loss(made.model, tiny(), stored(run, 0), BETA).item()
    assert abs(wanted - 0.6931471805599453) > 1e-3
    assert abs(step(made).loss - wanted) < 1e-6


@pytest.mark.one_in(2)
@pytest.mark.parametrize("precomputed", [False, True])
def test_a_masked_last_token_changes_nothing(run: Path, tmp_path: Path, precomputed: bool) -> None:
    """It is no context of any other: exactly the same loss and gradients."""
    # Of `as_dataset(run)` TRL may have kept what it precomputed in batches of another size, whose last bits are others.
    rows = Dataset.from_list(list(as_dataset(run)))
    found = step(trainer(tmp_path, rows, precompute_ref_log_probs=precomputed))
    touched = 0

    def other(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal touched
        changed = {}
        for branch in _BRANCHES:
            ids = list(row[f"{branch}_input_ids"])
            if row[f"{branch}_loss_weight"][-1] == 0:
                ids[-1] = (ids[-1] + 7) % 50
                touched += 1
            changed[f"{branch}_input_ids"] = ids
        return changed

    others = Dataset.from_list([{**row, **other(row)} for row in rows])
    changed = step(trainer(tmp_path, others, precompute_ref_log_probs=precomputed))
    assert touched > 2
    assert changed.loss == found.loss
    assert all(torch.equal(changed.gradients[name], one) for name, one in found.gradients.items())


def test_losses_that_divide_count_kept_tokens(tmp_path: Path) -> None:
    run = train_run(tmp_path / "run", kind="preference")
    found = step(trainer(tmp_path, as_dataset(run), loss_type=["sigmoid_norm"]))
    rows = stored(run, 0)
    for row in rows:
        for branch in _BRANCHES:
            kept = sum(one > 0 for one in row[f"{branch}_loss_weight"])
            row[f"{branch}_loss_weight"] = [one / kept for one in row[f"{branch}_loss_weight"]]
    assert abs(found.loss - dpo_loss(policy(), tiny(), rows, BETA).item()) < 1e-6


def test_a_pair_that_lost_a_branch_moves_nothing(tmp_path: Path) -> None:
    """By a mask that may empty rows, and by a cut."""
    run = train_run(tmp_path / "run", kind="preference")
    mask(run, published(keep=0.1, allow_empty_rows=True, always_keep="none"))
    for length in (None, 6):
        rows = stored(run, 1 if length is None else 0)
        for row in rows:
            for name in [name for name in row if isinstance(row[name], list)]:
                row[name] = row[name][:length]
        lost = [row for row in rows if not all(any(row[f"{branch}_loss_weight"]) for branch in _BRANCHES)]
        assert any(any(row[f"{branch}_loss_weight"]) for row in lost for branch in _BRANCHES) and len(lost) < len(rows)
        for row in lost:
            for branch in _BRANCHES:
                row[f"{branch}_loss_weight"] = [0.0] * len(row[f"{branch}_loss_weight"])
        found = step(trainer(tmp_path, as_dataset(run, 1 if length is None else 0, max_length=length)))
        model = policy()
        loss = dpo_loss(model, tiny(), rows, BETA)
        assert_close(found, loss, gradients(model, loss))


def test_the_loss_of_evaluation_is_that_computed_by_hand(run: Path, tmp_path: Path) -> None:
    rows = as_dataset(run)
    made = trainer(tmp_path, rows, per_device_eval_batch_size=ROWS)
    assert abs(made.evaluate(rows)["eval_loss"] - dpo_loss(policy(), tiny(), stored(run, 0), BETA).item()) < 1e-6


@pytest.mark.one_in(2)
def test_what_would_leave_weights_aside_is_refused(run: Path, tmp_path: Path) -> None:
    rows = as_dataset(run)
    with pytest.raises(UsageError, match="8 of 8 rows are longer than max_length=7"):
        trainer(tmp_path, rows, max_length=7)
    with pytest.raises(UsageError, match="use_weighting=True"):
        trainer(tmp_path, rows, use_weighting=True)
    with pytest.raises(UsageError, match="the train dataset has no chosen_loss_weight"):
        trainer(tmp_path, rows.remove_columns(["chosen_loss_weight"]))
    cut = step(trainer(tmp_path, as_dataset(run, max_length=7), max_length=7))
    short = [
        {name: value[:7] if isinstance(value, list) else value for name, value in row.items()} for row in stored(run, 0)
    ]
    assert abs(cut.loss - dpo_loss(policy(), tiny(), short, BETA).item()) < 1e-6


WHOLE = [((7, 8, 9), (5, 6), (3,)), ((11, 4), (21, 5, 9, 30), (12, 4)), ((17,), (4,), (8, 9, 10)), ((3, 9), (6,), (7,))]
"""Pairs: a prompt and two answers, each of which ends with token 2."""

TRAININGS = {
    "adamw": (Optimiser(lr=1e-3, steps=4, root=0.0), {"optim": "adamw_torch", "learning_rate": 1e-3}),
    "sgd, clipped": (
        Optimiser(lr=0.1, steps=4, kind="sgd", clip=0.2),
        {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.2},
    ),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("whose", [WeightedDPOTrainer, DPOTrainer])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_rehearsal_takes_the_steps_of_a_training(name: str, whose: Any, tmp_path: Path) -> None:
    """Two epochs of two steps, from a model that is not the reference; of TRL's own trainer, which has no weights."""
    optimiser, chosen = TRAININGS[name]
    made = whose(
        model=policy(),
        ref_model=tiny(),
        args=DPOConfig(
            **settings(tmp_path, 1, 2, max_length=None, beta=BETA, **NO_CHECKPOINTING)
            | {"max_steps": -1, "num_train_epochs": 2, **chosen}
        ),
        train_dataset=Dataset.from_list(
            [_lists(*one) if whose is WeightedDPOTrainer else _words(*one) for one in WHOLE]
        ),
        processing_class=tokenizer(),
    )
    made._get_train_sampler = lambda rows=None: SequentialSampler(made.train_dataset)
    made.train()
    assert made.state.global_step == 4

    pairs = [
        PairRow(
            **{
                branch: make_row(i, [*prompt, *answer, 2], [(len(prompt), len(prompt) + len(answer) + 1)])
                for branch, answer in zip(_BRANCHES, answers, strict=True)
            }
        )
        for i, (prompt, *answers) in enumerate(WHOLE)
    ]
    reference = torch.cat([Trainee(tiny(), 1).nll(collate([pair], [0])).detach() for pair in pairs]).numpy()
    loss = PairLoss(beta=BETA, reference=reference, starts=token_starts(pairs))
    trainee = Trainee(policy(), "all", "all")
    course = Course(rows=pairs, steps=[(0, 1), (2, 3)] * 2, optimiser=optimiser, loss=loss, batch_tokens=10)
    state = optimiser.start([w.detach() for w in trainee.weights])
    starts = [w.clone() for w in state.weights]
    for k in range(4):
        optimiser.step(state, trainee.gradient(course.batches(k), loss=loss)[0], k)
    after = dict(made.model.named_parameters())
    moved = [own - start for own, start in zip(state.weights, starts, strict=True)]
    wanted = [after[key].detach() - start for key, start in zip(trainee.names, starts, strict=True)]
    assert {key for key, x in zip(trainee.names, wanted, strict=True) if x.any()} == set(trainee.names)
    off = torch.cat([(a - b).flatten() for a, b in zip(moved, wanted, strict=True)])
    size = torch.cat([x.flatten() for x in wanted])
    # In float32, of which Adam turns some rounding to steps.
    assert off.abs().max() < 2e-3 * size.abs().max() and off.norm() < 1e-4 * size.norm()


def _words(prompt: Sequence[int], *answers: Sequence[int]) -> dict[str, str]:
    """As TRL reads a pair."""
    texts = ["".join(f" <{token}>" for token in (*answer, 2)) for answer in answers]
    return {"prompt": " ".join(f"<{token}>" for token in prompt), **dict(zip(_BRANCHES, texts, strict=True))}


def _lists(prompt: Sequence[int], *answers: Sequence[int]) -> dict[str, list[Any]]:
    """As ours does, all weights 1."""
    both = {f"{branch}_": [*answer, 2] for branch, answer in zip(_BRANCHES, answers, strict=True)}
    ids = {f"{prefix}input_ids": [*prompt, *answer] for prefix, answer in both.items()}
    weights = {f"{prefix}loss_weight": [0.0] * len(prompt) + [1.0] * len(answer) for prefix, answer in both.items()}
    return {**ids, **weights}
