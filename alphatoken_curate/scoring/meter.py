"""Seconds and bytes of what devices are doing: of the cards on CUDA, of this process anywhere else."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 and 1: the limit, what is used of it, and the part of that which is given back when it is needed."""


class Meter:
    """Measures a device, or several cards that a model is dealt over."""

    def __init__(self, *devices: torch.device) -> None:
        self._cards = [device for device in devices if device.type == "cuda"]

    def now(self) -> float:
        """Seconds on a clock that only goes forward, once all work given to the devices is done."""
        for card in self._cards:
            torch.cuda.synchronize(card)
        return time.perf_counter()

    def used(self) -> int:
        """Bytes in use, of all cards together."""
        if self._cards:
            return sum(torch.cuda.memory_allocated(card) for card in self._cards)
        return _status("VmRSS") or peak_of_process()

    def begin(self) -> None:
        """Forget the peak so far. That of a process only ever grows: there it remains a bound from above."""
        for card in self._cards:
            torch.cuda.reset_peak_memory_stats(card)

    def peak(self) -> int:
        """Most bytes in use since `begin`; of several cards the sum of theirs."""
        if self._cards:
            return sum(torch.cuda.max_memory_allocated(card) for card in self._cards)
        return peak_of_process()

    def room(self) -> int:
        """Bytes that could be taken beside those in use; of several cards on the fullest, as if all fell to that."""
        return min(map(_free_of, self._cards)) if self._cards else min([_free(), *cgroup_room()])


def _free_of(card: torch.device) -> int:
    free = torch.cuda.mem_get_info(card)[0]
    return free + torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)


def peak_of_process() -> int:
    """Most bytes of memory this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int | None:
    """A number of bytes the kernel keeps of this process; None where it keeps none."""
    return _kibibytes(Path("/proc/self/status"), name)


def _kibibytes(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def _free() -> int:
    available = _kibibytes(Path("/proc/meminfo"), "MemAvailable")
    if available is not None:
        return available
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def cgroup_room(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes left under each limit that the control groups of this process set, of either version."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", maxsplit=2)
        base = root / "memory" if controllers == "memory" else root
        if controllers not in ("", "memory"):
            continue
        group = base / place.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                yield from _left(folder)


def _left(folder: Path) -> Iterator[int]:
    for limit, used, spare in _CGROUP_FILES:
        try:
            most = (folder / limit).read_text().strip()
            held = int((folder / used).read_text())
            kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":
            yield int(most) - held + int(kept.get(spare, 0))
