"""The later sections of a report: what agrees with what, what goes with a high value, which tokens, and over time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from alphatoken_curate.page import chart
from alphatoken_curate.page.chart import Axis, Line
from alphatoken_curate.page.markup import (
    Html,
    agreement,
    column,
    figure,
    foreign,
    joined,
    note,
    number,
    share,
    table,
    tag,
)
from alphatoken_curate.page.numbers import (
    Bands,
    Floats,
    Group,
    Numbers,
    bands,
    correlation,
    density,
    groups,
    place_edges,
    quantile_edges,
    rank_correlation,
    same_sign,
    signed_log,
    unusual,
)
from alphatoken_curate.page.overview import bar, known_objectives
from alphatoken_curate.page.tokens import NO_CLASS, RunTokens, masked, values_at
from alphatoken_curate.reading.stats import Stats
from alphatoken_curate.reading.words import CLASSES, PART

CELLS = 36
"""Bins of a density along each axis."""

TYPES = 15
"""Token types told of, of those kept most and of those dropped most."""


# -------------------------------------------------------------------------------------------------- what agrees


def what_agrees(tokens: RunTokens, found: Stats) -> Html:
    """Adaptation against stability, the direct against the causal path, and decisions that stability changed."""
    if not len(tokens):
        return note("No token was scored.")
    parts = known_objectives(tokens)
    sums = {name: tokens.objective(signals) for name, signals in parts.items()}
    figures = [_agreement(tokens, "objectives", "adaptation", "stability", sums["adaptation"], sums["stability"])]
    for name, signals in parts.items():
        if len(signals) == 2:
            direct, causal = (tokens.signals[one] for one in signals)
            figures.append(_agreement(tokens, f"paths-{name}", f"direct {name}", f"causal {name}", direct, causal))
    if "drift" in sums:
        figures.append(
            _agreement(tokens, "drift", "stability by retention rows", "by drift", sums["stability"], sums["drift"])
        )
    figures.append(_decisions(found))
    return tag("div", *figures, class_="charts")


def _agreement(tokens: RunTokens, slug: str, x_name: str, y_name: str, x: Floats, y: Floats) -> Html:
    question = f"Does {x_name} agree with {y_name}?"
    constant = [name for name, values in ((x_name, x), (y_name, y)) if not np.any(values)]
    if constant:
        return figure(slug, question, f"There is nothing to compare: {constant[0]} is 0 for every token.", Html(""))
    ranked, plain, sign = rank_correlation(x, y), correlation(x, y), same_sign(x, y)
    told = f"The same sign at {share(sign)} of tokens."
    if ranked is not None:
        told = f"Rank correlation {agreement(ranked)} (Spearman; Pearson {agreement(plain)}). {told}"
    across, up = (_bent_axis(f"{name}, {tokens.layout.unit}", one) for name, one in ((x_name, x), (y_name, y)))
    drawing = chart.density(slug, density(x, y, _bent_edges(across), _bent_edges(up)), across, up)
    key = tag(
        "ul",
        *map(_shade, range(1, chart.SHADES + 1)),
        tag("li", "few to many tokens; axes logarithmic away from 0"),
        class_="keys shades",
    )
    return figure(slug, question, told, joined([drawing, key]))


def _shade(level: int) -> Html:
    cell = tag("rect", class_=f"cell q{level}", width="12", height="12")
    return tag("li", tag("svg", cell, viewBox="0 0 12 12", aria_hidden="true", class_="key"))


def _bent_axis(name: str, values: Floats) -> Axis:
    """Linear up to the median magnitude and logarithmic beyond: components have long tails."""
    far = float(np.percentile(np.abs(values), 99.8)) or float(np.abs(values).max())
    sizes = np.abs(values[values != 0])
    unit = max(float(np.median(sizes)), far * 1e-4)
    low = -far if np.any(values < 0) else 0.0
    return Axis(low=low, high=far, name=name, unit=unit)


def _bent_edges(axis: Axis) -> Numbers:
    unit = axis.unit or 1.0
    low, high = signed_log(np.array([axis.low, axis.high]), unit)
    edges: Numbers = np.sinh(np.linspace(low, high, CELLS + 1)) * unit
    return edges


def _decisions(found: Stats) -> Html:
    question = "How many decisions did stability change?"
    total = found.decided_tokens or 1
    changed = found.decisions_changed
    rows = [
        (name, f"{count:,}", share(count / total), bar(count / total, "changed")) for name, count in changed.items()
    ]
    told = (
        f"As published, {changed['none']:,} of {found.decided_tokens:,} tokens ({share(changed['none'] / total)}) are"
        f" kept or dropped only because of stability; with both objectives brought to one scale it would be"
        f" {changed['rms']:,} ({share(changed['rms'] / total)})."
    )
    if not found.decided_by_value:
        told = f"The mask {found.undecided}. In one that keeps the half of highest value: {told}"
    head = ("--stability-scale", "changed", "share", "")
    return figure("decisions", question, told, table("Decisions that stability changes", head, rows, class_="bars"))


# ------------------------------------------------------------------------------------------- what goes with a value


def what_goes_with_it(tokens: RunTokens) -> Html:
    """The value by loss, by place in the response and by class of token."""
    if not len(tokens):
        return note("No token was scored.")
    return tag("div", _by_loss(tokens), _by_place(tokens), _by_class(tokens), class_="charts")


def _by_loss(tokens: RunTokens) -> Html:
    nll, value = tokens.signals["nll"], tokens.signals["value"]
    found = bands(nll, value, tokens.kept, quantile_edges(nll, 10))
    ranked = rank_correlation(nll, value)
    size = rank_correlation(nll, np.abs(value))
    told = (
        f"Rank correlation of value and loss {agreement(ranked)}, of |value| and loss"
        f" {agreement(size)}.{_ends(found, 'likeliest', 'least likely')}"
    )
    labels = [chart.tick_text(float(f"{edge:.2g}")) for edge in found.edges]
    question = "Do tokens that the model finds hard have higher values?"
    return _banded(
        tokens, "loss", question, told, found, labels, "loss (nll) of the token, nats; a tenth of all in each box"
    )


def _by_place(tokens: RunTokens) -> Html:
    place = tokens.place.astype(np.float64)
    found = bands(place, tokens.signals["value"], tokens.kept, place_edges(int(place.max())))
    edges = found.edges.astype(int)
    labels = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in pairwise(edges)]
    ranked = rank_correlation(place, tokens.signals["value"])
    told = f"Rank correlation of value and place {agreement(ranked)}.{_ends(found, 'first', 'last')}"
    question = "Does the value depend on the place in the response?"
    return _banded(tokens, "place", question, told, found, labels, "token of the response")


def _ends(found: Bands, first: str, last: str) -> str:
    """What the first and the last bin keep."""
    kept = found.kept[found.count > 0]
    if len(kept) < 2 or np.isnan(kept).any():
        return ""
    return f" Of the {first} {share(float(kept[0]))} are kept, of the {last} {share(float(kept[-1]))}."


def _banded(
    tokens: RunTokens, slug: str, question: str, told: str, found: Bands, labels: Sequence[str], x_name: str
) -> Html:
    has_mask = not np.isnan(found.kept).all()
    drawing = chart.bands(slug, found, labels, x_name, f"value, {tokens.layout.unit}", masked=has_mask)
    filled = np.flatnonzero(found.count).tolist()
    power, quartiles = column([float(part[i]) for i in filled for part in (found.low, found.middle, found.high)])
    rows = []
    for place, i in enumerate(filled):
        name = f"{labels[i]} to {labels[i + 1]}" if len(labels) > len(found.count) else labels[i]
        kept = [share(float(found.kept[i]))] if has_mask else []
        rows.append((name, f"{int(found.count[i]):,}", *quartiles[3 * place : 3 * place + 3], *kept))
    names = (f"25th percentile{power}", "median", "75th percentile")
    head = (x_name, "tokens", *names, *(["kept"] if has_mask else []))
    told += " Boxes hold the middle half of values, lines are medians."
    return figure(slug, question, told, drawing, table(question, head, rows))


def _by_class(tokens: RunTokens) -> Html:
    question = "Which classes of tokens have high values?"
    known = tokens.kind != NO_CLASS
    if not known.any():
        return figure("class", question, "Not known: the run has no vocabulary.", Html(""))
    kept = None if tokens.kept is None else tokens.kept[known]
    found = groups(tokens.kind[known], tokens.signals["value"][known], kept)
    has_mask = kept is not None
    ordered = sorted(found, key=lambda one: (-one.share if has_mask else -one.value, one.name))
    names = [tag("span", CLASSES[one.name]) for one in ordered]
    best, worst = ordered[0], ordered[-1]
    what = (
        f"Kept most: {CLASSES[best.name]}, {share(best.share)}; least: {CLASSES[worst.name]}, {share(worst.share)}."
        if has_mask
        else f"Highest mean value: {CLASSES[best.name]}, {number(best.value, signed=True)}."
    )
    return figure("class", question, what, _group_table("Classes of tokens", "class", names, ordered, has_mask))


def _group_table(caption: str, first: str, names: Sequence[Html], found: Sequence[Group], has_mask: bool) -> Html:
    power, means = column([one.value for one in found])
    head = (first, "tokens", f"mean value{power}", *(("kept", "") if has_mask else ()))
    rows = []
    for name, one, mean in zip(names, found, means, strict=True):
        rows.append((name, f"{one.count:,}", mean, *((share(one.share), bar(one.share)) if has_mask else ())))
    return table(caption, head, rows, class_="bars")


# --------------------------------------------------------------------------------------------------- which tokens


def which_tokens(tokens: RunTokens) -> Html:
    """Types kept and dropped far more often than chance would have it."""
    if not len(tokens):
        return note("No token was scored.")
    if tokens.kept is None:
        return note("There is no mask yet, so no token is kept or dropped.")
    decided = ~np.isnan(tokens.weight)  # type: ignore[arg-type]
    kept = tokens.kept[decided]
    overall = float(kept.mean()) if len(kept) else 0.0
    found = groups(tokens.token_id[decided], tokens.signals["value"][decided], kept)
    more, less = unusual(found, overall, TYPES)
    sorts = (("more", "Which tokens are kept most?", more), ("less", "Which tokens are dropped most?", less))
    return tag("div", *(_types(tokens, slug, name, part, overall) for slug, name, part in sorts), class_="charts")


def _types(tokens: RunTokens, slug: str, question: str, found: Sequence[Group], overall: float) -> Html:
    if not found:
        return figure(slug, question, "None stands out: every type is kept as often as all tokens are.", Html(""))
    kept, count = sum(one.kept or 0 for one in found), sum(one.count for one in found)
    told = (
        f"These {len(found)} types of token are kept {share(kept / count)} of the time, all tokens {share(overall)}."
        f" First is what moves most tokens away from that."
    )
    names = [piece(tokens, one.name) for one in found]
    return figure(slug, question, told, _group_table(question, "token", names, found, True))


def piece(tokens: RunTokens, token_id: int) -> Html:
    """A token type as it is seen: spaces as dots, bytes of a cut character by their numbers."""
    text = tokens.vocabulary.texts.get(token_id) or f"<{token_id}>"
    if PART in text and token_id in tokens.vocabulary.pieces:
        text = " ".join(f"{byte:02X}" for byte in tokens.vocabulary.pieces[token_id]) + " (bytes)"
    bare = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    spaces = ("·" * before, "·" * (len(text) - len(bare) - before))
    dots = [tag("span", one, class_="space") if one else None for one in spaces]
    return tag("code", dots[0], foreign(bare) if bare else None, dots[1], class_="piece")


# ------------------------------------------------------------------------------------------------------- over time


def over_time(run: Path, tokens: RunTokens, found: Stats) -> Html:
    """Spreads, rank correlations and masks from one scoring to the next."""
    generations = tokens.stored.generations
    if len(generations) < 2:
        return note(
            "There is one scoring. After `refresh` at a checkpoint, this shows how values and masks drift between them."
        )
    values = [values_at(run, tokens, one) for one in generations]
    labels = [str(one.generation) for one in generations]
    names = "; ".join(f"{one.generation}: {one.checkpoint}" for one in generations)
    listed = tag("p", "Generations: ", foreign(names), class_="note")
    figures = [_drift(values, labels), _spreads(found, labels), _masks(run, tokens)]
    return joined([listed, tag("div", *figures, class_="charts")])


def _drift(values: Sequence[Floats], labels: Sequence[str]) -> Html:
    first = [rank_correlation(values[0], one) for one in values]
    previous = [None, *(rank_correlation(a, b) for a, b in pairwise(values))]
    found = [Line(name="with the first", values=first), Line(name="with the one before", values=previous)]
    low = min([0.0, *(x for line in found for x in line.values if x is not None)])
    axis = Axis(low=low if low == 0 else -1.0, high=1.0, name="rank correlation")
    told = (
        f"Values of generation {labels[-1]} rank {agreement(first[-1])} with those of generation {labels[0]}"
        f" (Spearman), and {agreement(previous[-1])} with the one before; 1 is the same order."
    )
    drawing = chart.lines("drift-values", found, labels, "generation", axis)
    return figure("drift-values", "How far do values drift?", told, joined([drawing, chart.line_key(found)]))


def _spreads(found: Stats, labels: Sequence[str]) -> Html:
    names = [name for name in ("adaptation", "stability", "drift", "value") if name in found.generations[-1].rms]
    lines = [Line(name=name, values=[one.rms.get(name) for one in found.generations]) for name in names]
    sizes = [x for line in lines for x in line.values if x]
    far = max(sizes, default=1.0)
    axis = Axis(low=0, high=far * 1.1, name=f"RMS, {found.unit}", unit=max(min(sizes, default=1.0), far * 1e-4))
    told = "; ".join(f"{line.name} from {number(line.values[0])} to {number(line.values[-1])}" for line in lines)
    drawing = chart.lines("drift-rms", lines, labels, "generation", axis)
    question = "Do the objectives grow or shrink?"
    return figure("drift-rms", question, f"Root mean square: {told}.", joined([drawing, chart.line_key(lines)]))


def _masks(run: Path, tokens: RunTokens) -> Html:
    question = "Do masks change?"
    known = tokens.stored.masks
    if len(known) < 2:
        return figure("drift-masks", question, "There is one mask." if known else "There is no mask yet.", Html(""))
    weights = [masked(run, tokens, one) for one in known]
    rows = []
    for place, one in enumerate(known):
        kept, decided = weights[place] > 0, ~np.isnan(weights[place])
        cells = [f"{one.mask}", ", ".join(map(str, one.generations)), share(kept.sum() / (decided.sum() or 1))]
        before = overlap(weights[place - 1], weights[place]) if place else None
        rows.append((*cells, share(before), bar(before or 0.0)))
    told = (
        f"Of the tokens that mask {known[-2].mask} or mask {known[-1].mask} keeps, both keep"
        f" {share(overlap(weights[-2], weights[-1]))}; of those of mask {known[0].mask} or mask {known[-1].mask},"
        f" {share(overlap(weights[0], weights[-1]))}."
    )
    head = ("mask", "generations", "kept", "kept by both, of it and the one before", "")
    return figure("drift-masks", question, told, table("Masks", head, rows, class_="bars"))


def overlap(one: Floats, other: Floats) -> float | None:
    """Tokens that both masks keep among those that either keeps (Jaccard), in rows that both hold."""
    both = ~(np.isnan(one) | np.isnan(other))
    a, b = one[both] > 0, other[both] > 0
    either = int((a | b).sum())
    return float((a & b).sum() / either) if either else None
