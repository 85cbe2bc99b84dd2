"""Where a run can be killed, what must hold of one that was, and a bench on which commands are killed and resumed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import yaml
from forks import Forks, Process
from safetensors import safe_open
from tiny_files import contents, token_records, write_jsonl

from alphatoken_curate import verify
from alphatoken_curate.runs import shards
from alphatoken_curate.runs.atomic import LOCK, TEMPORARY

POINTS = ("after-temp-open", "mid-write", "after-fsync", "after-close", "after-rename")


def assert_readable(run: Path) -> None:
    """Every file at a final name is whole."""
    for path in run.rglob("*"):
        if not path.is_file() or TEMPORARY.fullmatch(path.name) or path.name == LOCK:
            continue
        if path.suffix == ".parquet":
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                file.read()
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    tensors.get_tensor(name)
        elif path.suffix == ".json":
            orjson.loads(path.read_bytes())
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_bytes()), dict)
        elif path.suffix == ".jsonl":
            assert [orjson.loads(line) for line in path.read_bytes().splitlines()]
        else:
            assert path.name == "README.md" and path.read_text().startswith("---\n")


def temporaries(run: Path) -> list[Path]:
    return [path for path in run.rglob("*") if TEMPORARY.fullmatch(path.name)]


SHARDS = 4


MASK = ("--keep", 0.2, "--weights", "rank")


@dataclass(frozen=True)
class Bench:
    """A place where commands of the three kinds begin from the same state: nothing, or a finished run."""

    forks: Forks
    folder: Path
    models: dict[str, str]
    fake: bool

    def arguments(self, kind: str, run: Path) -> tuple[object, ...]:
        """A command whose every shard is to be written."""
        if kind == "mask":
            return ("mask", run, *MASK)
        if kind == "refresh":
            return ("refresh", run, "--checkpoint", self.models["broken"] if self.fake else self.models["base"])
        data = self.folder / "rows.jsonl"
        about = ("--bad-rows", "quarantine", "--rows-per-shard", 3, "--layers", 2, "--device", "cpu")
        models = ("--model", self.models["tuned"], "--reference", self.models["base"], "--batch-tokens", 512)
        return ("score", data, *about, *models, "-o", run)

    def run(self, kind: str, run: Path, **how: object) -> Process:
        return self.forks.run(*self.arguments(kind, run), fake=self.fake, **how)

    def begun(self, kind: str, run: Path) -> Path:
        """The run as the command finds it."""
        if kind != "score":
            shutil.copytree(self.folder / "whole-score", run)
        return run

    def whole(self, kind: str) -> Path:
        """The run as the command leaves it where nothing breaks it."""
        place = self.folder / f"whole-{kind}"
        if not place.exists():
            if kind != "score":
                self.whole("score")
            ended = self.run(kind, self.begun(kind, place))
            assert ended.code == 0, ended.err
            assert verify(place) == []
        return place

    def scored(self, kind: str, run: Path) -> set[int]:
        """Shards of values/ that the command writes and that are there."""
        return set(shards.listed(shards.values_folder(run, 1 if kind == "refresh" else 0)))


def bench_of(forks: Forks, folder: Path, models: dict[str, str], *, fake: bool) -> Bench:
    folder.mkdir(parents=True)
    write_jsonl(folder / "rows.jsonl", [*token_records(11), "{"])
    return Bench(forks=forks, folder=folder, models=models, fake=fake)


def stamps(run: Path) -> dict[str, tuple[int, int]]:
    """Finished files that are never written twice: which file each is, and when it was written."""
    found = {}
    for path in run.rglob("*"):
        if path.suffix in (".parquet", ".safetensors"):
            about = path.stat()
            found[str(path.relative_to(run))] = about.st_ino, about.st_mtime_ns
    return found


def resumed(bench: Bench, kind: str, run: Path, log: Path) -> None:
    """Let the command end: only what was not finished is done, and the end is that of an unbroken run."""
    before, there = stamps(run), bench.scored(kind, run)
    log.unlink(missing_ok=True)
    ended = bench.run(kind, run, log=log)
    assert ended.code == 0, ended.err
    done = [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []
    assert sorted(done) == (sorted(set(range(SHARDS)) - there) if kind != "mask" else [])
    now = stamps(run)
    assert {name: now[name] for name in before} == before
    assert contents(run) == contents(bench.whole(kind))
