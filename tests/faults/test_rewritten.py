"""Weights that another process writes while they are scored, with the real command in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_files import contents, token_records, write_jsonl


def begun(data: str, model: Path, run: Path) -> subprocess.Popen[str]:
    """A scoring of many shards that has committed some."""
    line = [sys.executable, "-m", "alphatoken_curate", "score", data, "-o", str(run), "--model", str(model)]
    options = ["--layers", "2", "--rows-per-shard", "5", "--batch-tokens", "64"]
    process = subprocess.Popen([*line, *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(run.glob("values/*/*.parquet"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


@pytest.mark.parametrize(
    "how", [pytest.param("dd conv=notrunc", marks=pytest.mark.slow), pytest.param("truncate", marks=pytest.mark.long)]
)
def test_the_process_ends_with_4_and_what_was_committed_is_right(
    how: str, models: dict[str, str], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models["base"], tmp_path / "model"))
    data = write_jsonl(tmp_path / "rows.jsonl", token_records(150))
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    whole = begun(data, model, tmp_path / "whole")
    assert whole.communicate()[1] is not None and whole.returncode == 0
    process = begun(data, model, tmp_path / "run")
    if how == "truncate":
        os.truncate(weights, 9000)
    else:
        subprocess.run(
            ["dd", "if=/dev/urandom", f"of={weights}", "bs=1000", "seek=9", "count=200", "conv=notrunc"],
            check=True,
            capture_output=True,
        )
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 4, (process.returncode, told)  # a bus error is -7
    assert f"{weights} " in told or f"{weights}:" in told
    assert "it changed while it was in use" in told
    kept = {name: data for name, data in contents(tmp_path / "run").items() if name.startswith("values/")}
    assert 3 <= len(kept) < 30 and kept.items() <= contents(tmp_path / "whole").items()
    weights.write_bytes(content)
    again = begun(data, model, tmp_path / "run")
    assert again.communicate()[1] is not None and again.returncode == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
