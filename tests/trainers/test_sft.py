"""TRL's SFTTrainer with weights of tokens, padded, padding-free and packed, against the computation by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from daily import daily
from datasets import Dataset
from hand import gradients, sft_loss, stored
from tiny import tiny_model
from trainer_runs import NO_CHECKPOINTING, PACKED, ROWS, assert_close, settings, step, tiny, tokenizer, train_run
from trl import SFTConfig, SFTTrainer

from alphatoken_curate.errors import UsageError
from alphatoken_curate.trainers import WeightedSFTTrainer, as_dataset

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"
)  # TRL's own call

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"max_length": None},
    "padding-free": {"max_length": None, "padding_free": True},
    "packed": {"max_length": PACKED, "packing": True},
}


@pytest.fixture(scope="module", params=["binary", "rank"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("runs") / "run", weights=request.param)


def trainer(out: Path, rows: Any, *, accumulation: int = 1, model: Any = None, **more: Any) -> WeightedSFTTrainer:
    own = {"denominator": more.pop("denominator")} if "denominator" in more else {}
    batch = ROWS // 2 if more.get("packing") else ROWS
    arguments = SFTConfig(**settings(out, accumulation, batch, **NO_CHECKPOINTING, **more))
    return WeightedSFTTrainer(
        model=model or tiny(), args=arguments, train_dataset=rows, processing_class=tokenizer(), **own
    )


@pytest.mark.one_in(5)
@pytest.mark.parametrize("denominator", ["count", "sum"])
@pytest.mark.parametrize("accumulation", daily([1, 4], [4]))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_computed_by_hand(
    run: Path, tmp_path: Path, layout: str, accumulation: int, denominator: str
) -> None:
    made = trainer(tmp_path, as_dataset(run), accumulation=accumulation, denominator=denominator, **LAYOUTS[layout])
    assert len(made.train_dataset) == (ROWS // 2 if layout == "packed" else ROWS)
    model = tiny()
    loss = sft_loss(model, stored(run, 0), denominator)
    assert_close(step(made), loss, gradients(model, loss))


@pytest.mark.parametrize("layout", ["padded", "padding-free"])
def test_weights_that_sum_to_less_than_one_divide_too(tmp_path: Path, layout: str) -> None:
    run = train_run(tmp_path / "run", weights="rank")
    small = as_dataset(run).map(lambda row: {"loss_weight": [one * 1e-3 for one in row["loss_weight"]]})
    found = step(trainer(tmp_path, small, denominator="sum", **LAYOUTS[layout]))
    assert abs(found.loss - sft_loss(tiny(), stored(run, 0), "sum").item()) < 1e-6


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_masked_last_token_changes_nothing(run: Path, tmp_path: Path, layout: str) -> None:
    """It is no context of any other: exactly the same loss and gradients."""
    rows = as_dataset(run)
    masked = [i for i, row in enumerate(rows) if row["loss_weight"][-1] == 0]
    assert masked
    found = step(trainer(tmp_path, rows, **LAYOUTS[layout]))

    def other(row: dict[str, Any], i: int) -> dict[str, Any]:
        ids = list(row["input_ids"])
        return {"input_ids": [*ids[:-1], (ids[-1] + 7) % 50] if i in masked else ids}

    changed = step(trainer(tmp_path, rows.map(other, with_indices=True), **LAYOUTS[layout]))
    assert changed.loss == found.loss
    assert all(torch.equal(changed.gradients[name], one) for name, one in found.gradients.items())


def test_binary_masks_train_as_trl_does_with_the_labels(tmp_path: Path) -> None:
    rows = as_dataset(train_run(tmp_path / "run"))
    found = step(trainer(tmp_path, rows, accumulation=4, max_length=None))
    arguments = SFTConfig(**settings(tmp_path, 4, **NO_CHECKPOINTING, max_length=None))
    bare = rows.select_columns(["input_ids", "labels"])
    plain = SFTTrainer(model=tiny(), args=arguments, train_dataset=bare, processing_class=tokenizer())
    wanted = step(plain)
    assert abs(found.loss - wanted.loss) < 1e-6
    for name, one in wanted.gradients.items():
        assert torch.allclose(found.gradients[name], one, atol=2e-6), name


def test_metrics_of_trl_are_as_without_weights(run: Path, tmp_path: Path) -> None:
    rows = as_dataset(run)
    logged = []
    for kind in (WeightedSFTTrainer, SFTTrainer):
        arguments = SFTConfig(**settings(tmp_path, 1, **NO_CHECKPOINTING, max_length=None, logging_steps=1))
        data = rows if kind is WeightedSFTTrainer else rows.select_columns(["input_ids", "labels"])
        made = kind(model=tiny(), args=arguments, train_dataset=data, processing_class=tokenizer())
        made.train()
        logged.append(made.state.log_history[0])
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_goes_by_weights_and_text_goes_trls_way(run: Path, tmp_path: Path, layout: str) -> None:
    rows = as_dataset(run)
    how = {"max_length": None, **LAYOUTS[layout], "eval_packing": False}
    made = trainer(tmp_path, rows, **how, per_device_eval_batch_size=ROWS, denominator="sum")
    by_hand = sft_loss(tiny(), stored(run, 0), "sum").item()
    assert abs(made.evaluate(rows)["eval_loss"] - by_hand) < 1e-6
    text = made.evaluate(Dataset.from_list([{"text": "<3> <4> <5> <6>"}]))["eval_loss"]
    whole = {"input_ids": [3, 4, 5, 6, 2], "loss_weight": [0.0, 1.0, 1.0, 1.0, 1.0]}
    assert abs(text - sft_loss(tiny(), [whole], "count").item()) < 1e-6


@pytest.mark.parametrize("accumulation", daily([1, 4], [4]))
def test_the_auxiliary_loss_of_experts_stays_trls(tmp_path: Path, accumulation: int) -> None:
    run = train_run(tmp_path / "run")
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "num_experts": 5}
    model = tiny_model("qwen3_moe", dtype=torch.float32, **changes)
    same = as_dataset(run).select([0] * ROWS)
    found = step(trainer(tmp_path, same, model=copy.deepcopy(model), accumulation=accumulation, max_length=None))
    row = stored(run, 0)[0]
    outputs = model(input_ids=torch.tensor([row["input_ids"]]), output_router_logits=True)
    wanted = sft_loss(model, [row], "count") + 0.5 * outputs.aux_loss
    assert abs(found.loss - wanted.item()) < 2e-6


def test_what_would_leave_weights_aside_is_refused(run: Path, tmp_path: Path) -> None:
    rows = as_dataset(run)
    with pytest.raises(UsageError, match=r"6 of 8 rows are longer than max_length=9 \(up to 12 tokens\)"):
        trainer(tmp_path, rows, max_length=9)
    cut = trainer(tmp_path, as_dataset(run, max_length=9), max_length=9)
    model = tiny()
    lists = ("input_ids", "loss_weight")
    short = [{name: row[name][:9] for name in lists} for row in stored(run, 0)]
    assert abs(step(cut).loss - sft_loss(model, short, "count").item()) < 1e-6
    streamed = trainer(tmp_path, rows.to_iterable_dataset(), max_length=9)
    with pytest.raises(UsageError, match="a row is longer than max_length=9"):
        streamed.train()
    with pytest.raises(UsageError, match="loss_type='dft'"):
        trainer(tmp_path, rows, max_length=None, loss_type="dft")
    with pytest.raises(UsageError, match="'bfd', which leaves rows whole"):
        trainer(tmp_path, rows, max_length=PACKED, packing=True, packing_strategy="wrapped")
    arguments = SFTConfig(**settings(tmp_path, 1, **NO_CHECKPOINTING, max_length=None))
    careless = WeightedSFTTrainer(model=tiny(), args=arguments, train_dataset=rows, processing_class=tokenizer())
    careless.data_collator = careless.data_collator.inner
    with pytest.raises(UsageError, match="a batch has no loss_weight"):
        careless.train()


def test_pairs_are_refused_by_name(tmp_path: Path) -> None:
    pairs = as_dataset(train_run(tmp_path / "pairs", kind="preference"))
    with pytest.raises(UsageError, match="the train dataset holds preference pairs; take WeightedDPOTrainer"):
        trainer(tmp_path, pairs, max_length=None)


def test_streamed_rows_train_as_others(run: Path, tmp_path: Path) -> None:
    rows = as_dataset(run)
    found = step(trainer(tmp_path, rows.to_iterable_dataset(), max_length=PACKED))
    assert abs(found.loss - sft_loss(tiny(), stored(run, 0), "count").item()) < 1e-6
