"""What keeps a generation from being scored at all, told by the input that does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.engine.capture import Direction
from alphatoken_curate.errors import InputError
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.wording import count, sequences_are


def made_of(config: ScoreConfig, objective: str) -> str:
    """`adaptation, of the gradient of the --target rows by --precondition kfac with --precondition-damping 0.1`."""
    if objective == "adapt":
        made = f"adaptation, of the gradient of {f'--target {config.target}' if config.target else 'the target rows'}"
    elif objective == "stab" and config.retention is not None:
        made = f"stability, of the gradient of --retention {config.retention}"
    else:
        made = f"stability, of --fisher {config.fisher} and the drift"
        made += "" if config.lookahead_lr is None else f" after a step of --lookahead-lr {config.lookahead_lr:g}"
    if config.precondition == "none" or (objective != "adapt" and not config.precondition_stability):
        return made
    adam = config.precondition == "adam"
    floor = f"eps {config.precondition_eps:g}" if adam else f"damping {config.precondition_damping:g}"
    return f"{made} by --precondition {config.precondition} with --precondition-{floor}"


def largest(config: ScoreConfig, objective: str, direction: Direction) -> float:
    """The largest number of a direction, by size. Raises `InputError` where one is not finite."""
    found = [float(matrix.abs().max()) for matrix in direction if matrix.numel()]
    if all(map(math.isfinite, found)):
        return max(found, default=0.0)
    kind = str(direction[0].dtype).removeprefix("torch.")
    raise InputError(
        f"No row can be scored: a direction overflows {kind}, that of {made_of(config, objective)}. Bring what it is"
        " made of to a smaller scale."
    )


def check_scored(run: Path, generation: int, told: str) -> None:
    """Raise `InputError` where rows failed in all shards of a generation and none was scored.

    Its shards hold nothing then, and are taken away unless a manifest names them. `told`: of the directions.
    """
    paths = shards.listed(shards.values_folder(run, generation)).values()
    if any(_counted(path, "scored") for path in paths) or not (failed := sum(_counted(p, "failed") for p in paths)):
        return
    named = (run / manifest.NAME).is_file() and generation in {x.generation for x in manifest.read(run).generations}
    for path in () if named else paths:
        path.unlink()
    raise InputError(
        f"{run}: no row was scored: the losses or signals of all {count(failed, 'row')} are not finite in what they are"
        f" computed in. Check the weights of the model and --dtype{f', and the directions ({told})' if told else ''}."
    )


def told_of_failed(run: Path, generation: int, rows: int, turns: str) -> str | None:
    """What is said of a generation in which some of its `rows`, or answers of them by `turns`, failed."""
    counts = (shards.read_footer(path).counts for path in shards.listed(shards.values_folder(run, generation)).values())
    failed = rows - sum(one.get("sequences", one["scored"]) for one in counts)
    if not failed:
        return None
    unit = sequences_are(turns == "each")
    which = "that is" if failed == 1 else "these are"
    return (
        f"{failed:,} of {count(rows, *unit)} failed in generation {generation}: {which} in no mask of its values, since"
        " losses or signals are not finite in what they are computed in."
    )


def _counted(path: Path, status: str) -> int:
    return shards.read_footer(path).counts.get(status, 0)


def told_of(config: ScoreConfig, found: Mapping[str, float]) -> str:
    """Of each direction what it is made of, and its largest number."""
    return "; ".join(f"{made_of(config, name)}: up to {top:.3g}" for name, top in found.items())
