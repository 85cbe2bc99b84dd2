"""How many values lie below 0 beyond their error, beside how many chance alone would let: whether there is much to cut.

A value is the mean over groups of target rows; its error says how far these lie apart (`directions.groups`). Read shard
by shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.masks import responses
from alphatoken_curate.reading.scan import choose_generation
from alphatoken_curate.rows.files import legible
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.manifest import Manifest
from alphatoken_curate.signals.student import CHANCE, beyond_error, factor
from alphatoken_curate.wording import count, pasted


@dataclass(frozen=True, slots=True, kw_only=True)
class Beyond:
    """Of the scored response tokens of one generation, all branches: those `below` 0 by more than `factor` errors.

    `by_chance`: how many would be were each value 0 (5% of all); `factor`: Student's one-sided 95% quantile for
    `groups` - 1 degrees of freedom; `command`: the arguments of the mask that leaves them out.
    """

    generation: int
    tokens: int
    below: int
    by_chance: float
    groups: int
    factor: float
    command: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """What is told of them, with the command to paste."""
        share = f"{self.below / self.tokens:.1%}" if self.tokens else "none"
        yield (
            f"{self.below:,} of {count(self.tokens, 'response token')} ({share}) lie below 0 beyond their error"
            f" ({self.factor:g} standard errors, of {self.groups} groups of target rows);"
            f" chance alone would let {self.by_chance:,.0f} ({CHANCE:.0%}) pass"
        )
        if self.below <= self.by_chance:
            yield "that is no more than chance: a mask that leaves them out is likely to leave out nothing that harms:"
        else:
            yield "what leaves them out, which has done harm (milder: --weights tilt:0.25):"
        run, *options = self.command[2:]
        yield legible(f"  alphatoken-curate mask {pasted(run)} \\")
        yield f"    {' '.join(map(_quoted, options))}"


def beyond(run: str | Path, generation: int | None = None) -> Beyond | None:
    """Of the newest generation or the one given; None where values have no errors.

    Raises `UsageError` for a generation that is not there, `StoredDataError` for damage.
    """
    folder = Path(run)
    stored = manifest.read(folder)
    groups = stored.settings.get("groups")
    if not isinstance(groups, int) or groups < 2 or not stored.generations:
        return None
    shown = choose_generation(folder, stored, generation)
    tokens = below = known = 0
    by_chance = 0.0
    for shard in shown.shards:
        for branch in responses.load(folder, [[shard]], ("value", "value_error"), manifest.layout(stored)).branches:
            value, error = branch.columns["value"], branch.columns["value_error"]
            known += int((~np.isnan(error)).sum())
            tokens += len(value)
            mine, chance = beyond_error(value, error, groups)
            below, by_chance = below + mine, by_chance + chance
    if not known:
        return None
    if known < tokens:
        raise StoredDataError(
            f"{folder}: column value_error has no value at {tokens - known} of {count(tokens, 'response token')};"
            " run `verify`"
        )
    command = _command(folder, stored, factor(groups), generation)
    return Beyond(
        generation=shown.generation,
        tokens=tokens,
        below=below,
        by_chance=by_chance,
        groups=groups,
        factor=factor(groups),
        command=command,
    )


def _command(run: Path, stored: Manifest, errors: float, generation: int | None) -> tuple[str, ...]:
    """Of the mask of these very values: of the generation that was asked for."""
    options = ["--by", f"value + {errors:g} * value_error", "--keep", "positive"]
    if generation is not None and generation != stored.generations[-1].generation:
        options += ["--generation", str(generation)]
    return ("alphatoken-curate", "mask", str(run), *options)


def _quoted(word: str) -> str:
    return f'"{word}"' if " " in word else word
