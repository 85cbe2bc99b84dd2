"""An environment for each trainer, made once: the releases of requirements/NAME.txt and no others."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = tuple(sorted(path.stem for path in (HERE / "requirements").glob("*.txt")))
TORCH = "torch==2.13.0"
"""Installed first, with what it needs, from wherever pip finds the build for this machine."""
WITH_OURS = ("axolotl",)
"""Environments that hold this package too, for its plugin; without its dependencies, which would change theirs.

What the plugin needs of them and Axolotl does not have, polars, is among the requirements.
"""
WITHOUT_SOUND = ("llamafactory",)
"""Environments that import torchaudio, of which they use nothing here, and whose builds demand their own torch."""


def python_of(envs: Path, name: str) -> Path:
    return envs / name / "bin" / "python"


def ready(envs: Path, name: str) -> bool:
    """Whether the environment is there, as its requirements are now."""
    mark = envs / name / "made-from"
    return mark.is_file() and mark.read_text() == _digest(name)


def make(envs: Path, name: str) -> None:
    """The environment, unless it is there. What `requirements` lists is complete, so dependencies are not followed."""
    if ready(envs, name):
        return
    listed = HERE / "requirements" / f"{name}.txt"
    _run(sys.executable, "-m", "venv", "--clear", envs / name)
    pip = (python_of(envs, name), "-m", "pip", "install", "--no-cache-dir", "--quiet")
    if TORCH in listed.read_text().splitlines():
        _run(*pip, TORCH)
    _run(*pip, "--no-deps", "-r", listed)
    if name in WITH_OURS:
        _run(*pip, "--no-deps", "-e", ROOT)
    if name in WITHOUT_SOUND:
        stub = next((envs / name / "lib").glob("python3.*")) / "site-packages" / "torchaudio"
        stub.mkdir(exist_ok=True)
        (stub / "__init__.py").touch()
    (envs / name / "made-from").write_text(_digest(name))


def _digest(name: str) -> str:
    listed = (HERE / "requirements" / f"{name}.txt").read_bytes()
    return hashlib.sha256(listed + Path(__file__).read_bytes()).hexdigest()


def _run(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, env=os.environ | {"PYTHONPATH": ""})
