"""A million short rows end to end without a model: seconds, memory of the process that leads, seconds to resume.

    python tests/benchmarks/million.py --data ../shared/data/gsm8k_sft.jsonl

Rows are prompts and completions of ten words each, 24 to 32 tokens in all; random signals stand in for the model
(`growth.py`). Each size has a process of its own, and a run that is interrupted once half of its shards are scored,
resumed to its end, and asked for again. `read` is from the beginning to the first shard: rows, tokens, what holds
rows out and digests tokens; `resume` the same of the second command, which finds its rows; `rest` from there to the
manifest; `mask` makes mask and train/; `again` finds that all is done. Memory is what the process held at most, in MiB
above what it held after a run of 20 rows: once rows are read, up to the manifest, and with the mask. An exponent is the
slope of log(seconds) over log(rows).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from growth import light, write_rows
from speed import in_a_process

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.scoring import loop
from alphatoken_curate.scoring.engines import Here
from alphatoken_curate.scoring.meter import peak_of_process
from alphatoken_curate.scoring.score import score
from alphatoken_curate.scoring.scorer import ShardScorer

SECONDS, MEMORY = ("read", "resume", "rest", "mask", "again"), ("rows", "manifest", "masked")


class Reading(Here):
    """This process alone, but for so many that make tokens."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes = processes

    def readers(self) -> int:
        """As many as were asked for."""
        return self.processes


class Scoring:
    """Scores shards until it has scored so many (`until`): when it was first asked to, and what was held then."""

    def __init__(self) -> None:
        self.until: int | None = None
        self.begin(None)

    def begin(self, until: int | None) -> None:
        """A command begins."""
        self.until, self.done = until, 0
        self.began, self.asked, self.held = time.perf_counter(), 0.0, 0

    def score(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """In place of `ShardScorer.score`."""

        def scored(*given: Any) -> Any:
            if not self.asked:
                self.asked, self.held = time.perf_counter(), peak_of_process()
            if self.done == self.until:
                raise KeyboardInterrupt
            self.done += 1
            return plain(*given)

        return scored


def measured(args: Namespace, rows: int) -> dict[str, float]:
    """What one size takes."""
    found: dict[str, float] = {}
    plain = loop.mask_and_card

    def masked(*given: Any, **more: Any) -> Any:
        found["manifest"], began = peak_of_process(), time.perf_counter()
        done = plain(*given, **more)
        found["mask"] = time.perf_counter() - began
        return done

    scoring = Scoring()
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        light(),
        patch.object(ShardScorer, "score", scoring.score(ShardScorer.score)),
        patch.object(loop, "mask_and_card", masked),
    ):
        few, data, run = (Path(folder) / name for name in ("few.jsonl", "rows.jsonl", "run"))
        for path, count in ((few, 20), (data, rows)):
            write_rows(path, Path(args.data), count)
        config = ScoreConfig(data=(str(few),), model=args.model, batch_tokens=2048)
        score(config, Path(folder) / "few")
        before, config = peak_of_process(), replace(config, data=(str(data),))
        scoring.begin(rows // config.rows_per_shard // 2)
        with suppress(KeyboardInterrupt):
            score(config, run, engine=Reading(args.processes))
        found |= {"read": scoring.asked - scoring.began, "rows": scoring.held}
        scoring.begin(None)
        score(config, run, engine=Reading(args.processes))
        found["resume"] = scoring.asked - scoring.began
        found["rest"] = time.perf_counter() - scoring.asked - found["mask"]
        found["masked"] = peak_of_process()
        began = time.perf_counter()
        score(config, run)
        found["again"] = time.perf_counter() - began
    return {**found, **{name: (found[name] - before) / 2**20 for name in MEMORY}}


def parse() -> Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/gsm8k_sft.jsonl", help="JSONL of messages whose text is used")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--processes", type=int, default=1, help="that make tokens, as with --workers")
    parser.add_argument("--folder", help="where runs are written: some 400 bytes a row")
    return parser.parse_args()


def main() -> None:
    """Measure and print each size, and the slopes between them."""
    args = parse()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.processes} make tokens")
    print(f"{'rows':>9}", *(f"{name:>9}" for name in (*SECONDS, *MEMORY)))
    found = []
    for rows in args.rows:
        found.append(in_a_process(measured, args, rows))
        print(f"{rows:>9}", *(f"{found[-1][name]:>9.1f}" for name in (*SECONDS, *MEMORY)), flush=True)
    for (few, one), (many, other) in pairwise(zip(args.rows, found, strict=True)):
        slopes = [np.log(other[name] / one[name]) / np.log(many / few) for name in SECONDS]
        print(f"{'exponent':>9}", *(f"{slope:>9.2f}" for slope in slopes))
        each = [(other[name] - one[name]) * 2**20 / (many - few) for name in MEMORY]
        print("bytes a row more:", ", ".join(f"{name} {more:.0f}" for name, more in zip(MEMORY, each, strict=True)))


if __name__ == "__main__":
    main()
