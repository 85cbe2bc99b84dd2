from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphatoken_curate.scoring.meter import Meter, cgroup_room

MIB = 1 << 20


FRESH = """
import torch
from alphatoken_curate.scoring.meter import Meter, peak_of_process

MIB = 1 << 20
meter = Meter(torch.device("cpu"))
before, room = meter.used(), meter.room()
held = torch.ones(64 * MIB, dtype=torch.uint8)
assert 60 * MIB < meter.used() - before < 80 * MIB
assert meter.peak() == peak_of_process() >= meter.used() - MIB
assert 0 < meter.room() <= room + 64 * MIB and len(held)
del held
assert meter.used() - before < 30 * MIB and meter.peak() - before > 60 * MIB
"""


@pytest.mark.long
def test_memory_of_a_process() -> None:
    """In a process of its own: one that ran other tests may hold free memory, and takes no more for a while."""
    done = subprocess.run([sys.executable, "-P", "-c", FRESH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_seconds_go_forward() -> None:
    meter = Meter(torch.device("cpu"))
    assert meter.now() < meter.now()


def group(folder: Path, version: int, limit: str, used: int, spare: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    stat = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{stat} {spare}\n")


def test_limits_of_control_groups_of_version_2(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/jobs/mine\n")
    group(tmp_path / "root/jobs/mine", 2, "max", 10, 3)
    group(tmp_path / "root/jobs", 2, "1000", 400, 50)
    assert list(cgroup_room(tmp_path / "root", own)) == [650]
    own.write_text("0::/\n")  # as a container sees it
    group(tmp_path / "root", 2, "900", 100, 0)
    assert list(cgroup_room(tmp_path / "root", own)) == [800]


def test_limits_of_control_groups_of_version_1(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:cpu:/a\n4:memory:/a/b\n0::/\n")
    group(tmp_path / "root/memory/a/b", 1, "500", 300, 20)
    group(tmp_path / "root/memory", 1, "9223372036854771712", 300, 0)
    assert min(cgroup_room(tmp_path / "root", own)) == 220


def test_without_control_groups(tmp_path: Path) -> None:
    assert list(cgroup_room(tmp_path, tmp_path / "none")) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_memory_of_a_card() -> None:
    meter = Meter(torch.device("cuda"))
    before = meter.used()
    held = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    assert meter.used() - before == 64 * MIB <= meter.peak() and meter.room() > 0 and len(held)
    del held
    assert meter.peak() >= before + 64 * MIB
    meter.begin()
    assert meter.peak() == before


def test_of_several_cards_memory_is_added_and_the_fullest_has_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, waited = [], []
    known = {
        "memory_allocated": lambda card: 100 * (1 + card.index),
        "max_memory_allocated": lambda card: 300 * (1 + card.index),
        "memory_reserved": lambda card: 500,
        "mem_get_info": lambda card: (1000 - 400 * card.index, 9000),
        "reset_peak_memory_stats": begun.append,
        "synchronize": waited.append,
    }
    for name, told in known.items():
        monkeypatch.setattr(f"torch.cuda.{name}", told)
    cards = [torch.device("cuda", n) for n in range(2)]
    meter = Meter(*cards)
    meter.begin()
    assert meter.now() > 0 and begun == waited == cards
    assert (meter.used(), meter.peak(), meter.room()) == (100 + 200, 300 + 600, 600 + 500 - 200)
