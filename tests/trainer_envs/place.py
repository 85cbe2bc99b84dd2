"""Where a trainer runs: the programs of its environment, a folder of its own, and what it reported there."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import by_hand
import environments
import yaml
from material import BINARY, Material

STEPS = 3
CLOSE = 2e-6
"""What float32 may change, relative to the loss."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A trainer's first loss and the one computed by hand."""

    reported: float
    by_hand: float

    @property
    def tolerance(self) -> float:
        """What float32 changes; besides, half of the fourth decimal where a trainer reports no more of them."""
        rounded = 0.5e-4 if round(self.reported, 4) == self.reported else 0.0
        return CLOSE * abs(self.by_hand) + rounded

    @property
    def agrees(self) -> bool:
        return abs(self.reported - self.by_hand) <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a case is given: the environments, the material, and a folder of its own."""

    envs: Path
    material: Material
    folder: Path

    def program(self, environment: str, name: str) -> Path:
        """A program of an environment."""
        return environments.python_of(self.envs, environment).with_name(name)

    def write(self, name: str, content: str | dict[str, Any]) -> Path:
        """A file in the folder; a dictionary as YAML."""
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    def run(self, *command: object) -> str:
        """What the command prints; raises with the end of it where it fails."""
        home = self.folder / "home"
        own = {
            "HF_HUB_OFFLINE": "1", "HF_HOME": home, "MODELSCOPE_CACHE": home, "CUDA_VISIBLE_DEVICES": "",
            "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
            "PATH": f"{Path(str(command[0])).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        done = subprocess.run(
            [*map(str, command)],
            cwd=self.folder,
            env=kept | {name: str(value) for name, value in own.items()},
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr.txt").open("w"),
            text=True,
            check=False,
        )
        (self.folder / "stdout.txt").write_text(done.stdout)
        if done.returncode:
            end = (self.folder / "stderr.txt").read_text()[-4000:]
            raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout[-2000:]}\n{end}")
        return done.stdout

    def first_loss(self) -> float:
        """The first that a trainer of the Hugging Face family logged; raises unless it took all steps, and learnt."""
        (state,) = self.folder.rglob(f"checkpoint-{STEPS}/trainer_state.json")
        losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        if len(losses) != STEPS or not losses[-1] < losses[0]:
            raise RuntimeError(f"{state}: losses {losses}; expected {STEPS} of them, the last below the first")
        return float(losses[0])

    def sft(self, mask: int = BINARY, **how: Any) -> float:
        return by_hand.sft(self.material.model, self.material.runs["sft"], mask, **how)

    def dpo(self, mask: int = BINARY) -> float:
        made = self.material
        return by_hand.dpo(made.model, made.reference, made.runs["preference"], mask)
