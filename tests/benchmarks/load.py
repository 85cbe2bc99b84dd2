"""How memory and seconds grow with response tokens and with rows, where no model is at work.

    python tests/benchmarks/load.py

A run of random signals is written shard by shard by the functions that a real run uses (`made_run.py`); then its
manifest is built from the shards, a mask is made, `stats` and `verify` read it. Then `check` reads rows of text of
twenty words each. Each line of a stage is a process of its own: memory is the peak above what is resident once its
libraries are loaded, and what it grew by for each token, or row, since the line before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from growth import write_rows
from made_run import made_run, write_shards
from speed import in_a_process, peak

from alphatoken_curate import MaskConfig, ScoreConfig, mask
from alphatoken_curate.models.load import find_model, load_tokenizer
from alphatoken_curate.reading.stats import stats
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.runs import manifest
from alphatoken_curate.scoring.check import check

WARM = 1000
"""Tokens, or rows, of what runs first, so that libraries that load when they are used are not counted."""


def build_manifest(run: Path) -> None:
    """As a run does that has lost it."""
    manifest.write(run, manifest.rebuild(run))


def check_nothing(run: Path) -> None:
    """All of `verify`, which must find nothing."""
    if problems := verify(run):
        raise SystemExit(f"verify found problems: {problems[:3]}")


def mask_by(**settings: Any) -> Callable[[Path], Any]:
    """A mask of these settings."""
    return lambda run: mask(run, MaskConfig(**settings))


STAGES: dict[str, Callable[[Path], Any]] = {
    "manifest": build_manifest,
    "mask": mask_by(),
    "stats": stats,
    "verify": check_nothing,
    "mask, batch:16": mask_by(scope="batch:16"),
    "mask, rank": mask_by(weights="rank"),
    "mask, sigmoid, rms": mask_by(weights="sigmoid", stability_scale="rms"),
    "mask, expression": mask_by(by="value - nll"),
}
"""In this order: only the first mask is there when `stats` and `verify` read."""


def write_stage(run: Path, tokens: int) -> tuple[float, int]:
    """Write values/: seconds, and peak bytes above what is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "warm", WARM)
    with peak() as most:
        begun = time.perf_counter()
        write_shards(run, tokens)
        seconds = time.perf_counter() - begun
    return seconds, most[0]


def stage(name: str, run: Path) -> tuple[float, int]:
    """One stage over a run that is there."""
    with tempfile.TemporaryDirectory() as folder:
        STAGES[name](made_run(Path(folder) / "warm", WARM))
    with peak() as most:
        begun = time.perf_counter()
        STAGES[name](run)
        seconds = time.perf_counter() - begun
    return seconds, most[0]


def check_rows(data: str, model: str) -> tuple[float, int]:
    """`check` of a file of rows."""
    load_tokenizer(find_model(model), trust_remote_code=False)
    with peak() as most:
        begun = time.perf_counter()
        check(ScoreConfig(data=(data,), model=model))
        seconds = time.perf_counter() - begun
    return seconds, most[0]


def line(name: str, size: int, found: tuple[float, int], before: tuple[int, int] | None) -> tuple[int, int]:
    """Print what was found; returns what the next line of the stage is compared with."""
    seconds, most = found
    grown = "" if before is None else f"{(most - before[1]) / (size - before[0]):>12.1f}"
    print(f"{name:<20}{size:>12,}{seconds:>10.1f}{size / seconds / 1e6:>12.3f}{most / 2**20:>11.0f}{grown}", flush=True)
    return size, most


def tokens_table(args: Namespace, folder: Path) -> None:
    """Every stage at every number of response tokens."""
    runs = {}
    print(f"{'stage':<20}{'tokens':>12}{'seconds':>10}{'M tokens/s':>12}{'peak MiB':>11}{'bytes/token':>12}")
    before = None
    for tokens in args.tokens:
        runs[tokens] = folder / str(tokens)
        before = line("write", tokens, in_a_process(write_stage, runs[tokens], tokens), before)
    for name in STAGES:
        before = None
        for tokens, run in runs.items():
            before = line(name, tokens, in_a_process(stage, name, run), before)


def rows_table(args: Namespace, folder: Path) -> None:
    """`check` at every number of rows."""
    print(f"\n{'stage':<20}{'rows':>12}{'seconds':>10}{'M rows/s':>12}{'peak MiB':>11}{'bytes/row':>12}")
    before = None
    for rows in args.rows:
        data = folder / f"{rows}.jsonl"
        write_rows(data, Path(args.data), rows)
        before = line("check", rows, in_a_process(check_rows, str(data), args.model), before)


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/gsm8k_sft.jsonl", help="JSONL of messages whose text is used")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer `check` uses")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2_000_000, 10_000_000], help="response tokens")
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print both tables."""
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        tokens_table(args, Path(folder))
        rows_table(args, Path(folder))


if __name__ == "__main__":
    main()
