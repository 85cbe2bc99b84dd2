"""Errors of the system as errors of ours: a file that it refuses, and an output that takes no more."""

from __future__ import annotations

import os
import sys

import click

from alphatoken_curate.errors import NO_ROOM, CurateError, refused


def of_system(error: OSError) -> CurateError | None:
    """What is said of it; None where it is a fault of ours, whose traceback is needed."""
    if error.filename is not None:
        return refused(error)
    if error.errno in NO_ROOM and not _is_output_taken():
        drop_output()
        return refused(error, "standard output")
    return None


def _is_output_taken() -> bool:
    try:
        click.echo()
    except OSError:
        return False
    return True


def drop_output() -> None:
    """Write no more of our output, so that Python does not complain when it closes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
