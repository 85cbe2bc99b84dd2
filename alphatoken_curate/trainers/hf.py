"""Weighted loss in `transformers.Trainer`, and what the trainers of TRL share with it.

The loss of a step is the sum over all batches of its accumulation window, on all processes, divided by one number:
the count of trainable tokens or the sum of weights of that window (`denominator`, see `trainers.loss`). Processes are
counted as transformers does (`average_tokens_across_devices`). GPUs and tensor parallelism have not been run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from alphatoken_curate.errors import UsageError
from alphatoken_curate.models.releases import before
from alphatoken_curate.runs.schema import PREFERENCE
from alphatoken_curate.trainers.collator import WEIGHT, WeightedCollator
from alphatoken_curate.trainers.current import ROWS, Served
from alphatoken_curate.trainers.dataset import LISTS
from alphatoken_curate.trainers.fit import check_model
from alphatoken_curate.trainers.loss import Denominator, count_items, weighted_loss
from alphatoken_curate.wording import count

_OF_PAIRS = tuple(prefix + name for prefix in PREFERENCE.branches for name in LISTS)
COLUMNS = ("row_id", "turn", ROWS, "seq_lengths", *LISTS, *_OF_PAIRS)
"""Columns of rows that must reach the collator."""


class RowsMixin:
    """Before a Trainer: columns of weighted rows are kept, and a `RefreshCallback` may change the mask in force.

    Raises `UsageError` for a model or a tokenizer of other tokens than the rows are made of.
    """

    data_collator: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for rows in (getattr(self, "train_dataset", None), getattr(self, "eval_dataset", None)):
            check_model(self.model, getattr(self, "processing_class", None), rows)  # type: ignore[attr-defined]
        loading = self.accelerator.dataloader_config
        if isinstance(getattr(self, "train_dataset", None), IterableDataset) and loading.dispatch_batches is None:
            loading.dispatch_batches = False  # one process would read for all, batches that must be of one length

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        self._signature_columns: list[str] = list(dict.fromkeys([*self._signature_columns, *COLUMNS]))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """That of the Trainer. Rows to train on go by the mask in force, rows to evaluate on by their own."""
        own = self.data_collator
        self.data_collator = Served(collator=own)
        try:
            loader: DataLoader[Any] = super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.data_collator = own
        return loader


class DenominatorMixin(RowsMixin):
    """Before a Trainer whose loss is a mean over tokens: what it is divided by."""

    denominator: Denominator = "count"
    # The loss is divided by the items of the whole window already.
    loss_is_scaled_for_ga = True
    # What TRL divides the auxiliary loss by; the Trainer sets it at each step.
    current_gradient_accumulation_steps = 1
    args: Any

    def __init__(self, *args: Any, denominator: Denominator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if denominator is not None:
            self.denominator = denominator
        count_items(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), self.denominator)
        refuse(self, [("label_smoothing_factor", "it smooths labels of tokens without their weights")])
        if callable(getattr(self, "compute_loss_func", None)):
            raise UsageError("compute_loss_func is never given the weights of tokens; leave it out")
        if before("5.19"):
            # There a loss is divided by the steps of a window again, but where the model is given the count of items;
            # TRL would call what it sets to say so.
            self.model_accepts_loss_kwargs, self.compute_loss_func = True, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """What the loss of a window is divided by: by `denominator`, over all processes. transformers asks for it."""
        if not batch_samples:
            return None
        parts = [count_items(batch["labels"], weight_of(batch), self.denominator) for batch in batch_samples]
        total = torch.stack([part.to(device) for part in parts]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum() / self.get_tp_size()  # type: ignore[attr-defined]
        return total

    def _items(self, inputs: Mapping[str, Any], num_items: Tensor | float | None) -> Tensor | float:
        if num_items is not None:
            return num_items
        found = self._get_num_items_in_batch([inputs], inputs["labels"].device)
        return 0.0 if found is None else found


class WeightedLossMixin(DenominatorMixin):
    """Before `transformers.Trainer` or a subclass of it: its loss is `weighted_loss` of the model's logits.

    Batches need `labels` and `loss_weight`, as `WeightedCollator` makes them. The auxiliary loss of a mixture of
    experts, where the model gives one, is added with the model's own coefficient, as a mean over the batches of a step,
    on all processes.
    """

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, and with `return_outputs` the model's outputs. Raises `UsageError` without weights."""
        labels, weight = inputs["labels"], weight_of(inputs)
        # Without labels, the model computes no loss of its own.
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", WEIGHT)})
        if getattr(outputs, "logits", None) is None:
            raise UsageError("the model gives no logits, so tokens cannot be weighed; turn off use_liger_kernel")
        items = self._items(inputs, num_items_in_batch)
        loss = weighted_loss(outputs.logits, labels, weight, num_items=items)
        if self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # type: ignore[attr-defined]
        # Behind that factor: gradients are averaged over processes, and this is a mean already.
        if (auxiliary := getattr(outputs, "aux_loss", None)) is not None:
            config = self.accelerator.unwrap_model(model).config.get_text_config()
            loss = loss + config.router_aux_loss_coef * auxiliary / self._steps(model)
        return (loss, outputs) if return_outputs else loss

    def _steps(self, model: nn.Module) -> int:
        return self.current_gradient_accumulation_steps if model.training else 1


