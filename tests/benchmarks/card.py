"""What this project does on a CUDA card of a machine that no registry can be reached from.

    python tests/benchmarks/card.py pack DIR                  # where there is a network: all that such a machine lacks
    python DIR/card.py run --out OUT --minutes 8              # there: OUT/card.json and OUT/card.txt
    python DIR/card.py run --out OUT --device cpu             # anywhere: tries the bundle, in tiny shapes

A bundle is at most 60 MiB: this project and what it needs as wheels, the tests that need a card, and these scripts. The
machine is assumed to have Python, torch, transformers, tokenizers, safetensors, pyarrow, numpy, click and rich, of
releases that pyproject.toml allows; `run` says what of it is not so before anything else. It installs nothing outside
a folder of its own, and deletes that. Steps run in order of worth, each in a process of its own with a time limit; what
a step found is written before the next begins, and as it goes on, so that nothing found is lost where time runs out.
Not packed is `datasets`, which only rows of the Hub and the trainers need, and whose pandas would not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 60 * 2**20

ASSUMED = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy", "click", "rich", "pyyaml")
"""Distributions that such a machine has; transformers brings PyYAML and packaging."""

PACKED = ("polars", "polars-runtime-32", "orjson", "zstandard", "pytest", "pluggy", "iniconfig", "psutil")
"""What it lacks: the project's other requirements, and those of these scripts and tests."""

LEFT_OUT = ("datasets",)

SCRIPTS = ("card.py", "card_steps.py", "card_page.py", "gpu.py", "speed.py", "estimate.py", "multiplications.py")
TESTS = ("conftest.py", "support", "whole/test_cuda.py")

PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Something to find out, by a script in a process of its own."""

    name: str
    seconds: int
    """What it may take."""
    command: tuple[str, ...]
    """A script and its arguments; `RESULT` and `DEVICE` stand for the file it writes and the device."""


THREE_LAYERS = ("forward", "3 published", "3 exact")
ALL_LAYERS = ("forward", "all published", "all exact", "all influence", "training step")

ALL_SHAPE = ("--shape", "llama-3.2-3b")
"""Of an 8B, directions for all layers (float32, 28 GB each) and what is made of them do not fit beside the model."""

STEPS = (
    Step(name="tests", seconds=90, command=("card_steps.py", "tests", "RESULT", "DEVICE")),
    Step(
        name="three_layers",
        seconds=100,
        command=("gpu.py", "--rounds", "3", "--json", "RESULT", "--jobs", *THREE_LAYERS),
    ),
    Step(
        name="all_layers",
        seconds=110,
        command=("gpu.py", *ALL_SHAPE, "--rounds", "3", "--prompt", "0.25", "--json", "RESULT", "--jobs", *ALL_LAYERS),
    ),
    Step(name="whole_run", seconds=150, command=("card_steps.py", "whole_run", "RESULT", "DEVICE")),
    Step(name="same_as_cpu", seconds=80, command=("card_steps.py", "same_as_cpu", "RESULT", "DEVICE")),
    Step(name="memory", seconds=90, command=("card_steps.py", "memory", "RESULT", "DEVICE")),
    Step(name="profile", seconds=60, command=("card_steps.py", "profile", "RESULT", "DEVICE")),
)


# --------------------------------------------------------------------------------------------------------------- pack


def pack(args: Namespace) -> None:
    """Gather a bundle in `args.folder`, which must not be there or be empty."""
    folder: Path = args.folder
    if folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder}: is not empty; name a new folder for the bundle.")
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(clean_copy(Path(scratch) / "project")))
        pinned = Path(scratch) / "pinned.txt"
        pinned.write_text(pins((ROOT / ".ci" / "requirements.txt").read_text(encoding="utf-8"), PACKED))
        kinds = [flag for platform in PLATFORMS for flag in ("--platform", platform)]
        python = ["--python-version", args.python, "--implementation", "cp", "--only-binary=:all:", *kinds]
        pip("download", "--no-deps", "--require-hashes", "-r", str(pinned), "-d", str(wheels), *python)
    for name in SCRIPTS:
        shutil.copy(HERE / name, folder / name)
    for name in TESTS:
        place = folder / "tests" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / "tests" / name).is_dir():
            shutil.copytree(ROOT / "tests" / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / "tests" / name, place)
    shutil.copy(ROOT / "pyproject.toml", folder / "pyproject.toml")
    (folder / "bundle.json").write_text(json.dumps({"python": args.python, "commit": commit()}))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LIMIT:
        raise SystemExit(f"{folder}: {size / 2**20:.1f} MiB, which is more than {LIMIT >> 20}.")
    script = shlex.quote(str(folder / "card.py"))
    print(f"{folder}: {size / 2**20:.1f} MiB. On a machine with a card: python {script} run --out OUT")


def clean_copy(folder: Path) -> Path:
    """The project without what builds and checks left in it."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("alphatoken_curate", "cli"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def commit() -> str:
    """What the bundle was packed from."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def pip(*arguments: str) -> None:
    """Run pip, and end where it fails."""
    if subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=False).returncode:
        raise SystemExit(f"pip {arguments[0]} failed.")


def pins(text: str, names: Iterable[str]) -> str:
    """Of a file of pinned requirements, those of some distributions, with their hashes."""
    found = {
        block.split("==", 1)[0].strip(): block for block in text.replace("\\\n", " ").splitlines() if "==" in block
    }
    return "\n".join(found[name] for name in names) + "\n"


# ---------------------------------------------------------------------------------------------------------------- run


def run(args: Namespace) -> int:
    """Every step; 0 where all of them went well."""
    began = time.monotonic()
    # Whoever ends this ends the step that runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {args.out}: {error.strerror}.") from error
    work = Path(tempfile.mkdtemp(prefix="card-"))
    try:
        site = unpack(work / "site")
        told = machine(site, args.device)
        report: dict[str, Any] = {"machine": told, "minutes": args.minutes, "steps": known_steps(args.out, told)}
        chosen = [step for step in STEPS if not args.steps or step.name in args.steps]
        for step in chosen:
            left = args.minutes * 60 - (time.monotonic() - began)
            try:
                report["steps"][step.name] = taken = take(step, left, work, site, args.device)
            except (KeyboardInterrupt, SystemExit):
                report["steps"][step.name] = {"ended": "interrupted", "found": read(work / f"{step.name}.json")}
                raise
            finally:
                write(args.out, report)
            print(f"{step.name}: {taken['ended']}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print((args.out / "card.txt").read_text(encoding="utf-8"))
    return int(any(report["steps"][step.name]["ended"] != "well" for step in chosen))


def known_steps(out: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What was found before on the same machine by the same bundle."""
    before = read(out / "card.json")
    return dict(before["steps"]) if before.get("machine") == told else {}


