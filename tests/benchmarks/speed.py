"""How much scoring costs beside what everybody knows: a plain forward with logits, and a training step.

    python tests/benchmarks/speed.py --data ../shared/data/gsm8k_sft.jsonl

Everything is timed in one process, round after round, so that a slow minute hits all jobs alike; the ratio of a job is
the median over rounds of its seconds to that round's forward. Peak memory is measured in a process of its own per job,
above the loaded model. Rows are the text of real rows, laid end to end and cut to one length, the first part of each
being its prompt; `--prompt real` takes the rows as they are, chat template and all. With `--pairs` every second row
gets the prompt of the one before: preference pairs, whose prompts run once for both branches; a job that ends in
` apart` scores the same branches as rows of their own.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from alphatoken_curate.capture import ScoringModel
from alphatoken_curate.models import find_model, load_model, load_tokenizer
from alphatoken_curate.paths import PathScorer
from alphatoken_curate.plan import Batch, collate, plan_batches, sequences
from alphatoken_curate.rows import read_rows
from alphatoken_curate.tokens import AnyRow, PairRow, TokenRow, chosen, tokenise

JOBS = ["forward", "training step", "3 published", "3 exact", "all published", "all exact"]
PAIR_JOBS = ["forward", *(name + apart for name in JOBS[2:] for apart in ("", " apart"))]


def make_rows(args: argparse.Namespace) -> list[AnyRow]:
    """Rows of real text, or pairs made of two each."""
    rows = plain_rows(args)
    if not args.pairs:
        return list(rows)
    pairs: list[AnyRow] = []
    for one, other in zip(rows[0::2], rows[1::2], strict=True):
        ids = np.where(one.response, other.input_ids, one.input_ids)
        pairs.append(PairRow(chosen=one, rejected=replace(other, input_ids=ids)))
    return pairs


def plain_rows(args: argparse.Namespace) -> list[TokenRow]:
    """`--rows` of `--length` tokens, or the first `--rows` rows as they are."""
    tokenizer = load_tokenizer(find_model(args.model))
    read = read_rows([args.data]).rows[: 8 * args.rows]
    tokens, _ = tokenise(read, tokenizer, max_length=4096, turns="all", vocab_size=None)
    if args.prompt == "real":
        return [chosen(row) for row in tokens[: args.rows]]
    text = np.concatenate([chosen(row).input_ids for row in tokens])
    response = np.zeros(args.length, np.bool_)
    response[max(1, round(args.length * float(args.prompt))) :] = True
    return [
        TokenRow(
            row_id=i,
            source="",
            line=i + 1,
            id=None,
            input_ids=text[i * args.length : (i + 1) * args.length],
            response=response,
            truncated=0,
        )
        for i in range(args.rows)
    ]


def load(args: argparse.Namespace) -> Any:
    """A fresh copy of the model."""
    return load_model(find_model(args.model), dtype=getattr(torch, args.dtype), device=torch.device("cpu"))


def job(name: str, args: argparse.Namespace, batches: list[Batch]) -> Callable[[], None]:
    """Something that runs once over all batches."""
    model = load(args)
    if name == "forward":
        return lambda: forward(model, batches)
    if name == "training step":
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
        return lambda: train(model, optimizer, batches)
    layers, estimator = name.split()[:2]
    scoring = ScoringModel(model, "all" if layers == "all" else int(layers))
    generator = torch.Generator().manual_seed(0)
    directions = [[torch.randn(m.weight.shape, generator=generator) for m in scoring.maps] for _ in range(2)]
    scorer = PathScorer(scoring, directions, estimator, 32)  # type: ignore[arg-type]
    del directions
    return lambda: score(scorer, batches)


def forward(model: Any, batches: list[Batch]) -> None:
    """Logits of every position, without a graph."""
    with torch.no_grad():
        for batch in batches:
            model(input_ids=torch.from_numpy(batch.input_ids), use_cache=False).logits  # noqa: B018


def train(model: Any, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
    """A step of AdamW on every batch, all weights training, loss on the responses."""
    for batch in batches:
        logits = model(input_ids=torch.from_numpy(batch.input_ids), use_cache=False).logits
        chosen = logits[torch.from_numpy(batch.row), torch.from_numpy(batch.position)].float()
        torch.nn.functional.cross_entropy(chosen, torch.from_numpy(batch.target)).backward()
        optimizer.step()
        optimizer.zero_grad()


def score(scorer: PathScorer, batches: list[Batch]) -> None:
    """Both directions, both paths, nll and entropy of every response token."""
    for batch in batches:
        scorer.score(batch)


def seconds(work: Callable[[], None]) -> float:
    """Wall time of one run."""
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_memory(name: str, args: argparse.Namespace, batches: list[Batch]) -> tuple[int, int]:
    """Bytes resident before a job runs (the model and its directions), and the most above them while it does."""
    work = job(name, args, batches)
    gc.collect()
    process = psutil.Process()
    before = highest = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return before, max(highest, process.memory_info().rss) - before


def measure_memory(name: str, args: argparse.Namespace, batches: list[Batch]) -> tuple[int, int]:
    """The same, in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, name, args, batches).result(timeout=600)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/gsm8k_sft.jsonl", help="JSONL whose text is used")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--prompt", default="0.5", help="share of a row that is prompt, or `real`")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", action="store_true", help="score preference pairs; not with --prompt real")
    parser.add_argument("--jobs", nargs="+")
    parser.add_argument("--no-memory", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    args = parse()
    if not Path(args.data).is_file():
        raise SystemExit(f"{args.data}: no such file; name rows with --data")
    rows = make_rows(args)
    flat = sequences(rows)
    batches = [collate(rows, indices) for indices in plan_batches(rows, args.batch_tokens)]
    apart = [collate(flat, indices) for indices in plan_batches(flat, args.batch_tokens)]
    tokens = sum(len(row.input_ids) for row in flat)
    prompt = 1 - sum(int(row.response.sum()) for row in flat) / tokens
    print(
        f"{args.model}, {args.dtype}, {len(flat)} rows, {tokens} tokens, {prompt:.0%} prompt, {len(batches)} batches,"
    )
    names = args.jobs or (PAIR_JOBS if args.pairs else JOBS)
    wanted = {name: apart if name == "forward" or name.endswith(" apart") else batches for name in names}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds")
    works = {name: job(name, args, of) for name, of in wanted.items()}
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    works.clear()
    gc.collect()
    print(
        f"{'job':<20}{'seconds':>9}{'x forward':>11}{'tokens/s':>10}{'peak MiB':>10}{'x forward':>11}{'held MiB':>10}"
    )
    base = None
    for name, spent in times.items():
        ratio = statistics.median(t / f for t, f in zip(spent, times["forward"], strict=True))
        middle = statistics.median(spent)
        line = f"{name:<20}{middle:>9.2f}{ratio:>11.2f}{tokens / middle:>10.0f}"
        if not args.no_memory:
            held, peak = measure_memory(name, args, wanted[name])
            base = base or peak
            line += f"{peak / 2**20:>10.0f}{peak / base:>11.2f}{held / 2**20:>10.0f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
