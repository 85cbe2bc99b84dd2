"""Config lines from the README of an export: what a user would copy, with the names they would fill in."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def block(export: Path, language: str) -> str:
    """The first block of this language in the README; raises where there is none."""
    for found in _FENCED.finditer((export / "README.md").read_text(encoding="utf-8")):
        if found[1] == language:
            return found[2]
    raise LookupError(f"{export / 'README.md'}: no block of {language}")


def settings(export: Path) -> dict[str, Any]:
    """The lines for a YAML configuration."""
    found: dict[str, Any] = yaml.safe_load(block(export, "yaml"))
    return found


def command(export: Path, **names: object) -> list[str]:
    """The shell command, with the words that stand in capitals replaced."""
    words = shlex.split(block(export, "sh").replace("\\\n", " "))
    return [str(names.get(word, word)) for word in words]