def read(path: Path) -> dict[str, Any]:
    """A file of JSON; empty where there is none that is whole."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def unpack(site: Path) -> Path:
    """The wheels in a folder for PYTHONPATH; a pure or binary wheel is a zip of just that, and pip may be missing."""
    for wheel in sorted((HERE / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return site


def machine(site: Path, device: str) -> dict[str, Any]:
    """What the machine is. Ends with all that is not as assumed, named."""
    bundle = json.loads((HERE / "bundle.json").read_text())
    wanted, here = bundle["python"], f"{sys.version_info.major}.{sys.version_info.minor}"
    wrong = [] if here == wanted else [f"Python is {here}; the bundle is for {wanted} (pack --python {here})"]
    if platform.machine() != "x86_64":
        wrong.append(f"the processor is {platform.machine()}; the bundle's wheels are for x86_64")
    wrong += unmet(site)
    if wrong:
        raise SystemExit("This machine is not as the bundle assumes:\n  " + "\n  ".join(wrong))
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA card. To try the bundle itself: --device cpu.")
    card = "no card: the CPU stands in, in tiny shapes"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        card = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"
    versions = {name: metadata.version(name) for name in ASSUMED}
    told = {"card": card, "device": device, "commit": bundle["commit"], "python": here}
    return told | {"cuda": torch.version.cuda, "versions": versions}


def unmet(site: Path) -> list[str]:
    """What the project requires of the machine and does not find there."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is not installed, which transformers brings: so neither is that"]
    (ours,) = (one for one in metadata.distributions(path=[str(site)]) if one.metadata["Name"] == "alphatoken-curate")
    wrong = []
    for asked in map(Requirement, ours.requires or []):
        if asked.marker is not None or asked.name in LEFT_OUT or asked.name in PACKED:
            continue
        try:
            found = metadata.version(asked.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{asked} is not installed")
            continue
        if not asked.specifier.contains(found, prereleases=True):
            wrong.append(f"{asked.name} is {found}; {asked.specifier} is needed")
    return wrong


def take(step: Step, left: float, work: Path, site: Path, device: str) -> dict[str, Any]:
    """Run a step. What it wrote counts, however it ended."""
    if left < 5:
        return {"ended": "not begun: no time was left"}
    result = work / f"{step.name}.json"
    known = {"RESULT": str(result), "DEVICE": device}
    script, *arguments = (known.get(word, word) for word in step.command)
    if script == "gpu.py" and device == "cpu":
        arguments += ["--shape", "tiny", "--length", "64"]
    began, limit = time.monotonic(), min(step.seconds, left)
    print(f"{step.name}: at most {limit:.0f} s", flush=True)
    # What a step leaves behind where it is stopped is gone before the next begins.
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        more = {"TMPDIR": scratch} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        ended, said = limited([sys.executable, str(HERE / script), *arguments], limit, more, site)
    seconds = round(time.monotonic() - began, 1)
    return {"ended": ended, "seconds": seconds, "found": read(result)} | ({} if ended == "well" else {"said": said})


def limited(command: list[str], limit: float, more: dict[str, str], site: Path) -> tuple[str, list[str]]:
    """How a command ended, and the last lines it printed. It and all that it began is killed at its limit."""
    theirs = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [str(site), str(HERE), str(HERE / "tests" / "support"), *theirs]
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env = os.environ | quiet | more | {"PYTHONPATH": os.pathsep.join(paths)}
    log = Path(more["TMPDIR"]) / "said.txt"
    with log.open("w") as out:
        child = subprocess.Popen(command, cwd=HERE, env=env, stdout=out, stderr=out, process_group=0)
        try:
            code = child.wait(limit)
            ended = "well" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            kill_group(child.pid)
            child.wait()
    return ended, log.read_text(errors="replace").splitlines()[-40:]


def kill_group(leader: int) -> None:
    """Whatever a step left running."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def write(out: Path, report: dict[str, Any]) -> None:
    """Both files."""
    from card_page import page

    put_whole(out / "card.json", json.dumps(report, indent=1))
    put_whole(out / "card.txt", page(report))


def put_whole(path: Path, text: str) -> None:
    """A file that is there whole or as it was."""
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def main() -> int:
    """Pack, or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="gather a bundle")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--python", default="3.12", help="of the machine it is for")
    packing.set_defaults(do=pack)
    running = commands.add_parser("run", help="on the machine with the card")
    names = [step.name for step in STEPS]
    running.add_argument("--out", type=Path, required=True, help="folder for card.json and card.txt")
    running.add_argument("--minutes", type=float, default=8, help="for all steps together (default: 8)")
    running.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the bundle itself")
    running.add_argument("--steps", nargs="+", choices=names, metavar="STEP", help=f"these alone of {', '.join(names)}")
    running.set_defaults(do=run)
    args = parser.parse_args()
    return args.do(args) or 0


if __name__ == "__main__":
    raise SystemExit(main())
