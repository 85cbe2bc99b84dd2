"""Results as JSON lines: each a benchmark's whole configuration, the versions it ran with, and what was found."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import torch

RESULTS = Path(__file__).parent / "results"


def read(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All lines of a benchmark."""
    path = folder / f"{name}.jsonl"
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def run(
    name: str,
    configs: Iterable[dict[str, Any]],
    work: Callable[[dict[str, Any]], Any],
    jobs: int,
    folder: Path = RESULTS,
) -> None:
    """Run every configuration that has no line yet, `jobs` at a time on one thread each; a line for each as it ends.

    One that fails keeps no other from running and having its line; the first such error is raised at the end.
    """
    done = {_key(line["config"]) for line in read(name, folder)}
    wanted = list({_key(config): config for config in configs if _key(config) not in done}.values())
    print(f"{name}: {len(done)} lines there, {len(wanted)} to run", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Linux gives large tensors a page at a time, and takes them back: a third of the time, but for huge pages.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        began = {pool.submit(_timed, work, config): config for config in wanted}
        failed: list[BaseException] = []
        for n, future in enumerate(as_completed(began), start=1):
            if (error := future.exception()) is not None:
                failed.append(error)
                print(f"{n}/{len(wanted)} failed: {error} {began[future]}", flush=True)
                continue
            seconds, found = future.result()
            line = {"config": began[future], "found": found, "seconds": round(seconds, 1), "versions": _versions()}
            with (folder / f"{name}.jsonl").open("ab") as sink:
                sink.write(orjson.dumps(line, option=orjson.OPT_SORT_KEYS) + b"\n")
            print(f"{n}/{len(wanted)} {seconds:.0f} s {began[future]}", flush=True)
    if failed:
        raise failed[0]


def parser(about: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark here has."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", default="../shared/data", help="folder of the real rows")
    found.add_argument("--work", default="pays.work", type=Path, help="folder for scorings and checkpoints")
    found.add_argument("--only", nargs="+", default=[], help="settings, and selections or rankings")
    found.add_argument("--jobs", type=int, default=1)
    return found


def asked(only: Sequence[str], settings: Iterable[str], setting: str, name: str) -> bool:
    """Whether `--only` lets this one pass: the settings it names and the others it names narrow apart."""
    known = set(settings)
    return narrowed(only, [(setting, known), (name, set(only) - known)])


def narrowed(only: Sequence[str], each: Iterable[tuple[str, Collection[str]]]) -> bool:
    """Whether `--only` lets one pass of which each value is one of some known: those that it names narrow apart."""
    return all(value in only for value, known in each if not set(known).isdisjoint(only))


def _timed(work: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work(config)
    return time.perf_counter() - began, found


def _key(config: dict[str, Any]) -> bytes:
    return orjson.dumps(config, option=orjson.OPT_SORT_KEYS)


def _versions() -> dict[str, str]:
    releases = {name: version(name) for name in ("alphatoken-curate", "torch", "transformers")}
    return {**releases, "products": multiplied_in()}


def multiplied_in() -> str:
    """In what the processor multiplies bfloat16: itself, or "float32" where it has it not (`training.ByFloat32`)."""
    if (of_processor := getattr(torch.cpu, "get_capabilities", None)) is None:  # older torch
        found = torch.cpu._is_avx512_bf16_supported()
    else:
        has = of_processor()
        found = has.get("avx512_bf16") or has.get("bf16")  # the latter of ARM's
    return "bfloat16" if found else "float32"
