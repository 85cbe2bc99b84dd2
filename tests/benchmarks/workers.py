"""What workers save: the same rows scored by one process and by several, and by parts at the same time, in one run.

    python tests/benchmarks/workers.py --data ../shared/data/gsm8k_sft.jsonl --rows 192
    python tests/benchmarks/workers.py --data ../shared/data/gsm8k_sft.jsonl --rehearsal --rows 16 --workers 2

Each worker has one thread. Seconds are of the whole call and of its stage of scoring alone, which starts and models
once loaded are no part of where it is long; all files of a run are compared with those of the first. `ray` is left out
where Ray is not installed. Ratios are of tokens a second in the stage of scoring. With `--rehearsal` values are
rehearsed, of 8 outcomes, and the stage and the ratios are those of the rehearsal, once its model is loaded in one
process, and models included with workers; there are no parts then, which do not share it, and no Ray.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from filecmp import dircmp
from pathlib import Path
from typing import Any

from alphatoken_curate import Local, Ray, ScoreConfig, score
from alphatoken_curate.progress import Silent
from alphatoken_curate.scoring.engines import Here


class Clock(Silent):
    """Seconds and tokens of a stage, by how its name begins."""

    def __init__(self, of: str) -> None:
        self.of, self.began, self.seconds, self.tokens = of, 0.0, 0.0, 0

    def stage(self, name: str, tokens: int) -> None:
        self.end()
        if name.startswith(self.of):
            self.began, self.tokens = time.monotonic(), self.tokens + tokens

    def end(self) -> None:
        """Whatever is done now."""
        self.seconds += time.monotonic() - self.began if self.began else 0.0
        self.began = 0.0


def timed(config: ScoreConfig, run: Path, engine: Any) -> tuple[float, float, int]:
    """Seconds of a scoring, of the stage that most of it is, and the tokens of that."""
    clock, began = Clock("rehearsal" if config.rehearses else "scoring"), time.monotonic()
    score(config, run, clock, engine)
    clock.end()
    return time.monotonic() - began, clock.seconds, clock.tokens


def by_parts(config: ScoreConfig, run: Path, parts: int) -> float:
    """Seconds of `prepare`, parts at the same time, and what ends the run, as commands."""
    flags = {"model": config.model, "target": config.target, "limit": config.limit}
    flags |= {"rows-per-shard": config.rows_per_shard, "batch-tokens": config.batch_tokens, "threads": 1}
    line = [sys.executable, "-m", "alphatoken_curate", "score", config.data[0], "-o", str(run)]
    line += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    began = time.monotonic()

    def start(*more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*line, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    for step in ([["--part", "prepare"]], [["--part", f"{n}/{parts}"] for n in range(parts)], [[]]):
        if any([one.wait() for one in [start(*more) for more in step]]):
            raise SystemExit("a part failed")
    return time.monotonic() - began


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte by byte."""
    found = dircmp(one, other, shallow=False) if sys.version_info >= (3, 13) else dircmp(one, other)
    alike = not (found.left_only or found.right_only or found.funny_files)
    alike = alike and all((one / name).read_bytes() == (other / name).read_bytes() for name in found.common_files)
    return alike and all(same(one / name, other / name) for name in found.common_dirs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample_data/sft.jsonl")
    parser.add_argument("--target", default="sample_data/target.jsonl")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--rows-per-shard", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rehearsal", action="store_true")
    parser.add_argument("--layers", default="3")
    parser.add_argument("--rows-per-step", type=int, default=4)
    args = parser.parse_args()
    rehearsed = {"direction": "rehearsal", "rehearse_lr": 1e-5, "rehearse_rows_per_step": args.rows_per_step}
    config = ScoreConfig(
        data=(args.data,),
        target=args.target,
        model=args.model,
        limit=args.rows,
        rows_per_shard=args.rows_per_shard,
        batch_tokens=1024,
        threads=1,
        layers="all" if args.layers == "all" else int(args.layers),
        **(rehearsed | {"target_groups": 8, "parameters": "linear"} if args.rehearsal else {}),
    )
    engines: dict[str, Callable[[], Any]] = {"1 process": Here}
    engines |= {f"{n} workers": lambda n=n: Local(n) for n in args.workers}  # type: ignore[misc]
    if importlib.util.find_spec("ray") and not args.rehearsal:
        engines["Ray, 2 workers"] = lambda: Ray(workers=2)
    stage = "rehearsal" if args.rehearsal else "scoring"
    print(f"| who | seconds in all | {stage} | tokens/s | ratio | same bytes |\n|---|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        first, rate, one = Path(folder) / "1 process", 0.0, 0
        for name, engine in engines.items():
            whole, last, tokens = timed(config, run := Path(folder) / name, engine())
            # Of a rehearsal those there and back, once: what workers train more than one does is their own matter.
            one = one or tokens
            tokens = one if args.rehearsal else tokens
            rate = rate or tokens / last
            told = f"{whole:.1f} | {last:.1f} | {tokens / last:.0f} | {tokens / last / rate:.2f}"
            print(f"| {name} | {told} | {'yes' if same(first, run) else 'NO'} |", flush=True)
        if args.rehearsal:
            return
        seconds = by_parts(config, run := Path(folder) / "parts", 2)
        print(f"| 2 parts at once | {seconds:.1f} |  |  |  | {'yes' if same(first, run) else 'NO'} |")


if __name__ == "__main__":
    main()
