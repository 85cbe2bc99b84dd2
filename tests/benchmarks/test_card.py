"""The bundle for a card without a network: what it holds, what it asks of a machine, and that nothing found is lost.

pytest -m slow -k card runs its steps on the CPU. What needs a registry, `pack`, is tried by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pinned import asked
from sources import ROOT

BENCHMARKS = ROOT / "tests" / "benchmarks"
sys.path.append(str(BENCHMARKS))

import card  # noqa: E402
import card_page  # noqa: E402


def requirements() -> set[str]:
    """What the project itself needs, by name."""
    ours = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("dependencies = [")[2].partition("]")[0]
    return set(re.findall(r'"([\w-]+)>=', ours))


def test_every_requirement_is_packed_or_assumed_or_left_out_by_name() -> None:
    assert "torch" in requirements() and len(requirements()) > 10
    assert requirements() <= {*card.ASSUMED, *card.PACKED, *card.LEFT_OUT}
    assert not set(card.ASSUMED) & set(card.PACKED)


def test_what_is_packed_is_pinned_by_hash() -> None:
    text = card.pins((ROOT / ".ci" / "requirements.txt").read_text(encoding="utf-8"), card.PACKED)
    lines = text.splitlines()
    assert [line.partition("==")[0] for line in lines] == list(card.PACKED)
    assert all(line.count("--hash=sha256:") for line in lines)
    assert len(asked()) > len(card.PACKED)


def test_the_bundle_has_every_script_that_its_scripts_import() -> None:
    ours = {path.stem for path in BENCHMARKS.glob("*.py")}
    for name in card.SCRIPTS:
        text = (BENCHMARKS / name).read_text(encoding="utf-8")
        found = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE)) & ours
        assert {f"{one}.py" for one in found} <= set(card.SCRIPTS), name
    commands = {step.command[0] for step in card.STEPS}
    assert commands <= set(card.SCRIPTS) and {step.name for step in card.STEPS} == set(card_page.TITLES)


def installed(site: Path, *needs: str) -> Path:
    """A folder in which this project stands as installed, with these requirements."""
    info = site / "alphatoken_curate-0.1.0.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", "Name: alphatoken-curate", "Version: 0.1.0"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)]) + "\n")
    return site


def test_what_the_machine_lacks_is_named_with_what_is_needed(tmp_path: Path) -> None:
    needs = ("torch>=2.9", "numpy>=99", "no-such-thing>=1", "polars>=99", 'peft>=99; extra == "peft"', "datasets>=99")
    assert card.unmet(installed(tmp_path, *needs)) == [
        f"numpy is {card.metadata.version('numpy')}; >=99 is needed",
        "no-such-thing>=1 is not installed",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_begun_unless_the_cpu_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    (tmp_path / "bundle.json").write_text(json.dumps({"python": here, "commit": "abc"}))
    monkeypatch.setattr(card, "HERE", tmp_path)
    site = installed(tmp_path / "site", "torch>=2.9")
    with pytest.raises(SystemExit, match="sees no CUDA card"):
        card.machine(site, "cuda")
    assert card.machine(site, "cpu")["python"] == here
    (tmp_path / "bundle.json").write_text(json.dumps({"python": "3.1", "commit": "abc"}))
    with pytest.raises(SystemExit, match=r"the bundle is for 3\.1 \(pack --python"):
        card.machine(site, "cpu")


MACHINE = {"card": "one", "commit": "abc", "python": "3", "cuda": "13", "versions": {"torch": "2.11"}}

SLOW_SCRIPT = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(json.dumps({"passed": 3, "failed": [], "skipped": 0, "child": child.pid}))
print("so far so good", flush=True)
time.sleep(60)
"""


