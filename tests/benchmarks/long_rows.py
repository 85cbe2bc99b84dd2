"""One long row: how much memory it takes, and that no tensor grows with length x vocabulary or length x length.

    python tests/benchmarks/long_rows.py --data ../shared/data/gsm8k_sft.jsonl

For each job, in a process of its own: seconds, peak memory above the model and the directions, and the largest tensor
that any operation made, told by a dispatch mode that sees every one. Beside them stand the sizes of a float32 tensor of
T x V (all logits), of T x T (attention of one head) and of H x T x T (of all heads). Exits with an error where some
operation made a tensor as large as T x T or T x V. Chunks have a size of their own, so rows of less than 4,096 tokens
are measured and not judged. K = all keeps its graph, so its memory grows with T x (activations of all blocks).
"""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from multiplications import shape_of
from speed import in_a_process, job, load, peak, plain_rows, resident
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alphatoken_curate.tokens.plan import collate

JOBS = ["3 published", "all published", "all influence"]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes; a view of one that was there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.what = 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at what it made."""
        out = func(*args, **(kwargs or {}))
        given = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and _place(x) not in given and x.numel() > self.numel:
                self.numel, self.what = x.numel(), f"{func} {tuple(x.shape)}"
        return out


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def measure(name: str, args: Namespace) -> dict[str, Any]:
    """A job on one row."""
    row = plain_rows(args)[0]
    model = load(args)
    config = model.config.get_text_config()
    sizes = {"heads": config.num_attention_heads, "vocabulary": config.vocab_size, "width": shape_of(model).width}
    before = resident()
    work = job(name, model)
    held = resident() - before
    largest, began = Largest(), time.perf_counter()
    with peak() as most, largest:
        work([collate([row], [0])])
    spent = time.perf_counter() - began
    return {"seconds": spent, "peak": most[0], "held": held, "numel": largest.numel, "what": largest.what, **sizes}


def parse() -> Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/gsm8k_sft.jsonl", help="JSONL whose text is used")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the row")
    parser.add_argument("--prompt", default="0.5", help="share of the row that is prompt")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--jobs", nargs="+", default=JOBS)
    return argparse.Namespace(**vars(parser.parse_args()), rows=1, pairs=False)


def main() -> None:
    """Measure, print and judge."""
    args = parse()
    print(f"{args.model}, {args.dtype}, a row of {args.length} tokens, {float(args.prompt):.0%} prompt")
    print(f"{'job':<16}{'seconds':>9}{'peak MiB':>10}{'held MiB':>10}{'largest MiB':>13}  made by")
    wrong = []
    for name in args.jobs:
        found = in_a_process(measure, name, args)
        logits, square = args.length * found["vocabulary"], args.length**2
        mib = [found[key] / 2**20 for key in ("peak", "held")] + [found["numel"] * 4 / 2**20]
        print(f"{name:<16}{found['seconds']:>9.1f}{mib[0]:>10.0f}{mib[1]:>10.0f}{mib[2]:>13.0f}  {found['what']}")
        if args.length >= 4096 and found["numel"] >= min(logits, square):
            wrong.append(f"{name}: {found['what']} is as large as T x T or T x V")
    named = {"T x T": square, "T x V": logits, f"{found['heads']} x T x T": square * found["heads"]}
    print("float32 of " + ", ".join(f"{what}: {numel * 4 / 2**20:.0f} MiB" for what, numel in named.items()))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
