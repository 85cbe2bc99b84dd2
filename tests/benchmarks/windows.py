"""How far values of a rehearsal in windows agree with those of one without, on a real model, by the window's length.

    python tests/benchmarks/windows.py --data ../shared/data/gsm8k_sft.jsonl --layers 3 --parameters linear
    python tests/benchmarks/windows.py --data ../shared/data/gsm8k_sft.jsonl --steps 8 --windows 1 2 4

Of each length: Spearman's correlation over all response tokens, the share of the lowest tenth that is the lowest tenth
of the other, the same of whole rows (sums of their tokens), steps that a visit sees on average, CPU seconds over all
threads, peak GiB of the process so far, and MiB that lay on disk at most. The first line, `whole`, says what agreement
may be asked for at all: it is that of the values by one half of the target rows with those by the other half.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rehearse import Floats, by_rows, layers_of, lowest_shared, peak_gib

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.course import Course, plan_steps
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, mean_loss
from alphatoken_curate.directions.shelves import Artefacts, Scratch
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.directions.windows import borders_of
from alphatoken_curate.models.load import find_model, load_model
from alphatoken_curate.reading.compare import spearman
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.scoring.prepare import prepare
from alphatoken_curate.tokens.plan import response_tokens


def seen(steps: int, window: int | None) -> float:
    """Steps from a visit to the end of its window, its own among them: the mean over all steps."""
    lengths = [borders[-1] - borders[0] for borders in borders_of(steps, window)]
    return sum(n * (n + 1) / 2 for n in lengths) / steps


def rehearsed(trainee: Trainee, course: Course, groups: list[Any]) -> tuple[Floats, float, float]:
    """Values by each group of target rows, CPU seconds, and most MiB on disk."""
    trainee.forget_below()
    begun, most = time.process_time(), 0
    with tempfile.TemporaryDirectory() as folder:

        def told(_: int) -> None:
            nonlocal most
            most = max(most, sum(path.stat().st_size for path in Path(folder).iterdir()))

        states = Artefacts(Store(folder=Path(folder), fields={}), "cpu", prefix="0")
        rehearsal = Rehearsal(trainee, course, states, steps=Scratch(Path(folder), "cpu"))
        found = rehearsal.run([mean_loss(rows, course.batch_tokens) for rows in groups], told).value
    return found, time.process_time() - begun, most / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1, help="of the steps: each takes all rows once")
    parser.add_argument("--target-rows", type=int, default=32)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layers", default="all")
    parser.add_argument("--parameters", default="all")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--root", type=float, default=1e-12)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    count = given.steps // given.epochs * given.rows_per_step
    config = ScoreConfig(
        data=(given.data,),
        limit=count + given.target_rows,
        model=given.model,
        target=given.data,
        max_length=given.max_length,
    )
    prepared = prepare(config)
    rows: Any = [*prepared.rows]
    rows, groups = rows[:count], deal(rows[count:], 2, 0)
    steps = plan_steps(rows, epochs=given.epochs, rows_per_step=given.rows_per_step, seed=0)
    optimiser = Optimiser(lr=given.lr, steps=len(steps), root=given.root, warmup=given.warmup, schedule="linear")
    course = Course(rows=rows, steps=steps, optimiser=optimiser, batch_tokens=given.batch_tokens)
    model = load_model(find_model(given.model), dtype=torch.float32, device=torch.device("cpu"))
    trainee = Trainee(model, layers_of(given), given.parameters)
    weights = np.array([response_tokens(group) for group in groups], float)
    print(f"{'window':>7} {'seen':>6} {'order':>7} {'low 10%':>8} {'rows':>7} {'CPU s':>8} {'GiB':>6} {'MiB disk':>9}")
    whole = None
    for window in (None, *given.windows):
        found, seconds, disk = rehearsed(trainee, replace(course, window=window), groups)
        value = weights @ found / weights.sum()
        one, other = (found[0], found[1]) if whole is None else (value, whole)
        whole = value if whole is None else whole
        of_rows = spearman(by_rows(one, course.lengths), by_rows(other, course.lengths))
        print(
            f"{window or 'whole':>7} {seen(len(steps), window):>6.1f} {spearman(one, other):>7.4f}"
            f" {lowest_shared(one, other):>8.1%} {of_rows:>7.4f} {seconds:>8.1f} {peak_gib():>6.2f} {disk:>9,.0f}",
            flush=True,
        )
    print(f"{count} rows, {sum(course.lengths)} response tokens, {len(steps)} steps, {given.target_rows} target rows")


if __name__ == "__main__":
    main()
