"""Who computes: options of the commands that run models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from alphatoken_curate.wording import count, pasted

if TYPE_CHECKING:
    from alphatoken_curate.scoring.engines import Engine
    from alphatoken_curate.scoring.part import PartSummary

F = TypeVar("F", bound=Callable[..., Any])


def engine_options(function: F) -> F:
    """--workers, --engine, --ray-address."""
    for option in (
        click.option("--ray-address", metavar="ADDRESS", help="Ray cluster, such as `auto`. Default: one of its own."),
        click.option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Where workers are: on this machine, or those of a Ray cluster.",
        ),
        click.option(
            "--workers",
            default="1",
            metavar="N|auto",
            show_default=True,
            callback=_count,
            help="Processes that compute, each on a card of its own; `auto`: one a card, or by --threads.",
        ),
    ):
        function = option(function)
    return function


def engine_of(settings: dict[str, Any], device: str) -> Engine | None:
    """The engine that was asked for, by a command's parameters and the --device of workers; None for this process."""
    workers, kind, address = settings["workers"], settings["engine"], settings["ray_address"]
    if address is not None and kind != "ray":
        raise click.UsageError("--ray-address goes with --engine ray.")
    if kind == "local" and workers == 1:
        return None

    from alphatoken_curate.scoring.named import check_shared

    check_shared(device)  # before torch is imported
    if kind == "ray":
        from alphatoken_curate.scoring.cluster import Ray

        return Ray(address, workers)
    from alphatoken_curate.scoring.processes import Local

    return Local(workers)


def part_option(function: F) -> F:
    """--part."""
    return click.option(
        "--part",
        metavar="prepare|I/N",
        help="Do this part alone; a plain `score` ends what parts began.",
    )(function)


def told_of_part(done: PartSummary) -> Iterator[str]:
    """What a part did, and what comes next."""
    what = "prepared" if done.part == "prepare" else f"part {done.part}: scored {count(done.scored, 'shard')}"
    yield f"{done.run}: {what}; there: {done.shards - done.missing} of {count(done.shards, 'shard')}."
    if done.finished:
        yield f"The run is finished. Next: alphatoken-curate stats {pasted(done.run)}"
    elif done.missing:
        yield "Next: the same command with --part 0/N to N-1/N, each where it may run; then without --part, to end it."
    else:
        yield "Next: the same command without --part, which writes manifest and mask."


def _count(_: click.Context, __: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    if not (value.isascii() and value.isdecimal() and 1 <= int(value) <= 4096):
        raise click.BadParameter("it takes a number of processes, or auto.")
    return int(value)
