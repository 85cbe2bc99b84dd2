"""Masks and weights of tokens in TRL's DPOTrainer (1.16 or later), on both branches and for the reference alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from trl import DPOTrainer
from trl.data_utils import get_dataset_column_names

from alphatoken_curate.errors import UsageError
from alphatoken_curate.runs.schema import PREFERENCE
from alphatoken_curate.trainers.collator import WEIGHT, PreferenceCollator
from alphatoken_curate.trainers.heads import weighted_log_probs
from alphatoken_curate.trainers.hf import RowsMixin, check_length, refuse, weight_of

_IDS = tuple(f"{prefix}input_ids" for prefix in PREFERENCE.branches)


class WeightedDPOTrainer(RowsMixin, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer with per-token weights: give it rows of `as_dataset(RUN)` of a preference run.

    The log-probability of an answer becomes sum_t w_t log p_t over the tokens that its branch's mask keeps, under the
    policy and under the reference, computed as it trains or before (`precompute_ref_log_probs`). That is DPO's own
    denominator: none, but the mean over pairs. Give DPOConfig the `beta` that the run was scored by: values are of it.
    Masks shorten the sums, so the same beta means a smaller margin; the losses `ipo`, `sigmoid_norm` and `sft` divide
    by the count of kept tokens.

    The same arguments as DPOTrainer. Rows longer than `max_length` are refused: give DPOConfig(max_length=None), or
    have `as_dataset` cut them. Datasets without weights are refused too. Raises `UsageError` for those and for what
    would leave weights aside: a collator without them, use_weighting (WPO), context or sequence parallelism.
    """

    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=data_collator or PreferenceCollator(), **kwargs)
        refuse(self, [("use_weighting", "WPO takes its own weights from the log-probabilities")])

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        names = get_dataset_column_names(dataset)
        if missing := [prefix + WEIGHT for prefix in PREFERENCE.branches if prefix + WEIGHT not in names]:
            raise UsageError(
                f"the {dataset_name} dataset has no {missing[0]}; take `as_dataset(RUN)` of a run of preference pairs"
            )
        return check_length(dataset, _IDS, args.max_length)

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Weighted log-probabilities of both branches under the reference, (B,) each: what is precomputed."""
        with weighted_log_probs([self.accelerator.unwrap_model(model)], weight_of(inputs)):
            found: tuple[Tensor, Tensor] = super().compute_ref_log_probs(model, _bare(inputs))
        return found

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        # Where an adapter is trained, the reference is the policy itself without it.
        models = [self.accelerator.unwrap_model(one) for one in (model, self.model, self.ref_model) if one is not None]
        with weighted_log_probs(models, weight_of(inputs)):
            return super()._compute_loss(model, _bare(inputs), return_outputs)


def _bare(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != WEIGHT}
