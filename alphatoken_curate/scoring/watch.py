"""A run scored again at each checkpoint of a training, as it is completed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Set
from contextlib import closing
from pathlib import Path

from alphatoken_curate.errors import BusyError, FingerprintError, InputError, ModelError, UsageError
from alphatoken_curate.models.checkpoints import Watcher, is_complete, signature
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.scoring.engines import Engine, Here
from alphatoken_curate.scoring.refresh import RefreshSummary, Rescored


def watch(
    run: Path | str,
    folder: Path | str,
    *,
    interval: float = 30.0,
    base: str | None = None,
    reference: str | None = None,
    device: str | None = None,
    trunk_device: str | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Iterator[RefreshSummary]:
    """`refresh` at each checkpoint of a training run's output folder, as it is completed. Never ends by itself.

    `interval`: seconds between looks. What was scored before, by this process or another, is not scored again. A
    checkpoint that cannot be scored is told of and passed over; while another process holds the run, it is waited for.
    `engine`: as in `score`; its workers stay from one checkpoint to the next.
    """
    places = {"base": base, "reference": reference, "device": device, "trunk_device": trunk_device}
    with closing(engine or Here()) as running:
        yield from _watched(run, folder, interval, running, progress or Silent(), **places)


def _watched(
    run: Path | str, folder: Path | str, interval: float, engine: Engine, listener: Progress, **places: str | None
) -> Iterator[RefreshSummary]:
    known = Rescored(Path(run), listener, **places)
    if Path(folder).is_file() or (Path(folder).is_dir() and is_complete(Path(folder)) is None):
        raise UsageError(f"{folder}: not a training's output folder. Score a single checkpoint with --checkpoint.")
    watcher = Watcher(Path(folder), base=known.base)
    listener.note(f"watching {folder} for checkpoints, every {interval:g} s, until it is stopped")
    seen: set[object] = set()
    told: set[str] = set()
    while True:
        for checkpoint in watcher.ready():
            place = checkpoint.source.adapter or checkpoint.source.folder
            try:
                mark = (place, signature(place))
                done = None if mark in seen else known.refresh(checkpoint, engine, listener)
            except BusyError as error:
                listener.note(f"{checkpoint.name} is tried again: {error}")
                break
            except FingerprintError as error:
                if error.fields != ("model",) or (place.is_dir() and signature(place) == mark[1]):
                    raise  # not this checkpoint was written again
                listener.warn(f"{checkpoint.name} is tried again: {error}")
                continue
            except (ModelError, InputError, FileNotFoundError) as error:
                # Not fit to be scored; or the training deleted it, file by file, while it was read: it may come back.
                if is_complete(place) is None:
                    seen.add(mark)
                listener.warn(f"{checkpoint.name} is not scored: {error}")
                continue
            seen.add(mark)
            if done is not None:
                yield done
        told = _tell(watcher, told, listener)
        time.sleep(interval)


def _tell(watcher: Watcher, told: Set[str], listener: Progress) -> set[str]:
    """What the last look found not fit or not ready, but what was told of the same name before; returns what is now."""
    waiting = {f"waiting {name}": f"{name} is waited for: {why}" for name, why in watcher.waiting.items()}
    refused = {f"refused {name}": f"{name} is not scored: {why}" for name, why in watcher.refused.items()}
    for name in waiting.keys() - told:
        listener.note(waiting[name])
    for name in refused.keys() - told:
        listener.warn(refused[name])
    return {*waiting, *refused}
