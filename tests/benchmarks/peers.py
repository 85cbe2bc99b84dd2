"""Other tools that score tokens, side by side with this one: same model, rows and direction, one process, one run.

    python tests/benchmarks/peers.py --data ../shared/data/gsm8k_sft.jsonl --prompt 0.5

README.md here says how to make the environment and what each tool's numbers mean. Every tool gets the model in memory,
the direction in memory (the gradient of the mean response loss of rows that are not scored) and the same batches; none
reads or writes scores on disk. Jobs run round after round; a ratio is the median over rounds of a job's seconds to the
same round's plain forward with logits. Peak memory is measured in a process of its own per job, above what is resident
once the job stands ready. Agreement is with one backward per token in float64 (tests/support/oracles.py) on a few short
rows. A job that ends in ` x2` takes two directions, as a run needs; the rest take one.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # before anything imports it: the peers draw progress bars

import numpy as np
import torch
from peer_jobs import BUILD, JOBS, MEANING, Job, Values, setting, split
from safetensors.torch import load_file, save_file, save_model
from speed import in_a_process, load, peak, plain_rows
from torch import Tensor, nn

from alphatoken_curate.tokens.tokenise import TokenRow

TARGET_ROWS = 4
SHORT_ROWS, SHORT_LENGTH = 3, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows to time, and short ones of the same text to compare with the oracle."""

    timed: list[TokenRow]
    short: list[TokenRow]
    target: list[TokenRow]
    """Rows whose mean response loss gives the direction; they are not timed."""


def make_rows(args: Namespace) -> Rows:
    """The text of real rows, cut to one length."""
    both = plain_rows(Namespace(**{**vars(args), "rows": args.rows + TARGET_ROWS}))
    short = plain_rows(Namespace(**{**vars(args), "rows": SHORT_ROWS, "length": SHORT_LENGTH}))
    return Rows(timed=both[: args.rows], short=short, target=both[args.rows :])


def make_direction(model: Any, rows: list[TokenRow]) -> dict[str, Tensor]:
    """Gradient of the rows' mean response loss in every linear map of the blocks."""
    from oracles import mean_loss_gradient

    given = [(torch.from_numpy(r.input_ids).long(), np.flatnonzero(r.response).tolist()) for r in rows]
    return {
        name: g.contiguous() for name, g in mean_loss_gradient(model, model.config.num_hidden_layers, given).items()
    }


def oracle(model: Any, layers: int, direction: dict[str, Tensor], rows: list[TokenRow]) -> Values:
    """Every signal in float64, from one backward per token."""
    from oracles import contraction_by_backwards

    wide = {name: m.double() for name, m in direction.items()}
    found: dict[str, list[Tensor]] = {}
    for row in rows:
        places = np.flatnonzero(row.response)
        parts = contraction_by_backwards(model, layers, wide, torch.from_numpy(row.input_ids).long(), places.tolist())
        at = parts[torch.from_numpy(places - 1)]
        direct, total = at.diagonal(), at.sum(1)
        for name, x in (("direct", direct), ("causal", total - direct), ("total", total), ("influence", parts.sum(0))):
            found.setdefault(name, []).append(x)
    return {name: torch.stack(each) for name, each in found.items()}


def ranks(x: Tensor) -> Tensor:
    """Ranks of the entries, less their mean."""
    return x.flatten().argsort().argsort().double() - (x.numel() - 1) / 2


def compare(found: Values, expected: Values, names: list[str]) -> dict[str, tuple[float, float]]:
    """(largest difference over largest value, Spearman's correlation) of each signal."""
    said = {}
    for name in names:
        one, other = found[name].double(), expected[name]
        rank, right = ranks(one), ranks(other)
        said[name] = (
            ((one - other).abs().max() / other.abs().max()).item(),
            ((rank @ right) / (rank.norm() * right.norm())).item(),
        )
    return said


def twin(model: nn.Module) -> nn.Module:
    """A model for a job to rebuild as it likes, on the same weights in memory."""
    weights = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, dict(weights))


def time_jobs(
    names: list[str], args: Namespace, model: Any, direction: dict[str, Tensor], rows: Rows
) -> dict[str, list[float]]:
    """Seconds of every job in every round, all jobs in this process; a round before them warms up."""
    jobs = {n: BUILD[split(n)[0]](setting(n, args, twin(model), direction, rows.timed)) for n in names}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for n in range(args.rounds + 1):
        for name, job in jobs.items():
            spent = job.seconds()
            times[name] += [spent] if n else []
    return times


def apart(name: str, args: Namespace, rows: Rows, folder: str) -> dict[str, Any]:
    """What a process of its own measures: peak memory, and how the values of the short rows compare."""
    direction = load_file(f"{folder}/direction.safetensors")
    model = load(Namespace(model=folder, dtype=args.dtype))
    method = split(name)[0]
    try:
        said: dict[str, Any] = {"peak": peak_of(BUILD[method](setting(name, args, twin(model), direction, rows.timed)))}
    except ImportError as error:
        return {"missing": f"not installed: {error.name}"}
    if method in MEANING and not args.no_agreement:
        every = Namespace(**{**vars(args), "backward_tokens": None})
        found = BUILD[method](setting(name, every, twin(model), direction, rows.short)).run()
        said["agreement"] = compare(found, load_file(oracle_file(folder, name)), MEANING[method])
    return said


