"""Does `check --estimate` tell what scoring takes? Predicted beside measured, each in a process of its own.

    python tests/benchmarks/estimate.py --data gsm8k_sft.jsonl --rows 400
    python tests/benchmarks/estimate.py --data gsm8k_sft.jsonl --rows 200 -- --estimator exact --layers all

What follows `--` goes to both commands. Seconds are those of a whole command on the wall; memory is the most that its
process ever held, or on a card that torch allocated there since the last trial of a batch. Both commands share what
else the machine does: a ratio means little where it was busy, so the load is printed, and `--repeat` does it all again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One command: what it printed, its seconds, and its peak in MiB."""

    out: str
    seconds: float
    peak: float


def run(*arguments: str) -> Ran:
    """`alphatoken-curate ARGUMENTS` in a process of its own."""
    code = (
        "import sys, resource; from alphatoken_curate.cli.main import main; sys.argv[0] = 'alphatoken-curate'\n"
        "try: main()\n"
        "finally:\n"
        "    import torch\n"
        "    card = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0\n"
        "    print('PEAK', card // 1024 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}")
    return Ran(out=done.stdout, seconds=seconds, peak=int(done.stdout.split("PEAK")[1]) / 1024)


def told(out: str) -> tuple[float, float]:
    """Seconds and MiB of the estimate's total."""
    found = re.search(r"total +([\d,.]+) +peak memory ([\d,]+) MiB, ([\d,]+) tokens", out)
    if found is None:
        raise SystemExit(f"no estimate in:\n{out}")
    return float(found[1].replace(",", "")), float(found[2].replace(",", ""))


def compare(data: Path, folder: Path, flags: list[str]) -> str:
    """A line of the table."""
    before = os.getloadavg()[0]
    asked = run("check", str(data), "--estimate", *flags)
    print(asked.out[asked.out.index("estimate") :].split("PEAK")[0])
    seconds, peak = told(asked.out)
    scored = run("score", str(data), "-o", str(folder / "run"), *flags)
    load = f"{before:.1f} to {os.getloadavg()[0]:.1f}"
    return (
        f"{seconds:10.1f} {scored.seconds:9.1f} {seconds / scored.seconds:6.2f}"
        f" {peak:10.0f} {scored.peak:9.0f} {peak / scored.peak:6.2f} {asked.seconds:9.1f}  {load}"
    )


def main() -> None:
    """Run it all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400, help="the first so many rows of --data")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("flags", nargs="*", help="after --: flags of score")
    args = parser.parse_args()
    lines = []
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.jsonl"
            data.write_text("".join(args.data.read_text().splitlines(keepends=True)[: args.rows]))
            lines.append(compare(data, Path(folder), args.flags))
    print("   seconds  measured  ratio   peak MiB  measured  ratio  estimate  load")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
