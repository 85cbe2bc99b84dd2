"""transformers.Trainer with weights of tokens, against the computation by hand."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hand import gradients, sft_loss, stored
from tiny import tiny_model
from tiny_files import token_records, write_jsonl
from trainer_runs import ROWS, assert_close, settings, step, tiny, train_run
from transformers import Trainer, TrainingArguments

from alphatoken_curate import ScoreConfig, score
from alphatoken_curate.errors import UsageError
from alphatoken_curate.trainers import TrainDataset, WeightedTrainer, as_dataset


@pytest.fixture(scope="module", params=["binary", "rank"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("runs") / "run", weights=request.param)


def trainer(out: Path, rows: Any, *, accumulation: int = 1, model: Any = None, **more: Any) -> WeightedTrainer:
    own = {name: more.pop(name) for name in ("denominator", "data_collator") if name in more}
    arguments = TrainingArguments(**settings(out, accumulation, **more))
    return WeightedTrainer(model=model or tiny(), args=arguments, train_dataset=rows, **own)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("denominator", ["count", "sum"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_is_that_computed_by_hand(run: Path, tmp_path: Path, accumulation: int, denominator: str) -> None:
    found = step(trainer(tmp_path, as_dataset(run), accumulation=accumulation, denominator=denominator))
    model = tiny()
    loss = sft_loss(model, stored(run, 0), denominator)
    assert_close(found, loss, gradients(model, loss))


def test_soft_weights_make_another_loss_than_labels_alone(tmp_path: Path) -> None:
    """So that tests of soft weights can fail."""
    rows = stored(train_run(tmp_path / "run", weights="rank"), 0)
    flat = [{**row, "loss_weight": [float(one > 0) for one in row["loss_weight"]]} for row in rows]
    model = tiny()
    weighted, plain = sft_loss(model, rows, "count"), sft_loss(model, flat, "count")
    assert abs(weighted - plain) > 0.01 and abs(weighted - sft_loss(model, rows, "sum")) < 1e-6
    few = rows[:3]
    assert abs(sft_loss(model, few, "sum") - sft_loss(model, few, "count")) > 0.01


def test_a_part_of_the_mask_is_divided_as_chosen(tmp_path: Path) -> None:
    """Of the whole mask, count and sum are the same; of a batch they are not."""
    run = train_run(tmp_path / "run", weights="rank")
    losses = {}
    for denominator in ("count", "sum"):
        made = trainer(tmp_path, as_dataset(run).select(range(2)), denominator=denominator, batch=2)
        losses[denominator] = step(made).loss
        assert abs(losses[denominator] - sft_loss(tiny(), stored(run, 0)[:2], denominator).item()) < 1e-6
    assert abs(losses["count"] - losses["sum"]) > 1e-3


def test_binary_masks_train_as_plain_trainer_does_with_the_labels(tmp_path: Path) -> None:
    run = train_run(tmp_path / "run")
    found = step(trainer(tmp_path, as_dataset(run), accumulation=4))
    labels = as_dataset(run).remove_columns(["loss_weight", "row_id"])

    def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(one["input_ids"]) for one in features)
        fill = {"input_ids": 0, "labels": -100}
        return {
            name: torch.tensor([one[name] + [fill[name]] * (longest - len(one[name])) for one in features])
            for name in fill
        }

    arguments = TrainingArguments(**settings(tmp_path, 4))
    plain = step(Trainer(model=tiny(), args=arguments, train_dataset=labels, data_collator=padded))
    assert abs(found.loss - plain.loss) < 1e-6
    for name, wanted in plain.gradients.items():
        assert torch.allclose(found.gradients[name], wanted, atol=2e-6), name


def test_a_masked_last_token_changes_nothing(run: Path, tmp_path: Path) -> None:
    """It is no context of any other: exactly the same loss and gradients."""
    rows = as_dataset(run)
    masked = [i for i, row in enumerate(rows) if row["loss_weight"][-1] == 0]
    assert masked
    found = step(trainer(tmp_path, rows))

    def other(row: dict[str, Any], i: int) -> dict[str, Any]:
        ids = list(row["input_ids"])
        return {"input_ids": [*ids[:-1], (ids[-1] + 7) % 50] if i in masked else ids}

    changed = step(trainer(tmp_path, rows.map(other, with_indices=True)))
    assert changed.loss == found.loss
    assert all(torch.equal(changed.gradients[name], one) for name, one in found.gradients.items())


def test_batches_without_a_trainable_token_give_nothing(run: Path, tmp_path: Path) -> None:
    rows = as_dataset(run).map(
        lambda row: {"labels": [-100] * len(row["labels"]), "loss_weight": [0.0] * len(row["labels"])}
    )
    for denominator in ("count", "sum"):
        found = step(trainer(tmp_path, rows, denominator=denominator))
        assert found.loss == 0 and not any(one.any() for one in found.gradients.values())


def test_the_loss_of_evaluation_is_that_computed_by_hand(run: Path, tmp_path: Path) -> None:
    rows = as_dataset(run)
    for denominator in ("count", "sum"):
        made = trainer(tmp_path, rows, denominator=denominator, per_device_eval_batch_size=ROWS)
        found = made.evaluate(rows)["eval_loss"]
        assert abs(found - sft_loss(tiny(), stored(run, 0), denominator).item()) < 1e-6


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_auxiliary_loss_of_experts_is_a_mean_over_batches(tmp_path: Path, accumulation: int) -> None:
    run = train_run(tmp_path / "run")
    model = tiny_model("mixtral", dtype=torch.float32, output_router_logits=True, router_aux_loss_coef=0.5)
    rows = as_dataset(run)
    # Batches of equal rows, so that every batch has the same auxiliary loss in whatever order they come.
    same = rows.select([0] * ROWS)
    found = step(trainer(tmp_path, same, model=copy.deepcopy(model), accumulation=accumulation))
    alone = stored(run, 0)[:1]
    outputs = model(input_ids=torch.tensor([alone[0]["input_ids"]]))
    assert outputs.aux_loss > 0.1
    wanted = sft_loss(model, alone, "count") + 0.5 * outputs.aux_loss
    assert abs(found.loss - wanted.item()) < 2e-6


def test_the_auxiliary_loss_is_a_mean_over_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are averaged over processes: what counts tokens of all of them is times their number, a mean is not."""
    run = train_run(tmp_path / "run")
    model = tiny_model("mixtral", dtype=torch.float32, output_router_logits=True, router_aux_loss_coef=0.5)
    made = trainer(tmp_path, as_dataset(run), model=model)
    monkeypatch.setattr(type(made.accelerator), "num_processes", 2)
    rows = stored(run, 0)[:1]
    batch = made.data_collator([as_dataset(run)[0]])
    with torch.no_grad():
        outputs = model(input_ids=batch["input_ids"])
        wanted = 2 * sft_loss(model, rows, "count") + 0.5 * outputs.aux_loss
        assert abs(made.compute_loss(model, batch) - wanted) < 2e-6


