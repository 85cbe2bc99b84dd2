"""Train with every trainer, each in an environment of its own, and compare its first loss with one computed by hand.

    python tests/trainer_envs/run.py --envs DIR

makes the environments below DIR (some 12 GB, once), a tiny model, runs scored with it and their exports, trains a few
steps with each trainer by the config lines of the exports' READMEs, and prints a table. Exit 1 where a loss differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import environments
import material
from place import Found
from trainers import CASES, Case

HEADER = ("trainer", "version", "what", "reported", "by hand", "difference", "")


def main() -> int:
    asked = _parser().parse_args()
    cases = [case for case in CASES if not asked.only or case.environment in asked.only]
    for name in dict.fromkeys(case.environment for case in cases):
        environments.make(asked.envs, name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.work or Path(temporary)
        made = material.make(folder.resolve())
        print(_line(HEADER), _line("---" for _ in HEADER), sep="\n", flush=True)
        results = [_printed(case, case.found(asked.envs.resolve(), made, folder.resolve() / "cases")) for case in cases]
    return 0 if all(results) else 1


def _printed(case: Case, found: Found) -> bool:
    numbers = (f"{found.reported:.6f}", f"{found.by_hand:.6f}", f"{found.reported - found.by_hand:+.1e}")
    verdict = "same" if found.agrees else f"DIFFERS by more than {found.tolerance:g}"
    print(_line((case.environment, case.version, case.what, *numbers, verdict)), flush=True)
    return found.agrees


def _line(cells: Iterator[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--envs", type=Path, required=True, metavar="DIR", help="where the environments are, or go")
    parser.add_argument("--only", nargs="+", choices=environments.NAMES, metavar="NAME", help="environments to use")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model, runs, exports and outputs here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
