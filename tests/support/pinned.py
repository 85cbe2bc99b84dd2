"""What the package and its checks ask for, a requirement a line, for pip-compile; see CONTRIBUTING.md."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def asked() -> list[str]:
    """Every requirement of pyproject.toml but torch (the machine's build) and `gcs`, which CI does without."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [extra for name, extra in project["optional-dependencies"].items() if name != "gcs"]
    every = [*project["dependencies"], *(one for extra in extras for one in extra)]
    return sorted({one for one in every if not one.startswith((project["name"], "torch>="))})


if __name__ == "__main__":
    print("\n".join(asked()))
