"""The first sections of a report: what was run, how many tokens are kept, how values and components are distributed."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from alphatoken_curate.page import chart
from alphatoken_curate.page.markup import (
    NONE,
    Html,
    Part,
    facts,
    figure,
    foreign,
    joined,
    listed,
    note,
    number,
    prose,
    share,
    table,
    tag,
)
from alphatoken_curate.page.numbers import Floats, overlaid, symmetric_edges
from alphatoken_curate.page.tokens import RunTokens
from alphatoken_curate.reading.errors import Beyond
from alphatoken_curate.reading.row import rejects
from alphatoken_curate.reading.stats import Stats
from alphatoken_curate.reading.sums import objectives
from alphatoken_curate.runs.manifest import Manifest
from alphatoken_curate.runs.schema import STATUSES, lacks
from alphatoken_curate.wording import chosen_by, count, end_of_turn, in_sequences, over_share, sequences_are

NAMES = {
    "adapt_direct": "direct adaptation",
    "adapt_causal": "causal adaptation",
    "adapt_upstream": "upstream adaptation",
    "adapt_influence": "adaptation",
    "stab_direct": "direct stability",
    "stab_causal": "causal stability",
    "stab_upstream": "upstream stability",
    "stab_influence": "stability",
    "drift_direct": "direct drift",
    "drift_causal": "causal drift",
    "drift_influence": "drift",
    "nll": "loss (nll)",
    "entropy": "entropy",
    "reference_nll": "reference loss (nll)",
    "adapt_error": "standard error of adaptation",
    "stab_error": "standard error of stability",
    "value_error": "standard error of the value",
    "loss_weight": "loss weight",
    "value": "value",
}
"""What readers call each column."""

_MOST_REASONS = 8
_MOST_SOURCES = 20


def bar(part: float, kind: str = "keptbar") -> Html:
    """A share as a bar as wide as its cell."""
    filled = tag("rect", class_=kind, width=100 * part, height="10")
    ground = tag("rect", class_="rest", width="100", height="10")
    frame = {"viewBox": "0 0 100 10", "preserveAspectRatio": "none", "aria_hidden": "true", "class_": "bar"}
    return tag("svg", ground, filled, **frame)


# --------------------------------------------------------------------------------------------------- what was run


def what_was_run(run: Path, tokens: RunTokens, found: Stats) -> Html:
    """Models, settings, rows and masks."""
    stored, settings = tokens.stored, tokens.stored.settings
    pairs = found.kind == "preference"
    rows = [f"{found.rows[status]:,} {_status(status)}" for status in STATUSES if found.rows[status]]
    read = f"{found.rows['read']:,} {'pairs' if pairs else 'rows'} read"
    told: list[tuple[str, Part]] = [
        ("Rows", f"{read}: {listed(rows)}{in_sequences(found.sequences)}"),
        ("Tokens", f"{found.tokens:,}, of them {found.response_tokens:,} in responses; {found.scored_tokens:,} scored"),
        ("Data", joined(_inputs(tokens))),
        ("Model", foreign(tokens.generation.checkpoint)),
        ("Reference", _reference(tokens)),
        ("Estimator", f"{found.estimator}; layers: {settings.get('layers', NONE)}"),
        *([("Values", f"of a rehearsed training: {found.rehearsed}")] if found.rehearsed else []),
        ("Stability", _stability(tokens)),
        ("Mask", _mask(tokens)),
    ]
    if len(stored.generations) > 1:
        told.append(("Generation", f"{tokens.generation.generation}, the newest of {len(stored.generations)}"))
    if found.truncated_rows:
        cut = f"{count(found.truncated_tokens, 'token')} of {count(found.truncated_rows, 'row')}, by --max-length"
        told.append(("Cut", cut))
    if (absent := lacks(stored.schema_version)) is not None:
        told.append(("Columns", absent))
    told.append(("Fingerprint", tag("code", tokens.generation.fingerprint.removeprefix("sha256:")[:16])))
    told.append(("Made with", ", ".join(f"{name} {version}" for name, version in sorted(stored.versions.items()))))
    return joined([facts(told), _refused(run, stored, found)])


def _status(status: str) -> str:
    return {"target": "held out as target"}.get(status, status)


def _inputs(tokens: RunTokens) -> Iterator[Part]:
    inputs = tokens.stored.inputs
    for place, one in enumerate(inputs[:_MOST_SOURCES]):
        yield from (", " if place else None, foreign(one.source), f" ({count(one.rows, 'row')})")
    if len(inputs) > _MOST_SOURCES:
        yield f" and {count(len(inputs) - _MOST_SOURCES, 'more file')}"


def _reference(tokens: RunTokens) -> str:
    digests = tokens.stored.digests
    model, reference = digests.get("model"), digests.get("reference")
    if reference is None or reference == model:
        return "the first generation's own model" if len(tokens.stored.generations) > 1 else "the same model"
    return f"another model, {reference.removeprefix('sha256:')[:16]}"


def _stability(tokens: RunTokens) -> str:
    settings = tokens.stored.settings
    by = "retention rows" if settings.get("retention") else f"drift of the {settings.get('drift', 'weights')}"
    fisher = f", {settings['fisher']} Fisher" if settings.get("fisher") else ""
    return f"by {by}{fisher}; weight {settings.get('stability_weight', NONE)}"


def _mask(tokens: RunTokens) -> Html:
    if tokens.mask is None:
        return prose("none yet; make one with the `mask` command")
    generations = listed([str(one) for one in tokens.mask.generations])
    several = "s" if len(tokens.mask.generations) > 1 else ""
    by = tag("code", chosen_by(tokens.mask.settings))
    return joined([f"number {tokens.mask.mask}, by ", by, f", of generation{several} {generations}"])


def _refused(run: Path, stored: Manifest, found: Stats) -> Html | None:
    """Why rows were refused, the commonest reasons first."""
    if not found.rows["rejected"]:
        return None
    reasons = Counter(str(one["reason"]) for one in rejects(run, stored) if "reason" in one)
    if not reasons:
        return None
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_MOST_REASONS]
    told = f"{count(found.rows['rejected'], 'row')} of {found.rows['read']:,}; `show` names each with its reason."
    names = table("Why rows were refused", ("reason", "rows"), [(foreign(a), f"{b:,}") for a, b in ordered])
    return tag("div", figure("refused", "Why were rows refused?", told, names), class_="charts")


# ------------------------------------------------------------------------------------------- kept, and their weight


def how_many_kept(tokens: RunTokens, found: Stats) -> Html:
    """Kept and dropped, by branch and source; the loss they hold; their weights."""
    if tokens.weight is None or not len(tokens):
        return note(
            "There is no mask yet, so nothing is kept or dropped: make one with the `mask` command."
            if len(tokens)
            else "No token was scored."
        )
    parts: list[Html | None] = [_kept_table(tokens, found, tokens.weight), _weights(tokens.weight)]
    return tag("div", *parts, class_="charts")


def _kept_table(tokens: RunTokens, found: Stats, weight: Floats) -> Html:
    kept, decided = weight > 0, ~np.isnan(weight)
    sorts: list[tuple[Part, np.ndarray]] = [("all", np.ones(len(tokens), np.bool_))]
    for place, prefix in enumerate(tokens.layout.branches if found.branches else ()):
        inside = np.zeros(len(tokens), np.bool_)
        inside[tokens.starts[place] : tokens.starts[place + 1]] = True
        sorts.append((prefix.rstrip("_"), inside))
    sources = tokens.rows.sources
    if len(sources) > 1:
        source = tokens.rows.source[tokens.row]
        commonest = np.argsort(-np.bincount(source, minlength=len(sources)), kind="stable")[:_MOST_SOURCES]
        sorts += [(foreign(sources[i]), source == i) for i in commonest if np.any(source == i)]
    loss = tokens.signals["nll"]
    rows = []
    for name, inside in sorts:
        all_, stays = int((inside & decided).sum()), int((inside & kept).sum())
        rows.append((name, f"{all_:,}", f"{stays:,}", share(stays / all_ if all_ else None), bar(stays / (all_ or 1))))
    of_loss = float(loss[kept].sum(dtype=np.float64)) / (float(loss[decided].sum(dtype=np.float64)) or 1.0)
    total, stays = int(decided.sum()), int(kept.sum())
    answer = (
        f"{stays:,} of {count(total, 'response token is', 'response tokens are')} kept ({share(stays / (total or 1))});"
        f" they hold {share(of_loss)} of the loss."
    )
    if found.rows_left_out:
        one, several = sequences_are(found.sequences)
        rows_out = count(found.rows_left_out, f"{one} is", f"{several} are")
        answer += f" {rows_out} left out: not each generation of the mask scored them."
    newest = found.masks[-1]
    if told := end_of_turn(newest.end_of_turn_tokens, newest.end_of_turn_kept):
        answer += f" {told.capitalize()}."
    if newest.over_share:
        answer += f" {over_share(newest.over_share).capitalize()}."
    head = ("tokens", "count", "kept", "share", "")
    return figure("kept", "How many tokens are kept?", answer, table("Kept tokens", head, rows, class_="bars"))


def _weights(weights: Floats) -> Html:
    weight = weights[weights > 0]
    question = "What do the kept tokens weigh?"
    if not len(weight):
        return figure("weigh", question, "Nothing is kept, so nothing weighs.", Html(""))
    low, middle, high = (float(x) for x in np.percentile(weight, (0, 50, 100)))
    if low == high:
        told = f"Each of them weighs {number(low)} in the loss, and all others 0."
        return figure("weigh", question, told, Html(""))
    found = overlaid(weight, None, np.linspace(0, float(np.percentile(weight, 98)) or high, 41))
    half = _holders(weight)
    told = (
        f"Between {number(low)} and {number(high)} times the mean, {number(middle)} in the middle;"
        f" the heaviest {share(half)} of them hold half of all weight."
    )
    drawing = chart.histogram("weigh", found, "loss weight, multiples of the mean", masked=False)
    return figure("weigh", question, told, drawing)


def _holders(weight: Floats) -> float:
    """The share of tokens that holds half of the weight, the heaviest first."""
    ordered = np.sort(weight.astype(np.float64))[::-1].cumsum()
    return (int(np.searchsorted(ordered, ordered[-1] / 2)) + 1) / len(ordered)


# ---------------------------------------------------------------------------------------------------- distributions


def how_distributed(tokens: RunTokens, found: Stats) -> Html:
    """A histogram of the value and of each component, of kept tokens before the others."""
    if not len(tokens):
        return note("No token was scored.")
    names = ["value", *tokens.components.of_value, *tokens.components.upstream, *tokens.components.drift]
    figures: list[Html] = []
    for name in names:
        if name in tokens.signals:
            figures.append(_distribution(tokens, name, tokens.signals[name]))
        if name == "value" and found.beyond:
            figures.append(_beyond(found.beyond))
    return joined([_key(tokens), tag("div", *figures, class_="charts")])


def _beyond(found: Beyond) -> Html:
    told, *rest = found.lines()
    # Not the folder: a page is handed on to others.
    command = " ".join(["alphatoken-curate mask RUN", *map(shlex.quote, found.command[3:])])
    answer = f"{told[0].upper()}{told[1:]}: {rest[0]}"
    return figure("beyond", "Which values are below 0 beyond their error?", answer, tag("p", tag("code", command)))


def _key(tokens: RunTokens) -> Html | None:
    if tokens.weight is None:
        return None

    def item(kind: str, name: str) -> Html:
        swatch = tag("rect", class_=f"area {kind}", width="12", height="12")
        return tag("li", tag("svg", swatch, viewBox="0 0 12 12", aria_hidden="true", class_="key"), name)

    return tag("ul", item("kept", "kept"), item("other", "dropped"), class_="keys")


def _distribution(tokens: RunTokens, name: str, values: Floats) -> Html:
    slug, called = f"hist-{name.replace('_', '-')}", NAMES[name]
    question = "How are values distributed?" if name == "value" else f"How is {called} distributed?"
    if not np.any(values):
        return figure(slug, question, "It is 0 for every token.", Html(""))
    counts = overlaid(values, tokens.kept, symmetric_edges(values))
    low, middle, high = (float(x) for x in np.percentile(values, (5, 50, 95)))
    above = float((values > 0).mean())
    told = (
        f"Median {number(middle, signed=True)}; nine in ten lie between {number(low, signed=True)} and"
        f" {number(high, signed=True)}; {share(above)} are above 0."
    )
    masked = tokens.weight is not None
    drawing = chart.histogram(slug, counts, f"{called}, {tokens.layout.unit}", masked=masked)
    rows = [
        (
            chart.bin_name(counts.edges, i),
            f"{int(counts.kept[i] + counts.other[i]):,}",
            *([f"{int(counts.kept[i]):,}"] if masked else []),
        )
        for i in range(len(counts.kept))
        if counts.kept[i] + counts.other[i]
    ]
    head = (f"{called}, {tokens.layout.unit}", "tokens", *(["kept"] if masked else []))
    return figure(slug, question, told, drawing, table(f"Tokens by {called}", head, rows))


def known_objectives(tokens: RunTokens) -> dict[str, Sequence[str]]:
    """Names of the signals of each objective that the run computed."""
    parts = objectives(tokens.components)
    return {name: signals for name, signals in parts.items() if all(one in tokens.signals for one in signals)}
