"""What `refresh` says of the generation of a checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from alphatoken_curate.config import MaskConfig, settings_of_mask
from alphatoken_curate.wording import pasted

from .told import nothing_but, older, rows, summary

if TYPE_CHECKING:
    from alphatoken_curate import RefreshSummary
    from alphatoken_curate.runs.manifest import Mask


def lines_of(done: RefreshSummary) -> Iterator[str]:
    """Lines that say what was done, and which mask readers take where it is not of this generation."""
    number, mask = done.generation, done.mask
    wrote = f"mask {mask.mask}: {mask.path}/" if mask.created else ""
    if done.shards_scored:
        wrote = f"{done.run}/values/generation={number}/   {wrote}".rstrip()
        yield f"Wrote generation {number} of {done.run}, at {done.checkpoint}"
        yield rows(done)
    else:
        there = f"{done.checkpoint} is generation {number} of {done.run} already"
        yield f"{there}; wrote mask {mask.mask}." if mask.created else f"{there}. {nothing_but(done.beside)}"
    if mask.created:
        yield from summary(mask)
    if wrote:
        yield f"  wrote   {wrote}"
    if done.shards_scored and not done.has_stability:
        yield "  stability is 0, as the checkpoint has the weights of the reference"
    yield from _passed_over(done)
    if wrote:
        yield f"Next: alphatoken-curate stats {pasted(done.run)}"


def _passed_over(done: RefreshSummary) -> Iterator[str]:
    """Lines that say how to have a mask of the generation, where readers take another's."""
    masks, number = done.manifest.masks, done.generation
    if number in masks[-1].generations:
        return
    config = replace(settings_of_mask(masks[-1].settings), generation=str(number))
    like = [one.mask for one in masks if one.generations == (number,) and _by(one, config)]
    if like:
        yield from older(done.run, like[-1], f"mask {like[-1]}, of generation {number},")
        return
    several, s = ", ".join(map(str, masks[-1].generations)), "s" * (len(masks[-1].generations) > 1)
    yield f"Readers take mask {masks[-1].mask}, of generation{s} {several}. They take one of generation {number} after:"
    yield f"  alphatoken-curate mask {pasted(done.run)} {' '.join(_flags(config))}"


def _by(mask: Mask, config: MaskConfig) -> bool:
    """Whether a mask was made by these settings, of whatever generation."""
    return replace(settings_of_mask(mask.settings), generation=config.generation) == config


def _flags(config: MaskConfig) -> Iterator[str]:
    """The flags of `mask` that give these settings."""
    for item in fields(MaskConfig):
        if (value := getattr(config, item.name)) != item.default:
            yield f"--{item.name.replace('_', '-')}{'' if value is True else f' {shlex.quote(str(value))}'}"
