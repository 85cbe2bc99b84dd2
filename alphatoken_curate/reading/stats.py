"""What a run holds, in numbers: counts, histograms, how large each component is, what masks keep.

Read shard by shard: sums and sizes first, of each generation (`sums`), from which the edges of histograms follow, then
their counts (`counting`). All add up exactly whatever the shards. Last comes `remask.spreads` for what stability
decides; it alone holds something of every response token: 14 bytes at most, and see `ranked` for an expression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphatoken_curate.config import MaskConfig, settings_of_mask
from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.masks import choose, criteria, formulas, remask, responses
from alphatoken_curate.reading.counting import GroupStats, counted
from alphatoken_curate.reading.errors import Beyond, beyond
from alphatoken_curate.reading.histogram import Histogram
from alphatoken_curate.reading.scan import choose_generation
from alphatoken_curate.reading.sums import PairStats, Sums
from alphatoken_curate.runs import direction, manifest
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.manifest import Generation, Manifest, Mask
from alphatoken_curate.runs.schema import PER_STEP, STATUSES, Layout

SCALES = ("none", "rms")
"""Choices of `--stability-scale`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStats:
    """One scoring of the rows; `rms` as in `Stats`, `pairs` None in SFT runs.

    `values`: what the newest mask keeps of its tokens, and a histogram of the edges of that of the generation shown.
    """

    generation: int
    checkpoint: str
    shards: int
    rows: int
    bytes: int
    rms: Mapping[str, float]
    pairs: PairStats | None
    values: GroupStats


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskStats:
    """One mask; `settings` as `mask` was given them, `kept_share` None where there is no response token.

    `end_of_turn_tokens`: those that end an answer, and of them kept; None where the run does not say which they are.
    `over_share`: by how many the tokens that are always kept exceed the share by themselves.
    """

    mask: int
    generations: tuple[int, ...]
    settings: Mapping[str, Json]
    kept_tokens: int
    response_tokens: int
    kept_share: float | None
    rows_given_back: int
    end_of_turn_tokens: int | None
    end_of_turn_kept: int | None
    over_share: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A run in numbers: one `generation` and the newest mask. Of preference rows, tokens are those of both branches.

    `kind`: `sft` or `preference`. `direction`: what values are along, `gradient` or `rehearsal`, of which `rehearsed`
    tells the training; `beyond`: values below 0 beyond their error, None where there are no errors. `rows`: read, and
    by status. `tokens`, `response_tokens`: of every status; `scored_tokens`: response tokens of scored rows, of which
    `kept_tokens` (None without a mask); `rows_left_out`: scored rows that are not in the mask, since another of its
    generations did not score them. `branches`: `chosen` and `rejected`, empty in SFT runs; `pairs` None there;
    `sources`: by the name of the file that scored rows are from.
    `histograms`: of each signal computed, over the scored tokens; those of `branches`, `sources` and `generations` are
    of the value and have its edges. `rms`: root mean square over the scored tokens of each signal
    that `estimator` gives along a direction, of `adaptation` and `stability` (the sums of their components) and of
    `value`; of the drift's signals and `drift`, their sum, where it was computed; in `unit`, as values are, 0 where
    there is no token. `mean`: of nll, entropy and reference_nll in nats, None where there is none.
    `decisions_changed`: by --stability-scale, tokens that the newest mask's settings (the default settings where there
    is no mask) keep or drop only due to stability, of `decided_tokens` in `decided_generations`: those the mask was
    made from, or the one that was asked for. `decided_by_value`: whether these settings select by the value; where they
    do not, both numbers are of the published mask, `by` value and `keep` 0.5.
    """

    kind: str
    estimator: str
    direction: str = "gradient"
    rehearsed: str | None = None
    unit: str = PER_STEP
    beyond: Beyond | None = None
    generation: int
    rows: Mapping[str, int]
    sequences: int | None = None
    tokens: int
    response_tokens: int
    truncated_rows: int
    truncated_tokens: int
    scored_tokens: int
    kept_tokens: int | None
    kept_share: float | None
    rows_left_out: int
    branches: Mapping[str, GroupStats]
    sources: Mapping[str, GroupStats]
    pairs: PairStats | None
    histograms: Mapping[str, Histogram]
    rms: Mapping[str, float]
    mean: Mapping[str, float | None]
    stability_is_zero: bool
    decisions_changed: Mapping[str, int]
    decided_tokens: int
    decided_generations: tuple[int, ...]
    decided_by_value: bool
    generations: tuple[GenerationStats, ...]
    masks: tuple[MaskStats, ...]

    @property
    def undecided(self) -> str:
        """What the newest mask does, where it is not by the value that it selects, and what follows for stability."""
        if self.kept_share == 1 or not self.masks:
            return "keeps every token, so stability decides nothing in it"
        if not criteria.is_readable(str(self.masks[-1].settings.get("by", "value"))):
            return "selects by SQL that --by does not take, so what stability decides in it is not told"
        if formulas.drops(str(self.masks[-1].settings.get("weights"))) and self.masks[-1].settings.get("keep") == 1:
            return "drops tokens by their weight alone, so what stability decides in it is not told"
        return "does not select by value, so stability decides nothing in it"


def stats(run: str | Path, *, generation: int | None = None) -> Stats:
    """The numbers of a run, of its newest generation or the one given.

    Raises `UsageError` for a generation that is not there, `StoredDataError` where the run has no manifest or is
    damaged.
    """
    folder = Path(run)
    stored = manifest.read(folder)
    if not stored.generations:
        raise StoredDataError(f"{folder / manifest.NAME}: names no generation; run the `score` command that makes one")
    shown = choose_generation(folder, stored, generation)
    all_sums = {one.generation: Sums.of(folder, stored, one) for one in stored.generations}
    sums = all_sums[shown.generation]
    edges = sums.edges()
    found = counted(folder, stored, shown, edges)
    only = {"value": edges["value"]}
    others = [one for one in stored.generations if one is not shown]
    values = {one.generation: counted(folder, stored, one, only).every for one in others}
    values[shown.generation] = found.every
    layout, counts = manifest.layout(stored), stored.counts
    generations = (
        _generation(one, all_sums[one.generation], layout, values[one.generation]) for one in stored.generations
    )
    return Stats(
        kind=layout.kind,
        estimator=str(stored.settings["estimator"]),
        **_direction(folder, stored, generation),
        generation=shown.generation,
        rows={"read": counts.read, **{status: sums.rows[status] for status in STATUSES}},
        sequences=counts.sequences if stored.settings.get("turns") == "each" else None,
        tokens=counts.tokens,
        response_tokens=counts.response_tokens,
        truncated_rows=counts.truncated_rows,
        truncated_tokens=counts.truncated_tokens,
        scored_tokens=found.every.scored_tokens,
        kept_tokens=found.every.kept_tokens,
        kept_share=found.every.kept_share,
        rows_left_out=found.rows_left_out,
        branches=found.branches,
        sources=found.sources,
        pairs=sums.pairs(layout),
        histograms=found.histograms,
        rms=sums.rms(),
        mean=sums.mean(),
        stability_is_zero=not any(sums.rms()[name] for name in manifest.components(stored).stability),
        **_decisions(folder, stored, generation),
        generations=tuple(generations),
        masks=tuple(_mask(one) for one in stored.masks),
    )


def _direction(run: Path, stored: Manifest, generation: int | None) -> dict[str, Any]:
    return {
        "direction": direction.direction(stored),
        "rehearsed": direction.rehearsed(stored),
        "unit": manifest.layout(stored).unit,
        "beyond": beyond(run, generation),
    }


def _decisions(run: Path, stored: Manifest, generation: int | None) -> dict[str, Any]:
    """What stability decides in a mask of the newest one's settings."""
    config = newest_settings(stored)
    if generation is not None:
        config = replace(config, generation=str(generation))
    elif stored.masks:
        # Not as the mask was told: its `latest` may be a newer one by now.
        config = replace(config, generation=",".join(map(str, stored.masks[-1].generations)), aggregate="mean")
    by_value = criteria.is_readable(config.by) and criteria.depends_on_value(config.by)
    by_value = by_value and choose.parse_keep(config.keep) != 1
    if not by_value:
        config = replace(config, by="value", keep=0.5, scope="global", weights="binary", always_keep="none")
    found = [remask.spreads(run, replace(config, stability_scale=scale)) for scale in SCALES]
    return {
        "decisions_changed": {scale: one.decisions_changed for scale, one in zip(SCALES, found, strict=True)},
        "decided_tokens": found[0].response_tokens,
        "decided_generations": tuple(one.generation for one in responses.chosen_generations(run, stored, config)),
        "decided_by_value": by_value,
    }


# ------------------------------------------------------------------------------------------------- from the manifest


def newest_settings(stored: Manifest) -> MaskConfig:
    """The settings of the newest mask; the defaults where there is none."""
    return responses.of_run(settings_of_mask(stored.masks[-1].settings) if stored.masks else MaskConfig(), stored)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _generation(one: Generation, sums: Sums, layout: Layout, values: GroupStats) -> GenerationStats:
    return GenerationStats(
        generation=one.generation,
        checkpoint=one.checkpoint,
        shards=len(one.shards),
        rows=sum(sums.rows.values()),
        bytes=sum(shard.bytes for shard in one.shards),
        rms=sums.rms(),
        pairs=sums.pairs(layout),
        values=values,
    )


def _mask(mask: Mask) -> MaskStats:
    return MaskStats(
        mask=mask.mask,
        generations=mask.generations,
        settings=mask.settings,
        kept_tokens=mask.kept_tokens,
        response_tokens=mask.response_tokens,
        kept_share=_share(mask.kept_tokens, mask.response_tokens),
        rows_given_back=mask.rows_given_back,
        end_of_turn_tokens=mask.end_of_turn_tokens,
        end_of_turn_kept=mask.end_of_turn_kept,
        over_share=mask.over_share or 0,
    )