def gone(process: int) -> bool:
    """Whether a process that was killed ends."""
    for _ in range(100):
        try:
            os.kill(process, 0)
            # One that ended stays in the table until somebody asks for it.
            if "Z" in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]:
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.long
def test_a_step_that_takes_too_long_is_stopped_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(SLOW_SCRIPT)
    monkeypatch.setattr(card, "HERE", tmp_path)
    step = card.Step(name="tests", seconds=8, command=("slow.py", "RESULT"))
    began = time.monotonic()
    taken = card.take(step, 100.0, tmp_path, tmp_path, "cpu")
    assert time.monotonic() - began < 40
    assert taken["ended"] == "stopped after 8 s" and taken["found"]["passed"] == 3
    assert taken["said"] == ["so far so good"]
    assert gone(taken["found"]["child"])
    report = {"machine": MACHINE, "steps": {"tests": taken}}
    assert "stopped after 8 s" in card_page.page(report) and "3 passed" in card_page.page(report)


HALF_SCRIPT = """
import pathlib, sys
pathlib.Path(sys.argv[1]).write_text('{"passed": 3, "fai')
"""


def test_a_result_that_is_not_whole_is_none_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half.py").write_text(HALF_SCRIPT)
    monkeypatch.setattr(card, "HERE", tmp_path)
    step = card.Step(name="tests", seconds=30, command=("half.py", "RESULT"))
    taken = card.take(step, 99.0, tmp_path, tmp_path, "cpu")
    assert (taken["ended"], taken["found"]) == ("well", {})


def test_what_was_found_before_on_the_same_machine_stays(tmp_path: Path) -> None:
    told = {"card": "one", "commit": "a"}
    (tmp_path / "card.json").write_text(json.dumps({"machine": told, "steps": {"memory": {"ended": "well"}}}))
    assert card.known_steps(tmp_path, told) == {"memory": {"ended": "well"}}
    assert card.known_steps(tmp_path, told | {"commit": "b"}) == card.known_steps(tmp_path / "none", told) == {}


def test_an_interrupted_step_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_its_parent = SLOW_SCRIPT.replace("\ntime.sleep", "\nimport os\nos.kill(os.getppid(), 15)\ntime.sleep")
    (tmp_path / "slow.py").write_text(ends_its_parent)
    (tmp_path / "wheels").mkdir()
    monkeypatch.setattr(card, "HERE", tmp_path)
    monkeypatch.setattr(card, "STEPS", (card.Step(name="tests", seconds=60, command=("slow.py", "RESULT")),))
    monkeypatch.setattr(card, "machine", lambda *_: MACHINE)
    args = argparse.Namespace(out=tmp_path / "out", minutes=2, device="cpu", steps=None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            card.run(args)
    finally:
        signal.signal(signal.SIGTERM, before)
    taken = json.loads((tmp_path / "out" / "card.json").read_text())["steps"]["tests"]
    assert taken["ended"] == "interrupted" and taken["found"]["passed"] == 3
    assert gone(taken["found"]["child"])


def test_a_step_that_fails_says_why_and_one_without_time_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit('no such luck')")
    monkeypatch.setattr(card, "HERE", tmp_path)
    step = card.Step(name="memory", seconds=30, command=("fails.py", "RESULT"))
    taken = card.take(step, 100.0, tmp_path, tmp_path, "cpu")
    assert taken["ended"] == "exit 1" and taken["said"] == ["no such luck"] and taken["found"] == {}
    late = card.take(step, 4.0, tmp_path, tmp_path, "cpu")
    text = card_page.page({"machine": MACHINE, "steps": {"memory": taken, "profile": late}})
    assert "| no such luck" in text and "not begun: no time was left" in text and "torch 2.11" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tests", "whole_run", "same_as_cpu", "memory", "profile"])
def test_steps_run_on_the_cpu(name: str, tmp_path: Path) -> None:
    result = tmp_path / "found.json"
    paths = os.pathsep.join(map(str, (BENCHMARKS, ROOT / "tests" / "support")))
    command = [sys.executable, str(BENCHMARKS / "card_steps.py"), name, str(result), "cpu"]
    env = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(result.read_text())
    assert list(card_page.TOLD[name](found))
    if name == "tests":
        assert found["passed"] > 25 and found["failed"] == [] and found["skipped"] == 0
    if name == "whole_run":
        assert found["same_bytes"] and 2 <= found["shards_before_kill"] < 12
        assert max(found["largest_difference"].values()) == 0