class WeightedTrainer(WeightedLossMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with per-token loss weights: give it rows of `as_dataset(RUN)`.

    The same arguments, and `denominator`, "count" (default) or "sum": what the loss is divided by (`trainers.loss`).
    The collator is `WeightedCollator()`, unless another is given that makes `loss_weight`. Rows are not cut: ask
    `as_dataset` for a `max_length`. Raises `UsageError` for what would leave weights aside: label smoothing, a
    compute_loss_func, context or sequence parallelism, several devices in one process.
    """

    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=data_collator or WeightedCollator(), **kwargs)


def weight_of(batch: Mapping[str, Any]) -> Tensor:
    """The weights of a batch. Raises `UsageError` where its collator left them out."""
    if WEIGHT not in batch:
        raise UsageError(
            f"a batch has no {WEIGHT}: its collator left the weights out. Use WeightedCollator, or leave the trainer"
            " its own, and train on `as_dataset(RUN)`"
        )
    found: Tensor = batch[WEIGHT]
    return found


def refuse(trainer: Any, settings: Sequence[tuple[str, str]]) -> None:
    """Raise `UsageError` for the settings, each with why, that are on, and for setups that split what weights align."""
    for name, why in settings:
        if getattr(trainer.args, name, None):
            raise UsageError(f"{name}={getattr(trainer.args, name)!r} cannot go with weights of tokens: {why}")
    plan = getattr(trainer.accelerator, "parallelism_config", None)
    if plan is not None and (plan.cp_enabled or plan.sp_enabled):
        raise UsageError("context and sequence parallelism split sequences, and the weights would not follow")
    if trainer.args.n_gpu > 1:
        raise UsageError("several devices in one process; start one process for each: `accelerate launch` or torchrun")


def check_length(dataset: Any, columns: tuple[str, ...], limit: int | None) -> Any:
    """The dataset. Raises `UsageError` where rows are longer than a trainer's max_length: at once, or when streamed."""
    if limit is None:
        return dataset
    if not isinstance(dataset, Dataset):
        return dataset.map(_refuse_long, fn_kwargs={"columns": columns, "limit": limit})
    longest = [max(len(row[name]) for name in columns) for row in dataset.select_columns(list(columns))]
    if over := [length for length in longest if length > limit]:
        raise _too_long(
            f"{len(over):,} of {count(len(longest), 'row')} {'is' if len(over) == 1 else 'are'} longer",
            max(over),
            limit,
        )
    return dataset


def _refuse_long(row: Mapping[str, Any], columns: tuple[str, ...], limit: int) -> dict[str, Any]:
    if (length := max(len(row[name]) for name in columns)) > limit:
        raise _too_long("a row is longer", length, limit)
    return {}


def _too_long(what: str, longest: int, limit: int) -> UsageError:
    return UsageError(
        f"{what} than max_length={limit} (up to {longest} tokens). Give the trainer's config max_length=None, or cut"
        f" ids, labels and weights alike: as_dataset(RUN, max_length={limit})"
    )
