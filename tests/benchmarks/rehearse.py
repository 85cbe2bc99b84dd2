"""What a rehearsal costs: a training step, and a step of the rehearsal forward, again and back, on a real model.

    python tests/benchmarks/rehearse.py --data ../shared/data/gsm8k_sft.jsonl
    python tests/benchmarks/rehearse.py --data ../shared/data/gsm8k_sft.jsonl --error
    python tests/benchmarks/rehearse.py --data ../shared/data/gsm8k_sft.jsonl --lora 16 --lr 2e-4 --full --full-lr 3e-5

Seconds are of CPU over all threads, so that other programs disturb them little; `x step` is the whole rehearsal by its
steps, over a training step by itself. Memory is the peak of the process, `GiB` after two training steps, and at the
end. States are kept on disk, as in a run. With `--error` it says instead how far values of float32, and of products in
bfloat16, are from those of float64: the norm of the difference over that of the values, median over median, and the
order of tokens. With `--lora R` a LoRA trains, and a training step is one of it; `--dtype bfloat16` keeps the model
narrow. With `--full` the training of all parameters is rehearsed after it, on the same rows in the same steps, and the
last line says how the values of both go together: Spearman's correlation over tokens and over the sums of rows, and
what share of the lowest tenth of tokens is the same. Memory of the first line is then that of the LoRA alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.course import Course, plan_steps
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.lora import LoraTrainee
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, Values, mean_loss
from alphatoken_curate.directions.shelves import Artefacts, InMemory, Scratch
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.models.load import find_model, load_model
from alphatoken_curate.models.unmerged import Lora
from alphatoken_curate.reading.compare import spearman
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.scoring.courses import KEPT_BYTES
from alphatoken_curate.scoring.prepare import prepare

Floats = NDArray[np.float64]


def peak_gib() -> float:
    """Most memory the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def errors(given: argparse.Namespace, course: Course, target: list[Any]) -> None:
    """Print how far values are from those of float64, whose weights are the same numbers."""
    found = {}
    for name, of_weights, of_products in (
        ("float64", torch.float64, None),
        ("float32", torch.float32, None),
        ("bfloat16", torch.float32, torch.bfloat16),
    ):
        model = load_model(find_model(given.model), dtype=of_weights, device=torch.device("cpu"))
        trainee = trainee_of(given, model, of_products)
        outcomes = [mean_loss(rows, course.batch_tokens) for rows in deal(target, given.groups, 0)]
        found[name] = Rehearsal(trainee, course, InMemory()).run(outcomes).value.mean(axis=0)
        exact = found["float64"]
        off = np.linalg.norm(found[name] - exact) / np.linalg.norm(exact)
        usual = np.median(abs(found[name] - exact)) / np.median(abs(exact))
        told = f"off by {off:.2e}, median {usual:.2e}, Spearman {spearman(found[name], exact):.4f}"
        print(f"{name:>9} {told}", flush=True)


def layers_of(given: argparse.Namespace) -> Any:
    """`--layers`."""
    return given.layers if given.layers == "all" else int(given.layers)


def trainee_of(given: argparse.Namespace, model: Any, products: torch.dtype | None, *, full: bool = False) -> Trainee:
    """What trains."""
    if given.lora is None or full:
        return Trainee(model, layers_of(given), given.parameters, dtype=products)
    alpha = 2 * given.lora if given.lora_alpha is None else given.lora_alpha
    lora = Lora(rank=given.lora, scale=alpha / given.lora)
    return LoraTrainee(model, layers_of(given), lora, seed=0, dtype=products)


def two_steps(trainee: Trainee, course: Course) -> list[float]:
    """CPU seconds of two training steps, of rows that no step has taken before."""
    state, seconds = course.optimiser.start([w.detach().clone() for w in trainee.weights]), []
    for k in range(2):
        begun = time.process_time()
        course.optimiser.step(state, trainee.gradient(course.batches(k))[0], k)
        seconds.append(time.process_time() - begun)
    return seconds


