"""Each trainer with an export of its own: how it is started by the config lines of the README, and what it reports.

One step takes every row, in micro-batches of 4 with accumulation 2, so that the first loss a trainer reports does not
depend on the order of rows and does depend on what it divides by. It is the loss of the weights as they were.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import by_hand
import environments
import guide
import torch
from material import BINARY, ROWS, SOFT, Material
from place import STEPS, Found, Place

MICRO_BATCH = 4

COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "gradient_accumulation_steps": ROWS // MICRO_BATCH,
    "logging_steps": 1,
    "save_steps": STEPS,
    "seed": 1,
}
"""What the README leaves to the user. Every trainer here knows these by the same names."""
HF: dict[str, Any] = COMMON | {
    "per_device_train_batch_size": MICRO_BATCH,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "bf16": False,
}
ONE_PACK = {"gradient_accumulation_steps": 1}
"""Where all rows are packed into one."""


# ---------------------------------------------------------------------------------------------------------------- TRL


def trl(environment: str, *, packed: bool = False) -> Callable[[Place], Found]:
    """SFT from `--for hf`, by the Python of its README."""

    def run(place: Place) -> Found:
        code = guide.block(place.material.export("hf", "sft", BINARY), "python")
        if packed:
            # As its comment says: packing, and at least the longest row.
            code = code.replace("SFTConfig(max_length=None", "SFTConfig(max_length=1024, packing=True")
        settings = HF | {"output_dir": str(place.folder / "out"), "use_cpu": True}
        if packed:
            settings |= ONE_PACK | {"per_device_train_batch_size": 1}
        place.run(
            place.program(environment, "python"), environments.HERE / "drive_trl.py", place.write("code.txt", code),
            place.material.model, place.write("settings.yaml", settings),
        )  # fmt: skip
        return Found(reported=place.first_loss(), by_hand=place.sft())

    return run


# ------------------------------------------------------------------------------------------------------------ Axolotl


def axolotl(mask: int, *, packed: bool = False) -> Callable[[Place], Found]:
    """SFT from `--for hf --strict`; of a soft mask from `--for hf`, by the plugin of `alphatoken_curate.trainers`.

    Axolotl divides by the tokens of each micro-batch and takes the mean of these, so that rows have to keep their
    order here. The plugin divides by the tokens of all of them.
    """

    def run(place: Place) -> Found:
        soft = mask == SOFT
        export = place.material.export("hf", "sft", mask, *(() if soft else ("--strict",)))
        config = guide.settings(export) | COMMON | {
            "base_model": str(place.material.model), "output_dir": str(place.folder / "out"),
            "dataset_prepared_path": str(place.folder / "prepared"), "dataset_num_proc": 1,
            "curriculum_sampling": True, "shuffle_merged_datasets": False, "micro_batch_size": MICRO_BATCH,
            "optimizer": "adamw_torch", "lr_scheduler": "constant", "num_epochs": STEPS,
            "bf16": False, "fp16": False, "attn_implementation": "sdpa", "use_wandb": False,
        }  # fmt: skip
        if packed:
            config |= ONE_PACK | {"sample_packing": True, "sequence_len": 1024, "micro_batch_size": 1}
        place.run(place.program("axolotl", "python"), "-m", "axolotl.cli.train", place.write("config.yaml", config))
        how = {"soft": True} if soft else {} if packed else {"micro_batch": MICRO_BATCH}
        return Found(reported=place.first_loss(), by_hand=place.sft(mask, **how))

    return run


# ------------------------------------------------------------------------------------------------------ LLaMA-Factory


def llamafactory(kind: str) -> Callable[[Place], Found]:
    """SFT, or DPO with the token mask of each branch, from `tokenized_path`."""

    def run(place: Place) -> Found:
        config = HF | guide.settings(place.material.export("llamafactory", kind, BINARY)) | {
            "model_name_or_path": str(place.material.model), "output_dir": str(place.folder / "out"),
            "do_train": True, "finetuning_type": "full", "template": "empty", "use_cpu": True,
            "overwrite_output_dir": True,
        }  # fmt: skip
        if kind == "preference":
            config |= {"ref_model": str(place.material.reference), "pref_beta": by_hand.BETA, "pref_loss": "sigmoid"}
        place.run(place.program("llamafactory", "llamafactory-cli"), "train", place.write("config.yaml", config))
        return Found(reported=place.first_loss(), by_hand=place.sft() if kind == "sft" else place.dpo())

    return run


# ----------------------------------------------------------------------------------------------------------- ms-swift


def swift(kind: str, mask: int) -> Callable[[Place], Found]:
    """SFT with the weight of each token, or DPO with the token mask of each branch, by the README's command."""

    def run(place: Place) -> Found:
        export = place.material.export("ms-swift", kind, mask)
        program, *words = guide.command(export, MODEL=place.material.model)
        more: dict[str, Any] = HF | {
            "output_dir": place.folder / "out", "tuner_type": "full", "torch_dtype": "float32",
            "model_type": "qwen2", "use_cpu": True, "dataset_num_proc": 1, "split_dataset_ratio": 0,
        }  # fmt: skip
        if kind == "preference":
            more |= {"ref_model": place.material.reference, "beta": by_hand.BETA}
        flags = [part for name, value in more.items() for part in (f"--{name}", _flag(value))]
        place.run(place.program("ms-swift", program), *words, *flags)
        return Found(
            reported=place.first_loss(), by_hand=place.sft(mask, soft=True) if kind == "sft" else place.dpo(mask)
        )

    return run


