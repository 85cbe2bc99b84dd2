"""alphatoken-curate: the commands, loaded when they are run, and what each kind of error ends with."""

from __future__ import annotations

import importlib
import io
import sys
from typing import Any, NoReturn

import click

from alphatoken_curate.errors import CurateError
from alphatoken_curate.rows.files import legible

from .grouped import HELP
from .interrupts import interruptible
from .system import drop_output, of_system

COMMANDS = {
    "check": "Validate rows, count tokens, plan; with --estimate, try the models: seconds and memory.",
    "score": "Value every response token; write values, a mask and loss weights.",
    "refresh": "Score the same rows again at a checkpoint, as a new generation.",
    "mask": "Make masks again from stored values. Loads no model.",
    "show": "Show a row's tokens coloured by value; find rows by their text.",
    "stats": "Show how values are distributed and what stability changed.",
    "compare": "Show two runs, or two generations of one, side by side.",
    "report": "Write a run as one HTML page: charts, and rows coloured by value.",
    "export": "Write the rows of a mask as files that another trainer reads.",
    "publish": "Put a finished run into an S3 bucket, or add what is new of it.",
    "verify": "Check every file of a run, or of an export: digests, counts, alignment.",
}

EXIT_CODES = """
Exit codes: 0 done, 1 internal error, 2 usage, 3 input refused, 4 stored data damaged or made with other settings,
130 interrupted.
"""


_HELP = """Decide, offline, which response tokens deserve to train a language model.

\b
alphatoken-curate check data.jsonl
alphatoken-curate score data.jsonl --target task.jsonl
alphatoken-curate stats data.alphatoken
"""


class _Lazy(click.Group):
    """A group whose commands are imported when they are asked for, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"alphatoken_curate.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, help=_HELP, epilog=EXIT_CODES, context_settings=HELP)
@click.version_option(package_name="alphatoken-curate", message="%(package)s %(version)s")
def cli() -> None:
    """All of the commands."""


def main() -> NoReturn:
    """Run the command line; the only place where errors become messages and exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows fewer characters than our tokens shows the others escaped.
            stream.reconfigure(errors="backslashreplace")
    with interruptible():
        sys.exit(_run())


def _run() -> int:
    try:
        result: Any = cli.main(standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        drop_output()  # its reader has gone, as `head` does
        return 1
    except (CurateError, OSError) as error:
        told = error if isinstance(error, CurateError) else of_system(error)
        if told is None:
            raise
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(legible(str(told)), err=True)
        return told.exit_code
