"""How seconds and memory grow with rows: with the real model, and with everything but the model.

    python tests/benchmarks/growth.py --data ../shared/data/gsm8k_sft.jsonl

The first table is `score` and `verify` from end to end on short rows of real text. In the second the model is replaced
by random signals that cost nothing, so that reading, tokenising, planning, writing, manifest, mask and verify are left.
Each run has a process and a run folder of its own. `start` is what does not depend on rows: finding the model, its
digest, its tokenizer and vocabulary, loading it. An exponent is the slope of log(seconds) over log(rows), start left
out; 1 is linear, and less where what does not grow still shows. `--profile` prints where the largest run without the
model spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from speed import in_a_process, peak

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.sums import Sums, sums_of
from alphatoken_curate.progress import Progress
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.runs import shards
from alphatoken_curate.runs.schema import BY_ESTIMATOR
from alphatoken_curate.scoring import identity, loop, prepare, reader, scorer, spec
from alphatoken_curate.scoring.reader import Reader
from alphatoken_curate.scoring.score import score
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import counted
from alphatoken_curate.signals.paths import Signals
from alphatoken_curate.signals.stored import RowResult
from alphatoken_curate.tokens.plan import Batch
from alphatoken_curate.tokens.tokenise import AnyRow

START = "start"
MODEL = "model"
STAGES = [START, MODEL, "read, tokens", "plan, store", "write values", "manifest", "mask, train", "verify", "rest"]

Seconds = dict[str, float]
"""Stage -> seconds of it alone."""


class RandomSignals:
    """Scores a batch at once: random numbers."""

    def __init__(self, directions: int) -> None:
        self.directions = directions
        self.generator = torch.Generator().manual_seed(0)

    def score(self, batch: Batch) -> Signals:
        """Signals of the N response tokens of a batch."""
        each = torch.randn(2 + 2 * self.directions, len(batch.target), generator=self.generator)
        return Signals(each[0], each[1], direct=each[2::2], causal=each[3::2])


class LightScorer(ShardScorer):
    """A scorer of shards that loads no model."""

    def ready(self, progress: Progress) -> Any:
        """Nothing."""

    def gradient(self, kind: str, rows: Sequence[AnyRow], pairs: Any, progress: Progress, batch_tokens: int) -> Sums:
        """Of no weights: random signals have no direction."""
        return sums_of(["none"], [torch.zeros(1)], {"tokens": 1})

    def __call__(
        self, shard: int, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int
    ) -> list[RowResult | None]:
        """Random signals of each row of a shard."""
        return scorer.row_signals(
            RandomSignals(len(self.spec.objectives)),
            rows,
            counted(rows, batch_tokens, progress),
            components=BY_ESTIMATOR[self.spec.config.estimator],
            objectives=self.spec.objectives,
            stability_weight=self.spec.config.stability_weight,
            reference_nll=None,
            pairs=None,
        )


def light() -> ExitStack:
    """Have scorers of shards load no model."""
    replaced = ExitStack()
    for name in ("ready", "gradient", "__call__"):
        replaced.enter_context(patch.object(ShardScorer, name, getattr(LightScorer, name)))
    return replaced


class Clock:
    """Seconds of each stage, those of the stages inside it left out."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack = ["rest"]
        self._since = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage runs inside this block."""
        self._note()
        self._stack.append(name)
        try:
            yield
        finally:
            self._note()
            self._stack.pop()

    def seconds_of_all(self) -> Seconds:
        """What each stage took until now."""
        self._note()
        return dict(self.seconds)

    def _note(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return run


def watched(clock: Clock, without: bool) -> ExitStack:
    """Have every stage of a run told to the clock."""
    places: list[tuple[Any, str, str]] = [
        (prepare, "find_model", START),
        (reader, "load_tokenizer", START),
        (identity, "model_digest", START),
        (spec, "load_placed", START),
        (loop, "write_beside", START),
        (Reader, "data", "read, tokens"),
        (shards, "write_values", "write values"),
        (loop, "write_manifest", "manifest"),
        (loop, "mask_and_card", "mask, train"),
        (scorer, "row_signals", "plan, store"),
    ]
    watching = ExitStack()
    for module, name, stage in places:
        watching.enter_context(patch.object(module, name, clock.timed(stage, getattr(module, name))))
    if without:
        watching.enter_context(light())
    else:
        watching.enter_context(patch.object(ShardScorer, "gradient", clock.timed(MODEL, ShardScorer.gradient)))
        watching.enter_context(patch.object(scorer, "make_scorer", partial(_timed_scorer, clock, scorer.make_scorer)))
    return watching


def _timed_scorer(clock: Clock, make: Callable[..., Any], *args: Any) -> Any:
    return SimpleNamespace(score=clock.timed(MODEL, clock.timed(START, make)(*args).score))


def write_rows(path: Path, source: Path, rows: int) -> None:
    """Prompts and completions of ten words each, 24 to 32 tokens in all, taken along the text of real rows."""
    words = [word for line in source.read_text().splitlines() for word in _words(json.loads(line))]
    with path.open("w") as sink:
        for i in range(rows):
            taken = [words[(i * 7 + n) % len(words)] for n in range(20)]
            sink.write(json.dumps({"prompt": " ".join(taken[:10]), "completion": " " + " ".join(taken[10:])}) + "\n")


def _words(row: dict[str, Any]) -> list[str]:
    return [word for message in row["messages"] for word in message["content"].split()]


def run_once(args: Namespace, rows: int, light: bool, profile: bool = False) -> tuple[Seconds, int]:
    """Score and verify that many rows: seconds of each stage, and the most bytes in memory above those at the start."""
    # Once before, so that importing what a run needs is not counted.
    _run(args, 20, True)
    profiler = cProfile.Profile()
    with peak() as most:
        seconds = _run(args, rows, light, profiler if profile else None)
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
    return seconds, most[0]


def _run(args: Namespace, rows: int, light: bool, profiler: cProfile.Profile | None = None) -> Seconds:
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "rows.jsonl", Path(folder) / "run"
        write_rows(data, Path(args.data), rows)
        settings = {"batch_tokens": 2048} if light else {}
        config = ScoreConfig(data=(str(data),), model=args.model, estimator=args.estimator, **settings)
        clock = Clock()
        with profiler or nullcontext(), watched(clock, light):
            score(config, run)
            with clock.stage("verify"):
                problems = verify(run)
    if problems:
        raise SystemExit(f"verify found problems: {problems[:3]}")
    return clock.seconds_of_all()


def exponents(rows: Sequence[int], found: Sequence[Seconds]) -> list[float]:
    """Slope of log seconds over log rows from each size to the next, start left out."""
    grown = [sum(seconds.values()) - seconds[START] for seconds in found]
    return [float(slope) for slope in np.diff(np.log(grown)) / np.diff(np.log(rows))]


def table(args: Namespace, sizes: Sequence[int], light: bool) -> dict[int, Seconds]:
    """Run each size and print its row; returns its stages."""
    print(f"\n{'without the model' if light else f'{args.model}, {args.estimator}'}: seconds")
    print(f"{'rows':>8}{'total':>9}{'rows/s':>9}{'peak MiB':>10}", *(f"{name:>13}" for name in STAGES), sep="")
    found = {}
    for rows in sizes:
        seconds, most = in_a_process(run_once, args, rows, light)
        total = sum(seconds.values())
        each = (f"{seconds.get(name, 0):>13.2f}" for name in STAGES)
        speed = rows / (total - seconds[START])
        print(f"{rows:>8}{total:>9.1f}{speed:>9.0f}{most / 2**20:>10.0f}", *each, sep="", flush=True)
        found[rows] = seconds
    if len(found) > 1:
        steps = exponents(list(found), list(found.values()))
        print("exponent from each size to the next:", *(f"{slope:.2f}" for slope in steps))
    return found


def parse() -> Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/gsm8k_sft.jsonl", help="JSONL of messages whose text is used")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--estimator", default="published", choices=("published", "exact"))
    parser.add_argument("--rows", type=int, nargs="*", default=[100, 400, 1000, 2000], help="with the model")
    parser.add_argument("--light-rows", type=int, nargs="*", default=[1000, 2000, 10_000, 100_000], help="without it")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print both tables, and what everything but the model takes of a real run."""
    args = parse()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    real = table(args, args.rows, False) if args.rows else {}
    light = table(args, args.light_rows, True) if args.light_rows else {}
    for rows in sorted(real.keys() & light.keys()):
        beside, whole = (sum(seconds.values()) - seconds[START] for seconds in (light[rows], real[rows]))
        print(f"{rows} rows: everything but the model takes {beside:.2f} of {whole:.2f} s, {beside / whole:.1%}")
    if args.profile:
        in_a_process(run_once, args, max(args.light_rows), True, True)


if __name__ == "__main__":
    main()
