"""What scoring costs on a CUDA card, for a model of the shape of Llama-3-8B with random weights in bfloat16.

    python tests/benchmarks/gpu.py
    python tests/benchmarks/gpu.py --shape tiny --length 64     # runs anywhere: a check of this script

Needs a card and no download: weights are drawn on the card (16 GB; `training step` and K = all take four to nine times
that, and a job that does not fit says so: take `--shape llama-3.2-3b` for those). One table for each share of a row
that is prompt. For each job: tokens per second, the ratio of its seconds to those of a plain no-grad forward with
logits at all positions, that ratio counted in multiplications alone, the share of the card's matrix peak (two
operations for each multiplication a job cannot do without, to what one large bfloat16 product reaches in the same run),
peak memory above the model's weights, and what of it the job holds ready. Seconds are medians of `--rounds` after a
warm-up, a forward before each job's. `--json FILE` holds the same numbers, and is written again after each job.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from card import put_whole
from multiplications import Shape, multiplications, shape_of, work_of
from speed import JOBS, forward, job, resident, rows_of_tokens
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken_curate.tokens.plan import Batch, collate, plan_batches

SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.2-3b": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Of one job: median seconds, those of the forward beside it, and bytes."""

    seconds: float
    forward: float
    held: int
    peak: int


class Device:
    """A card, or the CPU: waits for it, and tells the memory in use and at most."""

    def __init__(self, name: str) -> None:
        self.place = torch.device(name)
        self.is_card = self.place.type == "cuda"

    def wait(self) -> None:
        """Until everything asked of it is done."""
        if self.is_card:
            torch.cuda.synchronize()

    def used(self) -> int:
        """Bytes in use; the most is counted from here."""
        gc.collect()
        if not self.is_card:
            return resident()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def most(self) -> int:
        """The most bytes in use since `used`; on a CPU, where torch does not count them, those now."""
        return int(torch.cuda.max_memory_allocated()) if self.is_card else resident()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Wall time of some work."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began


def matrix_peak(device: Device, dtype: torch.dtype, size: int) -> float:
    """Multiplications per second of one large square product, the best of ten."""
    one, other = (torch.randn(size, size, device=device.place, dtype=dtype) for _ in range(2))
    return float(size**3 / min(device.seconds(lambda: one @ other) for _ in range(10)))


def make_model(args: Namespace, device: Device) -> Any:
    """Random weights, drawn on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=8192, rope_theta=500000.0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with device.place:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_batches(args: Namespace, prompt: float) -> list[Batch]:
    """Rows of random tokens."""
    text = np.random.default_rng(0).integers(0, SHAPES[args.shape]["vocab_size"], args.rows * args.length)
    rows = rows_of_tokens(text.astype(np.int32), args.rows, args.length, prompt)
    return [collate(rows, indices) for indices in plan_batches(rows, args.batch_tokens)]


def measure(name: str, args: Namespace, device: Device, settings: list[list[Batch]]) -> list[Found]:
    """A job in every setting, on a model of its own."""
    model = make_model(args, device)
    bare = device.used()
    # Before the job takes hold of the model: capture gives S an attention of its own.
    plain = [_median(partial(forward, model, batches), device, args.rounds) for batches in settings]
    bare = device.used()
    work = job(name, model)
    held = device.used() - bare
    found = []
    for batches, beside in zip(settings, plain, strict=True):
        device.used()
        spent = _median(partial(work, batches), device, args.rounds)
        found.append(Found(seconds=spent, forward=beside, held=held, peak=device.most() - bare))
    return found


def _median(work: Callable[[], Any], device: Device, rounds: int) -> float:
    work()
    return statistics.median(device.seconds(work) for _ in range(rounds))


def numbers(name: str, shape: Shape, batches: list[Batch], found: Found, peak: float) -> dict[str, Any]:
    """Of a job in one setting: what a line of the table tells, and seconds of both it and the forward."""
    work = work_of(batches)
    needed, least = (multiplications(what, shape, work) for what in (name, "forward"))
    return {
        "job": name,
        "seconds": found.seconds,
        "forward_seconds": found.forward,
        "times_forward": found.seconds / found.forward,
        "bound": needed / least,
        "tokens_per_second": sum(batch.input_ids.size for batch in batches) / found.seconds,
        "of_peak": needed / found.seconds / peak,
        "peak_gib": found.peak / 2**30,
        "held_gib": found.held / 2**30,
    }


def line(told: dict[str, Any]) -> str:
    """A line of a table."""
    if "seconds" not in told:
        return f"{told['job']:<16} does not fit on this card"
    return (
        f"{told['job']:<16}{told['seconds']:>9.3f}{told['times_forward']:>11.2f}{told['bound']:>8.2f}"
        f"{told['tokens_per_second']:>11.0f}{told['of_peak']:>9.1%}{told['peak_gib']:>11.2f}{told['held_gib']:>11.2f}"
    )


def table(prompt: float, told: list[dict[str, Any]], args: Namespace) -> str:
    """The jobs of one setting."""
    return "\n".join(
        [
            f"{args.rows} rows of {args.length} tokens, {prompt:.0%} prompt, {args.batch_tokens} tokens a batch",
            f"{'job':<16}{'seconds':>9}{'x forward':>11}{'bound':>8}{'tokens/s':>11}{'of peak':>9}"
            f"{'peak GiB':>11}{'held GiB':>11}",
            *map(line, told),
        ]
    )


def parse() -> Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--prompt", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="share of a row")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", nargs="+", default=JOBS)
    parser.add_argument("--json", type=Path, help="also write the numbers here, after each job")
    return parser.parse_args()


def main() -> None:
    """Measure and print the tables."""
    args = parse()
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    if not device.is_card and args.shape != "tiny":
        raise SystemExit(
            "There is no CUDA card here, so nothing was measured. --shape tiny checks the script on a CPU."
        )
    name = torch.cuda.get_device_name() if device.is_card else "no CUDA card: CPU, which says nothing of a card"
    peak = matrix_peak(device, getattr(torch, args.dtype), 16384 if device.is_card else 512)
    head = (
        f"{name}; torch {torch.__version__}; {args.shape} in {args.dtype}; a large product: {2e-12 * peak:.1f} TFLOP/s"
    )
    print(head, flush=True)
    settings = [make_batches(args, prompt) for prompt in args.prompt]
    shape = shape_of(make_model(args, device))
    told: list[list[dict[str, Any]]] = [[] for _ in settings]
    for what in args.jobs:
        try:
            found = measure(what, args, device, settings)
        except torch.OutOfMemoryError:
            for each in told:
                each.append({"job": what, "fits": False})
        else:
            for each, batches, one in zip(told, settings, found, strict=True):
                each.append(numbers(what, shape, batches, one, peak))
        tables = [table(prompt, each, args) for prompt, each in zip(args.prompt, told, strict=True)]
        if args.json is not None:
            put_whole(args.json, json.dumps({"head": head, "prompt": args.prompt, "jobs": told, "tables": tables}))
    print("", *tables, sep="\n\n")


if __name__ == "__main__":
    main()
