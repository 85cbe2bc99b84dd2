"""The plugin of Axolotl. Axolotl pins other releases, so stand-ins with its interface take the place of its classes."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hand import sft_loss, stored
from trainer_runs import settings, step, tiny, tokenizer, train_run
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from alphatoken_curate.errors import UsageError
from alphatoken_curate.trainers import as_dataset


class StandIn(Trainer):
    """As Axolotl's: it does things of its own, and leaves the loss to the class behind it."""

    steps = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        StandIn.steps += 1
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("axolotl", "axolotl.core", "axolotl.core.trainers", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    base, trainers = types.ModuleType("axolotl.integrations.base"), types.ModuleType("axolotl.core.trainers.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    trainers.AxolotlTrainer = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setitem(sys.modules, trainers.__name__, trainers)
    yield importlib.import_module("alphatoken_curate.trainers.axolotl")
    sys.modules.pop("alphatoken_curate.trainers.axolotl")


def test_micro_batches_are_divided_by_the_tokens_of_all(
    plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in transformers before 5.20, which Axolotl pins: only what the model accepts says who divides.
    monkeypatch.setattr(plugin.WeightedAxolotlTrainer, "loss_is_scaled_for_ga", None)
    run, own = train_run(tmp_path / "run", weights="rank"), plugin.AlphaTokenPlugin()
    made = own.get_trainer_cls({})(
        model=tiny(),
        args=TrainingArguments(**settings(tmp_path, 4)),
        train_dataset=as_dataset(run),
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
    )
    own.post_trainer_create({}, made)
    assert abs(step(made).loss - sft_loss(tiny(), stored(run, 0), "count").item()) < 1e-6


@pytest.mark.one_in(2)
@pytest.mark.parametrize("denominator", [None, "count", "sum"])
def test_a_step_is_that_computed_by_hand(plugin: Any, tmp_path: Path, denominator: str | None) -> None:
    run = train_run(tmp_path / "run", weights="rank")
    cfg = {} if denominator is None else {"alphatoken_denominator": denominator}
    own = plugin.AlphaTokenPlugin()
    made = own.get_trainer_cls(cfg)(
        model=tiny(),
        args=TrainingArguments(**settings(tmp_path, 1, batch=3)),
        train_dataset=as_dataset(run).select(range(3)),
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
    )
    own.post_trainer_create(cfg, made)
    StandIn.steps = 0
    found = step(made)
    assert StandIn.steps == 1
    wanted = {kind: sft_loss(tiny(), stored(run, 0)[:3], kind).item() for kind in ("count", "sum")}
    assert abs(found.loss - wanted[denominator or "count"]) < 1e-6
    assert abs(wanted["count"] - wanted["sum"]) > 1e-3


def test_samples_that_are_packed_are_weighed(plugin: Any, tmp_path: Path) -> None:
    """As its batch sampler hands over: lists of rows, which its collator joins with positions of their own."""
    run = train_run(tmp_path / "run", weights="rank")

    def packing(packs: list[Any]) -> dict[str, torch.Tensor]:
        rows = [row for pack in packs for row in pack]
        positions = [list(range(len(row["input_ids"]))) for row in rows]
        lists = {name: [row[name] for row in rows] for name in ("input_ids", "labels")} | {"position_ids": positions}
        return {name: torch.tensor([[x for part in parts for x in part]]) for name, parts in lists.items()}

    made = plugin.AlphaTokenPlugin().get_trainer_cls({})(
        model=tiny(),
        args=TrainingArguments(**settings(tmp_path, 1)),
        train_dataset=as_dataset(run),
        data_collator=packing,
    )
    made.eval_data_collator = None
    plugin.AlphaTokenPlugin().post_trainer_create({}, made)
    rows = [dict(row) for row in as_dataset(run)]
    made.get_train_dataloader()
    batch = made.data_collator([rows])
    assert batch["loss_weight"].shape == batch["labels"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    loss = made.compute_loss(made.model, batch)
    assert abs(loss.item() - sft_loss(tiny(), stored(run, 0), "count").item()) < 1e-6


def test_keys_of_the_plugin(plugin: Any) -> None:
    where, _, name = plugin.AlphaTokenPlugin().get_input_args().rpartition(".")
    keys = getattr(importlib.import_module(where), name)
    assert keys().alphatoken_denominator == "count" and keys(alphatoken_denominator="sum")
    with pytest.raises(ValueError, match="alphatoken_denominator"):
        keys(alphatoken_denominator="mean")


def test_what_has_a_loss_of_its_own_is_refused(plugin: Any) -> None:
    for name in ("rl", "reward_model", "orpo_alpha"):
        with pytest.raises(UsageError, match=name):
            plugin.AlphaTokenPlugin().get_trainer_cls({name: "dpo"})


def test_only_axolotl_needs_axolotl() -> None:
    with pytest.raises(ImportError, match="axolotl"):
        importlib.import_module("alphatoken_curate.trainers.axolotl")


def test_what_is_missing_stops_axolotl(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError would not: it goes on without the plugin."""
    monkeypatch.setitem(sys.modules, "alphatoken_curate.trainers.hf", None)
    with pytest.raises(UsageError, match=r"cannot be used: .*trainers\.hf.*install it"):
        importlib.reload(plugin)
