"""What two processes compute together; started by `trainers/test_hf.py` with torch.distributed.run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from trainer_runs import ROWS, settings, step, tiny
from transformers import AutoModelForCausalLM, TrainingArguments

from alphatoken_curate.trainers import RefreshCallback, WeightedTrainer, as_dataset


def main(run: str, scored: str, base: str, out: str) -> None:
    """Write losses and norms of gradients by denominator, then the masks of a training and the weights at its end."""
    found: dict[str, list[object]] = {"losses": [], "norms": []}
    for denominator in ("count", "sum"):
        arguments = TrainingArguments(**settings(Path(out) / denominator, 2, ROWS // 2))
        made = step(
            WeightedTrainer(model=tiny(), args=arguments, train_dataset=as_dataset(run), denominator=denominator)
        )
        found["losses"].append(made.loss)
        found["norms"].append({name: one.norm().item() for name, one in made.gradients.items()})
    callback = RefreshCallback(scored)
    more = settings(Path(out) / "trained", 1, 2, max_steps=-1, num_train_epochs=2, save_strategy="epoch")
    trainer = WeightedTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=TrainingArguments(**{**more, "learning_rate": 0.1}),
        train_dataset=as_dataset(scored, 0),
        callbacks=[callback],
    )
    trainer.train()
    found["masks"] = [list(one) for one in callback.masks]
    found["last"] = [one.double().sum().item() for one in trainer.model.parameters()]
    Path(out, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
