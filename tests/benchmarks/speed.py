"""How much scoring costs beside what everybody knows: a plain forward with logits, and a training step.

    python tests/benchmarks/speed.py --data ../shared/data/gsm8k_sft.jsonl

One table for each dtype and share of a row that is prompt. All jobs of a dtype are timed in one process, round after
round, so that a slow minute hits them alike; a ratio is the median over rounds of a job's seconds to the same round's
forward. `bound` is that ratio counted in multiplications alone (multiplications.py). Peak memory is measured in a
process of its own per job, above what is resident once the job stands ready; what it holds ready above the loaded model
(two directions) is in the last column. Every job scores along two directions. Rows are the text of real rows, laid end
to end and cut to one length, the first part of each being its prompt; `--prompt real` takes the rows as they are, chat
template and all. With `--pairs` every second row gets the prompt of the one before: preference pairs, whose prompts run
once for both branches; a job that ends in ` apart` scores the same branches as rows of their own.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import multiprocessing
import statistics
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from multiplications import Shape, multiplications, shape_of, work_of

from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.models.load import find_model, load_model, load_tokenizer
from alphatoken_curate.rows.read import read_rows
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.signals.stored import BatchScorer
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches, sequences
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow, TokenRow, chosen, tokenise

JOBS = ["forward", "training step", "3 published", "3 exact", "all published", "all exact", "all influence"]
PAIR_JOBS = ["forward", *(name + apart for name in JOBS[2:6] for apart in ("", " apart"))]

Work = Callable[[list[Batch]], None]
"""Runs once over all batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The rows of one table."""

    prompt: str
    tokens: int
    share: float
    """Of the tokens that are prompt."""
    batches: list[Batch]
    apart: list[Batch]
    """The same sequences, each a row of its own."""

    def of(self, job: str) -> list[Batch]:
        """The batches a job runs over."""
        return self.apart if job in ("forward", "training step") or job.endswith(" apart") else self.batches


def setting(args: Namespace, prompt: str) -> Setting:
    """Rows of which `prompt` is the share of each that is prompt, planned."""
    rows = make_rows(Namespace(**{**vars(args), "prompt": prompt}))
    flat = sequences(rows)
    tokens = sum(len(row.input_ids) for row in flat)
    return Setting(
        prompt=prompt,
        tokens=tokens,
        share=1 - sum(int(row.response.sum()) for row in flat) / tokens,
        batches=[collate(rows, indices) for indices in plan_batches(rows, args.batch_tokens)],
        apart=[collate(flat, indices) for indices in plan_batches(flat, args.batch_tokens)],
    )


def make_rows(args: Namespace) -> list[AnyRow]:
    """Rows of real text, or pairs made of two each."""
    rows = plain_rows(args)
    if not args.pairs:
        return list(rows)
    pairs: list[AnyRow] = []
    for one, other in zip(rows[0::2], rows[1::2], strict=True):
        ids = np.where(one.response, other.input_ids, one.input_ids)
        pairs.append(PairRow(chosen=one, rejected=replace(other, input_ids=ids)))
    return pairs


def plain_rows(args: Namespace) -> list[TokenRow]:
    """`--rows` of `--length` tokens, or the first `--rows` rows as they are."""
    if not Path(args.data).is_file():
        raise SystemExit(f"{args.data}: no such file; name rows with --data")
    tokenizer = load_tokenizer(find_model(args.model))
    needed = args.rows if args.prompt == "real" else 8 + args.rows * args.length // 64
    tokens, _ = tokenise(read_rows([args.data]).rows[:needed], tokenizer, max_length=4096, turns="all", vocab_size=None)
    if args.prompt == "real":
        return [chosen(row) for row in tokens]
    text = np.concatenate([chosen(row).input_ids for row in tokens])
    if len(text) < args.rows * args.length:
        raise SystemExit(f"{args.data}: {len(text)} tokens; {args.rows} rows of {args.length} need more")
    return rows_of_tokens(text, args.rows, args.length, float(args.prompt))


def rows_of_tokens(text: Any, rows: int, length: int, prompt: float) -> list[TokenRow]:
    """Token ids cut into rows of one length, the first part of each being its prompt."""
    response = np.zeros(length, np.bool_)
    response[max(1, round(length * prompt)) :] = True
    return [
        TokenRow(
            row_id=i,
            source="",
            line=i + 1,
            id=None,
            input_ids=text[i * length : (i + 1) * length],
            response=response,
            end_of_turn=np.zeros(length, np.bool_),
            truncated=0,
        )
        for i in range(rows)
    ]


def load(args: Namespace) -> Any:
    """A fresh copy of the model."""
    return load_model(find_model(args.model), dtype=getattr(torch, args.dtype), device=torch.device("cpu"))


def job(name: str, model: Any) -> Work:
    """A job, ready to run: with its model, directions or optimizer."""
    if name == "forward":
        return lambda batches: forward(model, batches)
    if name == "training step":
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
        return lambda batches: train(model, optimizer, batches)
    scorer = scorer_of(name, model)

    def score(batches: list[Batch]) -> None:
        for batch in batches:
            scorer.score(batch)

    return score


def scorer_of(name: str, model: Any) -> BatchScorer:
    """What scores by layers and estimator, as `3 exact`, along two random directions."""
    layers, estimator = name.split()[:2]
    scoring = ScoringModel(model, "all" if layers == "all" else int(layers))
    generator = torch.Generator(scoring.device).manual_seed(0)
    directions = [
        [torch.randn(m.weight.shape, generator=generator, device=scoring.device) for m in scoring.maps]
        for _ in range(2)
    ]
    return make_scorer(scoring, directions, estimator, 32)


def forward(model: Any, batches: list[Batch]) -> None:
    """Logits of every position, without a graph."""
    with torch.no_grad():
        for batch in batches:
            model(input_ids=torch.from_numpy(batch.input_ids).to(model.device), use_cache=False).logits  # noqa: B018


def train(model: Any, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
    """A step of AdamW on every batch, all weights training, loss on the responses."""
    for batch in batches:
        row, column, target = (torch.from_numpy(x).to(model.device) for x in (batch.row, batch.position, batch.target))
        logits = model(input_ids=torch.from_numpy(batch.input_ids).to(model.device), use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[row, column].float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def seconds(work: Callable[[], None]) -> float:
    """Wall time of one run."""
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def timed(args: Namespace, dtype: str, settings: list[Setting]) -> tuple[Shape, list[dict[str, list[float]]]]:
    """The model's shape; for each setting the seconds of each job, round after round."""
    model = load(Namespace(**{**vars(args), "dtype": dtype}))
    shape = shape_of(model)
    works = {name: job(name, copy.deepcopy(model)) for name in args.jobs}
    found: list[dict[str, list[float]]] = []
    for one in settings:
        times: dict[str, list[float]] = {name: [] for name in works}
        for n in range(args.rounds + 1):
            for name, work in works.items():
                spent = seconds(partial(work, one.of(name)))
                # The first round warms up.
                times[name] += [spent] if n else []
        found.append(times)
    return shape, found