def oracle_file(folder: str, name: str) -> str:
    """Where the oracle's values for a job's blocks are."""
    return f"{folder}/oracle-{split(name)[1]}.safetensors"


def peak_of(job: Job) -> int:
    """The most bytes resident during a run, above what is resident before."""
    with peak() as found:
        job.run()
    return found[0]


def measured_apart(name: str, args: Namespace, rows: Rows, folder: str) -> dict[str, Any]:
    """`apart`, in a fresh process; a job that fails says why in its row."""
    try:
        found: dict[str, Any] = in_a_process(apart, name, args, rows, folder)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        return {"missing": f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"}
    return found


# ------------------------------------------------------------------------------------------------------------- table


def line(name: str, args: Namespace, said: dict[str, Any], spent: list[float], base: list[float]) -> str:
    """A job's row."""
    method, layers, copies = split(name)
    head = f"{method:<17}{layers:>4}{copies:>3}"
    if "missing" in said:
        return f"{head}  {said['missing']}"
    middle, tokens = statistics.median(spent), args.rows * args.length
    ratio = statistics.median(t / f for t, f in zip(spent, base, strict=True))
    text = f"{head}{middle:>10.2f}{tokens / middle:>8.0f}{ratio:>8.2f}{said['peak'] / 2**20:>7.0f}   "
    return text + ", ".join(f"{key} {e:.0e} / {r:.4f}" for key, (e, r) in said.get("agreement", {}).items())


def versus(times: dict[str, list[float]]) -> list[str]:
    """How many times as long each peer takes as ours that gives the same or more."""
    pairs = [
        ("bergson position", ("published", "exact")),
        ("bergson output", ("influence",)),
        ("kronfluence", ("published", "exact")),
        ("dattri-llm", ("published", "exact")),
    ]
    said = []
    for peer, mine in pairs:
        for one in (name for name in times if split(name)[0] in mine):
            other = f"{peer} {split(one)[1]}"
            if one in times and other in times:
                ratios = [p / o for p, o in zip(times[other], times[one], strict=True)]
                least = min(times[other]) / min(times[one])
                middle = f"{statistics.median(ratios):>6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
                said.append(f"{other:<22}/ {one:<18}{middle}, least seconds {least:.2f}")
    return said


def parse() -> Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/gsm8k_sft.jsonl", help="JSONL whose text is used")
    parser.add_argument("--model", default="smollm2-135m", help="a Llama-like model (blocks in base_model.layers)")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--prompt", default="0.5", help="share of a row that is prompt")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backward-tokens", type=int, default=2, help="of each row, timed and drawn out to all")
    parser.add_argument("--jobs", nargs="+", default=JOBS, help="default: " + ", ".join(f"'{j}'" for j in JOBS))
    parser.add_argument("--no-agreement", action="store_true")
    args = parser.parse_args()
    args.dtype = "float32"
    for job in args.jobs:
        if split(job)[0] not in BUILD:
            parser.error(f"{job!r}: no such job")
    if args.rows * args.length % args.batch_tokens or args.batch_tokens % args.length:
        parser.error("rows must fill whole batches: dattri-llm takes one batch size")
    return args


def store(folder: str, names: list[str], args: Namespace, model: Any, rows: Rows) -> dict[str, Tensor]:
    """Put the model, the direction and the oracle's values where processes of their own find them."""
    direction = make_direction(model, rows.target)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # a GGUF's, whose weights are plain numbers by now
        del config.quantization_config
    config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    save_file(direction, f"{folder}/direction.safetensors")
    if not args.no_agreement:
        wide = copy.deepcopy(model).double()
        for name in {split(name)[1]: name for name in names[1:]}.values():
            s = setting(name, args, wide, direction, rows.short)
            save_file(oracle(wide, s.layers, s.direction, rows.short), oracle_file(folder, name))
    return direction


def main() -> None:
    """Measure and print the table."""
    args = parse()
    names = ["forward", *(job for job in args.jobs if job != "forward")]
    rows, model = make_rows(args), load(args)
    print(
        f"{args.model}, float32, {args.rows} rows of {args.length} tokens, {float(args.prompt):.0%} prompt, batches of"
        f" {args.batch_tokens}; torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        direction = store(folder, names, args, model, rows)
        said = {name: measured_apart(name, args, rows, folder) for name in names}
    before = os.getloadavg()[0]
    times = time_jobs([name for name in names if "missing" not in said[name]], args, model, direction, rows)
    print(f"load average {before:.1f} before the rounds, {os.getloadavg()[0]:.1f} after")
    print(f"{'method':<17}{'K':>4}{'M':>3}{'seconds':>10}{'tok/s':>8}{'x fwd':>8}{'MiB':>7}   largest error / Spearman")
    for name in names:
        print(line(name, args, said[name], times.get(name, []), times["forward"]))
    print("\n".join(versus(times)))
    print(json.dumps({name: [round(t, 3) for t in spent] for name, spent in times.items()}))


if __name__ == "__main__":
    main()
