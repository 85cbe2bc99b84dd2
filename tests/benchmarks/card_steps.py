"""The steps of `card.py run` that are no script of their own: what each found, as JSON, written as it goes on.

python card_steps.py STEP RESULT DEVICE      # in the environment that card.py makes
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from card import put_whole

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "bundle.json").is_file() else HERE.parents[1]
"""Of a bundle, or of the project."""

SHAPES = {"cuda": "llama-3.2-1b", "cpu": "tiny"}
"""Of the end-to-end model, by the names that `gpu.py` has."""

ROWS = {"cuda": (384, 1024), "cpu": (96, 48)}
"""How many, and tokens of the longest."""

SETTINGS = ("--batch-tokens", "8192", "--rows-per-shard", "32", "--fisher-rows", "32", "--estimator", "exact")
FULL_PRECISION = {"NVIDIA_TF32_OVERRIDE": "0"}
"""Products of float32 are of float32, whatever the machine prefers."""

SAME_RUN = 0.02
"""Of the largest value: what two runs in bfloat16 may differ by, where a card adds up in no fixed order."""

MASKS = (("--keep", "0.5", "--always-keep", "none"), ("--by", "nll", "--keep", "0.6", "--scope", "row"))


class Result:
    """What a step found so far; a change is written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}

    def put(self, **found: Any) -> None:
        """Add to it."""
        self.found |= found
        put_whole(self.path, json.dumps(self.found))


# -------------------------------------------------------------------------------------------------------------- tests