def test_what_would_leave_weights_aside_is_refused(run: Path, tmp_path: Path) -> None:
    rows = as_dataset(run)
    with pytest.raises(UsageError, match=r"label_smoothing_factor=0\.1"):
        trainer(tmp_path, rows, label_smoothing_factor=0.1)
    with pytest.raises(UsageError, match="give `count` or `sum`"):
        trainer(tmp_path, rows, denominator="mean")
    with pytest.raises(UsageError, match="compute_loss_func"):
        arguments = TrainingArguments(**settings(tmp_path, 1))
        WeightedTrainer(
            model=tiny(), args=arguments, train_dataset=rows, compute_loss_func=lambda *_, **__: torch.zeros(())
        )
    careless = trainer(tmp_path, rows, data_collator=lambda features: {"labels": torch.zeros(1, 3, dtype=torch.long)})
    with pytest.raises(UsageError, match="a batch has no loss_weight"):
        careless.train()


def test_streamed_rows_train_as_others(run: Path, tmp_path: Path) -> None:
    data = TrainDataset(run, shards_at_once=1)
    found = step(trainer(tmp_path, data, accumulation=4))
    model = tiny()
    loss = sft_loss(model, stored(run, 0), "count")
    assert_close(found, loss, gradients(model, loss))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, models: dict[str, str]) -> None:
    """One step, divided by what both processes have; then two epochs, with the masks that the first process makes."""
    run = train_run(tmp_path / "run", weights="rank")
    scored = score(
        ScoreConfig(
            data=write_jsonl(tmp_path / "rows.jsonl", token_records(ROWS)),
            target=write_jsonl(tmp_path / "target.jsonl", token_records(3, seed=5)),
            model=models["base"],
            layers=2,
        ),
        tmp_path / "scored",
    ).run
    script = Path(__file__).parents[1] / "support" / "two_processes.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    told = [str(script), str(run), str(scored), models["base"], str(tmp_path)]
    done = subprocess.run([*launch, *told], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    model = tiny()
    for number, denominator in enumerate(("count", "sum")):
        loss = sft_loss(model, stored(run, 0), denominator)
        # Each process reports its own part, times the number of processes: the mean over them is the loss.
        assert abs(sum(one["losses"][number] for one in found) / 2 - loss.item()) < 1e-6
        wanted = gradients(model, loss)
        for name, norm in found[0]["norms"][number].items():
            assert abs(norm - wanted[name].norm().item()) < 2e-6 + 1e-5 * norm, name
    assert [one["masks"] for one in found] == [[[0, 0], [1, 1]]] * 2
    assert found[0]["last"] == found[1]["last"]


def test_processes_read_streamed_rows_each_by_itself(run: Path, tmp_path: Path) -> None:
    """Else one would read for all, and batches that are padded to their own length fail."""
    for rows, asked, found in (
        (TrainDataset(run), {}, False),
        (TrainDataset(run), {"accelerator_config": {"dispatch_batches": True}}, True),
        (as_dataset(run), {}, None),
    ):
        made = trainer(tmp_path, rows, **asked)
        assert made.accelerator.dataloader_config.dispatch_batches is found
