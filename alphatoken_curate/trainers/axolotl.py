"""A plugin of Axolotl (0.19): float weights of tokens in its SFT, with sample packing or without.

    plugins: [alphatoken_curate.trainers.axolotl.AlphaTokenPlugin]
    alphatoken_denominator: count        # or sum, see trainers.loss
    datasets: [{path: rows.parquet, ds_type: parquet, type: }]   # input_ids, attention_mask, labels, loss_weight

Axolotl's own trainer and collators stay as they are: the weighted loss is put under its trainer, and the weights are
laid out as its collator lays out the labels. Only this module needs Axolotl, which only Axolotl imports. Axolotl pins
releases that this package's own pins exclude: `pip install --no-deps alphatoken-curate`, and `pip install polars`.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from alphatoken_curate.errors import UsageError

try:
    from alphatoken_curate.trainers.collator import WeightedCollator
    from alphatoken_curate.trainers.hf import WeightedTrainer
except ImportError as error:
    # Axolotl goes on without a plugin that raises this, and would train without weights.
    raise UsageError(f"the AlphaToken plugin cannot be used: {error}; install it beside Axolotl") from error


class AlphaTokenArgs(BaseModel):
    """Keys of the plugin in Axolotl's configuration."""

    alphatoken_denominator: Literal["count", "sum"] = "count"


class WeightedAxolotlTrainer(AxolotlTrainer, WeightedTrainer):  # type: ignore[misc]
    """Axolotl's trainer, whose own steps end in `WeightedTrainer.compute_loss` in place of the plain one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Axolotl has each micro-batch divided by its own tokens and their sum by the number of them. Ours is divided by
        # what the whole window has; the transformers of Axolotl (5.16) has no other way to be told than this.
        self.model_accepts_loss_kwargs = True


class AlphaTokenPlugin(BasePlugin):  # type: ignore[misc]
    """Gives Axolotl's SFT a weighted loss. Raises `UsageError` for what has a loss of its own."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the plugin's keys."""
        return f"{__name__}.AlphaTokenArgs"

    def get_trainer_cls(self, cfg: Any) -> type[Any]:
        """The trainer, with the denominator that the configuration names."""
        for name in ("rl", "reward_model", "process_reward_model", "orpo_alpha"):
            if cfg.get(name):
                raise UsageError(f"{name}: the AlphaToken plugin weighs SFT; take WeightedDPOTrainer for pairs")
        settings = {"denominator": cfg.get("alphatoken_denominator") or "count"}
        return type("AlphaTokenTrainer", (WeightedAxolotlTrainer,), settings)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Put weights beside what Axolotl's collators make."""
        for name in ("data_collator", "eval_data_collator"):
            inner = getattr(trainer, name, None)
            if inner is not None and not isinstance(inner, WeightedCollator):
                setattr(trainer, name, WeightedCollator(inner=inner))
