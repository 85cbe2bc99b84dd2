"""Write an SFT and a preference run of the schema version in force, and what they hold as JSON, in one file: vN.tar.xz.

    python tests/support/store_runs.py tests/data

Run it once for each schema version, with the last commit that has it. Runs of earlier versions are kept for ever and
never written again.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from small_run import scored, small_run, value_rows

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.runs.schema import SCHEMA_VERSION

GENERATIONS = (0, 2)


def plain(row: Any) -> dict[str, Any]:
    """A row that was written, as lists and numbers."""
    found = {name: getattr(row, name) for name in ("row_id", "source", "line", "id", "status", "omega", "margin")}
    branches = []
    for branch in row.branches:
        signals = {name: [None if np.isnan(x) else float(x) for x in s] for name, s in branch.signals.items()}
        ids, response = branch.input_ids.tolist(), branch.response.tolist()
        branches.append({"input_ids": ids, "response": response, "signals": signals})
    return found | {"branches": branches}


def main(folder: Path) -> None:
    """Write the file into a folder."""
    with tempfile.TemporaryDirectory() as made:
        held = {kind: write(Path(made) / kind, kind) for kind in ("sft", "preference")}
        (Path(made) / "held.json").write_text(json.dumps(held) + "\n")
        with tarfile.open(folder / f"v{SCHEMA_VERSION}.tar.xz", "w:xz") as archive:
            for name in (*held, "held.json"):
                archive.add(Path(made) / name, name, filter=anonymous)


def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of who made it, and when."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def write(run: Path, kind: str) -> dict[str, Any]:
    """A run, and what it holds."""
    rows = value_rows(9, kind=kind)
    numbers = GENERATIONS if kind == "sft" else GENERATIONS[:1]
    small_run(run, rows, per_shard=5, generations=numbers, config=MaskConfig(keep=0.4, weights="rank"))
    held = {}
    for number in numbers:
        again = [scored(row, seed=number) if row.status == "scored" and number else row for row in rows]
        held[str(number)] = [plain(row) for row in again]
    train = [row for path in sorted((run / "train").rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {"values": held, "train": train}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
