"""Questions to the tokens of a large run, by `scan_tokens` and polars: seconds and peak memory.

    python tests/benchmarks/tokens.py --tokens 10000000 --threads 2

The run is made of random signals by the functions that a real run uses, in a temporary folder (about 40 bytes a token).
Each question has a process of its own; memory is what is resident at most, above what is once polars is loaded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from speed import in_a_process, peak

Question = Callable[..., int]


def histogram(frame: object) -> int:
    """The histogram of sample_data/README.md."""
    import polars as pl

    value = pl.col("value").clip(-3, 3).round(0).cast(pl.Int8)
    counted = frame.group_by(value).agg(pl.len(), pl.col("kept").mean())  # type: ignore[attr-defined]
    return int(counted.collect(engine="streaming")["len"].sum())


def classes(frame: object) -> int:
    """How many tokens of each class, and what they are worth."""
    import polars as pl

    counted = frame.group_by("class").agg(  # type: ignore[attr-defined]
        pl.len(), pl.col("value").mean(), pl.col("kept").mean()
    )
    return int(counted.collect(engine="streaming")["len"].sum())


def types(frame: object) -> int:
    """The token types that are dropped most."""
    import polars as pl

    counted = frame.group_by("text").agg(pl.len(), pl.col("kept").mean())  # type: ignore[attr-defined]
    return int(counted.collect(engine="streaming")["len"].sum())


QUESTIONS: dict[str, Question] = {"value histogram": histogram, "by class": classes, "by token type": types}


def asked(name: str, run: Path) -> tuple[int, float, int]:
    """Tokens counted, seconds, and the most bytes in memory above those at the start."""
    import polars as pl

    from alphatoken_curate import scan_tokens

    pl.select(pl.lit(1)).lazy().collect(engine="streaming")
    with peak() as most:
        began = time.perf_counter()
        counted = QUESTIONS[name](scan_tokens(run))
        seconds = time.perf_counter() - began
    return counted, seconds, most[0]


def make(run: Path, tokens: int) -> int:
    """Write the run; its bytes."""
    from made_run import made_run

    made_run(run, tokens)
    return sum(path.stat().st_size for path in run.rglob("*.parquet"))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="response tokens")
    parser.add_argument("--threads", type=int, default=2, help="threads of polars")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a run folder in place of one that is made; it is made where missing")
    args = parser.parse_args()
    os.environ["POLARS_MAX_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or Path(folder) / "run"
        if not run.is_dir():
            began = time.perf_counter()
            size = in_a_process(make, run, args.tokens)
            print(f"{args.tokens:,} tokens written in {time.perf_counter() - began:.0f} s, {size / 1e6:,.0f} MB")
        print(f"{'question':<18}{'tokens':>14}{'seconds':>9}{'M tokens/s':>12}{'peak MiB':>10}")
        for name in QUESTIONS:
            rounds = [in_a_process(asked, name, run) for _ in range(args.rounds)]
            counted, seconds, most = rounds[0][0], min(one[1] for one in rounds), max(one[2] for one in rounds)
            print(f"{name:<18}{counted:>14,}{seconds:>9.2f}{counted / seconds / 1e6:>12.1f}{most / 2**20:>10,.0f}")


if __name__ == "__main__":
    main()
