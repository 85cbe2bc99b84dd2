"""The source files of this project."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "alphatoken_curate"
CLI = ROOT / "cli"


def modules(folder: Path) -> list[Path]:
    """Those of the folder and, in the library, of its folders."""
    return sorted([*folder.glob("*.py"), *(path for path in folder.glob("[a-z]*/*.py") if folder == LIBRARY)])
