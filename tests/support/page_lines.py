"""The command lines of the page on several machines, made ready to run on tiny rows and models."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from tiny_files import contents

from alphatoken_curate import ScoreConfig, score

PAGE = Path(__file__).parents[1] / "models" / "README.md"


def lines_of(name: str, folder: Path, settings: dict[str, Any], **more: object) -> str:
    """The block of the page after the marker `name`, for the rows, target and model of `settings` in `folder`.

    `more`: options that are given besides.
    """
    (folder / "rows.jsonl").rename(folder / "data.jsonl")
    (folder / "target.jsonl").rename(folder / "task.jsonl")
    (folder / "my").mkdir()
    (folder / "my" / "model").symlink_to(settings["model"])
    lines = PAGE.read_text().split(f"<!-- {name} -->\n```sh\n")[1].split("```")[0]
    lines = lines.replace("alphatoken-curate", f"{sys.executable} -m alphatoken_curate")
    flags = " ".join(f"--{option.replace('_', '-')} {value}" for option, value in more.items())
    return lines.replace("-o runs/mine", f"{flags} -o runs/mine")


def check_lines(folder: Path, **more: Any) -> None:
    """What the lines made is what one process makes."""
    with contextlib.chdir(folder):
        score(ScoreConfig(data="data.jsonl", target="task.jsonl", model="my/model", **more), "whole")
    assert contents(folder / "runs" / "mine") == contents(folder / "whole")
