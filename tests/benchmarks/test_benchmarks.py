"""That the scripts of tests/benchmarks run, on a few rows; what they measure is not judged here.

pytest -m slow -k benchmark
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ["--data", "sample_data/sft.jsonl"]

SCRIPTS = {
    "workers": (["--rows", "6", "--rows-per-shard", "2", "--workers", "2"], "| 2 parts at once |"),
    "growth": ([*DATA, "--rows", "--light-rows", "40", "80"], "exponent from each size"),
    "million": ([*DATA, "--rows", "40", "80"], "bytes a row more"),
    "planned": ([], "times one card"),
    "tokenising": ([*DATA, "--rows", "8", "--rounds", "1"], "all refused"),
    "load": (["--tokens", "20000", "--rows", "200"], "mask, expression"),
    "tokens": (["--tokens", "20000", "--rounds", "1"], "by token type"),
    "report": (["--tokens", "1000"], "B/response token"),
    "gpu": (["--shape", "tiny", "--length", "32"], "all influence"),
    "long_rows": ([*DATA, "--length", "256"], "float32 of T x T"),
    "estimate": ([*DATA, "--rows", "4"], "ratio"),
    "rehearse": (
        [
            *DATA,
            "--steps",
            "2",
            "--rows-per-step",
            "1",
            "--layers",
            "1",
            "--parameters",
            "linear",
            "--lora",
            "2",
            "--full",
        ],
        "lowest tenth",
    ),
    "windows": (
        [*DATA, "--steps", "2", "--rows-per-step", "1", "--target-rows", "2", "--windows", "1", "--layers", "1"],
        "2 steps, 2 target rows",
    ),
    "magic": ([*DATA, "--shape", "tiny", "--steps", "2", "--rows-per-step", "1", "--target-rows", "1"], "x step"),
    "speed": ([*DATA, "--rows", "2", "--length", "64", "--rounds", "1", "--prompt", "0.5"], "all exact"),
}
"""Of each script: flags that make it quick, and what its last table must hold."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_runs(name: str, smollm2_tokenizer: Any) -> None:
    flags, told = SCRIPTS[name]
    command = [sys.executable, f"tests/benchmarks/{name}.py", *flags]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert told in found.stdout