def tests(result: Result, device: str) -> int:
    """The tests that need a card, each counted as it ends. On a CPU they run there."""
    import pytest

    class Count:
        """Outcomes by test."""

        def __init__(self) -> None:
            self.passed, self.failed, self.skipped = 0, list[dict[str, str]](), 0

        def pytest_runtest_logreport(self, report: Any) -> None:
            """A phase of a test ended."""
            if report.failed:
                self.failed.append({"test": report.nodeid, "said": str(report.longrepr)[-1500:]})
            self.skipped += report.skipped
            self.passed += report.when == "call" and report.passed
            result.put(passed=self.passed, failed=self.failed, skipped=self.skipped)

    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CARD": device, **FULL_PRECISION}
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        os.environ.pop(name, None)
    # What libraries of the machine warn of is not at stake.
    chosen = ["-m", "cuda", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    chosen += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    count = Count()
    code = int(pytest.main([*chosen, str(ROOT / "tests" / "whole" / "test_cuda.py")], plugins=[count]))
    return code or int(not count.passed or bool(count.skipped))


# ---------------------------------------------------------------------------------------------------------- whole run


def whole_run(result: Result, device: str) -> int:
    """`score` by the command line, killed and started again, beside one that was not; then masks and an export."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        asked = scoring(folder, device)
        result.put(**made(folder, device))
        broken, unbroken = folder / "broken.alphatoken", folder / "unbroken.alphatoken"
        kept = killed(*asked, "-o", str(broken), shards=broken / "values" / "generation=0")
        result.put(shards_before_kill=kept)
        again = ran(*asked, "-o", str(broken))
        result.put(resume_seconds=again.seconds, resume_said=[line for line in again.said if line.startswith("  ")][:2])
        for number, settings in enumerate(MASKS):
            result.put(**{f"mask_{number}_said": ran("mask", str(broken), *settings).said[-4:]})
        exported = ran("export", str(broken), "--for", "hf", "-o", str(folder / "exported"))
        result.put(export_said=exported.said[-4:])
        for place in (broken, folder / "exported"):
            ran("verify", str(place))
        result.put(verified=True)
        whole = ran(*asked, "-o", str(unbroken))
        result.put(score_seconds=whole.seconds, same_bytes=values_digest(broken) == values_digest(unbroken))
        found = differences(broken, unbroken)
        result.put(largest_difference=found)
    return int(not all(x <= SAME_RUN for x in found.values()))


def scoring(folder: Path, device: str) -> list[str]:
    """The command that scores the rows of `folder` with its models, but for its run folder."""
    models = ("--model", str(folder / "tuned"), "--reference", str(folder / "base"))
    return ["score", str(folder / "rows.jsonl"), *models, "--device", device, "--dtype", "bfloat16", *SETTINGS]


def made(folder: Path, device: str) -> dict[str, Any]:
    """A random model, the same after a random step, and random rows; what they hold."""
    import torch
    from gpu import SHAPES as SIZES
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = SIZES[SHAPES[device]]
    config = LlamaConfig(**size, max_position_embeddings=4096, tie_word_embeddings=True)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter) * parameter.float().std().to(parameter.dtype))
        model.save_pretrained(folder / "tuned")
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters} | rows_of(folder / "rows.jsonl", size["vocab_size"], *ROWS[device])


def rows_of(path: Path, vocabulary: int, count: int, longest: int) -> dict[str, int]:
    """Write rows of random tokens; how many tokens they have."""
    draw, tokens, answers = random.Random(0), 0, 0
    with path.open("w") as file:
        for _ in range(count):
            length = draw.randint(longest // 8, longest)
            ids = [draw.randrange(3, vocabulary) for _ in range(length)]
            prompt = max(1, length // 3)
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}) + "\n")
            tokens, answers = tokens + length, answers + length - prompt
    return {"rows": count, "tokens": tokens, "response_tokens": answers}


class Ran:
    """A command that ended well."""

    def __init__(self, seconds: float, said: list[str]) -> None:
        self.seconds, self.said = seconds, said


def ran(*arguments: str) -> Ran:
    """Run `alphatoken-curate ARGUMENTS`. Ends the step where it fails."""
    began = time.monotonic()
    done = subprocess.run(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(f"$ alphatoken-curate {' '.join(arguments)}\n{done.stdout}", flush=True)
    if done.returncode:
        raise SystemExit(f"`{arguments[0]}` ended with {done.returncode}")
    return Ran(round(time.monotonic() - began, 1), done.stdout.splitlines())


def command(*arguments: str) -> list[str]:
    """As the installed command does it."""
    return [sys.executable, "-m", "alphatoken_curate", *arguments]


def killed(*arguments: str, shards: Path) -> int:
    """Run a command until it has committed two shards, and kill it; how many it left."""
    child = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL)
    while child.poll() is None and len(list(shards.glob("*.parquet"))) < 2:
        time.sleep(0.02)
    if child.poll() is not None:
        raise SystemExit(f"it ended with {child.returncode} before it could be killed")
    child.kill()
    child.wait()
    return len(list(shards.glob("*.parquet")))


def values_digest(run: Path) -> str:
    """Of all shards of values."""
    digest = hashlib.sha256()
    for path in sorted((run / "values").rglob("*.parquet")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def differences(one: Path, other: Path) -> dict[str, float]:
    """Of each column of signals: the largest difference of two runs, in parts of the largest value."""
    import numpy as np

    from alphatoken_curate import scan_tokens

    first, second = (scan_tokens(run).collect() for run in (one, other))
    found = {}
    for name, kind in first.schema.items():
        if first[name].null_count() != second[name].null_count():
            found[name] = math.inf
        elif kind.is_float() and first[name].null_count() == 0 and name != "loss_weight":
            a, b = (frame[name].to_numpy().astype(np.float64) for frame in (first, second))
            found[name] = float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300))
    return found


# -------------------------------------------------------------------------------------------------------- same as cpu


def same_as_cpu(result: Result, device: str) -> int:
    """A tiny model in float32 through the command line, there and on the CPU, by every estimator."""
    from tiny_files import save_models

    os.environ |= FULL_PRECISION
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = save_models(folder)
        rows_of(folder / "rows.jsonl", 60, 24, 40)
        asked = ["score", str(folder / "rows.jsonl"), "--model", models["tuned"], "--reference", models["base"]]
        worst: dict[str, dict[str, float]] = {}
        for estimator in ("exact+influence", "published"):
            runs = []
            for place in (device, "cpu"):
                runs.append(folder / f"{estimator}-{place}-{len(runs)}")
                flags = ("--device", place, "--dtype", "float32", "--estimator", estimator, "--batch-tokens", "256")
                ran(*asked, *flags, "-o", str(runs[-1]))
            worst[estimator] = differences(*runs)
            result.put(largest_difference=worst, within=1e-4)
    return int(not all(x <= 1e-4 for each in worst.values() for x in each.values()))


# ------------------------------------------------------------------------------------------------------------- memory


def memory(result: Result, device: str) -> int:
    """What `check --estimate` says of the 1B model's scoring, beside what that then takes."""
    from estimate import run, told

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result.put(**made(folder, device))
        _, *asked = scoring(folder, device)
        said = run("check", *asked, "--estimate")
        seconds, peak = told(said.out)
        result.put(estimated_seconds=seconds, estimated_peak_mib=peak, check_seconds=said.seconds)
        done = run("score", *asked, "-o", str(folder / "run"))
        result.put(score_seconds=done.seconds, peak_mib=done.peak)
    return 0


# ------------------------------------------------------------------------------------------------------------ profile


def profile(result: Result, device: str) -> int:
    """Where the time of one pass over rows goes with K = 3: the ten kernels that take most."""
    import torch
    from gpu import Device, make_batches, make_model
    from speed import job
    from torch.profiler import ProfilerActivity

    shape, length = ("llama-3-8b", 2048) if device == "cuda" else ("tiny", 64)
    args = Namespace(shape=shape, dtype="bfloat16", rows=8, length=length, batch_tokens=8192)
    place = Device(device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.is_card else [])]
    batches = make_batches(args, 0.25)
    for name in ("3 published", "3 exact"):
        model = make_model(args, place)
        work = job(name, model)
        work(batches)
        seconds = place.seconds(lambda work=work: work(batches))
        with torch.profiler.profile(activities=kinds) as watched:
            place.seconds(lambda work=work: work(batches))
        result.put(**{name: kernels(watched.key_averages(), seconds, place.is_card)})
        del model, work
        place.used()
    return 0


def kernels(events: Any, seconds: float, on_card: bool) -> dict[str, Any]:
    """The ten that take most of the device's time, and how much of the pass the device was at work."""
    spent = {e.key: (e.self_device_time_total if on_card else e.self_cpu_time_total) / 1e6 for e in events}
    calls = {e.key: e.count for e in events}
    # Of an operator torch counts the kernels it began once more; on a card only kernels are wanted.
    if on_card:
        spent = {e.key: spent[e.key] for e in events if str(e.device_type).endswith("CUDA")}
    busy = sum(spent.values())
    top = sorted(spent, key=lambda key: -spent[key])[:10]
    told = [{"kernel": key[:90], "calls": calls[key], "seconds": spent[key], "share": spent[key] / busy} for key in top]
    return {"seconds": seconds, "busy_seconds": busy, "top": told}


STEPS: dict[str, Callable[[Result, str], int]] = {
    step.__name__: step for step in (tests, whole_run, same_as_cpu, memory, profile)
}


def main() -> int:
    """The step that is named."""
    name, path, device = sys.argv[1:]
    return STEPS[name](Result(Path(path)), device)


if __name__ == "__main__":
    raise SystemExit(main())
