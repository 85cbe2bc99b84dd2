"""The folder of a run: what it is called, whether it is ours to write to, and what a scoring left in it."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks.remask import MaskSummary
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.atomic import LOCK
from alphatoken_curate.runs.documents import decode
from alphatoken_curate.runs.folder import FOLDERS
from alphatoken_curate.runs.manifest import Counts, Facts, Manifest
from alphatoken_curate.runs.shards import Shard
from alphatoken_curate.scoring.budget import NAME as BUDGET
from alphatoken_curate.urls import FILE_ADVICE, check_local, expanded

SUFFIX = ".alphatoken"
"""A run folder's default name is the stem of its data and this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """What `score` did. `shards_scored` is 0 where the values were there already.

    `counts`: of generation 0, which is what it scores. `has_stability` is False where model and reference are the same,
    and every stability is 0. `beside`: names of the files written that lie beside values/ and train/.
    """

    run: Path
    manifest: Manifest
    counts: Counts
    mask: MaskSummary
    shards_scored: int
    has_stability: bool
    beside: tuple[str, ...] = ()


def default_run(config: ScoreConfig) -> Path:
    """`data.jsonl` -> `data.alphatoken`, with --limit 100 `data.limit-100.alphatoken`, in the current folder."""
    name = Path(config.data[0].rstrip("/")).name
    while Path(name).suffix in (".gz", ".zst", ".jsonl", ".json", ".ndjson", ".parquet"):
        name = Path(name).stem
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip("-._").rstrip("._")
    trial = "" if config.limit is None else f".limit-{config.limit}"
    return Path((kept or "run") + trial + SUFFIX)


def check_ours(run: Path) -> None:
    """Refuse a folder that holds other things: a README.md there is not ours to replace."""
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run}: a file. Name a folder for the run with -o.")
    if not run.exists() or (run / "artifacts" / BUDGET).is_file() or (run / manifest.NAME).is_file():
        return
    foreign = sorted(path.name for path in run.iterdir() if path.name not in (*FOLDERS, LOCK))
    if foreign:
        raise UsageError(f"{run}: not a run folder, and not empty (it has {foreign[0]!r}). Name another one with -o.")


def artifacts_of(run: str | None) -> Path | None:
    """The artifacts/ of the run that --reuse names. Raises UsageError where there are none."""
    if run is None:
        return None
    check_local(run, FILE_ADVICE)
    folder = expanded(run) / "artifacts"
    if not folder.is_dir():
        raise UsageError(f"--reuse {run}: no run folder with artifacts/ in it. Name a run that was scored before.")
    return folder


def of_its_own(run: Path, config: ScoreConfig) -> ScoreConfig:
    """The settings of the mask that a scoring makes: by its own values, whatever was scored at checkpoints since."""
    several = len(manifest.read(run).generations) > 1
    return replace(config, generation="0") if several and config.generation == "latest" else config


def counts_of(run: Path, stored: Manifest, number: int) -> Counts:
    """Those of a generation, by the footers of its shards: the manifest has them of the newest alone."""
    [one] = [one for one in stored.generations if one.generation == number]
    if one is stored.generations[-1]:
        return stored.counts
    footers = [shards.read_footer(run / shard.path) for shard in one.shards]
    return manifest.added_up([footer.counts for footer in footers], [decode(Facts, dict(f.facts)) for f in footers])


def marks(run: Path) -> dict[str, tuple[int, int]]:
    """What tells the files of a run that lie beside values/ and train/ from others of their names."""
    found = {}
    for path in (*run.glob("*"), *run.glob("artifacts/*")):
        with suppress(OSError):  # what another process takes away meanwhile
            about = path.lstat()
            if stat.S_ISREG(about.st_mode) and path.name != LOCK:
                found[path.relative_to(run).as_posix()] = (about.st_ino, about.st_mtime_ns)
    return found


def written(run: Path, before: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """The names of those that are others than `before`."""
    return tuple(sorted(name for name, mark in marks(run).items() if before.get(name) != mark))


def is_as_named(run: Path, path: Path, named: Shard) -> bool:
    """Whether a shard is the one that the manifest names; its bytes are read where it was touched since that was made.

    Raises as `shards.facts_of`.
    """
    return shards.untouched(path, named, run / manifest.NAME) or shards.facts_of(path)[1] == named