# ------------------------------------------------------------------------------------------------------------- memory


def resident() -> int:
    """Bytes of this process in memory, once what is free has been given back where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(psutil.Process().memory_info().rss)


@contextmanager
def peak() -> Iterator[list[int]]:
    """A list to which the most bytes resident above those at the start are added at the end."""
    process, before = psutil.Process(), resident()
    highest, done, found = before, threading.Event(), list[int]()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append(max(highest, process.memory_info().rss) - before)


def peaks(name: str, args: Namespace, settings: list[Setting]) -> tuple[int, list[int]]:
    """Bytes a job holds ready above the loaded model, and its peak above both in each setting."""
    model = load(args)
    loaded = resident()
    work = job(name, model)
    held, found = resident() - loaded, list[int]()
    for one in settings:
        with peak() as most:
            work(one.of(name))
        found += most
    return held, found


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns when a fresh process runs it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# -------------------------------------------------------------------------------------------------------------- table


def parse() -> Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/gsm8k_sft.jsonl", help="JSONL whose text is used")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--prompt", nargs="+", default=["0.25", "0.5", "0.75"], help="share of a row, or `real`")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", action="store_true", help="score preference pairs; not with --prompt real")
    parser.add_argument("--jobs", nargs="+", help="default: all; `forward` always runs")
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    args.jobs = args.jobs or (PAIR_JOBS if args.pairs else JOBS)
    args.jobs = ["forward", *(name for name in args.jobs if name != "forward")]
    return args


def table(
    times: dict[str, list[float]], memory: dict[str, tuple[int, list[int]]], shape: Shape, at: int, one: Setting
) -> None:
    """Print the jobs of one setting, which is number `at`."""
    print(f"{'job':<20}{'seconds':>9}{'x forward':>11}{'bound':>8}{'tokens/s':>10}", end="")
    print(f"{'peak MiB':>10}{'x forward':>11}{'held MiB':>10}" if memory else "")
    least = multiplications("forward", shape, work_of(one.apart))
    for name, spent in times.items():
        ratio = statistics.median(t / f for t, f in zip(spent, times["forward"], strict=True))
        middle = statistics.median(spent)
        bound = multiplications(name, shape, work_of(one.apart)) / least
        line = f"{name:<20}{middle:>9.2f}{ratio:>11.2f}{bound:>8.2f}{one.tokens / middle:>10.0f}"
        if memory:
            (held, found), base = memory[name], memory["forward"][1][at]
            line += f"{found[at] / 2**20:>10.0f}{found[at] / base:>11.2f}{held / 2**20:>10.0f}"
        print(line, flush=True)


def main() -> None:
    """Measure and print the tables."""
    args = parse()
    settings = [setting(args, prompt) for prompt in args.prompt]
    print(f"{args.model}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds")
    for dtype in args.dtype:
        shape, times = timed(args, dtype, settings)
        gc.collect()
        each = Namespace(**{**vars(args), "dtype": dtype})
        names = [] if args.no_memory else args.jobs
        memory = {name: in_a_process(peaks, name, each, settings) for name in names}
        for at, one in enumerate(settings):
            rows = sum(len(batch.rows) for batch in one.apart)
            print(f"\n{dtype}, {rows} rows, {one.tokens} tokens, {one.share:.0%} prompt, {len(one.batches)} batches")
            table(times[at], memory, shape, at, one)


if __name__ == "__main__":
    main()
