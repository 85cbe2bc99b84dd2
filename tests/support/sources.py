"""The source files of this project."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "alphatoken_curate"
CLI = ROOT / "cli"


def modules(folder: Path) -> list[Path]:
    """Those of the folder and, in the library, of its folders; `__main__` counts with the command line."""
    library = [*LIBRARY.glob("*.py"), *LIBRARY.glob("[a-z]*/*.py")]
    main = LIBRARY / "__main__.py"
    return sorted(set(library) - {main} if folder == LIBRARY else {*folder.glob("*.py"), main})


def imports(path: Path) -> Iterator[str]:
    """Top names of all that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]