def rehearsed(trainee: Trainee, course: Course, target: list[Any], groups: int) -> tuple[float, Values]:
    """CPU seconds of a whole rehearsal with one outcome for each group of target rows, and what came of it."""
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        states = Artefacts(Store(folder=Path(folder), fields={}), "cpu", prefix="0")
        room = KEPT_BYTES if isinstance(trainee, LoraTrainee) else 0
        rehearsal = Rehearsal(trainee, course, states, steps=Scratch(Path(folder), "cpu"), room=room)
        found = rehearsal.run([mean_loss(rows, course.batch_tokens) for rows in deal(target, groups, 0)])
    return time.process_time() - begun, found


def measured(given: argparse.Namespace, course: Course, target: list[Any], *, full: bool = False) -> Values:
    """Print a line of the table."""
    narrow = torch.bfloat16 if given.dtype == "bfloat16" else None
    kind = torch.float32 if narrow is None or full or given.lora is None else narrow
    model = load_model(find_model(given.model), dtype=kind, device=torch.device("cpu"))
    trainee = trainee_of(given, model, narrow, full=full)
    seconds = two_steps(trainee, course)
    before, (whole, found) = peak_gib(), rehearsed(trainee, course, target, given.groups)
    step, lora = min(seconds), isinstance(trainee, LoraTrainee)
    print(
        f"{given.layers:>7} {f'lora {given.lora}' if lora else given.parameters:>7} {given.groups:>7}"
        f" {given.steps:>6} {step:>7.2f} {whole:>7.1f} {whole / given.steps / step:>7.2f} {before:>6.2f}"
        f" {peak_gib():>6.2f}   root term {found.root_share:.1%}",
        flush=True,
    )
    return found


def lowest_shared(one: Floats, other: Floats) -> float:
    """Share of the lowest tenth of one that is among the lowest tenth of the other."""
    n = max(1, len(one) // 10)
    return len({*np.argsort(one, kind="stable")[:n]} & {*np.argsort(other, kind="stable")[:n]}) / n


def by_rows(values: Floats, lengths: NDArray[np.int64]) -> Floats:
    """Sums over the tokens of each row."""
    return np.add.reduceat(values, np.cumsum(lengths) - lengths)


def agreement(one: Values, other: Values, course: Course) -> dict[str, float]:
    """How the values of two trainings of the same steps go together."""
    a, b = (found.value.mean(axis=0) for found in (one, other))
    return {
        "Spearman of tokens": round(spearman(a, b), 4),
        "of sums of rows": round(spearman(by_rows(a, course.lengths), by_rows(b, course.lengths)), 4),
        "lowest tenth in both": round(lowest_shared(a, b), 4),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--parameters", default="all")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd"])
    parser.add_argument("--root", type=float, default=1e-12)
    parser.add_argument("--error", action="store_true", help="how far values are from those of float64")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of products")
    parser.add_argument("--lora", type=int, help="rank of a LoRA that trains")
    parser.add_argument("--lora-alpha", type=float)
    parser.add_argument("--full", action="store_true", help="the training of --parameters after it, for comparison")
    parser.add_argument("--full-lr", type=float, default=3e-5, help="its rate")
    parser.add_argument("--full-root", type=float, default=1e-12, help="its root term")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    count = given.steps * given.rows_per_step
    prepared = prepare(ScoreConfig(data=(given.data,), limit=count + 8, model=given.model, target=given.data))
    rows, target = prepared.rows[:count], prepared.rows[count : count + 2 * given.groups]
    course = Course(
        rows=rows,  # type: ignore[arg-type]
        steps=plan_steps(rows, epochs=1, rows_per_step=given.rows_per_step, seed=0),  # type: ignore[arg-type]
        optimiser=Optimiser(lr=given.lr, steps=given.steps, kind=given.optimizer, root=given.root),
        batch_tokens=given.batch_tokens,
    )
    if given.error:
        errors(given, course, target)
        return
    print(
        f"{'layers':>7} {'train':>7} {'groups':>7} {'steps':>6}"
        f" {'s/step':>7} {'s all':>7} {'x step':>7} {'GiB':>6} {'GiB':>6}"
    )
    found = measured(given, course, target)
    if given.full:
        wide = replace(course, optimiser=replace(course.optimiser, lr=given.full_lr, root=given.full_root))
        print(json.dumps(agreement(found, measured(given, wide, target, full=True), course)))
    print(json.dumps({"tokens": sum(len(row.input_ids) for row in rows), "threads": given.threads}))  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
