"""alphatoken-curate: the commands, loaded when they are run, and what each kind of error ends with."""

from __future__ import annotations

import _thread
import importlib
import io
import os
import signal
import sys
import threading
from typing import Any, NoReturn

import click

from alphatoken_curate.errors import CurateError

COMMANDS = {
    "check": "Validate rows, count tokens, plan. Loads no model.",
    "score": "Value every response token; write values, a mask and loss weights.",
    "mask": "Make masks again from stored values. Loads no model.",
    "show": "Show a row's tokens coloured by value.",
    "stats": "Show how values are distributed and what stability changed.",
    "verify": "Check every file of a run: digests, checksums, counts, alignment.",
}

EXIT_CODES = """
Exit codes: 0 done, 1 internal error, 2 usage, 3 input refused, 4 stored data damaged or made with other settings,
130 interrupted.
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


@click.group(cls=_Lazy, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="alphatoken-curate", message="%(package)s %(version)s")
def cli() -> None:
    r"""Decide, offline, which response tokens deserve to train a language model.

    \b
    alphatoken-curate check data.jsonl
    alphatoken-curate score data.jsonl --target task.jsonl
    alphatoken-curate stats data.alphatoken
    """


def main() -> NoReturn:
    """Run the command line; the only place where errors become messages and exit codes."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _unraisable
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows fewer characters than our tokens shows the others escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        result: Any = cli.main(standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except CurateError as error:
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted. What is finished is kept; run the same command again to go on.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; keep Python from complaining when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _unraisable(found: Any) -> None:
    """Python drops an interrupt that falls into a finaliser; it is raised again a moment later."""
    if found.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(found)
        return
    again = threading.Timer(0.05, _thread.interrupt_main)
    again.daemon = True
    again.start()


def _terminate(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt
