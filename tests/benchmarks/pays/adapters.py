"""What values of a rehearsed LoRA pay where TRL then trains a LoRA by PEFT: 64 rows of split A, measured on V.

    python tests/benchmarks/pays/adapters.py --data ../shared/data --jobs 2

Values are the tool's (`score --direction rehearsal --rehearse-lora`); a training is TRL's, with its own order of rows
and PEFT's own start of A, other ones for each seed: neither is that which was rehearsed. `values` says how they agree
with those of all parameters, which the first look keeps. Resumable, as all here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lines
import numpy as np
import torch
from datasets import Dataset
from few_to_many import overlap
from fidelity import area
from first_look import FORMS, VALUES
from numpy.typing import NDArray
from rehearsals import GroupedNumbers, Place, values_of
from selections import Selection, counts, scored, weights_of
from settings import MODEL, Setting, about, record, setting
from training import Weights, load, measure

import alphatoken_curate as atc
from alphatoken_curate.models.load import find_model, load_tokenizer
from alphatoken_curate.reading.compare import spearman

SETTINGS = ("A digits", "A clean")
SEEDS = 2
RANK, ALPHA, RATE, CLIP = 16, 32, 1e-3, 1.0

REHEARSED: Mapping[str, Any] = {
    "direction": "rehearsal",
    "rehearse_lr": RATE,
    "rehearse_lora": RANK,
    "rehearse_lora_alpha": float(ALPHA),
    "rehearse_root": 1e-14,
    "rehearse_clip": CLIP,
    "target_groups": 1,
    "dtype": "float32",
    "batch_tokens": 1024,
}

USES = ("lowest 10%", "highest 10%", "lowest 5%", "tilt 0.25", "tilt 0.5")

SELECTIONS: dict[str, Selection] = {
    "all tokens": Selection(who="all"),
    **{name: Selection(score=REHEARSED, mask={"keep": 1.0, **FORMS[name]}) for name in USES},
    "random 0.9": Selection(score=REHEARSED, mask={"by": "random", "keep": 0.9}),
    "oracle": Selection(who="oracle"),
}


def one(data: str, work: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Train a LoRA once, or describe values."""
    where = setting(config["setting"], Path(data))
    if config["selection"] == VALUES:
        return described(where, work)
    weights = weights_of(SELECTIONS[config["selection"]], where, work, config["seed"])
    return {**trained(where, weights, config["seed"]), **counts(where, weights)}


def trained(where: Setting, weights: Weights, seed: int) -> dict[str, float]:
    """What a LoRA leaves that TRL trains on all linear maps, in one epoch."""
    from peft import LoraConfig
    from trl import SFTConfig

    from alphatoken_curate.trainers import WeightedSFTTrainer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = WeightedSFTTrainer(
            load().requires_grad_(False),
            args=SFTConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                seed=seed,
                num_train_epochs=where.epochs,
                per_device_train_batch_size=where.batch,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                warmup_steps=0,
                weight_decay=0.0,
                max_grad_norm=CLIP,
                max_length=None,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=Dataset.from_list(rows_of(where, weights)),
            processing_class=load_tokenizer(find_model(MODEL)),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        return measure(trainer.model.merge_and_unload(), where)


def rows_of(where: Setting, weights: Weights) -> list[dict[str, Any]]:
    """Rows as a weighted trainer takes them."""
    trained = [replace(row, response=weight > 0) for row, weight in zip(where.train, weights, strict=True)]
    return [
        {"row_id": i, "turn": 0, **record(row), "loss_weight": weight.tolist()}
        for i, (row, weight) in enumerate(zip(trained, weights, strict=True))
    ]


def described(where: Setting, work: Path) -> dict[str, Any]:
    """How values of the LoRA find what is bad, and how they agree with those of all parameters."""
    mine = adapt_of(scored(REHEARSED, where, work))
    good = np.concatenate([row.good[row.response] for row in where.train])
    told: dict[str, Any] = {"tokens": len(mine)}
    if not good.all():
        told["area"] = area(mine, good)
    place = Place(work=work, values=lines.RESULTS / "values")
    full = values_of(where, place).of(244, "count")
    lengths = np.array([int(row.response.sum()) for row in where.train])
    of_rows = GroupedNumbers(mine[None], np.ones(1, np.int64)).by_row(lengths).mean
    told["spearman"] = spearman(mine, full.mean)
    told["spearman_rows"] = spearman(of_rows, full.by_row(lengths).mean)
    return told | {f"lowest_{share:g}_in_both": overlap(mine, full.mean, share) for share in (0.05, 0.1)}


def adapt_of(run: Path) -> NDArray[np.float64]:
    """The adaptation of each response token, row by row, (N,)."""
    found = atc.scan_tokens(run).select("row_id", "position", "adapt_influence").sort("row_id", "position").collect()
    return found["adapt_influence"].to_numpy().astype(np.float64)


def config_of(name: str, selection: str, seed: int, data: Path) -> dict[str, Any]:
    """What a line says."""
    told = {} if selection == VALUES else SELECTIONS[selection].about()
    lora = {"rank": RANK, "alpha": ALPHA, "rate": RATE, "clip": CLIP}
    return {"setting": name, "about": about(name, data), "seed": seed, "selection": selection, "lora": lora, **told}


def main() -> None:
    """Run what has no line yet."""
    args = lines.parser(__doc__).parse_args()
    configs = [
        config_of(name, selection, seed, Path(args.data))
        for seed in range(SEEDS)
        for name in SETTINGS
        for selection in ([VALUES] if seed == 0 else []) + list(SELECTIONS)
        if (selection != "oracle" or setting(name, Path(args.data)).has_oracle)
        and lines.asked(args.only, SETTINGS, name, selection)
    ]
    lines.run("adapters", configs, partial(one, args.data, args.work.resolve()), args.jobs)


if __name__ == "__main__":
    main()
