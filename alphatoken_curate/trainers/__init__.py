"""Training on the masks of a run: a loss, a dataset, and what Trainer, TRL and Axolotl need to train by float weights.

In: a run folder, and the trainer that you use.
Out: batches with `labels` and `loss_weight`, the weighted loss, and masks made anew while a training goes on.
Open first: loss.py for what is divided by what, then the file of your trainer.

Everything here is token-aligned, as train/ is: index i is about predicting token i, and index 0 never trains. The names
below are imported when first used, so that nothing heavy is imported before; those of TRL need the extra `trl`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphatoken_curate.trainers.collator import PreferenceCollator, WeightedCollator
    from alphatoken_curate.trainers.dataset import TrainDataset, as_dataset
    from alphatoken_curate.trainers.dpo import WeightedDPOTrainer
    from alphatoken_curate.trainers.hf import WeightedLossMixin, WeightedTrainer
    from alphatoken_curate.trainers.loss import weighted_loss
    from alphatoken_curate.trainers.refresh import RefreshCallback
    from alphatoken_curate.trainers.sft import WeightedSFTTrainer

_HOME = {
    "PreferenceCollator": "collator",
    "RefreshCallback": "refresh",
    "TrainDataset": "dataset",
    "WeightedCollator": "collator",
    "WeightedDPOTrainer": "dpo",
    "WeightedLossMixin": "hf",
    "WeightedSFTTrainer": "sft",
    "WeightedTrainer": "hf",
    "as_dataset": "dataset",
    "weighted_loss": "loss",
}

__all__ = [
    "PreferenceCollator",
    "RefreshCallback",
    "TrainDataset",
    "WeightedCollator",
    "WeightedDPOTrainer",
    "WeightedLossMixin",
    "WeightedSFTTrainer",
    "WeightedTrainer",
    "as_dataset",
    "weighted_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
