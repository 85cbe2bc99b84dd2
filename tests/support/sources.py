"""The source files of this project."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "alphatoken_curate"
CLI = ROOT / "cli"


def modules(folder: Path) -> list[Path]:
    """Those of the folder and, in the library, of its folders; `__main__` counts with the command line."""
    library = [*LIBRARY.glob("*.py"), *LIBRARY.glob("[a-z]*/*.py")]
    main = LIBRARY / "__main__.py"
    return sorted(set(library) - {main} if folder == LIBRARY else {*folder.glob("*.py"), main})
