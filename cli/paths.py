"""Types of the arguments and options that name a folder or file of this machine: a URL is refused as it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from alphatoken_curate.urls import FILE_ADVICE, OUT_ADVICE, RUN_ADVICE, check_local


class Local(click.Path):
    """A path of this machine; `advice` is what a URL is answered with, before anything else is looked at."""

    def __init__(self, advice: str, **attributes: Any) -> None:
        super().__init__(path_type=Path, **attributes)
        self.advice = advice

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. Raises `UsageError`."""
        check_local(value, self.advice)
        return super().convert(os.path.expanduser(value), param, ctx)  # of --option=~/x no shell makes a path


RUN, OUT, READ, FILE = Local(RUN_ADVICE), Local(OUT_ADVICE), Local(FILE_ADVICE), Local(FILE_ADVICE, dir_okay=False)
"""A run; a file or folder that is written; one that is read; a file that is read."""