def _flag(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --------------------------------------------------------------------------------------------------- objects and files


def tinker(place: Place) -> Found:
    """The sum that its `cross_entropy` is, of Datum objects made by the README's code."""
    code = guide.block(place.material.export("tinker", "sft", SOFT), "python")
    python, drive = place.program("tinker", "python"), environments.HERE / "drive_tinker.py"
    lines = place.run(python, drive, place.write("code.txt", code)).splitlines()
    total = 0.0
    for line in lines:
        datum = json.loads(line)
        inputs, targets, weights = (datum[name] for name in ("model_input", "target_tokens", "weights"))
        if (targets["dtype"], weights["dtype"]) != ("int64", "float32"):
            raise RuntimeError(f"dtypes {targets['dtype']}, {weights['dtype']}")
        losses = by_hand.of_targets(place.material.model, inputs, targets["data"])
        total += float((losses * torch.tensor(weights["data"], dtype=torch.float64)).sum())
    expected = by_hand.sft_sum(place.material.model, place.material.runs["sft"], SOFT)
    return Found(reported=total, by_hand=expected)


def together(place: Place) -> Found:
    """Its check of a file before the upload passes the strict form, and counts its rows; the other form it refuses."""
    python, drive = place.program("together", "python"), environments.HERE / "drive_together.py"
    strict, full = (place.material.export("hf", "sft", BINARY, *flags) for flags in (("--strict",), ()))
    passed, refused = (json.loads(place.run(python, drive, export / "train.parquet")) for export in (strict, full))
    if not passed["is_check_passed"] or refused["is_check_passed"]:
        raise RuntimeError(f"strict: {passed}\nall columns: {refused}")
    return Found(reported=passed["num_samples"], by_hand=ROWS)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table. `environment`: its requirements name the release; `package`: the line that does."""

    environment: str
    package: str
    what: str
    check: Callable[[Place], Found]

    @property
    def name(self) -> str:
        return f"{self.environment} {self.what}"

    @property
    def version(self) -> str:
        lines = (environments.HERE / "requirements" / f"{self.environment}.txt").read_text().splitlines()
        return next(line.removeprefix(f"{self.package}==") for line in lines if line.startswith(f"{self.package}=="))

    def found(self, envs: Path, material: Material, folder: Path) -> Found:
        """Run it in a new folder."""
        own = folder / self.name.replace(" ", "-").replace(",", "")
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        return self.check(Place(envs=envs, material=material, folder=own))


def _case(environment: str, package: str, what: str, check: Callable[[Place], Found]) -> Case:
    return Case(environment=environment, package=package, what=what, check=check)


CASES = (
    _case("trl-0.24", "trl", "SFT", trl("trl-0.24")),
    _case("trl-0.24", "trl", "SFT packed", trl("trl-0.24", packed=True)),
    _case("trl-1.9", "trl", "SFT", trl("trl-1.9")),
    _case("trl-1.9", "trl", "SFT packed", trl("trl-1.9", packed=True)),
    _case("axolotl", "axolotl", "SFT", axolotl(BINARY)),
    _case("axolotl", "axolotl", "SFT packed", axolotl(BINARY, packed=True)),
    _case("axolotl", "axolotl", "SFT weights", axolotl(SOFT)),
    _case("axolotl", "axolotl", "SFT weights packed", axolotl(SOFT, packed=True)),
    _case("llamafactory", "llamafactory", "SFT", llamafactory("sft")),
    _case("llamafactory", "llamafactory", "DPO", llamafactory("preference")),
    _case("ms-swift", "ms-swift", "SFT", swift("sft", BINARY)),
    _case("ms-swift", "ms-swift", "SFT weights", swift("sft", SOFT)),
    _case("ms-swift", "ms-swift", "DPO", swift("preference", BINARY)),
    _case("tinker", "tinker", "Datum weights", tinker),
    _case("together", "together", "file check", together),
)
