"""Masks from stored values: read generations (`responses`), decide, write train/. No model is needed.

Runs in one process and reads shard by shard. Of each response token it holds the number selected on (4 bytes), whether
it is kept (1) and its weight (4): with what the threshold takes for a time no more than 10 bytes, 25 with `--weights
rank` (and see `ranked` for an expression as `--by`); one or two more where some are always kept; of each row 16 to 24
bytes; and what one shard takes.
Callers hold the run (`atomic.one_writer`) and write the card afterwards (`card.write`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.masks import always, choose, criteria
from alphatoken_curate.masks.always import Always
from alphatoken_curate.masks.ranked import Files, Ranked, RankedBranch, ranked, sizes
from alphatoken_curate.masks.responses import (
    Tokens,
    aligned,
    by_shard,
    chosen_generations,
    of_run,
    sequences_of,
    table_of,
)
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.atomic import sweep
from alphatoken_curate.runs.fingerprint import Json, fingerprint
from alphatoken_curate.runs.manifest import Generation, Manifest, Mask
from alphatoken_curate.runs.schema import Components, Layout, absent, rows_and_turns, units_of, with_units
from alphatoken_curate.runs.shards import Footer, Shard
from alphatoken_curate.runs.train_shards import MaskFacts, TrainLists, write_train
from alphatoken_curate.signals import composite


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchCounts:
    """Response tokens of one branch of the rows in train/, and those of them that the mask keeps."""

    kept_tokens: int
    response_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSummary:
    """What `make_mask` did. `created`: not there before; `newest`: what readers take who do not ask for a number.

    Tokens, and rows that got their best token back, are counted over all branches; `branches`: of preference rows,
    `chosen` and `rejected`. `rows_left_out`: scored in only some of the `generations` that the mask averages.
    `end_of_turn_tokens`: those that end an answer, and of them kept; None where the run does not say which they are.
    `over_share`: by how many the tokens that are always kept exceed the share by themselves. `of_turns`: each answer is
    a sequence of its own (`--turns each`), and the counts of rows are of these. `settings`: as the mask keeps them.
    """

    mask: int
    path: Path
    created: bool
    newest: bool
    generations: tuple[int, ...]
    rows: int
    rows_left_out: int
    response_tokens: int
    kept_tokens: int
    branches: Mapping[str, BranchCounts]
    rows_given_back: int
    end_of_turn_tokens: int | None
    end_of_turn_kept: int | None
    over_share: int
    of_turns: bool
    settings: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spreads:
    """`components`: RMS of each over the response tokens of all branches.

    `decisions_changed`: tokens that are kept or dropped only due to stability.
    """

    components: Mapping[str, float]
    response_tokens: int
    decisions_changed: int


def check_settings(config: MaskConfig, components: Components, layout: Layout) -> None:
    """Raise `UsageError` for settings that no mask of such a run can be made with, before anything is read."""
    choose.parse_keep(config.keep)
    choose.parse_scope(config.scope)
    criteria.columns_needed(config.by, components, layout)
    always.check(config.always_keep, components, layout)


def make_mask(run: Path, config: MaskConfig) -> MaskSummary:
    """Mask and loss weights from the generations that `config` names, in train/mask=NNNN and then in the manifest.

    Settings and values of an existing mask: that one is returned, nothing is written. A mask whose writing was cut off
    is finished with the same bytes. Other settings get a new number. Raises `UsageError` for settings that cannot be
    used, `StoredDataError` where the run has no manifest or is damaged.
    """
    stored = manifest.read(run)
    layout, components = manifest.layout(stored), manifest.components(stored)
    check_settings(config, components, layout)
    config = of_run(config, stored)
    generations = chosen_generations(run, stored, config)
    stays = always.always_kept(run, stored, config)
    config = config if stays else replace(config, always_keep="none")
    about = _fields(config, generations, stored.schema_version)
    known = next((mask for mask in stored.masks if mask.fingerprint == fingerprint(about)), None)
    if known and all(_is_there(run, shard) for shard in known.shards):
        several = aligned(run, generations) if len(generations) > 1 else ()
        left_out = sum(part.left_out for part in by_shard(run, several, (), layout))
        return _summary(run, known, stored, created=False, left_out=left_out)
    number = known.mask if known else _free_number(run, stored, fingerprint(about))
    mask, lost = _write(run, stored, number, generations, config, about, stays)
    others = [other for other in stored.masks if other.mask != number]
    changed = replace(stored, masks=tuple(sorted([*others, mask], key=lambda one: one.mask)))
    manifest.write(run, changed)
    return _summary(run, mask, changed, created=True, left_out=lost)


def spreads(run: Path, config: MaskConfig) -> Spreads:
    """How large each component is in the generations that `config` names, and what stability changes in its mask.

    `decisions_changed` compares the mask with the one that stability weight 0 gives. Raises as `make_mask`.
    """
    stored = manifest.read(run)
    config = of_run(config, stored)
    layout, components = manifest.layout(stored), manifest.components(stored)
    files = aligned(run, chosen_generations(run, stored, config))
    found = sizes(run, files, layout, components)
    weights = (_weight(config), 0.0)
    tokens = changed = 0
    stays = always.always_kept(run, stored, config)
    for branch in _ranked(run, files, layout, components, config, weights, stays, found).branches:
        choice = {**_choice(config), "always": branch.always}
        one, other = (choose.kept(score, branch.lengths, **choice) for score in branch.scores)
        tokens += len(one)
        changed += int(np.count_nonzero(one != other))
    return Spreads(components=found.spreads, response_tokens=tokens, decisions_changed=changed)


def keeps(
    branches: Sequence[Tokens], layout: Layout, components: Components, config: MaskConfig, stays: Always | None
) -> list[NDArray[np.bool_]]:
    """Which tokens of each branch a mask of these settings would keep, (N,) bool each. Nothing is written.

    `config`: of the run (`of_run`); `stays`: what it always keeps.
    """
    scales = composite.PUBLISHED
    if _is_scaled(config):
        scales = composite.sizes((tokens.columns for tokens in branches), components).scales
    kept = []
    for number, tokens in enumerate(branches):
        how: dict[str, Any] = {
            "components": components,
            "stability_weight": _weight(config),
            "scales": scales,
            "layout": layout,
        }
        score = criteria.selection(config.by, tokens.columns, **how, seed=config.seed, branch=number)
        choice = {**_choice(config), "always": stays and stays.of(tokens.columns, **how)}
        kept.append(choose.weighed(score, np.bincount(tokens.row), **choice, weights=config.weights).weight > 0)
    return kept


# ------------------------------------------------------------------------------------------------------ decide, write


def _fields(config: MaskConfig, generations: Sequence[Generation], version: int) -> dict[str, Json]:
    """What decides the mask, and nothing that this mask does not depend on; `version`: that of the values."""
    share = choose.parse_keep(config.keep)
    about: dict[str, Json] = {
        "schema_version": version,
        "generations": [one.generation for one in generations],
        "values": fingerprint({"shards": [shard.sha256 for one in generations for shard in one.shards]}),
        "keep": str(share) if share else "positive",
        "scope": config.scope,
        "weights": config.weights,
        "by": config.by,
        "allow_empty_rows": config.allow_empty_rows,
    }
    if len(generations) > 1:
        about["aggregate"] = config.aggregate
    if _is_by_value(config):
        about |= {"stability_weight": _weight(config), "stability_scale": config.stability_scale}
    if config.always_keep != "none":
        about["always_keep"] = config.always_keep
    return about | ({"seed": config.seed} if config.by == "random" else {})


def _is_there(run: Path, shard: Shard) -> bool:
    path = run / shard.path
    return path.is_file() and path.stat().st_size == shard.bytes


def _free_number(run: Path, stored: Manifest, mark: str) -> int:
    """The first number after all finished masks whose folder is empty or was begun with the same settings."""
    number = stored.masks[-1].mask + 1 if stored.masks else 0
    while paths := shards.listed(shards.train_folder(run, number)):
        if shards.read_footer(next(iter(paths.values()))).fingerprint == mark:
            break
        number += 1
    return number


def _write(
    run: Path,
    stored: Manifest,
    number: int,
    generations: Sequence[Generation],
    config: MaskConfig,
    about: Mapping[str, Json],
    stays: Always | None,
) -> tuple[Mask, int]:
    """The mask, its shards written, and how many rows only some of the generations scored."""
    layout, components = manifest.layout(stored), manifest.components(stored)
    files = aligned(run, generations)
    found = _ranked(run, files, layout, components, config, (_weight(config),), stays)
    decided = [_decided(branch, config) for branch in found.branches]
    facts = MaskFacts(
        generations=tuple(one.generation for one in generations),
        settings=_told(config),
        rows_given_back=sum(one.given_back for one in decided),
        over_share=sum(one.over_share for one in decided) if stays else None,
    ).as_json()
    metadata = Footer(fields=about, facts=facts)
    units = units_of(config.by, config.stability_scale, layout.unit)
    layout = replace(layout, train=with_units(layout.train, units))
    folder = shards.train_folder(run, number)
    sweep(folder)
    sweep(run)
    done = shards.committed(folder, about)
    group = []
    dealt = zip(*map(_by_shard, found.branches, decided), strict=True)
    for index, (keys, parts) in enumerate(zip(found.keys, dealt, strict=True)):
        path = folder / shards.shard_name(index)
        if index in done:
            shards.check_rows(path, rows_and_turns(keys)[0].tolist())
        else:
            lists = _train_lists(run, files[index][0], keys, layout, parts, stored.schema_version)
            done[index] = write_train(path, keys, lists, metadata, layout)
        group.append((shards.read_footer(path), done[index]))
    return manifest.mask_of(number, folder, group), found.left_out


def _told(config: MaskConfig) -> dict[str, Json]:
    """The settings as a mask keeps them: where nothing is always kept, as before there was such a setting."""
    settings = {item.name: getattr(config, item.name) for item in fields(MaskConfig)}
    if config.always_keep == "none":
        del settings["always_keep"]
    return settings


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Decided:
    """Of N response tokens of one branch: the number selected on and the loss weight, (N,) float32 each.

    `given_back`: rows of the whole branch that got their best token back; `over_share`: as in `choose.Weighed`.
    """

    score: NDArray[np.float32]
    weight: NDArray[np.float32]
    given_back: int
    over_share: int


def _ranked(
    run: Path,
    files: Files,
    layout: Layout,
    components: Components,
    config: MaskConfig,
    stability_weights: Sequence[float],
    stays: Always | None,
    known: composite.Sizes | None = None,
) -> Ranked:
    """What all branches are selected on. The scales are one pair for all: their values must stay comparable."""
    scales = composite.PUBLISHED
    if _is_scaled(config):
        scales = (known or sizes(run, files, layout, components)).scales
    return ranked(
        run, files, layout, components, config, stability_weights=stability_weights, scales=scales, always=stays
    )


def _weight(config: MaskConfig) -> float:
    """Of stability, once the settings are those of a run (`of_run`)."""
    assert config.stability_weight is not None
    return float(config.stability_weight)


def _is_scaled(config: MaskConfig) -> bool:
    return config.stability_scale == "rms" and _is_by_value(config)


def _is_by_value(config: MaskConfig) -> bool:
    """Whether the stability settings decide: by what is selected on, or by what is always kept."""
    return criteria.depends_on_value(config.by) or always.depends_on_value(config.always_keep)


def _choice(config: MaskConfig) -> dict[str, Any]:
    """The settings that `masks.kept` takes."""
    return {"keep": config.keep, "scope": config.scope, "allow_empty_rows": config.allow_empty_rows}


def _decided(branch: RankedBranch, config: MaskConfig) -> _Decided:
    """Eq. 13 for one branch by itself."""
    (score,) = branch.scores
    found = choose.weighed(score, branch.lengths, **_choice(config), weights=config.weights, always=branch.always)
    return _Decided(score=score, weight=found.weight, given_back=found.given_back, over_share=found.over_share)


def _by_shard(branch: RankedBranch, decided: _Decided) -> Iterator[_Decided]:
    start = 0
    for length in branch.per_shard:
        part = slice(start, start + length)
        yield replace(decided, score=decided.score[part], weight=decided.weight[part])
        start += length


def _train_lists(
    run: Path, shard: Shard, keys: NDArray[np.int64], layout: Layout, decided: Sequence[_Decided], version: int
) -> list[TrainLists]:
    """The rows of a train shard, by branch; `decided`: of the response tokens of these rows."""
    ends = [always.END_OF_TURN] if always.END_OF_TURN not in absent(version) else []
    columns = [prefix + name for prefix in layout.branches for name in ("input_ids", "response", *ends)]
    table = table_of(run, shard, layout, columns)
    table = table.filter(pa.array(np.isin(sequences_of(table), keys)))
    lists = []
    for prefix, one in zip(layout.branches, decided, strict=True):
        response, lengths = shards.entries(table[prefix + "response"])
        weight, value = np.zeros(len(response), np.float32), np.full(len(response), np.nan, np.float32)
        weight[response], value[response] = one.weight, one.score
        ids = shards.entries(table[prefix + "input_ids"])[0].astype(np.int32)
        end = shards.entries(table[prefix + ends[0]])[0] if ends else None
        lists.append(TrainLists(lengths=lengths, input_ids=ids, weight=weight, value=value, end_of_turn=end))
    return lists


def _summary(run: Path, mask: Mask, stored: Manifest, *, created: bool, left_out: int) -> MaskSummary:
    return MaskSummary(
        mask=mask.mask,
        path=shards.train_folder(run, mask.mask),
        created=created,
        newest=mask.mask == stored.masks[-1].mask,
        generations=mask.generations,
        rows=sum(shard.rows for shard in mask.shards),
        rows_left_out=left_out,
        response_tokens=mask.response_tokens,
        kept_tokens=mask.kept_tokens,
        branches=_branch_counts(run, mask, manifest.layout(stored)),
        rows_given_back=mask.rows_given_back,
        end_of_turn_tokens=mask.end_of_turn_tokens,
        end_of_turn_kept=mask.end_of_turn_kept,
        over_share=mask.over_share or 0,
        of_turns=stored.settings.get("turns") == "each",
        settings=mask.settings,
    )


def _branch_counts(run: Path, mask: Mask, layout: Layout) -> dict[str, BranchCounts]:
    """By the branch's name; nothing where the mask's own counts say it all."""
    if len(layout.branches) == 1:
        return {}
    kept, response = dict.fromkeys(layout.branches, 0), dict.fromkeys(layout.branches, 0)
    for shard in mask.shards:
        for prefix in layout.branches:
            table = shards.read_shard(run, shard, layout.train, [prefix + "loss_mask", prefix + "value"])
            kept[prefix] += int(shards.entries(table[prefix + "loss_mask"])[0].sum())
            value = pc.list_flatten(table[prefix + "value"])
            response[prefix] += len(value) - value.null_count
    return {
        prefix.rstrip("_"): BranchCounts(kept_tokens=kept[prefix], response_tokens=response[prefix])
        for prefix in layout.branches
    }
