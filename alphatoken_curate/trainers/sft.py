"""Weighted loss in TRL's SFTTrainer (1.16 or later), with its fused head, padded, padding-free or packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names, pack_dataset

from alphatoken_curate.errors import UsageError
from alphatoken_curate.runs.schema import PREFERENCE
from alphatoken_curate.trainers.collator import WEIGHT, WeightedCollator
from alphatoken_curate.trainers.current import ROWS, sequence_key
from alphatoken_curate.trainers.dataset import LISTS
from alphatoken_curate.trainers.heads import weighted_log_probs
from alphatoken_curate.trainers.hf import DenominatorMixin, check_length, weight_of
from alphatoken_curate.trainers.loss import divided


class WeightedSFTTrainer(DenominatorMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer with per-token loss weights: give it rows of `as_dataset(RUN)`.

    The same arguments, and `denominator`, "count" (default) or "sum": what the loss is divided by (`trainers.loss`).
    TRL's collator lays out the batch, its fused head computes the log-probabilities, its metrics stay as they are.
    Rows longer than `max_length` are refused (TRL cuts ids and labels, and would leave the weights): give
    SFTConfig(max_length=None), or have `as_dataset` cut them. Datasets without loss_weight, such as text to evaluate
    on, go TRL's way, every label with weight 1. Raises `UsageError` for those rows and for what would leave weights
    aside: loss_type dft, label smoothing, a compute_loss_func, packing that cuts rows, context or sequence
    parallelism.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.loss_type != "nll":
            raise UsageError(f"loss_type={self.args.loss_type!r} has weights of its own; give loss_type='nll'")
        # TRL takes no collator where it packs, so that ours is put round its own.
        self.data_collator = WeightedCollator(inner=self.data_collator)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        names = get_dataset_column_names(dataset)
        if any(prefix + WEIGHT in names for prefix in PREFERENCE.branches):
            raise UsageError(f"the {dataset_name} dataset holds preference pairs; take WeightedDPOTrainer for them")
        if WEIGHT not in names:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        dataset = check_length(dataset, ("input_ids",), args.max_length)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        return self._pack(dataset, args) if packing else dataset

    def _pack(self, dataset: Any, args: Any) -> Any:
        """Whole rows side by side, with the number of the row that each token is of."""
        if args.max_length is None or args.packing_strategy == "wrapped":
            raise UsageError("packing needs a max_length, and packing_strategy 'bfd', which leaves rows whole")
        names = [*LISTS]
        if "row_id" in get_dataset_column_names(dataset):
            dataset = dataset.map(lambda row: {ROWS: [sequence_key(row)] * len(row["input_ids"])})
            names.append(ROWS)
        return pack_dataset(dataset.select_columns(names), args.max_length, args.packing_strategy)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of weighted log-probabilities. Raises `UsageError` for a batch without weights."""
        items = self._items(inputs, num_items_in_batch)
        if not model.training:
            self.current_gradient_accumulation_steps = 1
        # TRL never divides by less than 1, which a sum of weights may be: divide first, and tell it 1.
        weight = divided(weight_of(inputs), items)
        bare = {name: value for name, value in inputs.items() if name != WEIGHT}
        with weighted_log_probs([self.accelerator.unwrap_model(model)], weight):
            return super().compute_loss(model, bare, return_outputs, num_items_in_batch=torch.ones_like(weight[0, 0]))
